"""What can be done with a model sharded, checked on every process against the same model whole.

`python -m torch.distributed.run --nproc-per-node=2 tests/sharded_operations.py FOLDER`; a failed check ends the launch.
"""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import lora_lightning as ll
from ll_dora import DoRA
from ll_lora import LoRA
from ll_riemannian_moe import MoELoRA
from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.folded import DenseUpdate
from lora_lightning.adapters.noise import Noise
from lora_lightning.distributed import full_tensor, gather, local, own_rows
from lora_lightning.errors import AdapterFileError, AdapterStateError, ExportError
from lora_lightning.injection.records import adapters_named
from lora_lightning.optim.groups import factor_pairs
from lora_lightning.optim.pairs import gram_B, grams, stack_pairs
from lora_lightning.storage.state import adapter_state
from lora_lightning.testing import BASE_KINDS, TinyMLP, perturb
from lora_lightning.testing.toy_models import LAYERS, seeded
from lora_lightning.training.strategies.units import shard

METHODS = {"low rank": LoRA(rank=2), "decomposed": DoRA(rank=2)}


class Holder(nn.Module):
    """One layer of a kind, called."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        with seeded(1):
            self.layer = LAYERS[kind][0]()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(model: nn.Module, method: Any) -> nn.Module:
    ll.inject(model.double(), method, also_train=(), targets=[name for name, _ in model.named_children()], seed=1)
    for adapter in adapters_named(model, "default").values():
        perturb(adapter)
    return model.eval()


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def check_kind(kind: str, method: Any, mesh: Any, folder: Path) -> None:
    with seeded(2):
        x = LAYERS[kind][1]()
    x = x.double() if x.is_floating_point() else x
    plain = Holder(kind).double()
    alone, model = adapted(Holder(kind), method), adapted(Holder(kind), method)
    shard(model, mesh, torch.device("cpu"))
    layer, same = model.layer, alone.layer
    assert isinstance(layer, AdaptedLayer)
    before = local(layer.base.weight.detach()).clone()

    with torch.no_grad():
        base, applied = plain(x), alone(x)
        close(model(x), applied)
        with ll.disable_adapters(model):
            close(model(x), base)
        close(model(x), applied)
        # merged: by shards, and back bit for bit
        ll.merge(model)
        ll.merge(alone)
        close(full_tensor(layer.base.weight), same.base.weight)
        close(model(x), applied)
        with ll.disable_adapters(model):
            close(model(x), base)
        ll.unmerge(model)
        ll.unmerge(alone)
        assert torch.equal(local(layer.base.weight.detach()), before)
        close(model(x), applied)

        # noise: the same entry the same noise; updates folded densely, sharded as the weight
        with pytest.raises(AdapterStateError, match="gathered now, so that what is written would be lost"):
            layer.set_noise(Noise(3, 0, "layer", 0.1))
        ll.set_active(model, "default")
        for part in (layer, same):
            part.set_folded("default", DenseUpdate(part.base_layer))
            part.set_noise(Noise(3, 1, "layer", 0.1))
            part.fold("default", 0.5, "figure_ema")
            part.fold("default", 0.5, "figure_ema", keep_noise=True)
        assert isinstance(layer.shifts["default"].delta, DTensor)
        assert local(layer.shifts["default"].delta).numel() < full_tensor(layer.shifts["default"].delta).numel()
        for name in ("delta", "slow"):
            close(full_tensor(getattr(layer.shifts["default"], name)), getattr(same.shifts["default"], name))
        close(full_tensor(layer.base.weight), same.base.weight)
        close(layer.clean_weight("default"), same.clean_weight("default"))
        close(model(x), alone(x))
    ll.save_adapter(model, folder / "shards")
    if dist.get_rank() == 0:
        ll.save_adapter(alone, folder / "whole")
    dist.barrier()
    for written in ("adapter.safetensors", "adapter.json"):
        assert (folder / "shards" / written).stat().st_size == (folder / "whole" / written).stat().st_size

    # gone without a trace, and back from the file
    state = {key: full_tensor(value) for key, value in model.state_dict().items()}
    layer.set_noise(None)
    layer.set_folded("default", None)
    assert torch.equal(local(layer.base.weight.detach()), before)
    perturb_pieces(model)
    ll.load_adapter(model, folder / "shards")
    same.set_noise(None)
    for key, value in model.state_dict().items():
        assert torch.equal(full_tensor(value), state[key]), key
    with torch.no_grad():
        close(model(x), alone(x))
        ll.eject(model)
        close(model(x), base)


def perturb_pieces(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                local(parameter).add_(1)


def check_refusals(mesh: Any, folder: Path) -> None:
    """What cannot work says so."""
    model = adapted(TinyMLP(), LoRA(rank=2))
    shard(model, mesh, torch.device("cpu"))
    ll.save_adapter(model, folder / "adapter")
    dist.barrier()
    with pytest.raises(AdapterStateError, match="the model is sharded already; inject adapters before fully_shard"):
        ll.inject(model, LoRA(rank=2), name="b")
    project = LightningModule()
    project.net = nn.Sequential(nn.Linear(6, 5))
    shard(project.net, mesh, torch.device("cpu"))
    with pytest.raises(AdapterStateError, match="the model is sharded already; inject adapters before fully_shard"):
        ll.InjectAdapters(LoRA(rank=2)).setup(Trainer(logger=False), project, "fit")
    with pytest.raises(AdapterStateError, match="the model is sharded already; inject adapters before fully_shard"):
        ll.load_adapter(model, folder / "adapter", name="b")
    with pytest.raises(ExportError, match="the model is sharded; save_adapter writes it whole"):
        ll.export(model, folder / "peft", "peft")
    whole = TinyMLP()
    ll.load_adapter(whole, folder / "adapter")
    assert ll.export(whole, folder / f"peft_{dist.get_rank()}", "peft").layers  # the way out
    with pytest.raises(AdapterStateError, match="the model is sharded already; leave sharding to the strategy"):
        shard(model, mesh, torch.device("cpu"))
    other = adapted(TinyMLP(), LoRA(rank=3))
    shard(other, mesh, torch.device("cpu"))
    with pytest.raises(AdapterFileError, match=r"rank=2 on .*has 3"):
        ll.load_adapter(other, folder / "adapter")

    bare = nn.Sequential(nn.Linear(6, 5, bias=False))
    ll.inject(bare, LoRA(rank=2, bias=True), ["0"], also_train=())
    shard(bare, mesh, torch.device("cpu"))
    with pytest.raises(AdapterStateError, match="has no bias and is sharded"):
        ll.merge(bare)


def check_grams(mesh: Any, method: Any) -> None:
    """What a rule reads that works sharded: sums of Grams, and whole what is cut along its rank, in one go each."""
    alone, model = adapted(TinyMLP(), method), adapted(TinyMLP(), method)
    shard(model, mesh, torch.device("cpu"))
    for one in (alone, model):
        one.train()(torch.ones(2, 6, dtype=torch.float64)).square().sum().backward()
    pairs, whole_pairs = factor_pairs(model), factor_pairs(alone)
    sizes: dict[str, list[int]] = {"all_gather": [], "all_reduce": []}
    with pytest.MonkeyPatch.context() as patch:
        for name, record in sizes.items():
            patch.setattr(dist, name, _counting(getattr(dist, name), record))
        stacks = stack_pairs(pairs, ("B", "grad_A"), sharded=True)
        found = grams([(stack, "B") for stack in stacks])
    experts = pairs[0].lora_A.dim() > 2
    rows = 0 if experts else sum(math.ceil(p.lora_A.shape[0] / 2) * p.lora_A.shape[1] for p in pairs)
    assert sizes["all_gather"] == ([rows] if rows else [])  # gradients of A; experts are whole where they lie
    assert sizes["all_reduce"] == [sum(gram.numel() for gram in found)]
    for stack, same, gram in zip(stacks, stack_pairs(whole_pairs), found, strict=True):
        close(gram, gram_B(same.B))
        rows_of = stack.own(stack.grad_A, "A")
        for factor, other in zip(stack.factors("A"), same.factors("A"), strict=True):
            close(rows_of[factor], own_rows(other.grad, factor))


def check_gathering(mesh: Any) -> None:
    """What a checkpoint holds of a model sharded comes together in one all-gather a dtype."""
    model = adapted(TinyMLP(), DoRA(rank=2))
    shard(model, mesh, torch.device("cpu"))
    state = adapter_state(model)
    cut = [tensor for tensor in state.values() if isinstance(tensor, DTensor)]
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", _counting(dist.all_gather, sizes))
        gather(list(state.values()))
    assert len(cut) > 2
    assert len(sizes) == len({tensor.dtype for tensor in cut})


def _counting(collective: Any, sizes: list[int]) -> Any:
    def run(*args: Any, **options: Any) -> Any:
        sizes.append((args[1] if len(args) > 1 else args[0]).numel())  # what this process hands over
        return collective(*args, **options)

    return run


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for kind in BASE_KINDS:
        for name, method in METHODS.items():
            try:
                check_kind(kind, method, mesh, folder / kind / name)
            except Exception as error:
                raise AssertionError(f"{kind}, {name}") from error
    for method in (LoRA(rank=3), MoELoRA(rank=2, experts=3, top_k=2)):
        check_grams(mesh, method)
    check_gathering(mesh)
    check_refusals(mesh, folder)
    dist.destroy_process_group()
    print("checked", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
