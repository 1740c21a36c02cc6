"""NoiseInjection: the frozen weights under adapters carry small uniform noise while training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.layer import AdaptedLayer
from lora_lightning.adapters.shift import DenseShift, Noise
from lora_lightning.callbacks.schedule import KNOTS, ScheduleCallback, adapted_layer
from lora_lightning.cascades import NoiseMode
from lora_lightning.errors import AdapterStateError, check


def noise_for(layer: AdaptedLayer, name: str, strength: float, seed: int, stage: int, path: str) -> Noise | None:
    """Noise whose entries reach strength / 2 standard deviations of the weight without noise; None for a constant one.

    The standard deviation is over all entries of the one matrix, with n - 1 (Wu et al., 2022, arXiv:2202.12024).
    """
    deviation = float(layer.clean_weight(name).std())
    return Noise(seed, stage, path, strength * deviation) if deviation > 0 else None


class NoiseInjection(ScheduleCallback):
    """Adds strength * std(W) * U[-1/2, 1/2] to each adapted weight when training starts.

    Works in any Lightning project. Validation during training sees the noise; what is saved does not hold it unless it
    persists: then it is part of the adapter, as a dense update.

    Args:
        strength: noise relative to each weight's standard deviation; 0.1 to 0.2 are common.
        mode: "restore" takes the noise off when training ends; "persist" keeps it in the adapter.
        seed: seed of the noise; None takes the adapter's.

    Raises:
        SettingsError: a strength that is not above 0.
        NoEffectError: no trainable adapter.
        AdapterStateError: an adapted weight is shared with another module.
    """

    phase: ClassVar[int] = KNOTS
    asks: ClassVar[str] = "a frozen weight beneath"

    def __init__(self, strength: float = 0.1, mode: NoiseMode = "restore", seed: int | None = None) -> None:
        super().__init__()
        self.strength, self.mode, self.seed = strength, mode, seed
        check(strength > 0, self, "strength", "it must be above 0; 0.1 is usual.")
        check(mode in ("restore", "persist"), self, "mode", 'it must be "restore" or "persist".')
        self._scales: dict[str, float] = {}

    def wants(self, adapter: Adapter) -> bool:
        """Every adapter lies on a weight."""
        return adapter.mergeable or self.mode == "restore"

    def begin(self, total: int | None, adapters: Mapping[str, Adapter]) -> None:
        """Put the noise on; a resumed run puts the same on again."""
        for path in adapters:
            layer, name, seed = adapted_layer(self.module, path)
            if self.mode == "persist" and name in layer.shifts:
                if path not in self._scales:
                    raise AdapterStateError(f"{path}: it has folded something already, so no noise can persist on it.")
                continue
            seed = seed if self.seed is None else self.seed
            if path in self._scales:
                noise: Noise | None = Noise(seed, 0, path, self._scales[path])
            else:
                noise = noise_for(layer, name, self.strength, seed, 0, path)
            self._scales[path] = noise.scale if noise else 0.0
            if self.mode == "restore" or noise is None:
                layer.set_noise(noise)
                continue
            shift = DenseShift(layer.accessor)
            shift.delta.copy_(noise.draw(shift.delta))
            layer.set_shift(name, shift)

    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Nothing: the noise stays as it is."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the noise off."""
        for path in self._adapters:
            adapted_layer(pl_module, path)[0].set_noise(None)

    def state_dict(self) -> dict[str, Any]:
        """How large the noise is on each layer; its entries are drawn again."""
        return super().state_dict() | {"scales": self._scales}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Draw the same noise as before."""
        super().load_state_dict(state_dict)
        self._scales = state_dict["scales"]
