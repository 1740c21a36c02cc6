"""Models without values, and which of them may take adapters."""

from __future__ import annotations

import pytest
import torch

import lora_lightning as ll
from lora_lightning.errors import AdapterStateError
from lora_lightning.models.meta import expect_values, values_follow
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
