"""RunReport: what was adapted before training; afterwards the adapter, a summary and a picture in the run folder."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lightning.callbacks.best import KeepBest
from lora_lightning.callbacks.guard import TrainingGuard
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.sparsity import SparsitySchedule
from lora_lightning.callbacks.step_counting import REPORTS, StepCallback, logs_at, outside_step, total_steps
from lora_lightning.data.sources.tables import on_hub, source_names
from lora_lightning.distributed import assembled, is_sharded, local, reshard, summed
from lora_lightning.exporters.preview import refusals
from lora_lightning.exporters.servers import preview
from lora_lightning.injection.records import adapters_named, injected_root, iter_adapters, records
from lora_lightning.injection.report import injection_table
from lora_lightning.methods import plain_settings
from lora_lightning.models.anatomy import survey
from lora_lightning.models.paths import plain
from lora_lightning.models.tasks.base import evaluate
from lora_lightning.optim.pair_optimizer import PairOptimizer
from lora_lightning.optim.wrapper import innermost
from lora_lightning.storage.atomic import write_json
from lora_lightning.storage.card import add_measured
from lora_lightning.storage.folder import save_adapter
from lora_lightning.storage.inside import shortened
from lora_lightning.training.linear_baseline import LinearBaseline, validation_batches
from lora_lightning.training.loss_trend import trend
from lora_lightning.training.rate_origin import rate_line
from lora_lightning.training.summary import draw, progress_line, summary_table
from lora_lightning.version import __version__


class RunReport(StepCallback):
    """Prints and writes what a run did.

    Works in any Lightning project with adapters; the metrics before training and of the linear baseline are there
    under AdapterModule.

    Args:
        directory: the run folder; None takes the trainer's `default_root_dir`.
        name: adapter to write.
        rate_from: where the learning rate comes from, for the header; empty says what the module knows.
        serve_with: who will serve it; what that refuses is printed before training.
    """

    phase: ClassVar[int] = REPORTS

    def __init__(
        self,
        directory: str | Path | None = None,
        name: str = "default",
        rate_from: str = "",
        serve_with: str | None = None,
    ) -> None:
        super().__init__()
        self.directory, self.name = directory, name
        self.rate_from, self.serve_with = rate_from, serve_with
        self.history: list[dict[str, float]] = []
        self.summary: dict[str, Any] | None = None
        self._start = Path.cwd()
        self._before = 0.0
        self._began = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record after every schedule has acted."""
        super().setup(trainer, pl_module, stage)
        if self.directory is not None:  # processes that the first one did not launch do not know its run folder yet
            self.directory = trainer.strategy.broadcast(str(self.directory))
        self._began = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the loggers the settings of the method and the rate."""
        super().on_train_start(trainer, pl_module)
        record = records(injected_root(pl_module)).get(self.name)
        settings = {f"method.{k}": v for k, v in plain_settings(record.method).items()} if record else {}
        for logger in trainer.loggers:
            logger.log_hyperparams({**settings, "rate": _rate(trainer), "total_steps": total_steps(trainer)})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what was adapted."""
        injection = getattr(pl_module, "injection", None)
        if injection is None or not trainer.is_global_zero:
            return
        schedules = [c for c in trainer.callbacks if isinstance(c, SparsitySchedule)]  # type: ignore[attr-defined]
        density = 1 - schedules[0].sparsity if schedules else None
        Console().print(injection_table(injection, density, survey(pl_module).frozen_bytes))
        for form, why in refusals(pl_module, self.name).items():
            print(f"export --format {form} will be refused: {why}")
        if told := rate_line(trainer, pl_module, self.rate_from):
            print(told)
        for line in preview(pl_module, self.serve_with, self.name) if self.serve_with else ():
            print(f"export --for {self.serve_with}: {line}")

    def after_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Record training numbers, as the loggers get them and as often."""
        if logs_at(trainer, step) or step == 1:
            self._record(trainer, step, validation=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record validation numbers."""
        if trainer.training or trainer.validating:
            self._record(trainer, trainer.global_step, validation=True)

    def _record(self, trainer: Trainer, step: int, validation: bool) -> None:
        wanted = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_") == validation}
        point = {"step": step, **wanted}
        if self.history[-1:] == [point]:  # a second validation within one step finds the same
            return
        self.history.append(point)
        if wanted and trainer.is_global_zero and not sys.stdout.isatty():  # a log has no bar
            print(progress_line(step, total_steps(trainer), wanted), flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the adapter, summary.json and report.png."""
        folder = Path(self.directory or trainer.default_root_dir)
        values, facts = self._final_values(trainer, pl_module), _data_facts(trainer)
        if not trainer.is_global_zero and not is_sharded(pl_module):
            return
        adapter = save_adapter(pl_module, folder / "adapter", self.name)
        self.summary = self._summarise(trainer, pl_module, values, facts, adapter)  # every process holds a shard
        if not trainer.is_global_zero:
            return
        write_json(folder / "summary.json", self.summary)
        add_measured(adapter, self.summary)
        metric = self.summary["metric"]
        levels = {
            "before training": self.summary["untrained"],
            "linear baseline": self.summary["linear_baseline"] or {},
        }
        draw(
            folder / "report.png",
            self.history,
            metric,
            {label: result[metric] for label, result in levels.items() if metric in result},
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the summary, after the progress bar has closed."""
        if stage == "fit" and self.summary is not None and trainer.is_global_zero:
            Console().print(summary_table(self.summary))

    def _final_values(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """Validation metrics of the state that is written; measured now if the last validation was earlier."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(c.changed_at_end for c in callbacks if isinstance(c, ScheduleCallback)):
            return self._measure(trainer, module)
        best = next((c for c in callbacks if isinstance(c, KeepBest) and c.step is not None), None)
        if best is not None:
            return {key.removeprefix("val_"): value for key, value in best.values.items()}
        last = next((point for point in reversed(self.history) if any(k.startswith("val_") for k in point)), None)
        if last is not None and last["step"] == trainer.global_step:
            return {key.removeprefix("val_"): value for key, value in last.items() if key != "step"}
        return self._measure(trainer, module)

    def _measure(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """Validation metrics now; none in a module without a task of ours."""
        task = getattr(module, "task", None)
        if task is None or not trainer.num_val_batches:
            return {}
        with trainer.precision_plugin.forward_context():
            context = cast(Any, module).predict_context()
            values = outside_step(
                trainer, lambda: evaluate(task, injected_root(module), validation_batches(trainer), context)
            )
        reshard(module)
        self.history.append({"step": trainer.global_step, **{f"val_{name}": value for name, value in values.items()}})
        return values

    def _summarise(
        self,
        trainer: Trainer,
        module: LightningModule,
        values: dict[str, float],
        facts: dict[str, dict[str, int]],
        adapter: Path,
    ) -> dict[str, Any]:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        baseline = next((c.result for c in callbacks if isinstance(c, LinearBaseline) and c.result is not None), None)
        guard = next((c for c in callbacks if isinstance(c, TrainingGuard)), None)
        task = getattr(module, "task", None)
        root = injected_root(module)
        record = records(root)[self.name]
        adapters = {plain(path): adapter for path, adapter in adapters_named(root, self.name).items()}
        trained = [p for p in module.parameters() if p.requires_grad]
        own = [p for a in adapters.values() for p in a.parameters() if p.requires_grad]
        with assembled(*adapters.values()):
            told = record.method.report(adapters)
        return {
            "method": type(record.method).__name__,
            "metric": task.metric if task else "loss",
            "values": values,
            "has_head": bool(task and task.has_head),
            "higher_is_better": bool(task and task.higher_is_better),
            "chance": _chance(trainer, task),
            "rate": _rate(trainer),
            "trend": trend(self.history),
            "settings": plain_settings(record.method),
            "optimizer": [type(optimizer).__name__ for optimizer in trainer.optimizers],
            "started_from": start.facts if (start := getattr(module, "start", None)) is not None else [],
            "untrained": baseline.untrained if baseline else {},
            "linear_baseline": baseline.linear if baseline else None,
            "linear_baseline_rate": baseline.rate if baseline else None,
            "trainable_parameters": sum(p.numel() for p in trained),
            "surviving_parameters": _not_zero([*own, *_folded(root, self.name)]),
            "report": told,
            "data": facts,
            "datasets": _datasets(trainer),
            "left_out": _left_out(trainer, facts),
            "changed": _changed(guard.changed() if guard else {}, root, self.name),
            "damping_raised": _damping(trainer),
            "adapter_dir": str(shortened(Path(adapter), self._start)),
            "steps": trainer.global_step,
            "seconds": round(self._before + time.monotonic() - self._began, 1),
            "seed": record.seed,
            "threads": torch.get_num_threads(),
            "versions": {
                "lora_lightning": __version__,
                **{name: version(name) for name in ("torch", "lightning", "transformers", "datasets")},
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """The curves so far and the time they took."""
        return {"history": self.history, "seconds": self._before + time.monotonic() - self._began}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves of a resumed run."""
        self.history, self._before = list(state_dict["history"]), state_dict["seconds"]


def _chance(trainer: Trainer, task: Any) -> float | None:
    """Fraction of validation examples of the most frequent class, where the task's metric is an accuracy of classes."""
    data: Any = getattr(trainer, "datamodule", None)
    if task is None or task.metric != "accuracy" or not task.has_head or not hasattr(data, "examples"):
        return None
    if "validation" not in data.ready or "labels" not in data.examples("validation").column_names:
        return None
    labels = data.examples("validation").with_format(None)["labels"][:]
    counts = Counter(label for label in labels if not isinstance(label, list))  # lists are of tokens
    return max(counts.values()) / counts.total() if counts else None


def _rate(trainer: Trainer) -> float | None:
    """The full rate of the first group of the first optimizer."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return float(groups[0].get("initial_lr", groups[0]["lr"])) if groups else None


def _data_facts(trainer: Trainer) -> dict[str, dict[str, int]]:
    """Numbers of examples, where the data module counts them; all processes take part."""
    facts: Callable[[], dict[str, dict[str, int]]] | None = getattr(getattr(trainer, "datamodule", None), "facts", None)
    return facts() if facts else {}


def _datasets(trainer: Trainer) -> list[str]:
    """Ids on the hub of the training data; none for files."""
    sources = getattr(getattr(trainer, "datamodule", None), "sources", None)
    return [name.partition(":")[0] for name in source_names(getattr(sources, "train", None)) if on_hub(name)]


def _left_out(trainer: Trainer, facts: dict[str, dict[str, int]]) -> dict[str, str]:
    """Rows that on_error: skip left out, by kind and with the line of the first, where the data module says so."""
    sources = getattr(getattr(trainer, "datamodule", None), "sources", None)
    told = {split: sources.told(split) for split in facts} if sources is not None else {}
    return {split: text for split, text in told.items() if text}


def _damping(trainer: Trainer) -> dict[str, int]:
    """Steps at which an optimizer over pairs had to raise its damping, by pair; wrappers are looked through."""
    optimizers = [innermost(optimizer) for optimizer in trainer.optimizers]
    return {k: v for o in optimizers if isinstance(o, PairOptimizer) for k, v in o.report().items()}


def _folded(root: nn.Module, name: str) -> list[torch.Tensor]:
    """What an adapter has folded."""
    return [t for _, layer in iter_adapters(root) if name in layer.shifts for t in layer.shifts[name].buffers()]


def _not_zero(tensors: Sequence[Tensor]) -> int:
    """Entries that are not zero; a shard counts where it lies, a full tensor once."""
    shards = [t for t in tensors if isinstance(t, DTensor)]
    counts = torch.tensor([float(sum(int(torch.count_nonzero(local(t))) for t in shards))], dtype=torch.float64)
    rest = sum(int(torch.count_nonzero(t)) for t in tensors if not isinstance(t, DTensor))
    return rest + int(summed(counts, shards))


def _changed(distances: dict[str, float], root: nn.Module, name: str) -> dict[str, float]:
    """The guard's distances, but |change| / |weight| for a layer whose adapter has folded its own away."""
    found = dict(distances)
    for path, layer in iter_adapters(root):
        if name in layer.shifts:
            found = {key: value for key, value in found.items() if f"{plain(path)}.adapters.{name}." not in key}
            original = layer.pretrained_weight(torch.float64).cpu()
            change = layer.merged_weight(name, torch.float64).cpu() - original
            found[f"{plain(path)} (folded)"] = float(change.norm() / original.norm().clamp_min(1e-30))
    return found
