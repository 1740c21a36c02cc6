"""What plugins, core and its libraries bring, as names and import paths, and where the things of 0.1 are now.

A class beside methods is imported when a run or somebody by its name asks for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pluggy

from lora_lightning import hookspecs
from lora_lightning.errors import (
    DuplicateMethodError,
    PluginError,
    UnknownMethodError,
    did_you_mean,
)
from lora_lightning.methods import Method
from lora_lightning.plugin_code import imported
from lora_lightning.start_values import Start

TRAINING_VERBS = ("fit", "validate", "test", "predict")
LIGHT_VERBS = (
    "methods",
    "show",
    "cite",
    "targets",
    "inspect-data",
    "estimate",
    "doctor",
    "compare",
    "export",
    "chat",
    "generate",
    "import-config",
    "new-plugin",
    "schema",
    "completion",
)

FORMATS = {  # core's; `Registry.formats` has those of plugins too
    "delta": "lora_lightning.exporters.delta",
    "gguf": "lora_lightning.exporters.llama_cpp",
    "merged": "lora_lightning.exporters.merged",
    "peft": "lora_lightning.exporters.peft.write",
}

SERVERS = {"vllm": "peft", "llama.cpp": "gguf"}
"""Programs that serve models, with the format in which they read adapters."""

SETTINGS = {
    "optimizer": "model.optimizer",
    "callback": "trainer.callbacks",
    "data module": "data",
    "strategy": "trainer.strategy",
}
"""Kinds of class that a config names beside methods, with the setting that names one."""

_OPTIMIZERS_OF_TORCH = (
    "ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax LBFGS Muon NAdam RAdam RMSprop Rprop SGD SparseAdam"
)
_CALLBACKS_OF_LIGHTNING = (
    "BackboneFinetuning BaseFinetuning BasePredictionWriter BatchSizeFinder Checkpoint DeviceStatsMonitor "
    "EMAWeightAveraging EarlyStopping GradientAccumulationScheduler LambdaCallback LearningRateFinder "
    "LearningRateMonitor ModelCheckpoint ModelPruning ModelSummary OnExceptionCheckpoint ProgressBar RichModelSummary "
    "RichProgressBar SpikeDetection StochasticWeightAveraging TQDMProgressBar ThroughputMonitor Timer WeightAveraging"
)
_STRATEGIES_OF_LIGHTNING = "DDPStrategy DeepSpeedStrategy FSDPStrategy ModelParallelStrategy SingleDeviceStrategy"
_CALLBACKS = {
    "Cascade": "cascade",
    "ExactResume": "resume",
    "FederatedRounds": "federated",
    "Forgetting": "forgetting",
    "InjectAdapters": "inject",
    "KeepBest": "best",
    "Meters": "meters",
    "NoiseInjection": "noise",
    "PrivateGradients": "privacy",
    "RankPruning": "rank_pruning",
    "Samples": "samples",
    "SparsitySchedule": "sparsity",
    "TrainingGuard": "guard",
}
_DATA_MODULES = {
    "Chat": "chat",
    "Completions": "completions",
    "LabelledImages": "images",
    "LabelledText": "labelled",
    "MaskedText": "masked",
    "MediaChat": "media_chat",
    "MultiLabelText": "multi_label",
    "PlainText": "plain",
    "Preferences": "preferences",
    "TaggedWords": "tagged",
    "TextPairs": "pairs",
    "TextToText": "text_to_text",
}
_STRATEGIES = {"DeepSpeed": "deepspeed", "FSDP1": "fsdp1", "FSDP2": "fsdp2"}


@dataclass(frozen=True)
class Component:
    """A class beside methods that a config can name; nothing of it is imported yet.

    Attributes:
        name: its short name.
        kind: what it is, a key of `SETTINGS`.
        path: import path, "module:Class".
        plugin: that brings it; empty for what torch, Lightning or core bring.
    """

    name: str
    kind: str
    path: str
    plugin: str = ""

    @property
    def class_path(self) -> str:
        """The path as a config writes it."""
        return self.path.replace(":", ".")

    def load(self) -> Any:
        """The class; its module is imported."""
        module, _, name = self.path.partition(":")
        return getattr(imported(module), name)


def _known() -> Iterator[Component]:
    """Core's own classes, then Lightning's and torch's; bases of which there is no instance are left out."""
    for kind, room, table in (
        ("callback", "callbacks", _CALLBACKS),
        ("data module", "data", _DATA_MODULES),
        ("strategy", "training.strategies", _STRATEGIES),
    ):
        for name, module in table.items():
            yield Component(name, kind, f"lora_lightning.{room}.{module}:{name}")
    for kind, module, names in (
        ("optimizer", "torch.optim", _OPTIMIZERS_OF_TORCH),
        ("callback", "lightning.pytorch.callbacks", _CALLBACKS_OF_LIGHTNING),
        ("strategy", "lightning.pytorch.strategies", _STRATEGIES_OF_LIGHTNING),
    ):
        for name in names.split():
            yield Component(name, kind, f"{module}:{name}")


KNOWN = {(component.kind, component.name): component for component in _known()}
"""What core and its libraries bring, by kind and short name. Tests compare it with what is installed."""


@dataclass(frozen=True)
class Provider:
    """Who provides a method."""

    plugin: str
    package: str
    version: str


@dataclass
class Registry:
    """Loaded plugins and what they provide."""

    methods: dict[str, type[Method]] = field(default_factory=dict)
    starts: dict[str, type[Start]] = field(default_factory=dict)
    """Starts of factor pairs by name."""
    providers: dict[str, Provider] = field(default_factory=dict)
    """Provider by method name."""
    failed: dict[str, BaseException] = field(default_factory=dict)
    """Cause by plugin name, for plugins that could not be loaded, or not with all they bring."""
    blocked: dict[str, str] = field(default_factory=dict)
    """Import path by blocked plugin; it is not imported, and nothing from it may be used."""
    duplicates: dict[str, DuplicateMethodError] = field(default_factory=dict)
    """What to raise for a name that two plugins provide."""
    components: dict[str, Component] = field(default_factory=dict)
    """Optimizers, callbacks and data modules of plugins by name."""
    tables: dict[str, str] = field(default_factory=dict)
    """Import path of the function that makes it, "module:function", by the name of a built-in table."""
    commands: dict[str, str] = field(default_factory=dict)
    """Import path of the module by verb."""
    owners: dict[str, str] = field(default_factory=dict)
    """Plugin by verb."""
    formats: dict[str, str] = field(default_factory=lambda: dict(FORMATS))
    """Import path of the module that writes it, by export format; core's first."""
    slow: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What a plugin imports while it is loaded though it takes seconds, by plugin; as far as nothing had before."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long a plugin took to load, by plugin, for those that took seconds."""
    printed: dict[str, str] = field(default_factory=dict)
    """What a plugin wrote to standard output while it was loaded, by plugin; it went to standard error."""
    changed: dict[str, list[str]] = field(default_factory=dict)
    """What a plugin did to the process while it was loaded, by plugin; all but threads has been put back."""
    classes: dict[str, tuple[str, type[Any]]] = field(default_factory=dict)
    """Plugin and class by name, of those in `components` that were imported; filled by `load_classes`."""
    unusable: dict[str, BaseException] = field(default_factory=dict)
    """Cause by name, for those in `components` that could not be imported."""
    kinds: list[tuple[str, Callable[[Any], Any]]] | None = None
    """Plugin and function from a module to its base layer; filled by `base_layer_kinds`."""
    manager: pluggy.PluginManager = field(default_factory=lambda: pluggy.PluginManager(hookspecs.NAMESPACE))

    def method(self, name: str, where: str = "method") -> type[Method]:
        """The method class called `name`.

        Raises:
            UnknownMethodError: none is; the message lists the nearest, the installed, and every failed plugin.
            DuplicateMethodError: two plugins provide it.
        """
        if name in self.duplicates:
            raise self.duplicates[name]
        if name in self.methods:
            return self.methods[name]
        raise UnknownMethodError(f"{where}: {self.explain_unknown(name)}")

    def settings_class(self, name: str, where: str) -> type[Method] | type[Start]:
        """The start or the method called `name`; raises as `method`."""
        return self.starts[name] if name in self.starts else self.method(name, where)

    def explain_unknown(self, name: str) -> str:
        """Why there is no method `name`, and what there is."""
        if name in self.duplicates:
            return str(self.duplicates[name])
        text = f'no method "{name}".{did_you_mean(name, self.methods)} '
        text += f"Installed: {', '.join(sorted(self.methods)) or 'none'}."
        return text + self.explain_absent()

    def explain_absent(self) -> str:
        """Which plugins are blocked or failed, so that a name may be theirs; begins with a blank, or is empty."""
        text = "".join(f" Plugin {plugin} is blocked by -p no:{plugin}." for plugin in self.blocked)
        for plugin, cause in self.failed.items():
            text += f" Plugin {plugin} failed to load: {one_line(cause)}."
        return text

    def explain_unusable(self, name: str) -> str:
        """Why the class `name` of a plugin cannot be used though a plugin brings it; empty for any other name."""
        if name not in self.unusable:
            return ""
        component = self.components[name]
        cause = one_line(self.unusable[name])
        return f"{component.kind} {name} ({component.class_path}) of plugin {component.plugin} failed: {cause}."

    def component(self, name: str) -> Component | None:
        """The class that a short name means, a plugin's or a known one; None where there is none."""
        known = next((KNOWN[kind, name] for kind in SETTINGS if (kind, name) in KNOWN), None)
        return known or self.components.get(name)

    def component_names(self, kind: str) -> list[str]:
        """Short names of one kind: core's, its libraries' and the plugins'."""
        known = [name for known_kind, name in KNOWN if known_kind == kind]
        brought = [name for name, component in self.components.items() if component.kind == kind]
        return [*known, *(name for name in brought if name not in known)]

    def refuse_blocked(self, class_path: str, where: str) -> None:
        """Raise `PluginError` if the class `class_path` belongs to a blocked plugin, which a full path would reach."""
        for plugin, module in self.blocked.items():
            if class_path.startswith(f"{module}."):
                raise PluginError(
                    f"{where}: {class_path} is part of plugin {plugin}, which is blocked by -p no:{plugin}."
                )

    def current_class_path(self, path: str) -> str:
        """Where the class is now that a config of 0.1 calls `path`; `path` itself for every other.

        A class of core is looked up in `FORMER_PATHS` and `FORMER_MODULES`. One that a plugin of 0.1 had, or that core
        had and a plugin has now, is looked up by its last part among what plugins bring.
        """
        if path in FORMER_PATHS:
            return FORMER_PATHS[path]
        module, _, name = path.rpartition(".")
        if homes := former_homes(module):
            return f"{homes[0]}.{name}"
        if name in self.methods and module.endswith(".settings"):  # where plugins of 0.1 had their method
            today = f"{self.methods[name].__module__}.{name}"
        elif name in self.components:
            today = self.components[name].class_path
        else:
            return path
        roots = {"lora_lightning", *(str(plugin.__name__) for plugin in self.manager.get_plugins())}
        moved = path != today and module.partition(".")[0] in roots and not _is_there(module, name)
        return today if moved else path


FORMER_PATHS = {
    "lora_lightning.callbacks.LinearBaseline": "lora_lightning.training.linear_baseline.LinearBaseline",
    "lora_lightning.callbacks.PackingCheck": "lora_lightning.training.packing_check.PackingCheck",
    "lora_lightning.callbacks.RunReport": "lora_lightning.training.run_report.RunReport",
    "lora_lightning.optim.warmup.Knots": "lora_lightning.optim.warmup.StageEnds",
}
"""Classes that have another name now, or that a room of 0.1 handed on and another does: path then, path now."""

FORMER_MODULES: Mapping[str, str] = {
    "adapters.experts": "models.experts",
    "adapters.layer": "adapters.adapted_layer",
    "adapters.packed": "adapters.layers.quantized",
    "adapters.seeds": "seeds",
    "adapters.shift": "adapters.folded adapters.noise",
    "adapters.sparsity": "callbacks.keep_masks",
    "adapters.weights": "adapters.layers.base adapters.layers.kinds",
    "base_layers": "models.base_layers",
    "baseline": "training.linear_baseline",
    "callbacks.baseline": "training.linear_baseline",
    "callbacks.packing": "training.packing_check",
    "callbacks.predictions": "training.predictions",
    "callbacks.report": "training.run_report",
    "cards": "cli.cards",
    "checkpoint": "storage.folder storage.load storage.state storage.description",
    "data.causal": "data.tokens.causal",
    "data.chat_templates": "data.chats.templates",
    "data.collate": "data.batches.collate",
    "data.encoding": "data.tokens.encoding",
    "data.formats": "data.prompt_formats",
    "data.grouping": "data.batches.grouping",
    "data.lines": "data.sources.lines",
    "data.loader": "data.batches.loader",
    "data.marks": "data.tokens.marks",
    "data.packing": "data.batches.packing",
    "data.rendering": "data.chats.rendering",
    "data.shares": "data.batches.process_rows",
    "data.splits": "data.sources.splits",
    "data.stream_loader": "data.batches.stream_loader",
    "data.streaming": "data.batches.streaming",
    "data.tokenizers": "data.tokens.tokenizers",
    "data.turns": "data.chats.turns",
    "exporting": "exporters.export exporters.from_folder",
    "files": "storage.atomic",
    "loading": "models.loading",
    "module": "training.module",
    "paths": "models.paths",
    "pretrained": "models.pretrained",
    "quantisation": "models.quantized_loading",
    "scopes": "models.scopes",
    "strategies": "training.strategies",
    "targets": "injection.targets",
    "tasks": "models.tasks",
    "tiny": "testing.toy_models",
    "vocabulary": "models.new_tokens",
    "zero": "training.strategies.deepspeed",
}
"""Modules of 0.1 that other packages imported, and where their contents are now; names without the root package."""

FORMER_NAMES = {"PackedBase": "QuantizedBase"}
"""Names in those modules that have changed since."""


def former_homes(module: str) -> list[str]:
    """Where the contents of a module of 0.1 are now, modules inside one that is in the table included."""
    root, _, inside = module.partition(".")
    within = ""
    while root == "lora_lightning" and inside:
        if inside in FORMER_MODULES:
            return [f"{root}.{home}{within}" for home in FORMER_MODULES[inside].split()]
        inside, _, last = inside.rpartition(".")
        within = f".{last}{within}"
    return []


def former_spec(name: str) -> ModuleSpec | None:
    """How to import a module by its name of 0.1; None for a name that was none."""
    homes = former_homes(name)
    return ModuleSpec(name, _FormerModule(homes), is_package=True) if homes else None


class _FormerModule(Loader):
    """Loads a module under its name of 0.1: one without contents, whose names are looked up where they are now."""

    def __init__(self, homes: list[str]) -> None:
        self.homes = homes

    def create_module(self, spec: ModuleSpec) -> None:
        """The usual module."""

    def exec_module(self, module: ModuleType) -> None:
        """Say where the names are, and look them up there."""
        said = f"{module.__name__} is of lora_lightning 0.1; import from {' or '.join(self.homes)}"
        warnings.warn(said, DeprecationWarning, stacklevel=2)
        homes = [importlib.import_module(home) for home in self.homes]

        def look_up(name: str) -> Any:
            current = FORMER_NAMES.get(name, name)
            for home in homes:
                if hasattr(home, current):
                    return getattr(home, current)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        vars(module)["__getattr__"] = look_up


def _is_there(module: str, name: str) -> bool:
    """Whether a module is there and has the name. One that fails for another reason is there."""
    try:
        return name in vars(importlib.import_module(module))
    except ModuleNotFoundError as error:
        return not f"{module}.".startswith(f"{error.name}.")
    except Exception:
        return True


def one_line(cause: BaseException) -> str:
    """One line for an exception, its class included."""
    try:
        text = str(cause)
    except Exception:  # a class of a plugin's own
        text = "(its message cannot be printed)"
    return f"{type(cause).__name__}: {' '.join(text.split())}".rstrip(": ")


def arguments(owner: type) -> dict[str, inspect.Parameter]:
    """What a class takes by name; where it takes any keyword, what its base takes too, but for what it has `fixed`."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found: dict[str, inspect.Parameter] = {}
    for cls in owner.__mro__:
        if not {"__init__", "__new__"} & set(vars(cls)):  # takes what the next one takes
            continue
        parameters = inspect.signature(cls).parameters
        found |= {name: p for name, p in parameters.items() if p.kind not in variadic and name not in found}
        if inspect.Parameter.VAR_KEYWORD not in {p.kind for p in parameters.values()}:
            break
    fixed: Mapping[str, str] = getattr(owner, "fixed", {})
    return {name: parameter for name, parameter in found.items() if name not in fixed}
