"""Cascade: training in stages. At the end of each the update is folded away and the adapter starts again at zero."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.folded import DenseUpdate, FactoredUpdate, FoldedUpdate
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.adapters.layers.quantized import QuantizedBase
from lora_lightning.callbacks.noise import WRITES_NOISE, NoiseInjection, StageNoise, is_zero
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.step_counting import MASKS, STAGE_ENDS, adapted_layer, injected_path
from lora_lightning.errors import SettingsError, check
from lora_lightning.injection.plan import built
from lora_lightning.methods import CascadeFields, Method, check_cascade, check_choices
from lora_lightning.optim.state import clear, clear_copies
from lora_lightning.optim.warmup import StageEnds, WarmUp
from lora_lightning.seeds import generator

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class CascadeSettings(CascadeFields):
    """What the callback takes beside the settings that methods have."""

    moments: Literal["reset", "keep"] = "reset"
    """Whether the optimizer forgets or keeps its state of the adapter at the end of a stage; copies of old values, such
    as slow weights, it forgets in any case."""
    seed: int | None = None
    """Seed of starts and noise; null takes the adapter's."""


class Cascade(CascadeSettings, ScheduleCallback):
    """Trains a chain of small updates, each on top of those before, at the memory of one.

    At the end of a stage, which falls on an optimizer step, the update is blended into what has been folded, the
    adapter is re-initialised in place and its optimizer state forgotten. A last stage that is cut short is folded as
    well, so the adapter that is written holds every stage. Low-rank updates are kept as factors where these are fewer
    numbers than the weight. Base weights are written only for other updates, or for noise.

    With blend below 1, or noise, the function jumps at the end of a stage. Validation there sees the folded weights
    without noise, validation inside a stage its noise and its update. Works in any Lightning project.

    Raises:
        SettingsError: a value outside its rule; a schedule of masks beside it.
        NoEffectError: no trainable adapter that can be folded.
    """

    phase: ClassVar[int] = STAGE_ENDS
    reads_base: ClassVar[bool] = True
    requires: ClassVar[str] = "an update that does not depend on the input, so that it can be folded"

    def __post_init__(self) -> None:
        ScheduleCallback.__init__(self)
        check_cascade(self)
        check_choices(self, CascadeSettings)
        self.length = 0
        """Optimizer steps of a stage, once training has begun."""
        self.stage = 0
        """Stages folded so far."""
        self._folded_at = 0
        self._noise = StageNoise(self.noise)

    def accepts(self, adapter: Adapter) -> bool:
        """Adapters whose update is a weight."""
        return adapter.mergeable

    def refuses_quantized(self, method: Method) -> str:
        """Why a quantized base cannot carry the stages of `method`; empty where it can."""
        if self.noise:
            return WRITES_NOISE
        # skip_init draws none of the random numbers of the run
        layer = core_base_layer(nn.utils.skip_init(nn.Linear, 1024, 1024))
        assert layer is not None
        if built(method, layer).low_rank() is None:
            return (
                "folds dense updates, which cannot be added to it: take a method whose update is a product of two "
                "factors, or load a plain base."
            )
        return ""

    def stage_length(self, trainer: Trainer) -> int:
        """Optimizer steps of a stage.

        Raises:
            SettingsError: the stage is counted in epochs, whose number of steps is not known.
        """
        if self.stage_steps is not None:
            return self.stage_steps
        if math.isinf(trainer.num_training_batches) or not trainer.lightning_module.automatic_optimization:
            raise SettingsError("Cascade.stage_steps is None, but the steps of an epoch are not known; give it.")
        epochs = 1 if self.stage_epochs is None else self.stage_epochs
        return epochs * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)

    def stage_ends(self, trainer: Trainer) -> StageEnds | None:
        """What a learning-rate schedule has to know of the stages."""
        if self.lr == "continue":
            return None
        return StageEnds(self.stage_length(trainer), self.lr, self.rewarm_steps)

    def on_start(self, total: int | None, adapters: Mapping[str, Adapter]) -> None:
        """Make room for folded updates, and put on the noise of the stage; a resumed run finds the updates loaded."""
        self._check_module()
        self.length = self.stage_length(self.trainer)
        check(self.length >= 2, self, "stage_epochs", "an epoch has one optimizer step; a stage needs at least 2.")
        stages = math.ceil(total / self.length) if total is not None else None
        if self.blend < 1 and stages == 1:
            log.warning("Cascade: one stage only; blend=%g shrinks its update by that.", self.blend)
        layers = [adapted_layer(self.module, path)[:2] for path in adapters]
        if not self.resumed:
            self._start_anew([cast(FoldedUpdate, layer.shifts[name]) for layer, name in layers if name in layer.shifts])
        for (path, adapter), (layer, name) in zip(adapters.items(), layers, strict=True):
            self._open(layer, name, path, adapter, stages)
        if self._noise.placed:
            self._noise.place(self.module, adapters, self.stage, self.seed)

    def _start_anew(self, folded: Sequence[FoldedUpdate]) -> None:
        """Keep what an earlier run has folded, and begin the moving average of its updates again."""
        for update in folded:
            update.forget_average()
        if folded and self.trainer.is_global_zero:
            print(
                f"{type(self).__name__}: an earlier run has folded updates of {len(folded)} layers; they stay, and new "
                "stages are folded on top"
            )

    def check_run(self, total: int | None, others: Sequence[Callback]) -> None:
        """Refuse schedules that act against stages, and a rate that follows them in a run that nothing bounds."""
        for other in others:
            if isinstance(other, ScheduleCallback) and other.phase == MASKS:
                raise SettingsError(
                    f"Cascade starts adapters again at each stage, which brings back what {type(other).__name__} has "
                    "removed; use one of them."
                )
            if isinstance(other, NoiseInjection) and self.noise:
                raise SettingsError(f"Cascade.noise is {self.noise} and NoiseInjection is there too; use one of them.")
        if self.lr != "continue" and total is None:
            raise SettingsError(f'Cascade.lr is "{self.lr}", but nothing bounds the run; set max_steps or max_epochs.')

    def _check_module(self) -> None:
        if self.lr != "continue" and not isinstance(getattr(self.module, "lr_scheduler", None), WarmUp):
            raise SettingsError(
                f'Cascade.lr is "{self.lr}"; it acts on the schedule of AdapterModule, which this module has not. '
                'Take "continue", and give the stages to a schedule of your own.'
            )

    def _open(self, layer: AdaptedLayer, name: str, path: str, adapter: Adapter, stages: int | None) -> None:
        if adapter.merged_bias(None) is not None:
            raise SettingsError(
                f"Cascade: {path} trains a bias, which cannot be folded; train without it (bias=False)."
            )
        persists = bool(self.noise) and self.noise_mode == "persist"
        if name not in layer.shifts:
            factors, base = layer.low_rank(name), layer.base_layer
            numbers = (stages or math.inf) * (factors[0].shape[-2] if factors else math.inf) * (base.d_in + base.d_out)
            keeps_factors = (
                isinstance(base, QuantizedBase) and factors is not None
            )  # which no dense update can be added to
            small = (numbers < base.d_in * base.d_out or keeps_factors) and not persists
            layer.set_folded(name, FactoredUpdate(base) if small else DenseUpdate(base))
        elif persists and isinstance(layer.shifts[name], FactoredUpdate):
            raise SettingsError(
                f'Cascade.noise_mode is "persist", but {path} holds factors that were folded before, which noise '
                'cannot join; take "restore".'
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the noise of a stage on with its first batch, so that validation between stages sees none."""
        if self.noise and not self._noise.placed:
            layers = {path: adapted_layer(pl_module, path) for path in self._adapters}
            # asked first: the original is then still where the layer is
            fresh = [path for path, (layer, name, _) in layers.items() if is_zero(self._adapters[path], layer, name)]
            self._noise.place(pl_module, self._adapters, self.stage, self.seed)
            for path in fresh:  # an adapter may start at a norm of the weight as it is now
                self._restart(path, self._adapters[path])

    def _restart(self, path: str, adapter: Adapter) -> None:
        own = adapted_layer(self.module, path)[2]
        if self.stage == 0:  # as `inject` started it
            adapter.reset(generator(own, "init", 0, injected_path(self.module, path)))
        else:
            adapter.reset(generator(own if self.seed is None else self.seed, "cascade", self.stage, path))
            adapter.begin_stage(self.stage)

    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """End a stage where one ends, or has ended at a step that was skipped."""
        if step // self.length > self.stage or step == self.total:
            self._end_stage(step, adapters)

    def _end_stage(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        self.stage, self._folded_at = self.stage + 1, step
        holds_noise: set[str] = set()
        for path in adapters:
            layer, name, _ = adapted_layer(self.module, path)
            place = path.rpartition(".adapters.")[0]
            layer.fold(name, self.blend, self.rule, keep_noise=self._persists() and place not in holds_noise)
            holds_noise.add(place)
        self._noise.lift(self.module, adapters)
        for path, adapter in adapters.items():
            self._restart(path, adapter)
            for optimizer in self.trainer.optimizers:
                (clear if self.moments == "reset" else clear_copies)(optimizer, adapter.parameters())

    def _persists(self) -> bool:
        return bool(self.noise) and self.noise_mode == "persist"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fold a stage that was cut short, and leave no noise behind."""
        if self._adapters and trainer.global_step != self._folded_at:
            self._end_stage(trainer.global_step, self._adapters)
            self.changed_at_end = True
        self._noise.lift(pl_module, self._adapters)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no noise behind; what the stage has learned stays in the adapter."""
        self._noise.lift(pl_module, self._adapters)

    def finished(self, step: int) -> bool:
        """Whether a stage has just been folded."""
        return step == self._folded_at

    def metrics(self) -> Mapping[str, float]:
        """Stages folded so far."""
        return {"stage": float(self.stage)}

    def state_dict(self) -> dict[str, Any]:
        """Which stage it is, and how large its noise."""
        own = {"stage": self.stage, "folded_at": self._folded_at, "noise": self._noise.state_dict()}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in that stage."""
        super().load_state_dict(state_dict)
        self.stage, self._folded_at = state_dict["stage"], state_dict["folded_at"]
        self._noise.load_state_dict(state_dict["noise"])
