"""What each GPU of a training run holds and sends: parts counted once, laid out by a strategy. All numbers are bytes.

    W   frozen weights             T   trained parameters, as many gradients G, optimizer state O
    n   GPUs                       m   batches of an optimizer step
    R_W frozen weights outside the blocks               B frozen weights of the two largest blocks

    strategy     held beside activations     made on the way      sent by each GPU in a step
    ddp          W + T + G + O               T (buckets)          2 (n-1)/n T
    fsdp2        (W + T + G + O) / n         R_W + B + T          m (n-1)/n (2 (W - R_W) + R_W + 2 T)
    fsdp         W / n + T + G + O           R_W + B + T          m (n-1)/n (2 (W - R_W) + R_W + 2 T)
    deepspeed    W + T + (G + O) / n         T (buckets)          (n-1)/n (m + 1) T

The strategies are those of `strategies`; deepspeed is ZeRO's stage 2. Ring algorithms: of an all-gather or a
reduce-scatter of x bytes each GPU sends (n-1)/n x, of an all-reduce twice that. Sharded weights are gathered for
forward and again for backward, the next block while one is at work; those outside the blocks once, and, under fsdp2,
trained ones too, which stay until backward. Gradients are reduced for each batch, under fsdp all in one; with ddp only
for the last one of a step. What a method or its optimizer sends itself comes on top; notes/005-scale.md has it, and the
bytes that two to four processes were counted to send under ddp and fsdp2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_lightning.errors import SettingsError, did_you_mean
from lora_lightning.models.quantized_loading import Quantization

STRATEGIES: dict[str, tuple[str, ...]] = {
    "ddp": ("auto", "ddp_find_unused_parameters_true", "DDPStrategy", "SingleDeviceStrategy"),
    "fsdp2": ("FSDP2",),
    "fsdp": ("FSDP1",),
    "deepspeed": ("DeepSpeed",),
}
"""Strategies by the name that is printed, with other names that mean them."""
PACKED: dict[Quantization, Callable[[int, int], float]] = {
    "nf4": lambda rows, columns: rows * columns * (1 / 2 + 4 / 64),
    "nf4-double": lambda rows, columns: rows * columns * (1 / 2 + 1 / 64 + 4 / (64 * 256)),
    "int8": lambda rows, columns: rows * columns + 4 * rows,
    "torchao-int8": lambda rows, columns: rows * columns + 4 * rows,
}
"""Bytes of a quantized weight: four bits with a scale for each 64 of them (of 8 bits, and a scale for each 256 of
those), or eight bits with a scale a row."""
_SHARDED = ("fsdp2", "fsdp")


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together."""

    frozen: int
    trained: int


@dataclass(frozen=True)
class Parts:
    """What a training step of one process holds, nothing sharded."""

    blocks: tuple[Unit, ...]
    rest: Unit
    """Everything outside the blocks."""
    optimizer: int
    kept: int
    """Buffers, the batch, and what adapters keep from the frozen weights."""
    activations: int
    """What is held beside, at its fullest."""
    dequantized: int = 0
    """The largest weight, unpacked for a product, where the base is quantized."""

    @property
    def frozen(self) -> int:
        """Frozen weights."""
        return self.rest.frozen + sum(block.frozen for block in self.blocks)

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return self.rest.trained + sum(block.trained for block in self.blocks)


@dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU, by what they are for, and bytes that each sends in an optimizer step."""

    strategy: str
    gpus: int
    frozen: float
    trained: float
    gradients: float
    optimizer: float
    kept: float
    activations: float
    gathered: float
    """Blocks gathered from their shards, or buckets that gradients are reduced in."""
    sent: float

    @property
    def total(self) -> float:
        """The most that a GPU holds; the CUDA context and the allocator's gaps come on top."""
        return (
            self.frozen + self.trained + self.gradients + self.optimizer + self.kept + self.activations + self.gathered
        )


def find_strategy(name: str) -> str:
    """The name in `STRATEGIES` of a strategy given by name, alias or class path.

    Raises:
        SettingsError: there is none, with the nearest.
    """
    last = name.rpartition(".")[2]
    for known, aliases in STRATEGIES.items():
        if last in (known, *aliases):
            return known
    listed = ", ".join(STRATEGIES)
    raise SettingsError(f'strategy is "{name}".{did_you_mean(last, STRATEGIES)} Estimates know: {listed}.')


def quantized_size(shape: Sequence[int], name: str) -> int:
    """Bytes of a linear weight of that shape in a format of `PACKED`.

    Raises:
        SettingsError: there is no such format, with the nearest.
    """
    if name not in PACKED:
        raise SettingsError(f'quantized is "{name}".{did_you_mean(name, PACKED)} Estimates know: {", ".join(PACKED)}.')
    return math.ceil(PACKED[name](*shape))


def check_positive(**numbers: int) -> None:
    """Raise `SettingsError` for a number below 1, by its name."""
    for name, value in numbers.items():
        if value < 1:
            raise SettingsError(f"{name} is {value}; it must be at least 1.")


def estimate(parts: Parts, strategy: str, gpus: int, batches: int = 1) -> Estimate:
    """Lay parts out over GPUs.

    Args:
        parts: what one process holds.
        strategy: a name in `STRATEGIES`.
        gpus: processes, one a GPU.
        batches: batches of an optimizer step, on each.

    Raises:
        SettingsError: an unknown strategy, or less than one GPU or batch; a quantized base that it does not take.
    """
    strategy = find_strategy(strategy)
    check_positive(gpus=gpus, batches=batches)
    if parts.dequantized and strategy != "ddp":
        raise SettingsError(
            f'strategy is "{strategy}", which takes no quantized base; nearest: "ddp", with the base on each GPU.'
        )
    everywhere, shared, others = 1.0, 1 / gpus, (gpus - 1) / gpus
    base = shared if strategy in _SHARDED else everywhere
    trained = shared if strategy == "fsdp2" else everywhere
    state = shared if strategy in ("fsdp2", "deepspeed") else everywhere
    return Estimate(
        strategy=strategy,
        gpus=gpus,
        frozen=parts.frozen * base,
        trained=parts.trained * trained,
        gradients=parts.trained * state,
        optimizer=parts.optimizer * state,
        kept=parts.kept,
        activations=parts.activations + parts.dequantized,
        gathered=_gathered(parts, strategy) if gpus > 1 else 0,
        sent=others * _moved(parts, strategy, batches),
    )


def _gathered(parts: Parts, strategy: str) -> int:
    """What is made whole at a time: the block at work and the next, what lies outside them, gradients to send."""
    if strategy not in _SHARDED:
        return parts.trained
    return parts.rest.frozen + parts.trained + sum(sorted(block.frozen for block in parts.blocks)[-2:])


def _moved(parts: Parts, strategy: str, batches: int) -> float:
    """Bytes that all-gathers and reduce-scatters of a step handle; an all-reduce is one of each."""
    if strategy == "ddp":
        return 2 * parts.trained
    if strategy == "deepspeed":
        return (batches + 1) * parts.trained
    inside = sum(block.frozen for block in parts.blocks)
    return batches * (2 * inside + parts.rest.frozen + 2 * parts.trained)


def smallest_fit(parts: Parts, memory: float, batches: int = 1, most: int = 1024) -> Estimate | None:
    """The fewest GPUs, a power of two up to `most`, on which fsdp2 holds a run in `memory` bytes; None for none."""
    gpus = 1
    while gpus <= most:
        found = estimate(parts, "fsdp2", gpus, batches)
        if found.total <= memory:
            return found
        gpus *= 2
    return None


def verdict(found: Sequence[Estimate], parts: Parts, memory: float, batches: int = 1) -> str:
    """One sentence on what fits into GPUs of `memory` bytes; the last tenth is left to context and allocator."""
    room, gib = 0.9 * memory, 2**30
    fits = [e for e in found if e.total <= room]
    if fits:
        names = ", ".join(f"{e.strategy} on {e.gpus}" for e in fits)
        return f"Fits into {memory / gib:g} GiB a GPU, a tenth of it left free: {names}."
    best = None if parts.dequantized else smallest_fit(parts, room, batches)
    where = f"fsdp2 on {best.gpus} GPUs does" if best else "no number of GPUs does; lower batch_size or max_length"
    return f"Nothing of this fits into {memory / gib:g} GiB a GPU, a tenth of it left free; {where}."
