"""The loss along the line between two adapters of one base model, and how high it rises above its ends.

    W(t) = (1 - t) W_a + t W_b,   t in [0, 1]
    barrier = max_t  L(t) - ((1 - t) L(0) + t L(1))

A layer is linear in its weight and bias, so that its output at t is the mean of the outputs with the two adapters, and
no weight is written. Spaces other than "update" mix the factors themselves, as merges of A and of B apart do:

    factors   A(t), B(t) = means of the factors as they are
    aligned   the same after both are canonical, and b's inner basis is aligned to a's
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ll_rebasin.functional import Factors, align, canonical
from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.folded import DenseUpdate
from lora_lightning.adapters.layers.base import BaseLayer, plus_product
from lora_lightning.adapters.low_rank import add_low_rank
from lora_lightning.distributed import is_sharded
from lora_lightning.errors import AdapterStateError, SettingsError
from lora_lightning.injection.heads import heads_of, with_buffers
from lora_lightning.injection.records import check_known, check_unmerged, injected_root, iter_adapters, records

Space = Literal["update", "factors", "aligned"]
SPACES: tuple[Space, ...] = ("update", "factors", "aligned")
_NAME = "segment-of-two"


@dataclass(frozen=True)
class Barrier:
    """The loss along a line."""

    space: Space
    positions: tuple[float, ...]
    """t, from 0 to 1."""
    losses: tuple[float, ...]

    @property
    def above(self) -> tuple[float, ...]:
        """The loss above the straight line between the ends."""
        first, last = self.losses[0], self.losses[-1]
        return tuple(loss - ((1 - t) * first + t * last) for t, loss in zip(self.positions, self.losses, strict=True))

    @property
    def height(self) -> float:
        """The barrier; 0 where the loss is nowhere above the line."""
        return max(self.above)


class Segment(Adapter):
    """Both adapters of one layer, mixed; refers to them and owns nothing."""

    def __init__(self, layer: AdaptedLayer, a: str, b: str, space: Space) -> None:
        super().__init__()
        self.at = 0.0
        # in a tuple, so that they are not registered twice
        self._layer, self._names = (layer,), (a, b)
        self._factors = None if space == "update" else _ends(layer, a, b, space == "aligned")

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """The layer with the weight at t."""
        if self._factors is not None:
            return add_low_rank(base, x, *self._mixed(), 1.0)
        layer = self._layer[0]
        ends = [
            layer.adapters[name](x, layer.base_weight.with_factors(base, name)) if name in layer.adapters else base(x)
            for name in self._names
        ]
        return torch.lerp(ends[0], ends[1], self.at)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W(t)."""
        if self._factors is not None:
            A, B = self._mixed()
            return plus_product(weight, B.to(weight.dtype), A.to(weight.dtype))
        first, last = (self._end(name, weight) for name in self._names)
        return torch.lerp(first, last, self.at)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias at t."""
        layer = self._layer[0]
        ends = [layer.adapter(n).merged_bias(bias) if n in layer.adapters else bias for n in self._names]
        if ends[0] is None or ends[1] is None:
            given = ends[0] if ends[1] is None else ends[1]
            return None if given is None else given * (1 - self.at if ends[1] is None else self.at)
        return torch.lerp(ends[0], ends[1], self.at)

    def reset(self, generator: torch.Generator) -> None:
        """Nothing is owned."""

    def _end(self, name: str, weight: Tensor) -> Tensor:
        layer = self._layer[0]
        if name not in layer.adapters:
            return weight
        folded = layer.folded(name)
        return layer.adapter(name).merged_weight(weight if folded is None else folded.merged_weight(weight))

    def _mixed(self) -> Factors:
        (A_a, B_a), (A_b, B_b) = cast(tuple[Factors, Factors], self._factors)
        return torch.lerp(A_a, A_b, self.at), torch.lerp(B_a, B_b, self.at)


def linear_barrier(
    model: nn.Module,
    loss: Callable[[], float],
    a: str,
    b: str,
    points: int = 11,
    space: Space = "update",
) -> Barrier:
    """Losses of a model along the line between two of its adapters, heads included; the model is left as it was.

    Args:
        model: has both adapters, unmerged.
        loss: measures the model as it is; called once a point, in eval mode, without gradients.
        a: name of the adapter at t = 0.
        b: name of the adapter at t = 1.
        points: how many, ends included.
        space: what is mixed: the "update"s, which is the line between the two weights; or the "factors", as they are or
            "aligned".

    Raises:
        AdapterStateError: no such adapters, or a model that is merged or sharded.
        SettingsError: fewer than three points, or adapters that have no line between them in this space.
    """
    root = injected_root(model)
    check_known(root, [a, b])
    check_unmerged(model)
    if points < 3:
        raise SettingsError(f"points is {points}; it must be at least 3, the ends among them.")
    if space not in SPACES:
        raise SettingsError(f'space is "{space}"; it must be one of {", ".join(SPACES)}.')
    if is_sharded(model):
        raise AdapterStateError("the model is sharded; load both adapters into a model that is not.")
    positions = torch.linspace(0, 1, points, dtype=torch.float64).tolist()
    found = []
    with _on_segment(root, a, b, space) as go_to, torch.no_grad():
        for position in tqdm(positions, delay=3.0, desc=f"{space}: from {a} to {b}", unit=" points", leave=False):
            go_to(position)
            found.append(float(loss()))
    return Barrier(space, tuple(positions), tuple(found))


@contextmanager
def _on_segment(root: nn.Module, a: str, b: str, space: Space) -> Iterator[Callable[[float], None]]:
    """Inside, both adapters stand for one whose place on the line is set; modes, heads and what is active come back."""
    adapted = dict(iter_adapters(root))
    before = {path: layer.active for path, layer in adapted.items()}
    segments = {
        path: _segment(path, layer, a, b, space)
        for path, layer in adapted.items()
        if a in layer.adapters or b in layer.adapters
    }
    keys = with_buffers(root, [*records(root)[a].trained, *records(root)[b].trained])
    modes = {module: module.training for module in root.modules()}
    ends = [_heads(root, keys, name) for name in (a, b)]
    root.eval()
    with heads_of(root, [b]):
        try:
            for path, layer in adapted.items():
                if path in segments:
                    layer.add(_NAME, segments[path])
                else:
                    layer.active = ()
            yield lambda position: _go_to(root, position, list(segments.values()), ends)
        finally:
            _write_heads(root, ends[1])
            for path, layer in adapted.items():
                if _NAME in layer.adapters:
                    layer.remove(_NAME)
                layer.active = before[path]
            for module, mode in modes.items():
                module.training = mode


def _segment(path: str, layer: AdaptedLayer, a: str, b: str, space: Space) -> Segment:
    for name in (n for n in (a, b) if n in layer.adapters):
        adapter = layer.adapter(name)
        if not adapter.mergeable:
            raise SettingsError(
                f"{path}: {type(adapter).__name__} depends on its input, so it has no weight, and there is no line "
                "between two of them."
            )
        if isinstance(layer.folded(name), DenseUpdate) or layer.base_weight.noise is not None:
            raise SettingsError(
                f'{path}: adapter "{name}" has folded a dense update, or noise is on the weight; both are written into '
                "it. Export it merged, and compare the models."
            )
        if space != "update" and layer.low_rank(name) is None:
            raise SettingsError(f'{path}: {type(adapter).__name__} is no product of factors; take the space "update".')
    return Segment(layer, a, b, space)


def _ends(layer: AdaptedLayer, a: str, b: str, aligned: bool) -> tuple[Factors, Factors]:
    """The factors of both, of equal rank; an adapter that the layer lacks is a pair of zeros."""
    found = [cast(Factors, layer.low_rank(name)) if name in layer.adapters else None for name in (a, b)]
    known = [pair for pair in found if pair is not None]
    pairs = [(torch.zeros_like(known[0][0]), torch.zeros_like(known[0][1])) if pair is None else pair for pair in found]
    rank = max(A.shape[-2] for A, _ in pairs)
    one, two = (_padded(*pair, rank) for pair in pairs)
    if not aligned:
        return one, two
    one, two = canonical(*one), canonical(*two)
    return one, align(*two, one, "both")


def _padded(A: Tensor, B: Tensor, rank: int) -> Factors:
    more = rank - A.shape[-2]
    return nn.functional.pad(A, (0, 0, 0, more)), nn.functional.pad(B, (0, more))


def _heads(root: nn.Module, keys: Sequence[str], name: str) -> dict[str, Tensor]:
    """Values of heads, as an adapter has trained them."""
    with heads_of(root, [name]):
        state = root.state_dict()
        return {key: state[key].detach().clone() for key in keys}


@torch.no_grad()
def _write_heads(root: nn.Module, values: dict[str, Tensor]) -> None:
    state = root.state_dict()
    for key, value in values.items():
        state[key].copy_(value)


def _go_to(root: nn.Module, position: float, segments: Sequence[Segment], ends: Sequence[dict[str, Tensor]]) -> None:
    for segment in segments:
        segment.at = position
    mixed = {
        key: torch.lerp(value, ends[1][key], position) if value.is_floating_point() else ends[round(position)][key]
        for key, value in ends[0].items()
    }
    _write_heads(root, mixed)
