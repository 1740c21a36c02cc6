"""Finding plugins, blocking them, and saying who provides what and why one failed.

Imports neither torch nor Lightning; a plugin that does is merely slow. No plugin's source is read: what it brings, it
answers.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from lora_lightning import hookspecs
from lora_lightning.errors import DuplicateMethodError, PluginError, did_you_mean
from lora_lightning.methods import Method, check_names, renamed
from lora_lightning.plugin_code import REQUIRES, check_api, entry_points, explained, plugin_code
from lora_lightning.registry import KNOWN, LIGHT_VERBS, TRAINING_VERBS, Component, Provider, Registry, one_line
from lora_lightning.start_values import Start

if TYPE_CHECKING:
    from torch.optim import Optimizer

T = TypeVar("T", Method, Start)
GROUP = "lora_lightning"
_KINDS = {
    "lora_lightning_optimizers": "optimizer",
    "lora_lightning_callbacks": "callback",
    "lora_lightning_datamodules": "data module",
}
"""Hooks that answer classes by name, with the kind of class."""
_OWNERS = ("torch", "lightning", "lora_lightning")
_SLOW = ("torch", "lightning", "transformers")
"""What takes seconds to import."""
SLOW_SECONDS = 2.0
"""A plugin that takes longer to load is named as slow."""


def load(blocked: Collection[str] = ()) -> Registry:
    """Load every installed plugin except those blocked, and make the result the current registry.

    A plugin that fails is recorded with its cause and never ends the command line. Two that provide one name both
    lose it, since either could be meant; asking for the name raises.

    Raises:
        PluginError: a blocked name that no installed plugin has.
    """
    global _current
    registry = Registry()
    registry.manager.add_hookspecs(hookspecs)
    found = entries()
    registry.failed |= unreadable_entries()
    _check_names(blocked, {entry.name for entry in found})
    for entry in found:
        if entry.name in blocked:
            registry.blocked[entry.name] = _module(entry)
        elif registry.manager.has_plugin(entry.name):
            registry.failed[f"{entry.name} ({' '.join(_package(entry))})"] = PluginError(
                "another plugin has that name already"
            )
        else:
            _load(registry, entry)
    _current = registry
    return registry


def entries() -> list[importlib.metadata.EntryPoint]:
    """The installed plugins by name; the current folder, where `python -m` looks first, is not searched."""
    every, _ = entry_points(GROUP)
    return sorted((entry for entry in every if not _is_of_this_folder(entry)), key=lambda entry: entry.name)


def unreadable_entries() -> dict[str, PluginError]:
    """Causes by package, for those whose plugins nobody can know: their entry_points.txt cannot be read."""
    return entry_points(GROUP)[1]


def _is_of_this_folder(entry: importlib.metadata.EntryPoint) -> bool:
    """Whether a plugin lies in the current folder and nobody has asked for that one by PYTHONPATH."""
    here = Path.cwd()
    asked = [Path(place).resolve() for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    return entry.dist is not None and Path(str(entry.dist.locate_file(""))).resolve() == here and here not in asked


def _load(registry: Registry, entry: importlib.metadata.EntryPoint) -> None:
    """Import one plugin and enter what it brings, or the cause of its failure."""
    before = set(sys.modules)
    with plugin_code() as ran:
        methods = _register(registry.manager, entry)
        verbs = dict.fromkeys((*TRAINING_VERBS, *LIGHT_VERBS), "core") | registry.commands
        commands = _named(registry, entry.name, "lora_lightning_commands", "verb", verbs)
        formats = _named(registry, entry.name, "lora_lightning_exporters", "format", registry.formats)
        tables = _named(registry, entry.name, "lora_lightning_tables", "table", registry.tables)
        starts = _starts(registry, entry.name)
        _add(registry, entry, methods)
        registry.starts |= starts
        registry.commands |= commands
        registry.owners |= dict.fromkeys(commands, entry.name)
        registry.formats |= formats
        registry.tables |= tables
        for hook in _KINDS:
            with plugin_code() as part:
                _add_components(registry, entry.name, hook)
            if part.error is not None:  # its methods stay
                registry.failed[entry.name] = part.error
    if ran.error is not None:
        if registry.manager.has_plugin(entry.name):
            registry.manager.unregister(name=entry.name)
        registry.failed[entry.name] = explained(_module(entry), ran.error)
    if ran.printed.strip():
        registry.printed[entry.name] = ran.printed.strip()
    if ran.changed:
        registry.changed[entry.name] = ran.changed
    if ran.seconds >= SLOW_SECONDS:
        registry.seconds[entry.name] = ran.seconds
    if slow := [name for name in _SLOW if name in sys.modules and name not in before]:
        registry.slow[entry.name] = tuple(slow)


def _add_components(registry: Registry, plugin: str, hook: str) -> None:
    """Enter the classes that a plugin answers to a hook, as names and import paths; a taken name fails."""
    for answer in _ask(registry.manager, plugin, hook):
        _check_form(plugin, hook, answer)
        for name, path in answer.items():
            component = Component(name, _KINDS[hook], path, plugin)
            owner = _owner_of_name(registry, component)
            if owner:
                registry.failed[plugin] = _taken(hook, plugin, name, owner)
            else:
                registry.components[name] = component


def _check_form(plugin: str, hook: str, answer: object) -> None:
    """Raise `PluginError` unless an answer is a mapping of class names to import paths; say the line to change."""
    if isinstance(answer, list | tuple) and answer and all(isinstance(element, type) for element in answer):
        right = ", ".join(f'"{cls.__name__}": "{cls.__module__}:{cls.__name__}"' for cls in answer)
        raise PluginError(
            f"{plugin}: {hook} returned a list of classes, the form of API 1; answer {{{right}}}, and import nothing "
            "for it"
        )
    if not isinstance(answer, Mapping):
        raise TypeError(f"{hook} returned {answer!r}, which is no mapping of class name to import path")
    for name, path in answer.items():
        if not (isinstance(name, str) and isinstance(path, str) and re.fullmatch(r"[\w.]+:\w+", path)):
            raise TypeError(f'{hook} returned {name!r}: {path!r}; an import path is written "module:Class"')
        module, _, cls = path.partition(":")
        if cls != name:
            raise PluginError(
                f'{hook} returned "{name}": "{path}"; a class goes by its own name, so write "{module}:{name}" or '
                f'"{cls}": "{path}"'
            )


def _owner_of_name(registry: Registry, component: Component) -> str:
    """Who has the name of a plugin's class already; empty where nobody has, or the class is theirs."""
    first = registry.components.get(component.name)
    if first is not None:
        return f"plugin {first.plugin}"
    known = KNOWN.get((component.kind, component.name))
    if known is None or component.path.partition(".")[0] in _OWNERS:
        return ""
    package = known.path.partition(".")[0]
    return f"{package} ({known.path.partition(':')[0]})"


def load_classes(registry: Registry, bases: Mapping[str, type[Any]]) -> None:
    """Import the classes of plugins that a config may name beside methods; they import torch and Lightning.

    One that fails is recorded with its cause, for its plugin and under its name; the others stay. A class whose name is
    taken, by one of torch, Lightning, core or another plugin, is reached by its full path only, so that the name keeps
    its meaning.

    Args:
        registry: the plugins.
        bases: what each hook's classes derive from.
    """
    for hook, base in bases.items():
        for component in registry.components.values():
            if component.kind != _KINDS[hook] or component.name in registry.classes:
                continue
            with plugin_code() as ran:
                _add_class(registry, component, hook, base)
            if ran.error is not None:
                registry.failed[component.plugin] = registry.unusable[component.name] = ran.error


def _add_class(registry: Registry, component: Component, hook: str, base: type[Any]) -> None:
    cls = component.load()
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise TypeError(f"{hook} returned {component.path!r}, which is no {base.__name__} class")
    for other in subclasses(base):
        if other is not cls and other.__name__ == component.name and owner_of(other):
            raise _taken(hook, component.plugin, component.name, f"{owner_of(other)} ({other.__module__})")
    registry.classes[component.name] = (component.plugin, cls)


def base_layer_kinds(registry: Registry) -> list[tuple[str, Callable[[Any], Any]]]:
    """Kinds of base layer that plugins bring, with their plugin; asked for once. They import torch.

    A plugin that fails is recorded with its cause; its methods stay.
    """
    if registry.kinds is None:
        registry.kinds, hook = [], "lora_lightning_base_layers"
        for plugin, _ in registry.manager.list_name_plugin():
            with plugin_code() as ran:
                kinds = _listed(registry.manager, plugin, hook)
                wrong = [kind for kind in kinds if not callable(kind)]
                if wrong:
                    raise TypeError(f"{hook} returned {wrong[0]!r}, which is no function")
                registry.kinds += [(plugin, kind) for kind in kinds]
            if ran.error is not None:
                registry.failed[plugin] = ran.error
    return registry.kinds


def _ask(manager: pluggy.PluginManager, plugin: str, hook: str, kind: type[Any] = object, what: str = "") -> list[Any]:
    """What one plugin answers: nothing, or one `kind`, which is called `what` where it is none."""
    others = [other for name, other in manager.list_name_plugin() if name != plugin]
    caller = manager.subset_hook_caller(hook, others)
    answers: list[Any] = caller()
    asked = [function for function in caller.get_hookimpls() if not (function.wrapper or function.hookwrapper)]
    if len(answers) < len(asked):  # pluggy leaves out None
        form = what.partition(" ")[0] or "mapping"
        raise TypeError(f"{hook} returned None; it must return a {form}, an empty one where there is nothing to give")
    for answer in answers:
        if not isinstance(answer, kind):
            raise TypeError(f"{hook} returned {answer!r}, which is no {what}")
    return answers


def _listed(manager: pluggy.PluginManager, plugin: str, hook: str) -> list[Any]:
    """The elements of a list that one plugin answers."""
    return [element for answer in _ask(manager, plugin, hook, Iterable, "list") for element in answer]


@contextmanager
def names_kept(bases: Iterable[type[Any]]) -> Iterator[None]:
    """Within it a name that torch, Lightning, core or a plugin brings for a class below `bases` means theirs alone.

    Other classes have the same names, bitsandbytes has an AdamW; those go by their full paths.
    """
    written: dict[type[Any], str] = {}
    for family in map(subclasses, bases):
        names = {cls.__name__ for cls in family if keeps_name(cls)}
        written |= {cls: cls.__qualname__ for cls in family if cls.__name__ in names and not keeps_name(cls)}
    try:
        for cls in written:  # as local classes are called, which jsonargparse takes for no short name
            cls.__qualname__ = f"{cls.__name__}.<locals>.{cls.__name__}"
        yield
    finally:
        for cls, qualname in written.items():
            cls.__qualname__ = qualname


def keeps_name(cls: type[Any]) -> bool:
    """Whether the short name of a class means it, whoever else has the name."""
    return bool(owner_of(cls)) or registry().classes.get(cls.__name__, ("", None))[1] is cls


def owner_of(cls: type[Any]) -> str:
    """Which of torch, Lightning and core a class is part of; empty for others."""
    package = cls.__module__.partition(".")[0]
    return package if package in _OWNERS and "<locals>" not in cls.__qualname__ else ""


def _taken(hook: str, plugin: str, name: str, owner: str) -> PluginError:
    return PluginError(f"{hook}: {name} of {plugin} has a name that is taken, by {owner}; it must have another one")


def subclasses(base: type[Any]) -> set[type[Any]]:
    """Imported subclasses of a class, theirs included."""
    children: list[type[Any]] = type.__subclasses__(base)
    return set(children).union(*map(subclasses, children))


def _named(registry: Registry, plugin: str, hook: str, what: str, taken: Mapping[str, str]) -> dict[str, str]:
    """Verbs, formats or tables of one plugin, as name to import path; `taken` says who has those that there are."""
    found: dict[str, str] = {}
    target = "function" if what == "table" else "module"
    for answer in _ask(registry.manager, plugin, hook, Mapping, f"mapping of {what} to {target}"):
        found |= answer
    for name, path in found.items():
        if not (isinstance(name, str) and isinstance(path, str)) or (":" in path) != (target == "function"):
            raise TypeError(
                f"{hook} returned {name!r}: {path!r}, which is no {what} with the import path of a {target}"
            )
        if name in taken:
            raise _taken(hook, plugin, f'{what} "{name}"', taken[name])
    return found


def _check_names(blocked: Collection[str], names: Collection[str]) -> None:
    for name in blocked:
        if name not in names:
            raise PluginError(
                f'-p no:{name}: no plugin "{name}".{did_you_mean(name, names)} '
                f"Installed: {', '.join(sorted(names)) or 'none'}."
            )


def _register(manager: pluggy.PluginManager, entry: importlib.metadata.EntryPoint) -> list[type[Method]]:
    """Import one plugin, register it, and return its methods; every way in which it can be wrong raises."""
    module = entry.load()
    check_api(getattr(module, REQUIRES, None))
    manager.register(module, name=entry.name)
    manager.check_pending()
    if not manager.get_hookcallers(module):
        raise PluginError("it contributes nothing: no function in it is marked with lora_lightning.hookimpl")
    methods = _listed(manager, entry.name, "lora_lightning_methods")
    for method in methods:
        _check_method(method)
    twice = {method.__name__ for method in methods if [other.__name__ for other in methods].count(method.__name__) > 1}
    if twice:
        raise PluginError(f"it provides {', '.join(sorted(twice))} twice")
    return methods


def _starts(registry: Registry, plugin: str) -> dict[str, type[Start]]:
    """Starts that a plugin brings, by name."""
    found: dict[str, type[Start]] = {}
    for start in _listed(registry.manager, plugin, "lora_lightning_starts"):
        if not (isinstance(start, type) and issubclass(start, Start)):
            raise TypeError(f"lora_lightning_starts returned {start!r}, which is no Start class")
        name = start.__name__
        if name in found or name in registry.starts or name in registry.methods:
            raise PluginError(f'the name "{name}" of a start is taken')
        found[name] = start
    return found


def _check_method(method: object) -> None:
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise TypeError(f"lora_lightning_methods returned {method!r}, which is no Method class")
    if inspect.isabstract(method):
        missing = ", ".join(sorted(method.__abstractmethods__))
        raise TypeError(f"method {method.__name__} does not implement {missing}")
    fields = [name for name, kind in vars(method).get("__annotations__", {}).items() if "ClassVar" not in str(kind)]
    if fields and "__dataclass_fields__" not in vars(method):
        raise TypeError(
            f"method {method.__name__} has the field {fields[0]} but no @dataclass(frozen=True, kw_only=True)"
        )


def _add(registry: Registry, entry: importlib.metadata.EntryPoint, methods: list[type[Method]]) -> None:
    provider = Provider(entry.name, *_package(entry))
    for method in methods:
        name = method.__name__
        first = registry.providers.get(name)
        if first is not None:
            registry.duplicates[name] = DuplicateMethodError(
                f'two plugins provide a method "{name}": {first.plugin} ({first.package} {first.version}) and '
                f"{entry.name} ({provider.package} {provider.version}). Block one with -p no:{entry.name}."
            )
            registry.methods.pop(name, None)
            continue
        registry.methods[name] = method
        registry.providers[name] = provider


def _module(entry: importlib.metadata.EntryPoint) -> str:
    """Import path of a plugin, as written: `entry.module` fails for one that is none."""
    return entry.value.partition(":")[0].strip()


def _package(entry: importlib.metadata.EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution that carries a plugin."""
    return (entry.dist.name, entry.dist.version) if entry.dist else (entry.name, "unknown")


def package_of(plugin: str) -> tuple[str, str]:
    """Name and version of the distribution that carries an installed plugin."""
    return _package(next(entry for entry in entry_points(GROUP)[0] if entry.name == plugin))


_current: Registry | None = None


def registry() -> Registry:
    """The current registry; loads every plugin at the first call."""
    return load() if _current is None else _current


def method(name: str) -> type[Method]:
    """The installed method class called `name`."""
    return registry().method(name)


def optimizer_of(method_class: type[Method], name: str) -> type[Optimizer]:
    """The optimizer called `name`, which is a method's default and of another plugin.

    Raises:
        PluginError: no plugin provides it, naming those that are blocked or failed.
    """
    known = registry()
    component = known.components.get(name)
    if component is not None:
        optimizer_class: type[Optimizer] = component.load()
        return optimizer_class
    reasons = [f" Plugin {plugin} is blocked by -p no:{plugin}." for plugin in known.blocked]
    reasons += [f" Plugin {plugin} failed: {one_line(cause)}." for plugin, cause in known.failed.items()]
    raise PluginError(
        f"{method_class.__name__} trains with {name} unless another optimizer is named, and no plugin provides it."
        f"{''.join(reasons)} Name one in model.optimizer, such as AdamW."
    )


def restore_settings(method_class: type[T], where: str, fields: Mapping[str, Any]) -> T:
    """Settings from plain data, as `plain_settings` gives it or gave it when fields had other names.

    Raises:
        SettingsError: a field that the method does not have.
        UnknownMethodError: a method inside that no plugin provides.
    """
    current = renamed(fields, getattr(method_class, "former_fields", {}))
    check_names(method_class, where, current)
    return method_class(**{name: _restored(value, where) for name, value in current.items()})


def _restored(value: Any, where: str) -> Any:
    if not (isinstance(value, Mapping) and set(value) == {"class_path", "init_args"}):
        return value
    found: Any = registry().settings_class(value["class_path"], where)
    return restore_settings(found, where, value["init_args"])
