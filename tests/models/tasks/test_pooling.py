"""Texts to unit vectors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lora_lightning.models.tasks.pooling import embed, example_pairs


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_unit_vectors_side_after_side(two_sides, pooling):
    net, batch, hidden = two_sides
    vectors = embed(net, batch, pooling)
    assert tuple(vectors.shape) == (2, 3, 5)
    for text in range(6):
        tokens = hidden[text, : int(batch["attention_mask"][text].sum())].double()
        pooled = tokens.mean(0) if pooling == "mean" else tokens[0]
        torch.testing.assert_close(vectors[text // 3, text % 3].double(), pooled / pooled.norm(), atol=1e-6, rtol=0)


def test_padding_counts_for_nothing(two_sides):
    net, batch, hidden = two_sides
    before = embed(net, batch, "mean")
    hidden[batch["attention_mask"] == 0] = 99.0
    assert torch.equal(embed(net, batch, "mean"), before)


def test_numbers_of_few_bits_become_float32_and_float64_stays():
    batch = {"attention_mask": torch.ones(2, 3, dtype=torch.int64), "sides": torch.tensor(2)}
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        hidden = torch.randn(2, 3, 4).to(dtype)
        net = lambda hidden=hidden, **_: SimpleNamespace(last_hidden_state=hidden)  # noqa: E731 - a model of one line
        assert embed(net, batch, "mean").dtype == expected


def test_an_example_has_the_shapes_of_a_batch():
    batch = example_pairs(3, 7)
    assert {name: tuple(values.shape) for name, values in batch.items()} == {
        "input_ids": (6, 7),
        "attention_mask": (6, 7),
        "sides": (),
        "labels": (3,),
    }
