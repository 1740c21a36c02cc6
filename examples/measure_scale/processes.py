"""What several processes send, and hold at most, while Lightning trains."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from counting import METHODS, NARROW, WIDE, adapted, batch, callbacks, loss_of, network, parts
from formulas import EVENTS, EXPERTS, STEPS, Point, own_traffic, points
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_lightning.cli.preflight.memory import estimate
from lora_lightning.cli.preflight.trace import size
from lora_lightning.distributed import local
from lora_lightning.injection.inject import ignore_adapter_buffers
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.training.strategies.fsdp2 import FSDP2

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
        callbacks=[*callbacks(p), watch or steps], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    rows = torch.randint(0, 2 * NARROW, (STEPS * n * batches, *batch(width).shape))
    trainer.fit(Training(net), torch.utils.data.DataLoader(rows, batch_size=None))
    return steps.counts


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
        subprocess.run(
            [*launcher, str(Path(__file__).parent), "--inside", what, str(file)], check=True, capture_output=True
        )
        rows: list[list[Any]] = json.loads(file.read_text())
    return rows


def inside(what: str, file: Path) -> None:
    """One of the processes that `spread` starts."""
    n = int(os.environ["WORLD_SIZE"])
    rows = measure_peaks(n) if what == "peaks" else count_traffic(n, few=what != "traffic")
    if os.environ["RANK"] == "0":
        file.write_text(json.dumps(rows))
