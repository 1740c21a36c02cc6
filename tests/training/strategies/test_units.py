"""Shards read whole and written back, on one process that shards for itself; two processes are in test_sharded_runs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from ll_lora import LoRA
from ll_optimizers.pro import LoRAPro
from ll_optimizers.riemannian import RiemannianAdamW
from ll_optimizers.rite import LoRARITE
from ll_rose import RoseLoRA
from lora_lightning import inject, iter_adapters
from lora_lightning.distributed import assembled, local
from lora_lightning.errors import AdapterStateError
from lora_lightning.injection.records import adapters_named
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.training.strategies.units import _check_peers, find_blocks, shard


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def model(method, layers=3):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(6, 6, dtype=torch.float64) for _ in range(layers)))
    inject(net, method, seed=1)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    return net


def both(method, mesh, **more):
    """A model, and the same one sharded."""
    plain, cut = model(method, **more), model(method, **more)
    shard(cut, mesh, torch.device("cpu"))
    return plain, cut


def shards(net):
    return [p for p in net.parameters() if isinstance(p, DTensor)]


def test_questions_are_answered_from_whole_parameters_which_then_lie_as_before(mesh):
    plain, cut = both(RoseLoRA(rank=2), mesh)
    lying = dict(cut.named_parameters())
    adapters = adapters_named(cut, "default")
    with assembled(*adapters.values()):
        assert not any(isinstance(p, DTensor) for a in adapters.values() for p in a.parameters())
        told = RoseLoRA(rank=2).report(adapters)
        update = next(iter(adapters.values())).low_rank()
    assert told == RoseLoRA(rank=2).report(adapters_named(plain, "default"))
    for ours, theirs in zip(update, next(iter(adapters_named(plain, "default").values())).low_rank(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(p is lying[name] for name, p in cut.named_parameters())


def test_parameters_lie_as_before_after_a_failed_question(mesh):
    _, cut = both(LoRA(rank=2), mesh)
    before = [id(p) for p in cut.parameters()]
    with pytest.raises(ZeroDivisionError), assembled(cut):
        1 / 0  # noqa: B018 - fails
    assert [id(p) for p in cut.parameters()] == before


@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize(
    ("factory", "collectives"),
    [
        (partial(RiemannianAdamW, lr=0.1), 2),
        (partial(RiemannianAdamW, lr=0.1, order="gauss_seidel"), 2),
        (partial(LoRAPro, lr=0.1), 1),
        (partial(LoRARITE, lr=0.1), 2),
    ],
)
def test_a_step_gathers_all_pairs_together(mesh, monkeypatch, factory, collectives, layers):
    calls = []
    gathered = dist.all_gather
    monkeypatch.setattr(dist, "all_gather", lambda *args, **kwargs: calls.append(1) or gathered(*args, **kwargs))
    plain, cut = both(LoRA(rank=2), mesh, layers=layers)
    optimizers = [build_optimizer(net, factory) for net in (plain, cut)]
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        for net, optimizer in zip((plain, cut), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            calls.clear()
            optimizer.step()
    assert len(calls) == collectives
    for (name, p), (_, q) in zip(plain.named_parameters(), cut.named_parameters(), strict=True):
        torch.testing.assert_close(local(q), p, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    for of_plain, of_cut in zip(optimizers[0].state.values(), optimizers[1].state.values(), strict=True):
        for key, value in of_plain.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(local(of_cut[key]), value, rtol=0, atol=1e-12)
    assert shards(cut)
    assert dict(iter_adapters(cut)).keys() == dict(iter_adapters(plain)).keys()


class Towers(nn.Module):
    """A list that repeats a class, one around such lists, one of different classes, and a block in two places."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3))
        self.mixed = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
        self.one = nn.ModuleList([nn.Linear(2, 2)])
        self.outer = nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(2)) for _ in range(2))
        self.tied = nn.ModuleList([self.layers[0], nn.Sequential(nn.Linear(2, 2))])


def test_blocks_are_what_must_not_be_split_or_repeated_lists():
    inner = [f"outer.{i}.{k}" for i in range(2) for k in range(2)]
    assert list(find_blocks(Towers())) == ["layers.0", "layers.1", "layers.2", *inner, "tied.1"]
    for name, paths in (
        ("LlamaForCausalLM", ["model.layers.0", "model.layers.1"]),
        ("BertForSequenceClassification", ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"]),
    ):
        net = small(name)
        assert list(find_blocks(net)) == paths, name
        assert list(find_blocks(nn.ModuleDict({"inside": net}))) == [f"inside.{path}" for path in paths]


def small(name):
    """A model of transformers' of two layers."""
    config = getattr(transformers, name).config_class(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=11
    )
    return getattr(transformers, name)(config)


def test_a_layer_that_reads_what_a_block_gives_back_is_refused():
    net = model(LoRA(rank=2))
    adapters = list(adapters_named(net, "default").values())
    adapters[2].peers = (adapters[1],)
    with pytest.raises(
        AdapterStateError, match=r"^2.adapters.default reads the tensors of 1.adapters.* train with DDP"
    ):
        _check_peers(net, {id(adapters[2])})
    _check_peers(net, {id(adapters[1])})
