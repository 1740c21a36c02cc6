"""Cascade: training in stages. At the end of each the update is folded away and the adapter starts again at zero."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from lightning.pytorch import LightningModule, Trainer

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.layer import AdaptedLayer
from lora_lightning.adapters.seeds import generator
from lora_lightning.adapters.shift import DenseShift, LogShift, Noise
from lora_lightning.callbacks.noise import NoiseInjection, noise_for
from lora_lightning.callbacks.schedule import KNOTS, MASKS, ScheduleCallback, adapted_layer
from lora_lightning.cascades import Moments, NoiseMode, Rule, StageRate, check_cascade
from lora_lightning.errors import SettingsError
from lora_lightning.optim.state import clear
from lora_lightning.optim.warmup import Knots, WarmUp

log = logging.getLogger(__name__)


class Cascade(ScheduleCallback):
    """Trains a chain of small updates, each on top of those before, at the memory of one.

    At a knot, which falls on an optimizer step, the update is blended into what has been folded, the adapter is
    re-initialised in place and its optimizer state forgotten. A last stage that is cut short is folded as well, so the
    adapter that is written holds every stage. Low-rank updates are kept as factors where these are fewer numbers than
    the weight; then, and without noise, no base weight is ever touched.

    With share below 1, or noise, the function jumps at a knot. Works in any Lightning project.

    Args:
        stage_epochs: epochs of a stage; None for one, unless stage_steps is given.
        stage_steps: optimizer steps of a stage, instead.
        share: weight of the newest update in the blend, in (0, 1].
        rule: "outer_step" adds share of each update; "figure_ema" keeps a moving average of updates and adds that.
        noise: noise on the frozen weights, relative to their standard deviation, drawn anew each stage; 0 for none.
        noise_mode: "restore" takes each stage's noise off at its end, "persist" folds it in.
        moments: whether the optimizer forgets or keeps its state of the adapter at a knot.
        lr: "continue" leaves the schedule alone, "rewarm" raises the rate anew over rewarm_steps, "restart" runs the
            whole schedule in each stage. The last two need AdapterModule's schedule.
        rewarm_steps: steps of a re-warm-up, from a tenth of the rate.
        seed: seed of starts and noise; None takes the adapter's.

    Raises:
        SettingsError: a value outside its rule; a schedule of masks beside it.
        NoEffectError: no trainable adapter that can be folded.
    """

    phase: ClassVar[int] = KNOTS
    asks: ClassVar[str] = "an update that does not depend on the input, so that it can be folded"

    def __init__(
        self,
        stage_epochs: int | None = None,
        stage_steps: int | None = None,
        share: float = 1.0,
        rule: Rule = "outer_step",
        noise: float = 0.0,
        noise_mode: NoiseMode = "restore",
        moments: Moments = "reset",
        lr: StageRate = "continue",
        rewarm_steps: int = 20,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.stage_epochs, self.stage_steps, self.share, self.rule = stage_epochs, stage_steps, share, rule
        self.noise, self.noise_mode, self.moments = noise, noise_mode, moments
        self.lr, self.rewarm_steps, self.seed = lr, rewarm_steps, seed
        check_cascade(self)
        self.length = 0
        """Optimizer steps of a stage, once training has begun."""
        self.stage = 0
        """Stages folded so far."""
        self._scales: dict[str, float] = {}

    def wants(self, adapter: Adapter) -> bool:
        """Adapters whose update is a weight."""
        return adapter.mergeable

    def stage_length(self, trainer: Trainer) -> int:
        """Optimizer steps of a stage.

        Raises:
            SettingsError: the stage is counted in epochs, whose length is not known.
        """
        if self.stage_steps is not None:
            return self.stage_steps
        if math.isinf(trainer.num_training_batches):
            raise SettingsError("Cascade.stage_steps is None, but the length of an epoch is not known; give it.")
        epochs = 1 if self.stage_epochs is None else self.stage_epochs
        return epochs * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)

    def knots(self, trainer: Trainer) -> Knots | None:
        """What a learning-rate schedule has to know of the stages."""
        if self.lr == "continue":
            return None
        return Knots(self.stage_length(trainer), self.lr, self.rewarm_steps)

    def begin(self, total: int | None, adapters: Mapping[str, Adapter]) -> None:
        """Open shifts and the first stage's noise; a resumed run finds the shifts loaded."""
        self._check_company()
        self.length = self.stage_length(self.trainer)
        stages = math.ceil(total / self.length) if total is not None else None
        if self.share < 1 and stages == 1:
            log.warning("Cascade: one stage only; share=%g makes it a LoRA-like update shrunk by that.", self.share)
        for path, adapter in adapters.items():
            layer, name, _ = adapted_layer(self.module, path)
            if adapter.merged_bias(None) is not None:
                raise SettingsError(f"Cascade: {path} trains a bias, which cannot be folded; train without it.")
            if name not in layer.shifts:
                layer.set_shift(name, self._shift(layer, adapter, stages))
            if self.noise:
                layer.set_noise(self._noise_of(path, layer, name))

    def _check_company(self) -> None:
        for other in cast("list[Any]", self.trainer.callbacks):  # type: ignore[attr-defined]
            if isinstance(other, ScheduleCallback) and other.phase == MASKS:
                raise SettingsError(
                    f"Cascade starts adapters again at each stage, which brings back what {type(other).__name__} has "
                    "removed; use one of them."
                )
            if isinstance(other, NoiseInjection) and self.noise:
                raise SettingsError(f"Cascade.noise is {self.noise} and NoiseInjection is there too; use one of them.")
        if self.lr != "continue" and not isinstance(getattr(self.module, "lr_scheduler", None), WarmUp):
            raise SettingsError(
                f'Cascade.lr is "{self.lr}"; it acts on the schedule of AdapterModule, which this module has not. '
                'Take "continue", and give the stages to a schedule of your own.'
            )

    def _shift(self, layer: AdaptedLayer, adapter: Adapter, stages: int | None) -> LogShift | DenseShift:
        """Factors while they are fewer numbers than the weight; a dense update where there are none, or noise stays."""
        factors, base = adapter.low_rank(), layer.accessor
        persists = bool(self.noise) and self.noise_mode == "persist"
        if factors is None or stages is None or persists:
            return DenseShift(base)
        numbers = stages * factors[0].shape[0] * (base.d_in + base.d_out)
        return LogShift(base) if numbers < base.d_in * base.d_out else DenseShift(base)

    def _noise_of(self, path: str, layer: AdaptedLayer, name: str) -> Noise | None:
        """The noise of the stage that begins, or has begun before a resume."""
        seed = self._seed(path)
        if path in self._scales:
            return Noise(seed, self.stage, path, self._scales[path])
        noise = noise_for(layer, name, self.noise, seed, self.stage, path)
        self._scales[path] = noise.scale if noise else 0.0
        return noise

    def _seed(self, path: str) -> int:
        return adapted_layer(self.module, path)[2] if self.seed is None else self.seed

    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """End a stage where one ends, and open the next unless the run ends too."""
        last = step == self.total
        if step % self.length and not last:
            return
        self.stage += 1
        self._scales = {}
        for path, adapter in adapters.items():
            layer, name, _ = adapted_layer(self.module, path)
            layer.fold(name, self.share, self.rule, keep_noise=self.noise_mode == "persist")
            if self.noise:
                layer.set_noise(None)
                if not last:
                    layer.set_noise(self._noise_of(path, layer, name))
            # after the noise: an adapter may start at a norm of the weight as it is now
            adapter.reset(generator(self._seed(path), "cascade", self.stage, path))
            for optimizer in self.trainer.optimizers if self.moments == "reset" else ():
                clear(optimizer, adapter.parameters())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fold a stage that a limit of time or the user has cut short."""
        if self._adapters and self.length and trainer.global_step % self.length and trainer.global_step != self.total:
            self.total = trainer.global_step
            self.on_stepped(trainer.global_step, self._adapters)

    def finished(self, step: int) -> bool:
        """Whether the last stage has been folded."""
        return step == self.total

    def metrics(self) -> Mapping[str, float]:
        """Stages folded so far."""
        return {"stage": float(self.stage)}

    def state_dict(self) -> dict[str, Any]:
        """Which stage it is, and how large its noise."""
        return super().state_dict() | {"stage": self.stage, "scales": self._scales}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in that stage."""
        super().load_state_dict(state_dict)
        self.stage, self._scales = state_dict["stage"], state_dict["scales"]
