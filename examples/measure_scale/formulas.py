"""Sizes that are counted, and the formulas of `lora_lightning/notes/005-scale.md`, a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

TOKENS, TOP_K, STAGES, KEPT = 32, 2, 2, 0.65


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


BASE, LAYERS, RANKS, EXPERTS, PROCESSES = (2, 6, 4), (4, 6), (12, 24), (8, 12), (3, 4)
"""Layers, rank and experts of the first point; what else each axis is counted at; processes beside 2."""


def points(system: str) -> dict[str, Point]:
    """Three points along each axis, the first shared."""
    L, r, E = BASE if system == "MoELoRA" else (*BASE[:2], 1)
    found = {f"L{L} r{r}": Point(system, L, r, E)}
    found |= {f"L{layers}": Point(system, layers, r, E) for layers in LAYERS}
    found |= {f"r{rank}": Point(system, L, rank, E) for rank in RANKS}
    return found | ({f"E{experts}": Point(system, L, r, experts) for experts in EXPERTS} if E > 1 else {})


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
        "MoELoRA": N * (5 if p.experts > TOP_K else 4) * p.experts,  # gates, and which were chosen
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
