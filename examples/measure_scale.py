"""What a training step costs, counted against formulas: the tables of `lora_lightning/notes/005-scale.md`.

    python examples/measure_scale.py [--only flops,memory,traffic,peaks] [--gpu examples/measured/gpu.jsonl]

Nothing is timed. Products are counted by torch's FlopCounterMode, memory by the storages that are alive, traffic by the
tensors that real processes (gloo) hand to collectives while Lightning trains under DDP and FSDP2. Each count is of a
small random Llama with adapters on all linear layers, batches of 2 x 16 tokens, float32, AdamW (MoELoRA:
RiemannianAdamW), and is printed beside its formula.

    i, o   inputs and outputs of a layer     N   tokens of a batch        n   processes
    P      i o, its frozen numbers           r   rank, E experts, k of them a token, R = E r
    C      columns of what was folded        K   kept channels, r0 the width of CELoRA's split
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import lora_lightning as ll
from lora_lightning.adapters.shift import LogShift
from lora_lightning.callbacks import SparsitySchedule
from lora_lightning.estimate import Parts, estimate
from lora_lightning.injection import ignore_adapter_buffers, iter_adapters, trainable_adapters
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.pieces import local
from lora_lightning.strategies import FSDP2
from lora_lightning.testing import perturb
from lora_lightning.tracing import Meter, size, trace_step, units, without_values

TOKENS, TOP_K, STAGES, KEPT = 32, 2, 2, 0.65
NARROW, WIDE = 48, 192
"""Widths of models."""


@dataclass(frozen=True)
class Point:
    """A system at a size."""

    system: str
    layers: int = 2
    rank: int = 6
    experts: int = 1

    @property
    def inner(self) -> int:
        """Ranks of all experts together."""
        return self.rank * self.experts


@dataclass(frozen=True)
class Layer:
    """An adapted layer; `passes` says whether its input needs a gradient."""

    i: int
    o: int
    passes: bool = True

    @property
    def kept(self) -> int:
        """Channels that CELoRA keeps."""
        return math.ceil(KEPT * self.o - 1e-9)


METHODS: dict[str, Callable[[Point], ll.Method]] = {
    "LoRA": lambda p: ll.method("LoRA")(rank=p.rank),
    "DoRA": lambda p: ll.method("DoRA")(rank=p.rank),
    "LoRASC": lambda p: ll.method("LoRASC")(inner=ll.method("LoRA")(rank=p.rank), stage_steps=3),
    "MoELoRA": lambda p: ll.method("MoELoRA")(rank=p.rank, experts=p.experts, top_k=TOP_K),
    "RoseLoRA": lambda p: ll.method("RoseLoRA")(rank=p.rank, start=2, end=4),
    "CELoRA": lambda p: ll.method("CELoRA")(rank=p.rank, svd_rank=p.rank, kept=KEPT, every_n_steps=3),
}


# -- the formulas, a layer ---------------------------------------------------------------------------------------------


def step_flops(p: Point, at: Layer, N: int = TOKENS) -> int:
    """Forward and backward, two a multiply-add, added to those of the frozen layer."""
    i, o, r, passes = at.i, at.o, p.inner, at.passes
    plain = 4 * N * r * (i + o) + 2 * N * r * o + passes * 2 * N * r * i
    more = {
        "DoRA": 2 * r * (i * o + r * i + r * o),
        "LoRASC": 2 * N * STAGES * r * (i + o) * (1 + passes),
        "MoELoRA": 2 * N * p.experts * i * (2 + passes),
        "CELoRA": passes * (2 * N * r * (i + o) - 2 * N * i * (o - at.kept)),
    }
    return plain + more.get(p.system, 0)


def optimizer_flops(p: Point, at: Layer) -> int:
    """Products of an optimizer step: Grams, Cholesky factors (r^3 / 3) and triangular solves (r^2 a column)."""
    r = p.rank
    return p.experts * (4 * r * r * (at.i + at.o) + 2 * r**3 // 3) if p.system == "MoELoRA" else 0


def trained(p: Point, at: Layer) -> int:
    """Numbers that train."""
    own = {"DoRA": at.o, "MoELoRA": p.experts * at.i}
    return p.inner * (at.i + at.o) + own.get(p.system, 0)


def kept_for_backward(p: Point, at: Layer, N: int = TOKENS) -> int:
    """Bytes, float32, beside what the frozen layers and the inputs of adapters take."""
    i, o, r = at.i, at.o, p.inner
    own = {
        "LoRA": at.passes * 4 * r * i,  # A under its rank mask
        "LoRASC": at.passes * 4 * r * i,
        "DoRA": 4 * (N * o + r * o) + (9 + 4 * at.passes) * o,
        "MoELoRA": N * (4 * p.experts + (12 * TOP_K if p.experts > TOP_K else 0)),
    }
    return 4 * N * r + own.get(p.system, 0)


def derived(p: Point, at: Layer) -> int:
    """Bytes, float32, that method and schedule hold between steps beside what trains."""
    i, o, r = at.i, at.o, p.rank
    found = {
        "LoRA": r,  # mask of ranks
        "DoRA": 4 * o,  # squared norms of the frozen rows
        "LoRASC": r + 4 * STAGES * r * (i + o) + 8 * STAGES * r,
        "MoELoRA": 4 * p.experts,  # loads
        "RoseLoRA": 10 * r * (i + o),  # masks twice, average and mask as factor
        "CELoRA": at.passes * (4 * r * (i + o) + 4 * o + 8 * at.kept),
    }
    return found.get(p.system, 0)


def own_traffic(p: Point, at: Layer, strategy: str, event: str) -> int:
    """Bytes that the system itself hands to collectives in a step, float32; of an all-reduce twice as many.

    Args:
        p: the system.
        at: a layer.
        strategy: of `STRATEGIES`.
        event: of `EVENTS`; "" for what is done in every step.
    """
    i, o, E, r = at.i, at.o, p.experts, p.rank
    pair, gathers = 4 * p.inner * (i + o), strategy == "fsdp2"
    dense = RUN_STAGES * r * (i + o) >= i * o  # what is folded is fewer numbers as one matrix
    found = {
        ("MoELoRA", ""): 2 * 4 * E + gathers * 2 * 2 * 8 * E * r * r,  # loads; Grams of both sides, in float64
        ("RoseLoRA", "removal"): gathers * pair,  # averages of sensitivity
        ("CELoRA", "first choice"): 2 * 4 * o + at.passes * (4 * r * (i + o) + 4 * o + gathers * 4 * i * o),
        ("CELoRA", "choice"): 2 * 4 * o,
        ("LoRASC", "fold"): gathers * pair,
        # for the deviation, and for whether the update is zero
        ("LoRASC", "noise"): gathers * (2 * 4 * i * o * (1 + dense) + pair),
    }
    return found.get((p.system, event), 0)


STEPS, RUN_STAGES = 4, 2
EVENTS: dict[str, dict[int, tuple[str, ...]]] = {
    "RoseLoRA": {3: ("removal",), 4: ("removal",)},
    "CELoRA": {1: ("first choice",), 4: ("choice",)},
    "LoRASC": {1: ("noise",), 3: ("fold",), 4: ("noise", "fold")},
}
"""What falls on steps of the runs that are counted, beside what is done in every one."""


# -- counting in one process -------------------------------------------------------------------------------------------


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
            layer.set_shift("default", LogShift(layer.accessor))
            for _ in range(STAGES):
                layer.fold("default", 0.5, "figure_ema")
        if p.system == "CELoRA" and at.passes:
            adapter.split(layer.accessor.weight())
            adapter.refresh(torch.rand(at.o), 1)
    return net


def adapted(net: nn.Module) -> list[Layer]:
    """Its adapted layers; what the first block reads from the embedding needs no gradient."""
    first = tuple(f".0.self_attn.{name}_proj" for name in "qkv")
    return [Layer(at.accessor.d_in, at.accessor.d_out, not path.endswith(first)) for path, at in iter_adapters(net)]


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
        schedules = [c for c in _callbacks(p) if isinstance(c, SparsitySchedule)]
        for schedule in schedules:
            schedule.begin(STEPS, trainable_adapters(net))
            schedule.on_gradients(1, trainable_adapters(net))
        for parameter in net.parameters():
            parameter.grad = None
        found = meter.live - size(list(net.parameters()))
        del schedules
    return found


def _callbacks(p: Point) -> list[Any]:
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


# -- counting what processes send --------------------------------------------------------------------------------------

COLLECTIVES = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "broadcast_": "broadcast",
}
"""c10d's operations; what else there is ends the run."""


class Traffic(TorchDispatchMode):
    """Bytes handed to collectives by kind: whole tensors, as after an all-gather and before a reduce-scatter."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname not in ("barrier", "monitored_barrier_"):
            kind = COLLECTIVES[func._opname]
            given = args[1] if func._opname == "_reduce_scatter_base_" else args[0]
            self.bytes[kind] += sum(t.numel() * t.element_size() for t in tree_leaves(given) if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))

    def sent(self, n: int) -> float:
        """Bytes that each of n processes sends, by rings; a broadcast as an all-gather."""
        return (n - 1) / n * sum((1 + (kind == "all-reduce")) * size for kind, size in self.bytes.items())


class Training(LightningModule):
    """Next-token prediction."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        ignore_adapter_buffers(self)  # as AdapterModule and InjectAdapters do

    def training_step(self, ids: Tensor) -> Tensor:
        return loss_of(self.net, ids)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.net, None)


class Steps(Callback):
    """Counts each step from before any other callback acts in it until the next one starts, its end included."""

    phase = -9

    def __init__(self) -> None:
        self.counts: list[Traffic] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.close()
        self.counts.append(Traffic())
        self.counts[-1].__enter__()

    def close(self) -> None:
        if self.counts:
            self.counts[-1].__exit__(None, None, None)

    def on_train_end(self, *_: Any) -> None:
        self.close()


STRATEGIES: dict[str, Callable[[], Any]] = {"ddp": DDPStrategy, "fsdp2": FSDP2}


class Peak(Callback):
    """The most bytes of tensors that this process holds in the third step, by the CPU allocator's events."""

    phase = -9
    most = 0

    def on_train_batch_start(self, trainer: Any, module: Any, ids: Tensor, index: int) -> None:
        if index == 2:
            state = [value for entries in trainer.optimizers[0].state.values() for value in entries.values()]
            tensors = [*module.parameters(), *module.buffers(), ids, *(t for t in state if isinstance(t, Tensor))]
            self.most = size([local(tensor.detach()) for tensor in tensors])
            self.record = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.record.__enter__()

    def on_train_batch_end(self, _trainer: Any, _module: Any, _outputs: Any, _ids: Tensor, index: int) -> None:
        if index == 2:
            self.record.__exit__(None, None, None)
            events = [e for e in self.record.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore
            events.sort(key=lambda event: event.start_ns())
            self.most += max(accumulate(event.nbytes() for event in events))


def train(
    p: Point, strategy: str, n: int, watch: Callback | None = None, width: int = NARROW, batches: int = 1
) -> list[Traffic]:
    """What each batch hands to collectives, `batches` to a step; `watch` is called instead, where it is given."""
    torch.manual_seed(0)
    net, steps = network(p, width), Steps()
    trainer = Trainer(
        accelerator="cpu", devices=n, strategy=STRATEGIES[strategy](), max_steps=STEPS, logger=False,
        accumulate_grad_batches=batches,
        callbacks=[*_callbacks(p), watch or steps], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    rows = torch.randint(0, 2 * NARROW, (STEPS * n * batches, *batch(width).shape))
    trainer.fit(Training(net), torch.utils.data.DataLoader(rows, batch_size=None))
    return steps.counts


# -- tables ------------------------------------------------------------------------------------------------------------

BASE, LAYERS, RANKS, EXPERTS, PROCESSES = (2, 6, 4), (4, 6), (12, 24), (8, 12), (3, 4)
"""Layers, rank and experts of the first point; what else each axis is counted at; processes beside 2."""


def points(system: str) -> dict[str, Point]:
    """Three points along each axis, the first shared."""
    L, r, E = BASE if system == "MoELoRA" else (*BASE[:2], 1)
    found = {f"L{L} r{r}": Point(system, L, r, E)}
    found |= {f"L{layers}": Point(system, layers, r, E) for layers in LAYERS}
    found |= {f"r{rank}": Point(system, L, rank, E) for rank in RANKS}
    return found | ({f"E{experts}": Point(system, L, r, experts) for experts in EXPERTS} if E > 1 else {})


def markdown(head: list[str], rows: list[list[Any]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def print_flops() -> None:
    """Products of a step, counted and by formula."""
    rows: list[list[Any]] = []
    for system in METHODS:
        for name, p in points(system).items():
            (step, formula), (optimizer, own) = flops(p)
            rows.append([system, name, step, formula, optimizer, own])
    print(markdown(["system", "point", "step, counted", "formula", "optimizer, counted", "formula"], rows), flush=True)


def print_memory() -> None:
    """Bytes kept for backward beside the inputs of adapters, and between steps, counted and by formula; writes."""
    rows: list[list[Any]] = []
    for system in METHODS:
        for name, p in points(system).items():
            same = replace(p, system="RoseLoRA", experts=1)  # which keeps nothing of its own but 4 N r
            layers = adapted(network(p))
            inputs = held(same) - sum(kept_for_backward(same, at) for at in layers)
            counted, formula = held(p) - inputs, sum(kept_for_backward(p, at) for at in layers)
            numbers = sum(trained(p, at) for at in layers)
            state = between_steps(p) - between_steps(replace(p, system="frozen"))
            count = parts(p)
            steps = 0 if system == "MoELoRA" else 4 * sum(1 for _ in _trained_tensors(p))
            moments = 8 * numbers + steps  # AdamW counts the steps of each tensor in a tensor
            row = [counted, formula, count.trained, 4 * numbers, count.optimizer, moments]
            rows.append([system, name, *row, state, sum(derived(p, at) for at in layers), *writes(p)])
    head = [
        "system",
        "point",
        "kept, counted",
        "formula",
        "trained, counted",
        "formula",
        "optimizer, counted",
        "formula",
    ]
    print(markdown([*head, "operations", "numbers written"], rows), flush=True)


def _trained_tensors(p: Point) -> list[nn.Parameter]:
    return [parameter for parameter in network(p).parameters() if parameter.requires_grad]


def count_traffic(n: int, few: bool) -> list[list[Any]]:
    """Rows of what this process, one of n, hands to collectives, at first points alone or at all; called on all."""
    rows: list[list[Any]] = []
    for system in METHODS:
        many = {f"r12 E{EXPERTS[-1]}": Point(system, 2, 12, EXPERTS[-1] if system == "MoELoRA" else 1)}
        for name, p in list((points(system) if n == 2 else many).items())[: 1 if few else None]:
            layers, strategies = adapted(network(p)), [(s, estimate(parts(p), s, n).sent) for s in STRATEGIES]
            for strategy, sent in strategies:
                counts, events = train(p, strategy, n), EVENTS.get(system, {})
                off, plain, own = 0.0, 0.0, Counter[str]()
                for step, traffic in enumerate(counts, start=1):
                    falls = {e: sum(own_traffic(p, at, strategy, e) for at in layers) for e in events.get(step, ())}
                    always = sum(own_traffic(p, at, strategy, "") for at in layers)
                    off = max(off, abs(traffic.sent(n) - sent - (n - 1) / n * (always + sum(falls.values()))))
                    own |= Counter(falls)
                    plain = traffic.sent(n) if step == 2 else plain
                said = ", ".join(f"{e} {(n - 1) / n * size:.0f}" for e, size in own.items())
                rows.append([system, strategy, n, name, f"{plain:.0f}", f"{sent:.0f}", said, f"{off:.0f}"])
    return rows + [_two_batches(strategy, n) for strategy in STRATEGIES]


def _two_batches(strategy: str, n: int) -> list[Any]:
    p = points("LoRA")["L2 r6"] if n == 2 else Point("LoRA", 2, 12)
    second = train(p, strategy, n, batches=2)[2:4]
    counted, sent = sum(traffic.sent(n) for traffic in second), estimate(parts(p), strategy, n, batches=2).sent
    return ["LoRA", strategy, n, "2 batches", f"{counted:.0f}", f"{sent:.0f}", "", f"{abs(counted - sent):.0f}"]


def measure_peaks(n: int) -> list[list[Any]]:
    """Rows of what this process, one of n, holds at most in a step, beside what `estimate` says; called on all."""
    rows: list[list[Any]] = []
    for system in ("LoRA", "DoRA", "MoELoRA"):
        for layers in (2, 4):
            for strategy in STRATEGIES:
                p = Point(system, layers, 12, 4 if system == "MoELoRA" else 1)
                said = estimate(parts(p, WIDE), strategy, n).total
                peak = Peak()
                train(p, strategy, n, peak, WIDE)
                rows.append([system, layers, strategy, n, peak.most, f"{said:.0f}", f"{said / peak.most:.2f}"])
    return rows


def spread(what: str, n: int) -> list[list[Any]]:
    """What `count_traffic` or `measure_peaks` gives on n new processes.

    Args:
        what: "traffic", "traffic of first points" or "peaks".
        n: processes.
    """
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("localhost", 0))
        port, file = probe.getsockname()[1], Path(folder) / "rows.json"
        probe.close()
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}", f"--master-port={port}"]
        subprocess.run([*launcher, __file__, "--inside", what, str(file)], check=True, capture_output=True)
        rows: list[list[Any]] = json.loads(file.read_text())
    return rows


def inside(what: str, file: Path) -> None:
    """One of the processes that `spread` starts."""
    n = int(os.environ["WORLD_SIZE"])
    rows = measure_peaks(n) if what == "peaks" else count_traffic(n, few=what != "traffic")
    if os.environ["RANK"] == "0":
        file.write_text(json.dumps(rows))


def print_traffic() -> None:
    """Bytes sent in a step."""
    rows = [row for n in (2, *PROCESSES) for row in spread("traffic", n)]
    head = ["system", "strategy", "n", "point", "sent in step 2", "estimate", "own, by event", "largest difference"]
    print(markdown(head, rows), flush=True)


def print_peaks() -> None:
    """Most memory of a process."""
    head = ["system", "layers", "strategy", "n", "peak, measured", "estimate", "ratio"]
    print(markdown(head, spread("peaks", 2)), flush=True)


def print_gpu(file: Path) -> None:
    """Peaks above LoRA's on the GPU, 1B shape with kept activations, beside the formulas at two bytes an activation."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    runs = {
        r["method"]: r for r in lines if (r["library"], r["model"], r["recompute"]) == ("lora_lightning", "1B", False)
    }
    narrow, wide, kv = 2048, 8192, 512
    shapes = [(narrow, narrow), (narrow, kv), (narrow, kv), (narrow, narrow), (narrow, wide), (narrow, wide)]
    first = [Layer(i, o, passes=index > 2) for index, (i, o) in enumerate([*shapes, (wide, narrow)])]
    layers = first + 15 * [replace(at, passes=True) for at in first]
    both, outputs, N = sum(at.i + at.o for at in layers), sum(at.o for at in layers), runs["LoRA"]["tokens"]
    formulas = {
        "DoRA": (2 * N + 2 * 16 + 16) * outputs,  # product, c B in bfloat16, magnitudes with gradient and AdamW's
        "RoseLoRA": 10 * 16 * both,
        "LoRASC": (4 + 2) * 2 * 16 * both,  # two stages, and their factors cast to bfloat16
        "CELoRA": sum(2 * 14 * (at.i + at.o) + 4 * at.o + 8 * at.kept for at in layers if at.passes),
    }
    rows = [
        [system, runs[system]["peak_bytes"] - runs["LoRA"]["peak_bytes"], formula]
        for system, formula in formulas.items()
    ]
    print(markdown(["system", "above LoRA, measured", "formula"], rows))


def main() -> None:
    """Count what is asked for, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {"flops": print_flops, "memory": print_memory, "traffic": print_traffic, "peaks": print_peaks}
    parser.add_argument("--only", default=",".join(kinds), help="of flops, memory, traffic, peaks")
    parser.add_argument("--gpu", type=Path, help="results of measure_gpu.py, to be set beside the formulas")
    parser.add_argument("--inside", nargs=2, metavar=("WHAT", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.inside:
        inside(args.inside[0], Path(args.inside[1]))
        return
    unknown = set(args.only.split(",")) - {*kinds, ""}
    if unknown:
        raise SystemExit(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(kinds)}.")
    for kind in filter(None, args.only.split(",")):
        kinds[kind]()
    if args.gpu:
        print_gpu(args.gpu)


if __name__ == "__main__":
    main()
