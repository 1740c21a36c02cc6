"""Blocks that share their weights (Zamba): scopes adapt one of the sharers; what is named by hand is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from model_classes import model_class
from torch.utils.data import DataLoader
from toy_runs import trainer
from transformers import Zamba2Config, Zamba2ForCausalLM

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.callbacks import InjectAdapters, TrainingGuard
from lora_lightning.errors import AdapterStateError, TargetError, TrainingError
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


class Zamba2(LightningModule):
    """Two shared transformers, each in two hybrid blocks."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        mamba = {"mamba_d_state": 4, "mamba_headdim": 8, "mamba_ngroups": 1, "n_mamba_heads": 4, "chunk_size": 4}
        config = Zamba2Config(
            **sizes, **mamba, num_hidden_layers=5, num_key_value_heads=2, num_mem_blocks=2, adapter_rank=2,
            layers_block_type=["mamba", *["hybrid"] * 4], hybrid_layer_ids=[1, 2, 3, 4], use_mem_rope=False,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        self.net = Zamba2ForCausalLM(config)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.net(batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of kernels that are not installed, and of the loader
def test_zamba2_trains_under_all_linear(tmp_path: Path) -> None:
    """Each shared block calls only its own entries of a list of adapters, and its sharers hold the others."""
    batches = DataLoader(IDS.expand(6, -1), batch_size=2)
    inject, guard = InjectAdapters(LoRA(rank=2)), TrainingGuard()
    with pytest.raises(TrainingError, match=r"To leave them out: exclude=") as error:
        trainer(tmp_path, [inject, guard], max_steps=3).fit(Zamba2(), batches)
    exclude = re.findall(r'"([^"]+)"', str(error.value).partition("exclude=")[2])
    assert len(exclude) == 4
    assert inject.report is not None
    assert set(exclude) <= set(inject.report.layers)

    module = Zamba2()
    base = module.net.eval()(IDS).logits
    inject, guard = InjectAdapters(LoRA(rank=2), exclude=exclude, directory=tmp_path / "adapter"), TrainingGuard()
    module.net.train()
    trainer(tmp_path, [inject, guard], max_steps=3).fit(module, batches)
    sharers = [re.sub(r"layers\.(\d)", lambda found: f"layers.{int(found[1]) + 2}", path) for path in exclude]
    assert inject.report is not None
    assert set(sharers) <= set(inject.report.layers)
    assert all(distance > 0 for distance in guard.changed().values())
    module.net.eval()
    assert not torch.allclose(module.net(IDS).logits, base, atol=1e-4)
    fresh = Zamba2()
    ll.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh.net.eval()(IDS).logits, module.net(IDS).logits)
    with ll.disable_adapters(module):
        assert torch.equal(module.net(IDS).logits, base)
