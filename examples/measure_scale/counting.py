"""What one process computes, keeps and writes in a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers
from formulas import KEPT, STAGES, STEPS, TOKENS, TOP_K, Layer, Point, optimizer_flops, step_flops
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import lora_lightning as ll
from lora_lightning.adapters.folded import FactoredUpdate
from lora_lightning.callbacks import SparsitySchedule
from lora_lightning.cli.preflight.memory import Parts
from lora_lightning.cli.preflight.trace import Meter, size, trace_step, units, without_values
from lora_lightning.injection.records import iter_adapters, trainable_adapters
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.testing import perturb

NARROW, WIDE = 48, 192
"""Widths of models."""

METHODS: dict[str, Callable[[Point], ll.Method]] = {
    "LoRA": lambda p: ll.method("LoRA")(rank=p.rank),
    "DoRA": lambda p: ll.method("DoRA")(rank=p.rank),
    "LoRASC": lambda p: ll.method("LoRASC")(inner=ll.method("LoRA")(rank=p.rank), stage_steps=3),
    "MoELoRA": lambda p: ll.method("MoELoRA")(rank=p.rank, experts=p.experts, top_k=TOP_K),
    "RoseLoRA": lambda p: ll.method("RoseLoRA")(rank=p.rank, start=2, end=4),
    "CELoRA": lambda p: ll.method("CELoRA")(rank=p.rank, svd_rank=p.rank, kept=KEPT, every_n_steps=3),
}


def network(p: Point, width: int = NARROW) -> nn.Module:
    """A random Llama with the system's adapters, as it is in mid-training: channels chosen, stages folded."""
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=p.layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=2 * width,
    )  # fmt: skip
    net = transformers.LlamaForCausalLM(config).train()
    net.requires_grad_(False)
    if p.system in METHODS:
        ll.inject(net, METHODS[p.system](p), also_train=(), seed=0)
    return net


def in_training(net: nn.Module, p: Point) -> nn.Module:
    """Put adapters where training brings them: off their start, channels chosen, stages folded."""
    for k, ((_, layer), at) in enumerate(zip(iter_adapters(net), adapted(net), strict=True)):
        adapter: Any = layer.adapter("default")
        perturb(adapter, k, size=0.02)
        if p.system == "LoRASC":
            layer.set_folded("default", FactoredUpdate(layer.base_layer))
            for _ in range(STAGES):
                layer.fold("default", 0.5, "figure_ema")
        if p.system == "CELoRA" and at.passes:
            adapter.split(layer.base_layer.weight())
            adapter.refresh(torch.rand(at.o), 1)
    return net


def adapted(net: nn.Module) -> list[Layer]:
    """Its adapted layers; what the first block reads from the embedding needs no gradient."""
    first = tuple(f".0.self_attn.{name}_proj" for name in "qkv")
    return [Layer(at.base_layer.d_in, at.base_layer.d_out, not path.endswith(first)) for path, at in iter_adapters(net)]


def batch(width: int = NARROW) -> Tensor:
    """Token ids: 2 x 16, or 8 x 64 for a wide model."""
    return torch.arange(TOKENS).view(2, -1) if width == NARROW else torch.arange(512).view(8, -1) % width


def loss_of(net: nn.Module, ids: Tensor) -> Tensor:
    """Next-token loss."""
    value: Tensor = net(input_ids=ids, labels=ids, use_cache=False).loss
    return value


def counted_flops(run: Callable[[], Any]) -> int:
    """Products in `run`, with Cholesky factors, triangular solves and sums in place."""
    more = {
        torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * math.prod(a) * b[-1],
        torch.ops.aten.linalg_cholesky_ex: lambda a, *_, **__: math.prod(a) * a[-1] // 3,
        torch.ops.aten.linalg_solve_triangular: lambda L, x, **__: math.prod(x) * L[-1],
    }
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        run()
    return int(counter.get_total_flops())


def flops(p: Point) -> tuple[tuple[int, int], tuple[int, int]]:
    """(counted, formula) of forward and backward, and of the optimizer's step; added to the frozen model's."""
    net = in_training(network(p), p)
    layers, optimizer = adapted(net), build_optimizer(net, None)
    head = net.get_output_embeddings().weight.numel()  # type: ignore[operator]
    frozen = counted_flops(lambda: loss_of(network(replace(p, system="frozen")), batch()))
    frozen += 2 * TOKENS * (head + sum(at.i * at.o for at in layers if at.passes))  # gradients of inputs
    step = counted_flops(lambda: loss_of(net, batch()).backward())
    own = counted_flops(optimizer.step)
    formulas = sum(step_flops(p, at) for at in layers), sum(optimizer_flops(p, at) for at in layers)
    return (step - frozen, formulas[0]), (own, formulas[1])


def held(p: Point) -> int:
    """Bytes that a forward leaves for backward."""
    net = in_training(network(p), p)
    loss_of(net, batch()).backward()  # what is made once is there now
    ids = batch()
    with Meter() as meter:
        for tensor in (*net.parameters(), *net.buffers(), ids):
            meter.count(tensor)
        before = meter.live
        value = loss_of(net, ids)
        found = meter.live - before
        del value
    return found


def between_steps(p: Point) -> int:
    """Bytes that are alive after a step beside parameters and what the frozen model has."""
    with Meter() as meter:
        net = network(p)
        if p.system in METHODS:
            in_training(net, p)
            loss_of(net, batch()).backward()
        schedules = [c for c in callbacks(p) if isinstance(c, SparsitySchedule)]
        for schedule in schedules:
            schedule.on_start(STEPS, trainable_adapters(net))
            schedule.on_gradients(1, trainable_adapters(net))
        for parameter in net.parameters():
            parameter.grad = None
        found = meter.live - size(list(net.parameters()))
        del schedules
    return found


def callbacks(p: Point) -> list[Any]:
    """Those of the method."""
    return list(METHODS[p.system](p).callbacks()) if p.system in METHODS else []


class Writes(TorchDispatchMode):
    """Operations that write, and the numbers that they write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operations += 1
            self.numbers += sum(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))
        return result


def writes(p: Point) -> tuple[int, int]:
    """Operations, and numbers written, in a forward and backward."""
    net = in_training(network(p), p)
    loss_of(net, batch()).backward()
    for parameter in net.parameters():
        parameter.grad = None
    with Writes() as counter:
        loss_of(net, batch()).backward()
    return counter.operations, counter.numbers


def parts(p: Point, width: int = NARROW) -> Parts:
    """What a step holds, counted without values, as `estimate` does, with the CPU's kernels."""
    with without_values(gpu=False) as meter:
        net = network(p, width)
        blocks, rest = units(net)
        step = trace_step(meter, net, lambda: loss_of(net, batch(width)), lambda: build_optimizer(net, None))
    return Parts(blocks, rest, step.optimizer, step.kept, step.activations)
