"""NoiseInjection: the frozen weights under adapters carry small uniform noise while training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.folded import DenseUpdate
from lora_lightning.adapters.noise import Noise, NoiseMode
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.step_counting import STAGE_ENDS, adapted_layer, injected_path
from lora_lightning.distributed import assembled, put
from lora_lightning.errors import AdapterStateError, check
from lora_lightning.methods import Method
from lora_lightning.seeds import generator

T = TypeVar("T")

MOST_AHEAD = 8
"""Weights whose noise is drawn at once, at most: each takes four bytes an entry of the CPU's memory."""


class StageNoise:
    """Noise on every adapted weight of a stage: U[-1/2, 1/2] times strength times the weight's standard deviation.

    The deviation is over all entries of the one matrix without noise, with n - 1 (Wu et al., 2022, arXiv:2202.12024);
    a constant weight gets none. Entries are functions of seed, stage and path; only their size is remembered.

    Args:
        strength: noise relative to the deviation; 0 for none.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.scales: dict[str, float] = {}

    @property
    def placed(self) -> bool:
        """Whether the noise of a stage is on the weights."""
        return bool(self.scales)

    def place(self, module: nn.Module, adapters: Iterable[str], stage: int, seed: int | None) -> None:
        """Put the noise on, as large as remembered where the stage had begun before a resume."""
        found: dict[str, tuple[AdaptedLayer, Noise | None]] = {}
        for path in adapters:
            layer, name, own = adapted_layer(module, path)
            place = path.rpartition(".adapters.")[0]
            if place not in self.scales:
                self.scales[place] = self.strength * float(layer.clean_weight(name).std())
            scale = self.scales[place]
            found[place] = layer, Noise(own if seed is None else seed, stage, place, scale) if scale > 0 else None
        # drawing takes the time, one thread a weight; every weight has its own generator, so numbers stay what they are
        draws = [partial(_values, layer, noise) for layer, noise in found.values()]
        values = ahead(draws, min(torch.get_num_threads(), MOST_AHEAD))
        for (layer, noise), drawn in zip(found.values(), values, strict=True):
            layer.set_noise(noise, drawn)

    def lift(self, module: nn.Module, adapters: Iterable[str]) -> None:
        """Take the noise off."""
        for path in adapters if self.scales else ():
            adapted_layer(module, path)[0].set_noise(None)
        self.scales = {}

    def state_dict(self) -> dict[str, float]:
        """Size of the noise by layer path; empty while there is none."""
        return dict(self.scales)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Remember the sizes of a stage that had begun."""
        self.scales = dict(state)


def _values(layer: AdaptedLayer, noise: Noise | None) -> Tensor | None:
    base = layer.base_layer
    return None if noise is None else noise.values((*base.lead, base.d_out, base.d_in))


def ahead(calls: Iterable[Callable[[], T]], threads: int) -> Iterator[T]:
    """What each call returns, in their order; up to `threads` more are run meanwhile."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[T]] = deque()
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@torch.no_grad()
def is_zero(adapter: Adapter, layer: AdaptedLayer, name: str) -> bool:
    """Whether an adapter changes nothing on the weight as it was before any noise."""
    if not adapter.mergeable:
        return False
    weight = layer.clean_weight(name)
    with assembled(adapter):
        return torch.equal(adapter.merged_weight(weight), weight)


WRITES_NOISE = "writes noise into its weights, which cannot be written: leave it out (noise=0), or load a plain base."


class NoiseInjection(ScheduleCallback):
    """Adds strength * std(W) * U[-1/2, 1/2] to each adapted weight when training starts.

    Works in any Lightning project. Validation during training sees the noise; what is saved does not hold it unless it
    persists: then it is part of the adapter, as a dense update. An adapter that has learned nothing yet starts anew on
    the noisy weight.

    Args:
        strength: noise relative to each weight's standard deviation; 0.1 to 0.2 are common.
        mode: "restore" takes the noise off when training ends; "persist" keeps it in the adapter.
        seed: seed of the noise; None takes the adapter's.

    Raises:
        SettingsError: a strength that is not above 0.
        NoEffectError: no trainable adapter.
        AdapterStateError: an adapted weight is shared with another module, or the adapter has folded something already.
    """

    phase: ClassVar[int] = STAGE_ENDS
    reads_base: ClassVar[bool] = True
    requires: ClassVar[str] = "a frozen weight beneath"

    def __init__(self, strength: float = 0.1, mode: NoiseMode = "restore", seed: int | None = None) -> None:
        super().__init__()
        self.strength, self.mode, self.seed = strength, mode, seed
        check(strength > 0, self, "strength", "it must be above 0; 0.1 is usual.")
        check(mode in ("restore", "persist"), self, "mode", 'it must be "restore" or "persist".')
        self._noise = StageNoise(strength)
        self.changed_at_end = mode == "restore"

    def refuses_quantized(self, method: Method) -> str:
        """Why a quantized base cannot carry noise."""
        return WRITES_NOISE

    def accepts(self, adapter: Adapter) -> bool:
        """Adapters on a weight; noise that persists needs an update that is one."""
        return adapter.mergeable or self.mode == "restore"

    def on_start(self, total: int | None, adapters: Mapping[str, Adapter]) -> None:
        """Put the noise on; a resumed run puts the same on again, unless the adapter holds it."""
        resumed = self._noise.placed
        layers = {path: adapted_layer(self.module, path) for path in adapters}
        fresh = [] if resumed else [p for p, (layer, name, _) in layers.items() if is_zero(adapters[p], layer, name)]
        if self.mode == "restore" or not resumed:
            self._noise.place(self.module, adapters, 0, self.seed)
        if self.mode == "persist" and not resumed:
            for path, (layer, name, _) in layers.items():
                self._keep(layer, name, path)
        for path in fresh:
            adapters[path].reset(generator(layers[path][2], "init", 0, injected_path(self.module, path)))

    def _keep(self, layer: AdaptedLayer, name: str, path: str) -> None:
        """Move the noise from the weight into the adapter."""
        if name in layer.shifts:
            raise AdapterStateError(f"{path}: it has folded something already, so no noise can persist on it.")
        update = DenseUpdate(layer.base_layer)
        put(update.delta, layer.wrapped(name).weight(update.delta.dtype) - layer.clean_weight(name))
        layer.set_noise(None)
        layer.set_folded(name, update)

    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Nothing: the noise stays as it is."""

    def finished(self, step: int) -> bool:
        """Whether what validation sees is what is written."""
        return self.mode == "persist"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the noise off."""
        self._noise.lift(pl_module, self._adapters)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the noise off."""
        self._noise.lift(pl_module, self._adapters)

    def state_dict(self) -> dict[str, Any]:
        """How large the noise is on each layer; its entries are drawn again."""
        return super().state_dict() | {"noise": self._noise.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Draw the same noise as before."""
        super().load_state_dict(state_dict)
        self._noise.load_state_dict(state_dict["noise"])
