"""Cascade: training in stages. At the end of each the update is folded away and the adapter starts again at zero."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim import Optimizer

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.folded import DenseUpdate, FactoredUpdate, FoldedUpdate
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.adapters.layers.quantized import QuantizedBase
from lora_lightning.callbacks.noise import WRITES_NOISE, NoiseInjection, StageNoise, is_zero
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.step_counting import MASKS, STAGE_ENDS, adapted_layers, injected_path
from lora_lightning.errors import SettingsError, check
from lora_lightning.injection.plan import built
from lora_lightning.methods import Method
from lora_lightning.optim.state import clear, clear_copies, prune
from lora_lightning.optim.warmup import StageEnds, WarmUp
from lora_lightning.seeds import generator
from lora_lightning.stages import CascadeFields, check_cascade

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class CascadeSettings(CascadeFields):
    """What the callback takes beside the settings that methods have."""

    seed: int | None = None
    """Seed of starts, noise and what else is drawn for a stage; null takes the adapter's."""


class Cascade(CascadeSettings, ScheduleCallback):
    """Trains a chain of small updates, each on top of those before, at the memory of one.

    At the end of a stage, which falls on an optimizer step, the update is blended into what has been folded, the
    adapter is re-initialised in place and its optimizer state forgotten. A last stage that is cut short is folded as
    well, so the adapter that is written holds every stage. Low-rank updates are kept as factors where these are fewer
    numbers than the weight. Base weights are written only for other updates, or for noise.

    With blend below 1, or noise, the function jumps at the end of a stage; not where the remainder of an update stays
    in its adapter. Which layers train in a stage, and with what rank, follows from the stage's number. Validation at a
    stage's end sees the folded weights without noise, validation inside a stage its noise and its update. Works in any
    Lightning project.

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
        self.length = 0
        """Optimizer steps of a stage, once training has begun."""
        self.stage = 0
        """Stages folded so far."""
        self._folded_at = 0
        self._layers: dict[str, tuple[AdaptedLayer, str, int]] = {}
        self._lost: dict[str, float] = {}
        self._log_error = 0.0
        self._noise = StageNoise(self.noise)

    @property
    def restarts(self) -> bool:
        """Whether a stage begins at zero; else with what is left of the update before."""
        return self.remainder == "restart" or self.blend == 1

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
        return StageEnds(self.stage_length(trainer), self.lr, self.rewarm_steps, self.lr_floor)

    def on_start(self, total: int | None, adapters: Mapping[str, Adapter]) -> None:
        """Make room for folded updates, and put on the noise of the stage; a resumed run finds the updates loaded."""
        self._check_module()
        self.length = self.stage_length(self.trainer)
        check(self.length >= 2, self, "stage_epochs", "an epoch has one optimizer step; a stage needs at least 2.")
        stages = math.ceil(total / self.length) if total is not None else None
        if self.blend < 1 and stages == 1:
            log.warning("Cascade: one stage only; blend=%g shrinks its update by that.", self.blend)
        self._layers = adapted_layers(self.module, adapters)
        layers = [self._layers[path][:2] for path in adapters]
        if not self.resumed:
            self._start_anew([cast(FoldedUpdate, layer.shifts[name]) for layer, name in layers if name in layer.shifts])
        for (path, adapter), (layer, name) in zip(adapters.items(), layers, strict=True):
            self._open(layer, name, path, adapter, stages)
        if not self.resumed and self.stage_ranks is not None:
            for adapter in adapters.values():
                self._mask(adapter)
        self._let_rest()
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
        if not self.restarts and not adapter.shrink(1.0):
            raise SettingsError(
                f'Cascade.remainder is "{self.remainder}", but the update of {path} ({type(adapter).__name__}) cannot '
                'be made smaller by its factors; take "restart".'
            )
        self._check_rank(path, adapter)
        persists = bool(self.noise) and self.noise_mode == "persist"
        if name not in layer.shifts:
            factors, base = layer.low_rank(name), layer.base_layer
            numbers = self._columns(stages, factors[0].shape[-2] if factors else None) * (base.d_in + base.d_out)
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

    def _columns(self, stages: int | None, rank: int | None) -> float:
        """Rank of all that the run folds, as far as it is bounded."""
        if rank is None:
            return math.inf
        ranks = self.stage_ranks or [rank]
        total = math.inf if stages is None else sum(ranks[:stages]) + max(0, stages - len(ranks)) * ranks[-1]
        return total if self.log_rank is None else min(total, self.log_rank)

    def _check_rank(self, path: str, adapter: Adapter) -> None:
        if self.stage_ranks is None:
            return
        if adapter.rank_mask is None:
            raise SettingsError(
                f"Cascade.stage_ranks is {self.stage_ranks}, but the rank components of {path} "
                f"({type(adapter).__name__}) cannot be masked; take a method with a rank mask, such as LoRA, or null."
            )
        most = adapter.rank_mask.numel()
        rule = f"the adapter of {path} has rank {most}, so each must be at most {most}."
        check(max(self.stage_ranks) <= most, self, "stage_ranks", rule)

    def _mask(self, adapter: Adapter) -> None:
        """Leave as many rank components on as the stage trains."""
        if self.stage_ranks is not None and adapter.rank_mask is not None:
            rank = self.stage_ranks[min(self.stage, len(self.stage_ranks) - 1)]
            adapter.rank_mask.copy_(torch.arange(adapter.rank_mask.numel()) < rank)

    def active_in(self, stage: int) -> frozenset[str]:
        """Paths of the adapters that train in a stage."""
        paths = sorted(self._adapters)
        if self.active_layers is None:
            return frozenset(paths)
        most = len(paths)
        rule = f"{most} layers are adapted, so it must be at most {most}, or null for all."
        check(self.active_layers <= most, self, "active_layers", rule)
        seed = self._layers[paths[0]][2] if self.seed is None else self.seed
        order = torch.randperm(most, generator=generator(seed, "layers", stage, ""))
        return frozenset(paths[i] for i in order[: self.active_layers].tolist())

    def _let_rest(self) -> None:
        active = self.active_in(self.stage)
        for path, adapter in self._adapters.items():
            adapter.resting = path not in active

    def on_gradients(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Drop the gradients of layers that rest, so that no optimizer moves them; sharding and buckets stay."""
        for adapter in adapters.values():
            if adapter.resting:
                for parameter in adapter.parameters():
                    parameter.grad = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the noise of a stage on with its first batch, so that validation between stages sees none."""
        if self.noise and not self._noise.placed:
            layers = self._layers
            # asked first: the original is then still where the layer is
            fresh = [path for path, (layer, name, _) in layers.items() if is_zero(self._adapters[path], layer, name)]
            self._noise.place(pl_module, self._adapters, self.stage, self.seed)
            for path in fresh:  # an adapter may start at a norm of the weight as it is now
                self._restart(path, self._adapters[path])

    def _restart(self, path: str, adapter: Adapter) -> None:
        own = self._layers[path][2]
        if self.stage == 0:  # as `inject` started it
            adapter.reset(generator(own, "init", 0, injected_path(self.module, path)))
        else:
            adapter.reset(generator(own if self.seed is None else self.seed, "cascade", self.stage, path))
            adapter.begin_stage(self.stage)
        self._mask(adapter)

    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """End a stage where one ends, or has ended at a step that was skipped."""
        if step // self.length > self.stage or (step == self.total and self.restarts):
            self._end_stage(step, adapters)

    @torch.no_grad()
    def _end_stage(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        active = {path: adapter for path, adapter in adapters.items() if not adapter.resting}
        self.stage, self._folded_at = self.stage + 1, step
        weight = self.blend * self.blend_decay**self.stage
        holds_noise: set[str] = set()
        for path in active:
            layer, name, _ = self._layers[path]
            place = path.rpartition(".adapters.")[0]
            layer.fold(name, weight, self.rule, keep_noise=self._persists() and place not in holds_noise)
            holds_noise.add(place)
            self._compress(path, layer.shifts[name])
        self._noise.lift(self.module, adapters)
        for path, adapter in active.items():
            if self.restarts:
                self._restart(path, adapter)
            else:
                adapter.shrink((1 - self.blend) ** (1 if self.remainder == "shrink" else 2))
            for optimizer in self.trainer.optimizers:
                self._forget(optimizer, path, adapter)
        self._let_rest()

    def _compress(self, path: str, update: nn.Module) -> None:
        if self.log_rank is None or not isinstance(update, FactoredUpdate):
            return
        lost, size = update.compress(self.log_rank)
        if size:
            self._lost[path] = self._lost.get(path, 0.0) + lost
            self._log_error = max(self._log_error, self._lost[path] / size)

    def _forget(self, optimizer: Optimizer, path: str, adapter: Adapter) -> None:
        if self.moments == "reset":
            clear(optimizer, adapter.parameters())
            return
        clear_copies(optimizer, adapter.parameters())
        if self.moments == "keep":
            return
        seed = self._layers[path][2] if self.seed is None else self.seed
        for name, parameter in adapter.named_parameters():
            draw = partial(_drawn, seed, self.stage, f"{path}.{name}")
            prune(optimizer, parameter, self.pruned_fraction, self.pruned_by, self.pruned_apart, draw)

    def _persists(self) -> bool:
        return bool(self.noise) and self.noise_mode == "persist"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fold a stage that was cut short, and leave no noise behind."""
        if self._adapters and trainer.global_step != self._folded_at and self.restarts:
            self._end_stage(trainer.global_step, self._adapters)
            self.changed_at_end = True
        self._noise.lift(pl_module, self._adapters)
        if trainer.is_global_zero:
            self._tell()
        if self.active_layers is not None:  # nothing is to be trained in a stage that never comes
            for adapter in self._adapters.values():
                adapter.resting = True

    def _tell(self) -> None:
        """Print what a run has left out: layers that were never drawn, and what cut factors have lost."""
        stages = self.stage if self.restarts else self.stage + 1
        never = set(self._adapters).difference(*(self.active_in(stage) for stage in range(stages)))
        if never:
            print(
                f"note: {type(self).__name__}.active_layers is {self.active_layers}: {len(never)} of "
                f"{len(self._adapters)} layers were drawn in none of {stages} stages, so they did not train"
            )
        if self._lost:
            print(
                f"{type(self).__name__}: factors of {len(self._lost)} layers were cut to rank {self.log_rank}; at most "
                f"{self._log_error:.2e} of a layer's update was lost"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """No layer rests any more."""
        for adapter in self._adapters.values():
            adapter.resting = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no noise behind; what the stage has learned stays in the adapter."""
        self._noise.lift(pl_module, self._adapters)

    def finished(self, step: int) -> bool:
        """Whether a stage has just been folded."""
        return step == self._folded_at or not self.restarts

    def metrics(self) -> Mapping[str, float]:
        """Stages folded so far, and the largest relative error of factors that were cut."""
        own = {"stage": float(self.stage)}
        return own if self.log_rank is None else own | {"log_error": self._log_error}

    def state_dict(self) -> dict[str, Any]:
        """Which stage it is, and how large its noise."""
        own = {"stage": self.stage, "folded_at": self._folded_at, "noise": self._noise.state_dict()}
        own |= {"lost": self._lost, "log_error": self._log_error}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in that stage."""
        super().load_state_dict(state_dict)
        self.stage, self._folded_at = state_dict["stage"], state_dict["folded_at"]
        self._noise.load_state_dict(state_dict["noise"])
        self._lost, self._log_error = dict(state_dict.get("lost", {})), state_dict.get("log_error", 0.0)


def _drawn(seed: int, stage: int, path: str, purpose: str) -> torch.Generator:
    """The numbers of one mask."""
    return generator(seed, f"prune {purpose}", stage, path)
