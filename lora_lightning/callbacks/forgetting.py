"""Forgetting: what a run learns of its target, and what it loses of a source, before, during and after training.

The measurement of Biderman et al., 2024, arXiv:2405.09673. L(t) is a metric on the target after t steps, F(t) one on
the source; forgetting is F(t) - F(0), and the two are set against each other.

{"format": ..., "label": "LoRA", "sources": ["source"], "target": "target",
 "records": [{"step": 0, "when": "before", "sets": {"source": {"loss": 1.5}, "target": {...}}}, ...]}

Departs from the paper: nothing known. Sets and metrics are the user's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lora_lightning.callbacks.meters import Meters
from lora_lightning.callbacks.set_values import Measure, set_values
from lora_lightning.callbacks.step_counting import REPORTS, StepCallback
from lora_lightning.errors import DataError, ResumeError, SettingsError, check
from lora_lightning.injection.records import records
from lora_lightning.storage.atomic import write_json
from lora_lightning.storage.recorded import content_of

FORMAT = "lora_lightning forgetting 1"
FILENAME = "forgetting.json"
TARGET = "target"
VALIDATION = "validation"
When = Literal["before", "during", "after"]
Set = LightningDataModule | Iterable[Any]


@dataclass(frozen=True)
class Measured:
    """All sets at one time."""

    step: int
    when: When
    sets: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Course:
    """What one run learned and forgot."""

    label: str
    sources: tuple[str, ...]
    target: str | None
    records: tuple[Measured, ...]

    def metrics(self) -> list[str]:
        """Names of metrics that every set has, in the order of the first one."""
        sets = self.records[0].sets.values() if self.records else ()
        names = [list(values) for values in sets]
        return [name for name in names[0] if all(name in other for other in names)] if names else []

    def values(self, name: str, metric: str) -> list[tuple[int, float]]:
        """Step and value of a metric on a set, over the run; the last one is of the state that the run ended with."""
        return [(one.step, one.sets[name][metric]) for one in self.records if metric in one.sets.get(name, {})]

    def changes(self, name: str, metric: str) -> list[tuple[int, float]]:
        """Step and change since before training."""
        found = self.values(name, metric)
        return [(step, value - found[0][1]) for step, value in found]


class Forgetting(StepCallback):
    """Measures sets before the first step, while training, and at its end, into a file that `analyse` draws.

    Works in any Lightning project, with adapters and without. Of AdapterModule, all metrics of its task are measured. A
    module of another kind is asked by `measure_batches(batches)`, where it has that; else what its `validation_step`
    logs or returns counts. Training stays as it was: modes, random numbers and states of metrics come back. Every
    process takes part. A resumed run keeps what was measured before training.

    Args:
        source: what may be forgotten: a datamodule, whose validation data it is, or a loader; in Python also several by
            name.
        target: what is to be learned: "validation" for the run's own validation data, another set, or None to leave it
            out.
        every_n_steps: optimizer steps from one time to the next; None measures at each validation.
        measure: `measure(module, batches)` gives the values, by metric, in place of the module.
        label: name of the run in pictures; None takes the method's, or "full fine-tuning".
        directory: folder of the file; None takes the run folder.
        filename: name of the file.

    Raises:
        SettingsError: a value outside its rule, or nothing that says what to measure.
        DataError: a set without batches.
    """

    phase: ClassVar[int] = REPORTS

    def __init__(
        self,
        source: Set | Mapping[str, Set],
        target: Set | Literal["validation"] | None = VALIDATION,
        every_n_steps: int | None = None,
        measure: Measure | None = None,
        label: str | None = None,
        directory: str | Path | None = None,
        filename: str = FILENAME,
    ) -> None:
        super().__init__()
        self.sources: dict[str, Any] = dict(source) if isinstance(source, Mapping) else {"source": source}
        self.target, self.every_n_steps, self.measure = target, every_n_steps, measure
        self.label, self.directory, self.filename = label, directory, filename
        check(bool(self.sources), self, "sources", "name at least one set that may be forgotten.")
        check(TARGET not in self.sources, self, "sources", f'"{TARGET}" is the name of what is learned; take another.')
        check(every_n_steps is None or every_n_steps >= 1, self, "every_n_steps", "it must be at least 1, or null.")
        for name, one in (*self.sources.items(), (TARGET, target)):
            _check_set(name, one)
        self._records: list[dict[str, Any]] = []
        self._resumed = False

    @property
    def state_key(self) -> str:
        """Several of them keep their records apart, by file."""
        return self._generate_state_key(filename=self.filename)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure before the first step.

        Raises:
            ResumeError: the run goes on from a checkpoint that does not say what was measured before training.
        """
        super().on_train_start(trainer, pl_module)
        self.label = self.label or _label(pl_module)
        if self.target == VALIDATION and trainer.val_dataloaders is None:
            raise SettingsError(
                'Forgetting.target is "validation", and the run has no validation data; name a set, or null to leave '
                "it out."
            )
        if not trainer.global_step:
            self._records = []
            self._record(trainer, pl_module, "before")
        elif not self._resumed and not self._records:
            raise ResumeError(
                f"Forgetting: the run goes on from step {trainer.global_step}, and its checkpoint does not say what "
                "was measured before the first one. Leave the callback out, or begin the run anew with it."
            )

    def after_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Measure where the step is one of `every_n_steps`."""
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            self._record(trainer, pl_module, "during")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, unless steps say when."""
        if self.every_n_steps is None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._record(trainer, pl_module, "during")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the state that the run ends with, which need not be that of the last step."""
        self._record(trainer, pl_module, "after")

    def _record(self, trainer: Trainer, module: LightningModule, when: When) -> None:
        """Measure all sets, and write the file, so that a killed run keeps what was measured."""
        began, step = time.monotonic(), trainer.global_step
        if when == "during" and self._records and self._records[-1]["step"] == step:
            return
        sets = {
            name: set_values(trainer, module, partial(_batches, trainer, name, one), f"measuring {name}", self.measure)
            for name, one in self._sets().items()
        }
        kept = [one for one in self._records if one["step"] < step or (when == "after" and one["when"] != "after")]
        self._records = [*kept, {"step": step, "when": when, "sets": sets}]
        if trainer.is_global_zero:
            content = {
                "format": FORMAT,
                "label": self.label,
                "sources": list(self.sources),
                "target": None if self.target is None else TARGET,
                "records": self._records,
            }
            write_json(Path(self.directory or trainer.default_root_dir) / self.filename, content)
        self._log(trainer, step)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Meters) and not trainer.validating:
                callback.leave_out(time.monotonic() - began)

    def _sets(self) -> dict[str, Any]:
        return {**self.sources, **({} if self.target is None else {TARGET: self.target})}

    def _log(self, trainer: Trainer, step: int) -> None:
        """To all loggers: each value as SET/METRIC, and what sources have changed by as SET/METRIC_change."""
        last, first = self._records[-1]["sets"], self._records[0]["sets"]
        found = {f"{name}/{metric}": value for name, values in last.items() for metric, value in values.items()}
        for name in self.sources:
            for metric, value in last[name].items():
                if metric in first[name]:
                    found[f"{name}/{metric}_change"] = value - first[name][metric]
        for logger in trainer.loggers:
            logger.log_metrics(found, step)

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        return {"records": self._records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was measured before; above all, before training."""
        self._records, self._resumed = list(state_dict["records"]), True


def read_course(file: Path) -> Course:
    """What a file that Forgetting wrote holds.

    Raises:
        DataError: missing, damaged, or another kind of file.
    """
    return content_of(file, FORMAT, "Forgetting", FILENAME, _course)


def _course(content: dict[str, Any]) -> Course:
    found = tuple(Measured(one["step"], one["when"], one["sets"]) for one in content["records"])
    return Course(str(content["label"]), tuple(content["sources"]), content["target"], found)


def _batches(trainer: Trainer, name: str, one: Any) -> Iterable[Any]:
    """The batches of a set, at least one."""
    if isinstance(one, LightningDataModule):
        one.setup("validate")
        found: Iterable[Any] = one.val_dataloader()
    elif one == VALIDATION:
        found = _validation(trainer)
    else:
        found = one
    batches = iter(found)
    first = list(itertools.islice(batches, 1))
    if not first:
        raise DataError(f"Forgetting: the set {name} has no batches, so nothing can be measured on it.")
    return itertools.chain(first, batches)


def _validation(trainer: Trainer) -> Iterable[Any]:
    """Batches of the run's own validation, of its first loader, as many as a validation has."""
    loaders: Any = trainer.val_dataloaders
    loader: Iterable[Any] = next(iter(loaders)) if isinstance(loaders, list | tuple) else loaders
    numbers = trainer.num_val_batches
    limit = None if not numbers or numbers[0] == float("inf") else int(numbers[0])
    return itertools.islice(loader, limit)


def _check_set(name: str, one: Any) -> None:
    if type(one) is LightningDataModule:  # what a config's parser makes of a table of names
        raise SettingsError(
            f"Forgetting: the set {name} is a datamodule without data. A config names one datamodule by class_path, "
            "and another Forgetting with another filename measures another set. In Python several go by name."
        )
    known = one is None or one == VALIDATION or isinstance(one, LightningDataModule)
    if not known and (isinstance(one, str) or not hasattr(one, "__iter__") or iter(one) is one):
        raise SettingsError(
            f"Forgetting: the set {name} is {one!r:.80}; it must be a datamodule or a loader, which can be read again "
            "and again."
        )


def _label(module: LightningModule) -> str:
    """The name of the first method injected into the model."""
    for part in module.modules():
        for record in records(part).values():
            return type(record.method).__name__
    return "full fine-tuning"
