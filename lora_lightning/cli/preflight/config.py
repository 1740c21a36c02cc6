"""Config check: every problem of a config that can be parsed, before any weights are loaded.

parse       the first thing that the parser refuses, and what can be known without it (`unparsed`)
build       each class by itself: method, optimizer, schedule, data, strategy, callbacks; wrong values give way
files       model folder and weights, tokenizer, data files and columns; what lies on the hub is left for `fit`
together    the trainer here; task and data, quantization, precision and strategy, schedules and the run's length
model       without values: targets, exclusions, overrides, settings of layers, optimizer, what callbacks act on
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.cli import command_line as argv
from lora_lightning.cli import loggers
from lora_lightning.cli.auto_rate import auto_rate
from lora_lightning.cli.hints import hide_hints
from lora_lightning.cli.lightning import Description
from lora_lightning.cli.parser_errors import explain, refused
from lora_lightning.cli.preflight import monitors, unparsed
from lora_lightning.cli.preflight.trace import without_values
from lora_lightning.data.sources.tables import on_hub, source_names
from lora_lightning.errors import LoraLightningError, SettingsError, wrapped_error
from lora_lightning.exporters.preview import refusals
from lora_lightning.exporters.servers import preview
from lora_lightning.exporters.trained_adapter import OURS
from lora_lightning.injection.also_train import trained_parameters
from lora_lightning.injection.inject import inject, settings_by_layer
from lora_lightning.injection.records import adapters_named
from lora_lightning.injection.targets import select
from lora_lightning.models.anatomy import Anatomy, survey
from lora_lightning.models.loading import load_skeleton
from lora_lightning.models.meta import expect_values
from lora_lightning.models.pretrained import check_reachable, check_weights, resolve
from lora_lightning.models.random import is_random
from lora_lightning.models.token_rows import TokenRows, choose_rows
from lora_lightning.models.untied import apart, retie
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.registry import one_line
from lora_lightning.training.assembly import NAME, enable_checkpointing
from lora_lightning.training.module import AdapterModule
from lora_lightning.training.start import SETTING, tokenizer_of

_USER_ERRORS = (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError, OSError)
"""What libraries raise for a setting that cannot be."""
_PARTS = ("strategy", "callbacks", "logger", "plugins", "profiler")
"""Settings of the trainer that are objects."""


@dataclass
class Findings:
    """One line for each problem, and for what could not be checked."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, what: object) -> None:
        """Add a problem, unless its setting is named already."""
        text = " ".join(str(what).split())
        if text.partition("; ")[0] not in {known.partition("; ")[0] for known in self.problems}:
            self.problems.append(text)

    def attempt(self, run: Callable[[], Any], where: str = "") -> bool:
        """Whether `run` raises nothing; what it raises is a problem, named by `where` if it is a library's."""
        try:
            run()
        except LoraLightningError as error:
            self.problem(error)
        except _USER_ERRORS as error:
            self.problem(f"{where}: {error}")
        else:
            return True
        return False


def check_config(words: Sequence[str]) -> Findings:
    """Everything that is wrong with a command line of `fit`, without its verb."""
    hide_hints()
    findings = Findings()
    _ConfigCheck(argv.read(words), findings)
    return findings


class _ConfigCheck(Description):
    """A command line that goes on after each problem."""

    def __init__(self, line: argv.Line, findings: Findings) -> None:
        self.findings = findings
        super().__init__(line)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse; of a line that cannot be parsed, say why, and what it shows even so."""
        parser.exit_on_error = False
        try:
            self.config = parser.parse_args(args)
        except (argparse.ArgumentError, LoraLightningError) as error:
            self.findings.problem(error if isinstance(error, LoraLightningError) else explain(str(error), parser))
            for text in unparsed.problems(args, parser):
                self.findings.problem(text)
            self.findings.notes.append("the rest of the config is checked once this can be parsed")
            self.config = Namespace(seed_everything=0)  # type: ignore[no-untyped-call]

    def before_instantiate_classes(self) -> None:
        """Files of the model, which its tokenizer or processor are taken from."""
        auto_rate(self.config.get("model.optimizer"), self.config.get("model.method"))
        self._source = self.config.get("model.pretrained")
        if self._source is not None and not self.findings.attempt(lambda: check_weights(self._source)):
            self._source = self._source if self.findings.attempt(lambda: resolve(self._source)) else None
        elif self._source is not None and not self.findings.attempt(lambda: check_reachable(self._source)):
            self._source = None
        settings = self.config.get("data.init_args") or {}
        if settings.get("tokenizer", "") is None and not settings.get("new_tokens"):
            settings["tokenizer"] = _safely(lambda: tokenizer_of(self.config.get("model.adapter")))
        for name in ("tokenizer", "processor"):
            if name in settings and settings[name] is None and self._source and not is_random(self._source):
                settings[name] = self._source

    def instantiate_classes(self) -> None:
        """Build part by part, then look at the parts together."""
        if "model" not in self.config:
            return
        data = self._built("data") if self.config.get("data") is not None else None
        module = self._module(data)
        trainer = self._trainer()
        examples = self._read(data) if data is not None else None
        if module is None:
            return
        if trainer is not None:
            module.trainer = trainer
            trainer.datamodule = data  # type: ignore[attr-defined]
        callbacks = list(trainer.callbacks) if trainer is not None else []  # type: ignore[attr-defined]
        for one in module.settings_callbacks():
            if not any(isinstance(other, type(one)) for other in callbacks):
                callbacks.append(one)
        if trainer is not None:
            trainer.callbacks = callbacks  # type: ignore[attr-defined]
            if self._source is not None:
                self._check_refusals(module, data)
            self._check_conflicts(trainer, callbacks, self._length(trainer, data, examples))
            validates = data is not None and trainer.limit_val_batches != 0 and monitors.validates(data)
            for text in monitors.problems(callbacks, module.task, validates):
                self.findings.problem(text)
        if self._source is not None:
            self._check_model(module, data, callbacks)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _built(self, key: str) -> Any:
        """What the settings under `key` make; values that are refused are noted and give way to defaults.

        Returns:
            None for what cannot be made at all.
        """
        part = Namespace()  # type: ignore[no-untyped-call]
        part[key] = self.config[key]
        while True:
            try:
                return self.parser.instantiate_classes(part, instantiate_groups=False)[key]
            except (LoraLightningError, *_USER_ERRORS) as error:
                ours = wrapped_error(error)
                self.findings.problem(ours or f"{key}: {refused(str(error)) or error}")
                setting = ours.setting if isinstance(ours, SettingsError) else None
                if setting is None or not _drop(part, setting):
                    return None

    def _module(self, data: Any) -> AdapterModule | None:
        """The module here; settings that are refused are noted, and one after the other gives way to a default."""
        settings = {name: self._built(f"model.{name}") for name in self.config.model.as_dict()}
        settings["pretrained"] = self._source or ""
        kinds: tuple[str, ...] = getattr(data, "task_kinds", ())  # the data know which task is meant
        defaults: list[dict[str, Any]] = [{}, {"task_settings": None}, {"random_config": None}]
        if settings.get("adapter") is not None:
            defaults += [{"method": None}, {"adapter": None}]
        if kinds:
            defaults.insert(1, {"task": kinds[0]})
        for default in defaults:
            settings |= default
            try:
                return AdapterModule(**settings)
            except LoraLightningError as error:
                self.findings.problem(error)
        return None

    def _trainer(self) -> Trainer | None:
        """The trainer here; settings that it refuses are noted and left out."""
        settings: dict[str, Any] = {}
        missing = loggers.problems(self.config.trainer.get("logger"))
        for text in missing:
            self.findings.problem(text)
        for name, value in self.config.trainer.as_dict().items():
            if value is not None and not (name == "logger" and missing):
                settings[name] = self._built(f"trainer.{name}") if name in _PARTS else value
        settings["logger"] = False
        while (message := _refused(settings)) is not None:
            self.findings.problem(f"trainer: {message}")
            refused = _refused_setting(settings, message)
            if refused is None:
                return None
            del settings[refused]
        return Trainer(**settings)

    # -- together ------------------------------------------------------------------------------------------------------

    def _read(self, data: Any) -> int | None:
        """Read the sources that lie here; the number of training rows, where batches are made of rows."""
        if getattr(data, "tokenizer", None) is not None and hasattr(type(data), "tokenizer_object"):
            self.findings.attempt(lambda: data.tokenizer_object, "data.tokenizer")
        rows: dict[str, Any] = {}
        sources = getattr(data, "sources", None)
        for split in unparsed.SPLITS if hasattr(data, "read") else ():
            named = source_names(getattr(sources, split, None))
            if remote := [name for name in named if on_hub(name)]:
                self.findings.notes.append(f'data.{split} "{remote[0]}" lies on the hub and was not read')
            elif named or not hasattr(data, split):
                self.findings.attempt(partial(_keep, rows, split, data.read), f"data.{split}")
        train = rows.get("train")
        whole = not getattr(data, "packing", False) and not getattr(data, "streaming", False)
        if train is None or not whole or not hasattr(train, "__len__"):
            return None
        limit = getattr(data, "limit", None)
        return min(len(train), limit) if limit else len(train)

    def _check_refusals(self, module: AdapterModule, data: Any) -> None:
        labels = module.num_labels
        if data is None and labels is None:
            module.num_labels = 1  # whatever the data would have said
        for error in module.refusals():
            self.findings.problem(error)
        module.num_labels = labels

    def _check_conflicts(
        self, trainer: Trainer, callbacks: Sequence[Callback], length: tuple[bool, int | None]
    ) -> None:
        refuse = getattr(trainer.strategy, "refuse", None)
        if refuse is not None:
            self.findings.attempt(lambda: refuse(callbacks))
        known, total = length
        for one in callbacks:
            if isinstance(one, ScheduleCallback) and known:
                others = [other for other in callbacks if other is not one]
                self.findings.attempt(partial(one.check_run, total, others))

    def _length(self, trainer: Trainer, data: Any, rows: int | None) -> tuple[bool, int | None]:
        """Whether the number of optimizer steps is known, and the number; None for a run that nothing bounds."""
        bound = trainer.max_steps if trainer.max_steps is not None and trainer.max_steps > 0 else None
        epochs, size = trainer.max_epochs, getattr(data, "batch_size", None)
        if epochs is None or epochs < 0:
            return True, bound
        if rows is None or not size:
            return bound is not None, bound
        batches, limit = math.ceil(rows / size / trainer.world_size), trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        steps = epochs * math.ceil(batches / trainer.accumulate_grad_batches)
        return True, steps if bound is None else min(steps, bound)

    # -- model ---------------------------------------------------------------------------------------------------------

    def _check_model(self, module: AdapterModule, data: Any, callbacks: Sequence[Callback]) -> None:
        try:
            with without_values():
                self._check_skeleton(module, data, callbacks)
        except LoraLightningError as error:
            self.findings.problem(error)
        except Exception as error:  # tensors without values cannot do everything that real ones can
            self.findings.notes.append(f"the model was not checked to the end: {one_line(error)}")

    def _check_skeleton(self, module: AdapterModule, data: Any, callbacks: Sequence[Callback]) -> None:
        names = _safely(lambda: list(data.label_names)) or []
        labels = module.num_labels or _safely(lambda: data.num_labels)
        if module.start is not None and module.task.has_head:  # where the data have other classes, that has been said
            names = module.start.labels or names
            labels = len(names) or labels
        net = load_skeleton(module.assembly().source(0), module.task, labels, label_names=names)
        self.findings.attempt(lambda: module.assembly().check_length(net))
        self.findings.attempt(lambda: module.assembly().check_vocabulary(net))
        if module.start is not None:
            self._check_start(module, net, callbacks)
            return
        if tokens := getattr(data, "new_tokens", ()):
            from lora_lightning.models.new_tokens import Vocabulary, add_rows

            add_rows(net, Vocabulary(tuple(tokens), len(net.get_input_embeddings().weight)))  # type: ignore[operator]
        anatomy = survey(net)
        targets = self._fitting(module.targets, "all-linear", lambda some: select(anatomy, some))
        exclude = self._fitting(module.exclude, [], lambda some: select(anatomy, targets, some))
        also_train = self._fitting(module.also_train, "heads", lambda some: trained_parameters(anatomy, some))
        if module.gradient_checkpointing:
            self.findings.attempt(lambda: enable_checkpointing(net))
        if module.method is None:
            return
        layers = select(anatomy, targets, exclude).layers
        overrides: dict[str, Any] = {}
        for pattern, fields in module.overrides.items():
            fits = self.findings.attempt(partial(settings_by_layer, module.method, layers, {pattern: fields}))
            if fits:
                overrides[pattern] = fields
        untie = module.untie and self.findings.attempt(lambda: _try_untie(net), "model.untie")
        rows: dict[str, TokenRows] = {}
        self.findings.attempt(lambda: rows.update(_rows(anatomy, module, data)), "model.train_tokens")
        tokens = {path: own.ids for path, own in rows.items()}
        inject(
            net,
            module.method,
            targets,
            exclude,
            overrides,
            also_train,
            name=NAME,
            seed=0,
            train_tokens=tokens,
            untie=untie,
        )
        self._check_injected(module, net, callbacks)

    def _check_start(self, module: AdapterModule, net: nn.Module, callbacks: Sequence[Callback]) -> None:
        """The adapters that the run begins with, on a model without values."""
        assert module.start is not None
        self.findings.notes += [f"{SETTING}: {line}" for line in module.start.lines]
        if peft := [str(one) for one in module.start.adapters if one.format != OURS]:
            self.findings.notes.append(f"{peft[0]} is compared with the model when it is loaded")
            return
        module.assembly().adapt(expect_values(net), 0)
        self._check_injected(module, net, callbacks)

    def _check_injected(self, module: AdapterModule, net: nn.Module, callbacks: Sequence[Callback]) -> None:
        self.findings.attempt(
            lambda: build_optimizer(net, module.optimizer_factory, module.head_ratio, "model.optimizer"),
            "model.optimizer",
        )
        for form, why in refusals(net, NAME).items():
            self.findings.notes.append(f"export --format {form} will be refused: {why}")
        server = self.config.get("serve_with")
        for line in preview(net, server, NAME) if server else ():
            self.findings.notes.append(f"export --for {server}: {line}".removesuffix("."))
        adapters = adapters_named(net, NAME)
        for one in callbacks:
            if isinstance(one, ScheduleCallback):
                self.findings.attempt(partial(one.select, adapters))

    def _fitting(self, given: Any, otherwise: Any, use: Callable[[Any], Any]) -> Any:
        """The patterns that fit the model, of a list each by itself; `otherwise` where none does."""
        if not isinstance(given, list):
            return given if self.findings.attempt(lambda: use(given)) else otherwise
        try:
            use(given)
        except LoraLightningError as error:
            good = [one for one in given if self.findings.attempt(partial(use, [one]))]
            if good == given:  # together they do not
                self.findings.problem(error)
            return good if good and good != given else otherwise
        return given


def _rows(anatomy: Anatomy, module: AdapterModule, data: Any) -> dict[str, TokenRows]:
    """Rows of known tokens that are to train; raises as `choose_rows`."""
    return choose_rows(anatomy, module.train_tokens, getattr(data, "tokenizer_object", None))


def _try_untie(net: nn.Module) -> None:
    with apart(survey(net), wanted=True):
        pass
    retie(net)


def _drop(part: Namespace | list[Any], setting: tuple[str, str]) -> bool:
    """Take a field of a class out of settings, wherever the class stands in them."""
    owner, name = setting
    found = False
    for value in list(vars(part).values()) if isinstance(part, Namespace) else part:
        if isinstance(value, Namespace) and str(value.get("class_path")).rpartition(".")[2] == owner:
            fields = value.get("init_args") or {}
            found |= fields.pop(name, None) is not None
        if isinstance(value, Namespace | list):
            found |= _drop(value, setting)
    return found


def _refused_setting(settings: Mapping[str, Any], message: str) -> str | None:
    """The setting without which the trainer does not say `message`, if it is a single one."""
    for name in dict.fromkeys(("precision", "strategy", *settings)):
        others = {other: value for other, value in settings.items() if other != name}
        if name in settings and _refused(others) != message:
            return name
    return None


def _refused(settings: Mapping[str, Any]) -> str | None:
    """What the trainer says that cannot be made of these settings."""
    try:
        # a strategy keeps the devices of the first trainer it is given to, and refuses a second
        Trainer(**{**settings, "strategy": copy.deepcopy(settings.get("strategy", "auto"))})
    except _USER_ERRORS as error:
        return " ".join(str(error).split())
    return None


def _keep(rows: dict[str, Any], split: str, read: Callable[[str], Any]) -> None:
    rows[split] = read(split)


def _safely(read: Callable[[], Any]) -> Any:
    """What cannot be read has been noted where it was looked for first."""
    try:
        return read()
    except (LoraLightningError, AttributeError):
        return None
