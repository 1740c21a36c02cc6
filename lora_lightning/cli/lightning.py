"""The command line: LightningCLI, configured for adapters, runs in numbered folders, and short names.

command_line.read -> plugins.load -> LightningCLI(AdapterModule, any data module) -> fit | validate | test | predict
"""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer

import lora_lightning.data
import lora_lightning.training.strategies.sharded  # noqa: F401 - and of our strategies
from lora_lightning import plugins
from lora_lightning.callbacks.step_counting import REPORTS
from lora_lightning.cli import command_line, environment, former_names, loggers
from lora_lightning.cli.auto_rate import AutoRate, auto_rate
from lora_lightning.cli.given_settings import origin_of, shown_origin
from lora_lightning.cli.hints import hide_hints
from lora_lightning.cli.parser import Parser
from lora_lightning.cli.parser_errors import refused as refusal
from lora_lightning.cli.preflight import monitors
from lora_lightning.cli.run_folder import RunFolder
from lora_lightning.cli.run_paths import as_given, located
from lora_lightning.cli.system_errors import system_error
from lora_lightning.cli.trust import trusted_config
from lora_lightning.errors import (
    LoraLightningError,
    SettingsError,
    TrainingError,
    raised_in,
    wrapped_error,
)
from lora_lightning.injection.records import injected_root, iter_adapters
from lora_lightning.methods import Method
from lora_lightning.models.pretrained import check_reachable, resolve
from lora_lightning.models.random import is_random
from lora_lightning.registry import TRAINING_VERBS
from lora_lightning.start_values import Start
from lora_lightning.storage.inside import shortened
from lora_lightning.training.assembly import NAME
from lora_lightning.training.module import AdapterModule
from lora_lightning.training.predictions import WritePredictions
from lora_lightning.training.range_test import RangeTest
from lora_lightning.training.run_bar import RunBar
from lora_lightning.training.run_report import RunReport
from lora_lightning.training.save_often import SaveOften, stopped
from lora_lightning.training.start import tokenizer_of
from lora_lightning.training.trainer_checkpoints import AtomicCheckpoints, LastCheckpoint

_CLASSES = {
    "lora_lightning_optimizers": Optimizer,
    "lora_lightning_callbacks": Callback,
    "lora_lightning_datamodules": LightningDataModule,
}
_VERB = {"allow_abbrev": False, "print_config": "--print_config"}
_PARSER = {"prog": "lora_lightning", "default_env": True, "env_prefix": "LORA_LIGHTNING", **_VERB}
_DEFAULTS = {"enable_model_summary": False}
_START = "python -m lora_lightning"
_REST = "[--config NAME|PATH ...] [-p no:NAME] [--SETTING VALUE ...]"
_USAGE = {verb: f"{_START} {verb} [--run DIR [--trust-run]] {_REST}" for verb in TRAINING_VERBS} | {
    "fit": f"{_START} fit [--resume DIR] {_REST}",
    "predict": f"{_START} predict [--run DIR [--trust-run]] [--output FILE.csv|FILE.jsonl] {_REST}",
}


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the run folder, whatever the loggers are, once nothing has been refused."""

    phase = REPORTS

    def __init__(self, *args: Any, run_folder: RunFolder, **options: Any) -> None:
        super().__init__(*args, **options)
        self.run_folder = run_folder
        self._config = self.config

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: a run that is refused changes no file."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file; a run that goes on from another directory keeps the names that it was begun with."""
        self._config = as_given(self.config, Path(trainer.default_root_dir))
        if (name := self._config.model.pretrained) != self.config.model.pretrained:
            root: Any = injected_root(pl_module)
            root.config._name_or_path = name
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def on_train_batch_end(self, *_: Any) -> None:
        """From here on there is something to keep."""
        self.run_folder.started = True

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002 - Lightning's signature
        """Write the file."""
        self.parser.save(self._config, Path(trainer.default_root_dir) / "config.yaml", skip_none=False, overwrite=True)


class CLI(LightningCLI):
    """Fit in a new run folder, or in the one to resume; the other verbs read a run and write nothing there."""

    def __init__(self, line: command_line.Line, run: bool = True, folder: RunFolder | None = None) -> None:
        self.line = line
        self.run_folder = folder or RunFolder()
        self.auto_rate: AutoRate | None = None
        plugins.load_classes(plugins.load(line.blocked), _CLASSES)
        set_parsing_settings(docstring_parse_attribute_docstrings=True, subclasses_enabled=[Method, Start])
        verbs = {line.verb: {**_VERB, "usage": _USAGE[line.verb]}} if run and line.verb else {}
        super().__init__(
            AdapterModule,
            LightningDataModule,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={**_PARSER, **verbs},
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False, "run_folder": self.run_folder},
            seed_everything_default=0,
            trainer_defaults=dict(_DEFAULTS),
            args=_believed(line),
            run=run,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # a static method there
        """The one verb that is asked for: each has a parser of its own, which takes a third of a second to build."""
        every = LightningCLI.subcommands()
        return {verb: every[verb] for verb in every if verb == self.line.verb}

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Our own settings."""
        parser.add_argument(
            "--checkpoint_minutes",
            type=float | None,
            default=5.0,
            help="Minutes between two last.ckpt of a fit; null writes them where it validates only.",
        )
        parser.add_argument(
            "--serve_with",
            type=Literal["vllm", "llama.cpp"] | None,
            default=None,
            help="Who will serve the adapter; fit and doctor say before training what it refuses (see export --for).",
        )

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse the words given; `sys.argv` is another matter."""
        used = environment.used(parser, self.line.verb)
        self.config = parser.parse_args(args)
        for text in used:
            print(text)

    def before_instantiate_classes(self) -> None:
        """A data module without a tokenizer or an image processor gets the adapter's, or else the model's."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        if self.subcommand == "fit" and (missing := loggers.problems(config.trainer.get("logger"))):
            raise SettingsError("; ".join(missing))
        self.auto_rate = auto_rate(config.model.get("optimizer"), config.model.get("method"))
        resolve(config.model.pretrained)
        settings = config.data.get("init_args", {}) if config.data else {}
        if settings.get("tokenizer", "") is None and not settings.get("new_tokens"):
            settings["tokenizer"] = tokenizer_of(config.model.get("adapter"))
        lacking = [name for name in ("tokenizer", "processor") if name in settings and settings[name] is None]
        if lacking and not is_random(config.model.pretrained):
            if self.subcommand:  # else nothing is loaded yet
                check_reachable(config.model.pretrained)
            for name in lacking:
                settings[name] = config.model.pretrained

    def instantiate_classes(self) -> None:
        """As always; what a class says that could not be made comes out of what the parser wraps around it."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            ours = wrapped_error(error)
            if ours is None and (text := refusal(str(error))):
                ours = SettingsError(text)
            if ours is None or isinstance(error, LoraLightningError):
                raise
            raise ours from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the run folder's loggers and checkpoint, for `fit`; without any for the other verbs."""
        given = self._get(self.config_init, "trainer", default={})
        self.trainer_defaults = dict(self.trainer_defaults)
        if self.subcommand != "fit" or given.get("fast_dev_run"):
            self.save_config_callback = None
            ours: list[Callback] = [WritePredictions(self.line.output)] if self.subcommand == "predict" else []
            self.trainer_defaults["callbacks"] = ours
            return super().instantiate_trainer(**{"logger": False, "enable_checkpointing": False, **kwargs})
        root, rank = Path(given.get("default_root_dir") or "runs"), getattr(rank_zero_only, "rank", 0)
        if self.line.resume and self.line.folder is not None:
            folder = self.run_folder.resume(self.line.folder, rank)
        else:
            folder = self.run_folder.begin(self.line.stem, root, rank)
        kwargs.setdefault("default_root_dir", folder)
        logger = given.get("logger")
        if logger is not False:  # others stand beside ours, so that the folder holds the run whatever they are
            kwargs["logger"] = [CSVLogger(folder, name="", version=""), *loggers.made(logger, folder)]
        kwargs["plugins"] = [*(given.get("plugins") or []), AtomicCheckpoints()]
        minutes = self._get(self.config_init, "checkpoint_minutes", default=5.0)
        report = self._report(folder)
        ours = [LastCheckpoint(folder), SaveOften(folder, minutes), report]
        if self.auto_rate is not None:
            ours.append(self._range_test(report, self.auto_rate))
        self.trainer_defaults["callbacks"] = ours
        callbacks = given.get("callbacks") or []
        theirs = callbacks if isinstance(callbacks, list) else [callbacks]
        if given.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in theirs):
            self.trainer_defaults["callbacks"].append(RunBar())
        trainer = super().instantiate_trainer(**kwargs)
        if rank > 0 and trainer.world_size == 1:
            environment.refuse_rank(rank)
        return trainer

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            seed = self._get(self.config, "seed_everything")
            raise SettingsError(f"seed_everything is {seed}; it must be from 0 to {2**32 - 1}.") from error

    def _report(self, folder: Path) -> RunReport:
        """The run's report, which says where the rate comes from, and what a server refuses."""
        optimizer = "model.optimizer"
        origin = origin_of(self.line.rest, f"{optimizer}.lr", former_names.load)
        rate_from = f"from {shown_origin(origin)}" if origin else ""
        if not origin and (named := origin_of(self.line.rest, optimizer, former_names.load)):
            rate_from = f"its own default, since {shown_origin(named)} names no rate"
        return RunReport(
            folder, rate_from=rate_from, serve_with=self._get(self.config_init, "serve_with", default=None)
        )

    def _range_test(self, report: RunReport, auto: AutoRate) -> RangeTest:
        """What replaces `lr: auto` by a number, also in config.yaml."""

        def told(rate: float) -> None:
            auto.set(rate)
            report.rate_from = f"by a range test around {auto.start:g} (lr: auto)"

        return RangeTest(auto.start, told)

    def _use_checkpoint(self) -> None:
        """The run's checkpoint, set here so that it is not saved into config.yaml; no pickle is opened."""
        self.config_init[self.subcommand].weights_only = True
        if self.subcommand != "fit":
            if self.line.checkpoint is None and not self.config_init[self.subcommand].ckpt_path:
                raise SettingsError(
                    f"{self.subcommand}: no trained weights given; --run FOLDER takes a run's, --ckpt_path FILE a "
                    "checkpoint's."
                )
            # callbacks of the fit have no part in it
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`.*")
        given = self.config_init[self.subcommand]
        if self.line.checkpoint is not None:
            given.ckpt_path = str(self.line.checkpoint)
        path = str(given.ckpt_path or "")
        if path and path not in ("best", "last", "hpc") and "://" not in path and not Path(path).exists():
            with_run = "fit --resume DIR" if self.subcommand == "fit" else f"{self.subcommand} --run DIR"
            raise SettingsError(
                f"--ckpt_path {path}: no such file. Name a checkpoint, or a run's folder with {with_run}."
            )
        if given.ckpt_path is not None and Path(given.ckpt_path).is_file():
            # known before the adapter is built, whose plan stands in it; as an argument it would be hidden until after
            self.trainer.ckpt_path, given.ckpt_path = given.ckpt_path, None

    before_validate = before_test = before_predict = _use_checkpoint

    def before_fit(self) -> None:
        """The checkpoint to go on from, and what would end the run after its first validation."""
        self._use_checkpoint()
        self._check_monitors()

    def _check_monitors(self) -> None:
        """Raise `SettingsError` where a callback watches what nobody logs; where a stranger may log it, say so."""
        callbacks: list[Callback] = [*self.trainer.callbacks, *self.model.settings_callbacks()]  # type: ignore[attr-defined]
        watched = [one for one in callbacks if isinstance(getattr(one, "monitor", None), str)]
        if not watched or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        validates = self.trainer.limit_val_batches != 0 and monitors.validates(self.datamodule)
        others = monitors.strangers(callbacks)
        for text in monitors.problems(callbacks, self.model.task, validates):
            if not others:
                raise SettingsError(text)
            print(f"note: {text} That ends the run, unless {' or '.join(others)} logs it.")

    def after_fit(self) -> None:
        """Say where everything lies, last of all.

        Raises:
            TrainingError: no step was taken.
        """
        if self.run_folder.path is None:
            return
        folder = Path(self.trainer.strategy.broadcast(str(self.run_folder.path)))
        shown = shortened(folder, self.run_folder.start)
        if not self.run_folder.started:
            raise TrainingError(self._nothing_left(shown))
        self.trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)  # with optimizer and schedules
        to = _export_format(self.model)  # of an adapter sharded every process is asked
        if self.trainer.is_global_zero:
            run, target = shlex.quote(str(shown)), shlex.quote(f"{shown}/{to}")
            print(f"try next: {_START} validate --run {run}")
            if self.model.task.generates and hasattr(type(self.datamodule), "renderer"):
                print(f"          {_START} chat {run}")
            if to:
                print(f"          {_START} export {run} --format {to} --output {target}")
            print(f"run: {shown}", flush=True)

    def _nothing_left(self, folder: Path) -> str:
        """Why a fit has taken no step, and the setting that gives it some."""
        steps, epochs = self.trainer.max_steps, self.trainer.max_epochs
        bound = (
            f"trainer.max_steps is {steps}" if steps is not None and steps >= 0 else f"trainer.max_epochs is {epochs}"
        )
        if 0 not in (steps, epochs) and not self.trainer.global_step:
            return (
                "the run was stopped before its first step (trainer.should_stop), as trainer.max_time or a callback "
                "does, so nothing was trained."
            )
        if not self.line.resume:
            return f"{bound}, so nothing was trained; give a larger one."
        done = self.trainer.global_step
        more = f"max_steps {2 * done or 1}" if "steps" in bound else f"max_epochs {2 * (epochs or 1)}"
        return (
            f"--resume {folder}: the run has finished, with {done} optimizer steps ({bound}); its adapter is "
            f"{folder / 'adapter'}. To go on, give more: fit --resume {shlex.quote(str(folder))} --trainer.{more}"
        )


def _export_format(module: AdapterModule) -> str | None:
    """The format in which the trained adapter can travel to other libraries, if any."""
    kind = module.method.export
    layers = [layer for _, layer in iter_adapters(module) if NAME in layer.adapters]
    if not layers:
        return "merged"
    if kind == "not expressible":
        return None
    if module.start is not None and module.start.stacked:
        return "merged"  # the others would be loaded without what lies below
    exact = kind == "native" or (kind == "exact LoRA" and all(layer.low_rank(NAME) is not None for layer in layers))
    return "peft" if exact else "merged"


def _believed(line: command_line.Line) -> list[str]:
    """The words of a line, with a run folder's config as far as it is to be trusted, its paths found from here."""
    if line.folder is None:
        return list(line.rest)
    own = str(line.folder / "config.yaml")
    first = line.rest.index(own)
    config = located(own if line.trusted else trusted_config(own), line.folder)
    return [*line.rest[:first], config, *line.rest[first + 1 :]]


class Description(CLI):
    """Module, data module and the trainer's settings as they were given; no Trainer is made, which needs hardware."""

    def __init__(self, line: command_line.Line) -> None:
        self.settings: dict[str, Any] = {}
        super().__init__(line, run=False)

    def before_instantiate_classes(self) -> None:
        """Keep the trainer's settings back."""
        super().before_instantiate_classes()
        self.settings = self.config.trainer.as_dict()
        for name in ("strategy", "callbacks", "logger", "plugins"):
            self.config.trainer[name] = "auto" if name == "strategy" else None

    def instantiate_trainer(self, **kwargs: Any) -> Any:  # noqa: ARG002 - Lightning's signature
        """None."""
        return None


def main(args: Sequence[str], cli: type[CLI] = CLI) -> int:
    """Run one training verb; returns the exit code.

    Args:
        args: the command line.
        cli: runs it.

    Raises:
        LoraLightningError: anything a user can mend.
    """
    hide_hints()
    line, folder = command_line.read(args), RunFolder()
    try:
        cli(line, folder=folder)
    except BaseException as error:
        ours = _told(error, line, folder)
        folder.close(refused=ours is not None)
        if ours is None or ours is error:
            raise
        raise ours from error
    folder.close(refused=False)
    return 0


def _told(error: BaseException, line: command_line.Line, folder: RunFolder) -> LoraLightningError | None:
    """What a user can mend about an error; None for all others."""
    if isinstance(error, LoraLightningError):
        return error
    if isinstance(error, SIGTERMException):  # a SystemExit, which would mean success
        return TrainingError(_stopped(line, folder, "SIGTERM"))
    if isinstance(error, SystemExit) and not error.code and folder.path is not None:  # which would mean success
        return TrainingError(_stopped(line, folder, "sys.exit() of a callback or a plugin"))
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        return TrainingError(_stopped(line, folder, "Ctrl-C"))
    if isinstance(error, MisconfigurationException) or (
        isinstance(error, ValueError | FileNotFoundError) and raised_in(error, "lightning")
    ):
        return SettingsError(f"trainer: {' '.join(str(error).split())}")
    return system_error(error)


def _stopped(line: command_line.Line, folder: RunFolder, why: str) -> str:
    """What a run was stopped at, and how it goes on."""
    if line.verb != "fit" or folder.path is None:
        return f"{line.verb} was stopped by {why}; start it again."
    return stopped(why, folder.path, folder.start)


def build(args: Sequence[str]) -> tuple[AdapterModule, LightningDataModule]:
    """The module and data module that a command line without a verb describes; nothing is loaded or written yet.

    Raises:
        SettingsError: no data, or no model.
    """
    hide_hints()
    cli = CLI(command_line.read(args), run=False)
    return cli.model, cli.datamodule


def build_with_settings(args: Sequence[str]) -> tuple[AdapterModule, LightningDataModule, dict[str, Any]]:
    """As `build`, with the trainer's settings; they need not fit this machine."""
    hide_hints()
    cli = Description(command_line.read(args))
    return cli.model, cli.datamodule, cli.settings
