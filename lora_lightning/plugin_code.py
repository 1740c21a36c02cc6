"""Running code of a plugin: whatever it raises, prints, changes or takes of time is noted, explained and stays its own.

Nothing helps against code that ends the process otherwise than by `os._exit` and `os.abort`, as a crash in a compiled
extension does.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib import metadata
from importlib.metadata import EntryPoint
from types import FrameType, ModuleType
from typing import Any

import pluggy

from lora_lightning import hookspecs
from lora_lightning.errors import PluginError, did_you_mean
from lora_lightning.version import __version__

REQUIRES = "requires_api"
"""What a plugin's module calls the range of interfaces that it was written for."""
clock = time.perf_counter
"""What says how long a plugin's code takes, in seconds."""


@dataclass
class Ran:
    """What became of a plugin's code.

    Attributes:
        error: what it raised, of any kind; None where it came to its end.
        printed: what it wrote to standard output.
        changed: what it did to the process, a verb and its object each; all but threads has been put back.
        seconds: how long it took.
    """

    error: BaseException | None = None
    printed: str = ""
    changed: list[str] = field(default_factory=list)
    seconds: float = 0.0


@contextmanager
def plugin_code() -> Iterator[Ran]:
    """Code of a plugin runs inside: what it raises is noted, what it prints goes to standard error and is noted.

    A verb's output stays what the verb prints. Ctrl-C while it runs passes; a KeyboardInterrupt that the plugin itself
    raises is noted as any other exception.
    """
    ran, start = Ran(), clock()
    outer = sys.stdout
    if outer is not None:
        outer.flush()  # what was printed before is no part of it
    aside = outer if isinstance(outer, _Aside) else _Aside(outer)
    with _interrupts() as came:
        try:
            with redirect_stdout(aside), _descriptor_aside(), _process_kept(ran.changed), _no_end():
                yield ran
        except BaseException as error:
            if came and isinstance(error, KeyboardInterrupt):
                raise
            ran.error = error
        finally:
            if aside is not outer:
                aside.done = True
                ran.printed = "".join(aside.parts)
            ran.seconds = clock() - start


def imported(module: str) -> ModuleType:
    """A module of a plugin, imported as `plugin_code`.

    Raises:
        PluginError: its import raises what is no Exception, such as SystemExit; an Exception is raised as it is.
    """
    with plugin_code() as ran:
        return importlib.import_module(module)
    if isinstance(ran.error, Exception):
        raise ran.error
    raise PluginError(f"importing {module} raises {type(ran.error).__name__}({ran.error})") from ran.error


def check_api(required: object) -> None:
    """Raise `PluginError` unless a plugin was written for an interface like this core's; None says nothing."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    if required is None:
        return
    try:
        fits = SpecifierSet(str(required)).contains(hookspecs.API)
    except InvalidSpecifier as error:
        raise PluginError(f'{REQUIRES} is "{required}"; it must be a range of versions such as ">=2,<3"') from error
    if not fits:
        raise PluginError(
            f'{REQUIRES} is "{required}", and the plugin interface of this core ({__version__}) is {hookspecs.API}; '
            "it needs another version of lora-lightning, or is needed in another version itself"
        )


def explained(module: str, error: BaseException) -> BaseException:
    """What a failure most likely means: a plugin that was written for another core says so before anything else.

    Args:
        module: the plugin's import path.
        error: what it raised.
    """
    try:
        check_api(_stated(module, error))
    except PluginError as other_api:
        other_api.__cause__ = error
        return other_api
    except Exception:  # what it states cannot be read either
        return error
    explained: PluginError | None = None
    if isinstance(error, pluggy.PluginValidationError) and (unknown := re.match(r"unknown hook '(\w+)'", str(error))):
        known = [name for name in vars(hookspecs) if name.startswith(f"{hookspecs.NAMESPACE}_")]
        explained = PluginError(
            f'no hook "{unknown[1]}" here.{did_you_mean(unknown[1], known)} '
            f"It needs a newer core than {__version__}, or the name is misspelt"
        )
    elif isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "lora_lightning":
        explained = PluginError(
            f"{error}. It was written for another plugin interface than {hookspecs.API}, that of this core "
            f"({__version__}), or the name is misspelt"
        )
    if explained is None:
        return error
    explained.__cause__ = error
    return explained


def _stated(module: str, error: BaseException) -> object:
    """What a plugin had set `requires_api` to when an import in it failed; None where it had not come so far."""
    trace = error.__traceback__
    while trace is not None:
        names = trace.tb_frame.f_globals
        if names.get("__name__") == module and REQUIRES in names:
            return names[REQUIRES]
        trace = trace.tb_next
    return None


class _Aside:
    """Standard output while a plugin's code runs; afterwards, for whoever kept it, standard output itself."""

    def __init__(self, stdout: Any) -> None:
        self.stdout, self.done = stdout, False
        self.parts: list[str] = []

    def write(self, text: str) -> int:
        """Write to standard error, and note it."""
        if self.done:
            return int(self.stdout.write(text))
        self.parts.append(text)
        return sys.stderr.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def close(self) -> None:
        """Nothing: the stream is not the plugin's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stdout if self.done else sys.stderr, name)


@contextmanager
def _descriptor_aside() -> Iterator[None]:
    """What compiled code and other processes write to standard output goes to standard error; it is not noted."""
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    try:
        with suppress(OSError):  # there is no standard error
            os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def _process_kept(changed: list[str]) -> Iterator[None]:
    """What the rest of a command line stands on is put back, and noted: directory, arguments, what warnings do."""
    folder, words, threads = _folder(), list(sys.argv), set(threading.enumerate())
    strict = [entry for entry in warnings.filters if entry[0] == "error"]
    try:
        yield
    finally:
        if folder is not None and _folder() != folder:
            os.chdir(folder)
            changed.append("changes the working directory")
        if sys.argv != words:
            sys.argv[:] = words
            changed.append("changes sys.argv")
        if new := [entry for entry in warnings.filters if entry[0] == "error" and entry not in strict]:
            with warnings.catch_warnings():  # tells the machinery that filters are others
                pass
            warnings.filters[:] = [entry for entry in warnings.filters if entry not in new]  # type: ignore[index]
            changed.append("turns warnings into errors")
        if any(not one.daemon and one.is_alive() for one in set(threading.enumerate()) - threads):
            changed.append("starts a thread that is no daemon, so that the program cannot end")


def _folder() -> str | None:
    """The working directory; None where it was removed."""
    try:
        return os.getcwd()  # noqa: PTH109 - its name as it stands
    except OSError:
        return None


@contextmanager
def _no_end() -> Iterator[None]:
    """Functions that end a process raise in this one; in those that a plugin forks they do what they are for."""
    here, kept = os.getpid(), {name: getattr(os, name) for name in ("_exit", "abort")}

    def refusing(name: str, end: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*args: Any) -> Any:
            if os.getpid() != here:
                return end(*args)
            raise PluginError(f"it calls os.{name}, which would end the program")

        return refuse

    try:
        for name, end in kept.items():
            setattr(os, name, refusing(name, end))
        yield
    finally:
        for name, end in kept.items():
            setattr(os, name, end)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Signals of Ctrl-C that come inside; they are handled as before."""
    came: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield came
        return
    before = handler

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        if signal.getsignal(signal.SIGINT) is note:  # else the plugin has set one of its own
            signal.signal(signal.SIGINT, handler)


def entry_points(group: str) -> tuple[list[EntryPoint], dict[str, PluginError]]:
    """What installed packages offer under a name, and the cause by package whose entry_points.txt cannot be read.

    Of a package that is found twice the first counts, as for Python itself.
    """
    try:
        return list(metadata.entry_points(group=group)), {}
    except Exception:  # one package is broken: asked one by one, the others answer
        found: list[EntryPoint] = []
        broken: dict[str, PluginError] = {}
        seen: set[str] = set()
        for package in metadata.distributions():
            name = package.name or ""
            if name in seen:
                continue
            seen.add(name)
            try:
                found += package.entry_points.select(group=group)
            except Exception as error:
                why = f"its entry_points.txt cannot be read ({type(error).__name__}: {error})"
                broken[name] = PluginError(f"{why}; install {name} again, or remove it")
        return found, broken
