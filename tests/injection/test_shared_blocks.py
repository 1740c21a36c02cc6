"""Blocks that share their weights (Zamba): scopes adapt one of the sharers; what is named by hand is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_classes import model_class

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import AdapterStateError, TargetError
from lora_lightning.testing import perturb

IDS = torch.tensor([[1, 5, 7, 2, 9, 4]])


def zamba() -> Any:
    """Two hybrid blocks around one shared transformer."""
    found = model_class("ZambaForCausalLM")
    settings = {"attention_hidden_size": 32, "attention_head_dim": 16, "num_hidden_layers": 5}
    kinds = ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"]
    return found.build(found.config(**settings, layers_block_type=kinds))


@pytest.mark.filterwarnings("ignore")  # of kernels that are not installed
def test_all_linear_adapts_one_of_the_sharers_exactly(tmp_path: Path) -> None:
    model, plain = zamba(), zamba()
    base = model(IDS).logits
    report = ll.inject(model, LoRA(rank=2), seed=0)
    shared = [path for path, why in report.skipped.items() if "shares its weight with" in why]
    assert len(shared) == 7
    assert all(".1." in report.skipped[path] and path.replace(".3.", ".1.") in report.layers for path in shared)
    assert torch.equal(model(IDS).logits, base)
    for index, (_, layer) in enumerate(ll.iter_adapters(model)):
        perturb(layer.adapters, index)
    model(IDS).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    # by hand: the first block gets weights of its own, with the update in them, and the second keeps the shared ones
    for path, layer in ll.iter_adapters(model):
        own = plain.get_submodule(path)
        own.weight = torch.nn.Parameter(layer.applied_weight(torch.float32))
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)

    ll.save_adapter(model, tmp_path)
    fresh = zamba()
    ll.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    with pytest.raises(AdapterStateError, match="which a merge would change too; keep the adapter unmerged"):
        ll.merge(model)


def test_sharers_that_are_named_are_refused() -> None:
    with pytest.raises(TargetError, match="share one weight; adapt one of them and exclude the other"):
        ll.inject(zamba(), LoRA(rank=2), targets=["q_proj"])
    report = ll.inject(zamba(), LoRA(rank=2), targets=["q_proj"], exclude=["model.layers.1"])
    assert list(report.layers) == ["model.layers.3.shared_transf.self_attn.q_proj"]
