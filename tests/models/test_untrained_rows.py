"""Rows of the output layer that no other rows tell apart."""

from __future__ import annotations

import pytest
import torch

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.models.untrained_rows import untrained_rows
from lora_lightning.testing import tiny_decoder


@pytest.fixture
def model():
    """Tokens 3 to 6 have one row, but for rounding; 7 and 8 are nearly zero; the others are drawn."""
    made = tiny_decoder()
    with torch.no_grad():
        rows = made.get_output_embeddings().weight
        rows[3:7] = rows[3] * (1 + 1e-4 * torch.randn(4, 1))
        rows[7:9] *= 1e-6
    return made.requires_grad_(False)


def test_rows_that_many_tokens_have(model):
    assert untrained_rows(model, [2, 3, 6, 7, 9]) == {3: 3, 6: 3, 7: 1}


def test_half_precision(model):
    assert untrained_rows(model.bfloat16(), [3, 9]) == {3: 3}


def test_rows_that_train_are_no_matter(model):
    rows = tiny_decoder()
    with torch.no_grad():
        rows.get_output_embeddings().weight[3:7] = 1.0
    ll.inject(rows, LoRA(rank=2), targets=["q_proj"], train_tokens={"lm_head": [3]}, seed=0)
    assert untrained_rows(rows, [3, 4]) == {4: 3}
    ll.inject(model, LoRA(rank=2), targets=["lm_head"], seed=0)
    assert untrained_rows(model, [3]) == {}
    assert untrained_rows(tiny_decoder(), [3]) == {}


def test_models_without_an_output_layer_and_tokens_that_are_not_there():
    assert untrained_rows(torch.nn.Linear(2, 2), [0]) == {}
    assert untrained_rows(tiny_decoder().requires_grad_(False), [10_000]) == {}
