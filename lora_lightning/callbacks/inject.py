"""InjectAdapters: adapters in a LightningModule that knows nothing about them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.callbacks.beside import refuse_beside
from lora_lightning.callbacks.group_settings import apply_group_settings
from lora_lightning.callbacks.guard import TrainingGuard
from lora_lightning.callbacks.project_checkpoint import (
    SaveUnderProjectNames,
    accept_project_names,
    check_averages,
    load_section,
)
from lora_lightning.callbacks.step_counting import REPORTS, inside_window, order_callbacks
from lora_lightning.distributed import is_sharded
from lora_lightning.errors import AdapterStateError, TrainingError
from lora_lightning.injection.inject import ignore_adapter_buffers, inject
from lora_lightning.injection.records import adapters_named, injected_root, iter_adapters, records
from lora_lightning.injection.report import InjectionReport
from lora_lightning.injection.targets import Targets
from lora_lightning.methods import Method
from lora_lightning.models.anatomy import Heads
from lora_lightning.optim.clipping import clip_groups
from lora_lightning.optim.groups import factor_pairs
from lora_lightning.optim.pair_optimizer import PairOptimizer
from lora_lightning.optim.wrapper import innermost
from lora_lightning.storage.folder import save_adapter


class WriteAdapter(Callback):
    """Writes the adapter when training has ended and every other callback has finished with it.

    Args:
        directory: the adapter folder.
        name: which adapter.
    """

    phase: ClassVar[int] = REPORTS

    def __init__(self, directory: str | Path, name: str = "default") -> None:
        self.directory, self.name = directory, name

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it."""
        if not (trainer.is_global_zero or is_sharded(pl_module)):
            return
        folder = save_adapter(pl_module, self.directory, self.name)
        if trainer.is_global_zero:
            print(f"adapter: {folder}")


class InjectAdapters(Callback):
    """Injects before training, and does what AdapterModule would: freezes, prunes optimizer groups, adds callbacks.

    The project keeps its module, data and trainer. Its checkpoints keep their contents: base weights stay under their
    own names, and the adapter lies in a section beside them.

    Args:
        method: the adapter method and its settings.
        targets: "all-linear", a scope ("attention", "mixer", "mlp", "experts", "vision", "vision.mlp", ...), a list of
            name suffixes and scopes, or one regular expression. Of a vision-language model, a scope without a tower
            means the language tower. "none" leaves training to `also_train`.
        exclude: names of layers to leave out.
        overrides: other settings for some layers.
        also_train: base parameters that are fully trained: "heads" of a Hugging Face model inside, "all", or names.
        seed: seed of the start values.
        untie: give an output layer that shares the embedding's weight one of its own; see `inject`.
        train_tokens: ids of known tokens whose rows train; see `inject`.
        directory: folder the adapter is written to when the fit ends; None writes none.
        checkpoint: "full" keeps the project's own contents beside the adapter; "adapter" drops everything frozen.
    """

    def __init__(
        self,
        method: Method,
        targets: Targets = "all-linear",
        exclude: Sequence[str] = (),
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        also_train: Heads = "heads",
        seed: int | None = None,
        directory: str | Path | None = None,
        checkpoint: Literal["full", "adapter"] = "full",
        train_tokens: list[int] | dict[str, list[int]] | None = None,
        untie: bool = False,
    ) -> None:
        self.method, self.targets, self.exclude, self.overrides = method, targets, exclude, overrides
        self.also_train, self.seed, self.directory, self.checkpoint = also_train, seed, directory, checkpoint
        self.train_tokens: Any = train_tokens or []
        self.untie = untie
        self.name = "default"
        self.report: InjectionReport | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Inject now, or right after a lazy module has built itself, and add the method's callbacks.

        Raises:
            SettingsError: a callback that averages weights stands before this one, or one cannot work beside adapters.
        """
        check_averages(trainer.callbacks, self)  # type: ignore[attr-defined]
        if stage == "fit":
            refuse_beside(trainer.callbacks, pl_module)  # type: ignore[attr-defined]
        if next(pl_module.parameters(), None) is not None:
            self._inject(pl_module)
        else:
            self._inject_after_building(pl_module)
        self._add_callbacks(trainer, pl_module, stage)

    def _inject_after_building(self, module: LightningModule) -> None:
        build = module.configure_model

        @functools.wraps(build)
        def configure_model() -> None:
            build()
            self._inject(module)

        module.configure_model = configure_model  # type: ignore[method-assign]

    def _inject(self, module: LightningModule) -> None:
        if any(True for _ in iter_adapters(module)):
            there = records(injected_root(module)).get(self.name)
            if there is None or there.method != self.method:
                other = there.method if there else "another name"
                raise AdapterStateError(
                    f"the module has adapters already ({other}), not those of {self.method}; eject them first, or "
                    "leave InjectAdapters out."
                )
            return
        self.report = inject(
            module,
            self.method,
            self.targets,
            self.exclude,
            self.overrides,
            self.also_train,
            name=self.name,
            seed=self.seed,
            train_tokens=self.train_tokens,
            untie=self.untie,
        )
        print(self.report)
        ignore_adapter_buffers(module)
        if self.checkpoint == "adapter":
            module.strict_loading = False
        cast(nn.Module, module).register_load_state_dict_pre_hook(self._accept_project_names)
        self._add_penalty(module)

    def _add_penalty(self, module: LightningModule) -> None:
        if type(self.method).penalty is Method.penalty:
            return
        step = module.training_step

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            penalty = self.method.penalty(adapters_named(injected_root(module), self.name))
            if penalty is None or output is None:
                return output
            return output + penalty if isinstance(output, Tensor) else {**output, "loss": output["loss"] + penalty}

        module.training_step = training_step  # type: ignore[method-assign]

    def _add_callbacks(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        given: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        wanted: list[Callback] = [*self.method.callbacks(), TrainingGuard()]
        wanted.append(SaveUnderProjectNames(self.name, self.checkpoint))
        if self.directory is not None:
            wanted.append(WriteAdapter(self.directory, self.name))
        ours = [c for c in wanted if not any(isinstance(other, type(c)) for other in given)]
        trainer.callbacks = [*given, *ours]  # type: ignore[attr-defined]
        order_callbacks(trainer)
        for callback in ours:
            callback.setup(trainer, module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take frozen parameters out of optimizers that were given `self.parameters()`; hand over factor pairs.

        Groups that the method declares get their rates, decay and clipping.

        Raises:
            TrainingError: an optimizer has nothing left to train; a group cannot have its settings.
        """
        for optimizer in trainer.optimizers:
            given = [p for group in optimizer.param_groups for p in group["params"]]
            frozen = sum(not p.requires_grad for p in given)
            if frozen and frozen == len(given):
                raise TrainingError(
                    f"all {frozen} parameters of the module's {type(optimizer).__name__} are frozen now; name what it "
                    "is to train in InjectAdapters.also_train, or take the optimizer out."
                )
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p.requires_grad]
            if frozen and trainer.is_global_zero:
                print(f"  {type(optimizer).__name__}: {frozen} frozen tensors taken out, {len(given) - frozen} train")
            core = innermost(optimizer)
            if isinstance(core, PairOptimizer) and not core.pairs:
                core.bind_pairs(factor_pairs(pl_module))
        apply_group_settings(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Clip what a method wants clipped by itself."""
        if not inside_window(trainer):
            clip_groups(optimizer)

    def _accept_project_names(self, module: LightningModule, state_dict: dict[str, Any], *_: Any) -> None:
        accept_project_names(module, self.name, state_dict)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """What Lightning names in its warning where a run that reads the checkpoint lacks this callback."""
        return "InjectAdapters (without it the adapter in this file is not loaded)"

    def state_dict(self) -> dict[str, Any]:
        """The adapter's name: a callback without a state is not missed."""
        return {"adapter": self.name}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load the adapter's section, exactly.

        Raises:
            ResumeError: the checkpoint has no adapter, or another one.
        """
        load_section(pl_module, self.name, checkpoint)
