"""Running code of a plugin: whatever it raises, prints or takes of time is noted and stays its own.

Nothing helps against code that ends the process, as `os._exit` or a crash in a compiled extension does.
"""

from __future__ import annotations

import importlib
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from types import FrameType, ModuleType
from typing import Any

from lora_lightning.errors import PluginError

clock = time.perf_counter
"""What says how long a plugin's code takes, in seconds."""


@dataclass
class Ran:
    """What became of a plugin's code.

    Attributes:
        error: what it raised, of any kind; None where it came to its end.
        printed: what it wrote to standard output.
        seconds: how long it took.
    """

    error: BaseException | None = None
    printed: str = ""
    seconds: float = 0.0


@contextmanager
def plugin_code() -> Iterator[Ran]:
    """Code of a plugin runs inside: what it raises is noted, what it prints goes to standard error and is noted.

    A verb's output stays what the verb prints. Ctrl-C while it runs passes; a KeyboardInterrupt that the plugin itself
    raises is noted as any other exception.
    """
    ran, start = Ran(), clock()
    outer = sys.stdout
    aside = outer if isinstance(outer, _Aside) else _Aside(outer)
    with _interrupts() as came:
        try:
            with redirect_stdout(aside):
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
