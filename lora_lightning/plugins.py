"""Finding plugins, blocking them, and saying who provides what and why one failed.

Imports neither torch nor Lightning; a plugin that does is merely slow.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pluggy

from lora_lightning import hookspecs
from lora_lightning.cli.shell.sources import PACKAGES, imported_from, known_names, statements
from lora_lightning.errors import DuplicateMethodError, PluginError, did_you_mean
from lora_lightning.methods import Method, check_names, renamed
from lora_lightning.registry import LIGHT_VERBS, TRAINING_VERBS, Provider, Registry
from lora_lightning.version import __version__

GROUP = "lora_lightning"
_REQUIRES = "requires_api"
_CLASS_HOOKS = {
    "lora_lightning_optimizers": "optimizers",
    "lora_lightning_callbacks": "callbacks",
    "lora_lightning_datamodules": "datamodules",
}
"""Hooks that answer classes, with what `known_names` calls them."""
_SLOW = ("torch", "lightning", "transformers")
"""What takes seconds to import."""


def load(blocked: Collection[str] = ()) -> Registry:
    """Load every installed plugin except those blocked, and make the result the current registry.

    A plugin that fails is recorded with its cause and never ends the command line. Two that provide one name both
    lose it, since either could be meant; asking for the name raises.

    Raises:
        PluginError: a blocked name that no installed plugin has.
    """
    global _current
    registry = Registry()
    manager = registry.manager
    manager.add_hookspecs(hookspecs)
    found = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: entry.name)
    _check_names(blocked, {entry.name for entry in found})
    for entry in found:
        if entry.name in blocked:
            registry.blocked[entry.name] = _announced(entry)
            registry.modules[entry.name] = entry.module
            continue
        if manager.has_plugin(entry.name):
            registry.failed[f"{entry.name} ({' '.join(_package(entry))})"] = PluginError(
                "another plugin has that name already"
            )
            continue
        before = set(sys.modules)
        try:
            methods = _register(manager, entry)
            verbs = dict.fromkeys((*TRAINING_VERBS, *LIGHT_VERBS), "core") | registry.commands
            commands = _named(registry, entry.name, "lora_lightning_commands", "verb", verbs)
            formats = _named(registry, entry.name, "lora_lightning_exporters", "format", registry.formats)
        except (Exception, SystemExit) as error:
            if manager.has_plugin(entry.name):
                manager.unregister(name=entry.name)
            registry.failed[entry.name] = _explained(error)
            continue
        finally:
            if slow := [name for name in _SLOW if name in sys.modules and name not in before]:
                registry.slow[entry.name] = tuple(slow)
        _add(registry, entry, methods)
        registry.commands |= commands
        registry.formats |= formats
        for hook in _CLASS_HOOKS:
            _announce(registry, entry, hook)
    _current = registry
    return registry


def load_classes(registry: Registry, bases: Mapping[str, type[Any]]) -> None:
    """Ask plugins for the classes that a config may name beside methods; they import torch and Lightning.

    A plugin that fails is recorded with its cause; its methods stay. A class whose name is taken, by one of
    torch, Lightning, core or another plugin, is reached by its full path only, so that the name keeps its meaning.

    Args:
        registry: the plugins.
        bases: what each hook's classes derive from.
    """
    for hook, base in bases.items():
        for plugin, _ in registry.manager.list_name_plugin():
            try:
                for cls in _listed(registry.manager, plugin, hook):
                    if not (isinstance(cls, type) and issubclass(cls, base)):
                        raise TypeError(f"{hook} returned {cls!r}, which is no {base.__name__} class")
                    _add_class(registry, plugin, cls, hook, base)
            except (Exception, SystemExit) as error:
                registry.failed[plugin] = error


def base_layer_kinds(registry: Registry) -> list[tuple[str, Callable[[Any], Any]]]:
    """Kinds of base layer that plugins bring, with their plugin; asked for once. They import torch.

    A plugin that fails is recorded with its cause; its methods stay.
    """
    if registry.kinds is None:
        registry.kinds, hook = [], "lora_lightning_base_layers"
        for plugin, _ in registry.manager.list_name_plugin():
            try:
                kinds = _listed(registry.manager, plugin, hook)
                wrong = [kind for kind in kinds if not callable(kind)]
                if wrong:
                    raise TypeError(f"{hook} returned {wrong[0]!r}, which is no function")
                registry.kinds += [(plugin, kind) for kind in kinds]
            except (Exception, SystemExit) as error:
                registry.failed[plugin] = error
    return registry.kinds


def _ask(manager: pluggy.PluginManager, plugin: str, hook: str, kind: type[Any], what: str) -> list[Any]:
    """What one plugin answers: nothing, or one `kind`, which is called `what` where it is none."""
    others = [other for name, other in manager.list_name_plugin() if name != plugin]
    answers: list[Any] = manager.subset_hook_caller(hook, others)()
    for answer in answers:
        if not isinstance(answer, kind):
            raise TypeError(f"{hook} returned {answer!r}, which is no {what}")
    return answers


def _listed(manager: pluggy.PluginManager, plugin: str, hook: str) -> list[Any]:
    """The elements of a list that one plugin answers."""
    return [element for answer in _ask(manager, plugin, hook, Iterable, "list") for element in answer]


def _add_class(registry: Registry, plugin: str, cls: type[Any], hook: str, base: type[Any]) -> None:
    name = cls.__name__
    first, known = registry.classes.get(name, ("", cls))
    own = next((other for other in subclasses(base) if other.__name__ == name and _owner(other)), cls)
    if known is not cls or own is not cls:
        cls.__qualname__ = _hidden(cls)
        raise _taken(hook, plugin, name, f"plugin {first}" if first else f"{_owner(own)} ({own.__module__})")
    registry.classes[name] = (plugin, cls)


@contextmanager
def names_kept(bases: Iterable[type[Any]]) -> Iterator[None]:
    """Within it a name that torch, Lightning or core has for a class below `bases` means theirs alone.

    Other packages have classes of the same names, bitsandbytes an AdamW; those go by their full paths.
    """
    written: dict[type[Any], str] = {}
    for family in map(subclasses, bases):
        names = {cls.__name__ for cls in family if _owner(cls)}
        written |= {cls: cls.__qualname__ for cls in family if cls.__name__ in names and not _owner(cls)}
    try:
        for cls in written:
            cls.__qualname__ = _hidden(cls)
        yield
    finally:
        for cls, qualname in written.items():
            cls.__qualname__ = qualname


def _hidden(cls: type[Any]) -> str:
    """A qualified name as local classes have one, which neither jsonargparse nor `choices` takes for a short name."""
    return f"{cls.__name__}.<locals>.{cls.__name__}"


def _owner(cls: type[Any]) -> str:
    """Which of torch, Lightning and core a class is part of; empty for others."""
    package = cls.__module__.partition(".")[0]
    return package if package in PACKAGES and "<locals>" not in cls.__qualname__ else ""


def _taken(hook: str, plugin: str, name: str, owner: str) -> PluginError:
    return PluginError(f"{hook}: {name} of {plugin} has a name that is taken, by {owner}; it must have another one")


def subclasses(base: type[Any]) -> set[type[Any]]:
    """Imported subclasses of a class, theirs included."""
    children: list[type[Any]] = type.__subclasses__(base)
    return set(children).union(*map(subclasses, children))


def _announce(registry: Registry, entry: importlib.metadata.EntryPoint, hook: str) -> None:
    """Enter the classes that a plugin's source answers to a hook; it fails where their names are plainly taken."""
    for name in _announced(entry, hook):
        owner = f"plugin {registry.announced[name][0]}" if name in registry.announced else ""
        owner = owner or known_names(_CLASS_HOOKS[hook]).get(name, "")
        if owner and name in _own(entry):
            registry.failed[entry.name] = _taken(hook, entry.name, name, owner)
        else:
            registry.announced[name] = (entry.name, hook)


def _own(entry: importlib.metadata.EntryPoint) -> set[str]:
    """Classes that a plugin's source defines or imports, but not from torch, Lightning or core."""
    found = set()
    for node in (inner for statement in statements(entry.module) for inner in ast.walk(statement)):
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            package = imported_from(node, entry.module).partition(".")[0]
            found |= {alias.name for alias in node.names if package not in PACKAGES}
    return found


def _named(registry: Registry, plugin: str, hook: str, what: str, taken: Mapping[str, str]) -> dict[str, str]:
    """Verbs or formats of one plugin, as name to import path; `taken` says who has those that there are."""
    found: dict[str, str] = {}
    for answer in _ask(registry.manager, plugin, hook, Mapping, f"mapping of {what} to module"):
        found |= answer
    for name, path in found.items():
        if not (isinstance(name, str) and isinstance(path, str)):
            raise TypeError(f"{hook} returned {name!r}: {path!r}, which is no {what} with the import path of a module")
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
    _check_api(_requirement(entry))  # read before it runs: what it imports from a newer core would fail first
    module = entry.load()
    _check_api(getattr(module, _REQUIRES, None))
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


def _check_api(required: object) -> None:
    """Raise `PluginError` unless a plugin was written for an interface like this core's; None says nothing."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    if required is None:
        return
    try:
        fits = SpecifierSet(str(required)).contains(hookspecs.API)
    except InvalidSpecifier as error:
        raise PluginError(f'{_REQUIRES} is "{required}"; it must be a range of versions such as ">=1,<2"') from error
    if not fits:
        raise PluginError(
            f'{_REQUIRES} is "{required}", and the plugin interface of this core ({__version__}) is {hookspecs.API}; '
            "it needs another version of lora-lightning, or is needed in another version itself"
        )


def _requirement(entry: importlib.metadata.EntryPoint) -> object:
    """What a plugin's source sets `requires_api` to; None where that is not plainly there."""
    for node in statements(entry.module):
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [_REQUIRES]:
            return node.value.value if isinstance(node.value, ast.Constant) else None
    return None


def _announced(entry: importlib.metadata.EntryPoint, hook: str = "lora_lightning_methods") -> tuple[str, ...]:
    """Names of what a plugin would answer to a hook, read in its source without running it; empty where unclear."""
    body = statements(entry.module)
    original = {alias.asname: alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == hook:
            names = [name for statement in node.body for name in _returned(statement)]
            return tuple(original.get(name, name) for name in names)
    return ()


def _returned(statement: ast.stmt) -> Iterator[str]:
    """Class names in `return [First, module.Second]`."""
    if isinstance(statement, ast.Return) and isinstance(statement.value, ast.List | ast.Tuple):
        for element in statement.value.elts:
            if isinstance(element, ast.Name):
                yield element.id
            elif isinstance(element, ast.Attribute):
                yield element.attr


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


def _package(entry: importlib.metadata.EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution that carries a plugin."""
    return (entry.dist.name, entry.dist.version) if entry.dist else (entry.name, "unknown")


def package_of(plugin: str) -> tuple[str, str]:
    """Name and version of the distribution that carries an installed plugin."""
    [entry, *_] = importlib.metadata.entry_points(group=GROUP, name=plugin)
    return _package(entry)


def _explained(error: BaseException) -> BaseException:
    """A hook of our namespace that this core does not know is most likely from a newer one."""
    unknown = re.match(r"unknown hook '(\w+)'", str(error))
    if isinstance(error, pluggy.PluginValidationError) and unknown:
        known = [name for name in vars(hookspecs) if name.startswith(f"{hookspecs.NAMESPACE}_")]
        explained = PluginError(
            f'no hook "{unknown[1]}" here.{did_you_mean(unknown[1], known)} '
            f"It needs a newer core than {__version__}, or the name is misspelt"
        )
        explained.__cause__ = error
        return explained
    return error


_current: Registry | None = None


def registry() -> Registry:
    """The current registry; loads every plugin at the first call."""
    return load() if _current is None else _current


def method(name: str) -> type[Method]:
    """The installed method class called `name`."""
    return registry().method(name)


def restore_settings(method_class: type[Method], where: str, fields: Mapping[str, Any]) -> Method:
    """Settings from plain data, as `plain_settings` gives it or gave it when fields had other names.

    Raises:
        SettingsError: a field that the method does not have.
        UnknownMethodError: a method inside that no plugin provides.
    """
    current = renamed(fields, method_class.former_fields)
    check_names(method_class, where, current)
    return method_class(**{name: _restored(value, where) for name, value in current.items()})


def _restored(value: Any, where: str) -> Any:
    if not (isinstance(value, Mapping) and set(value) == {"class_path", "init_args"}):
        return value
    return restore_settings(registry().method(value["class_path"], where), where, value["init_args"])
