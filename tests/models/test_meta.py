"""Models without values, and which of them may take adapters."""

from __future__ import annotations

import pytest
import torch

import lora_lightning as ll
from lora_lightning.cli.preflight.trace import without_values
from lora_lightning.errors import AdapterStateError
from lora_lightning.models.meta import expect_values, is_counted, values_follow
from lora_lightning.testing import TinyMLP


def test_only_a_model_that_will_be_given_its_values_takes_adapters() -> None:
    method = ll.method("LoRA")(rank=2)
    with torch.device("meta"):
        model = TinyMLP()
    assert not values_follow(model)
    with pytest.raises(AdapterStateError, match=r"first\.weight is on the meta device"):
        ll.inject(model, method, seed=0)
    assert expect_values(model) is model
    assert values_follow(model)
    assert len(ll.inject(model, method, seed=0).layers) == 2


def test_a_model_is_counted_where_no_tensor_beside_it_has_values_either() -> None:
    with torch.device("meta"):
        of_a_process = expect_values(TinyMLP())
    assert not is_counted(of_a_process)
    assert not is_counted(TinyMLP())
    with without_values():
        assert is_counted(expect_values(TinyMLP()))
