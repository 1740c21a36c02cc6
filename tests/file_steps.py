"""Stopping at each single step that code takes on the disk, as a kill does: nothing after it happens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

STEPS = ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "symlink")


class Stopped(BaseException):
    """The process is gone."""


def each_step(run: Callable[[], object], prepare: Callable[[], object]) -> Iterator[tuple[int, str]]:
    """Call `prepare` and `run` again and again, stopped at the first, second, ... step, until a run comes to its end.

    Yields after each stop the number of the step and its name. Until the next run, steps are taken again.
    """
    for number in range(1, 500):
        prepare()
        stopped = _run_stopped(run, number)
        if stopped is None:
            return
        yield number, stopped
    raise AssertionError("the run takes more steps than are tried")


def _run_stopped(run: Callable[[], object], number: int) -> str | None:
    left, stopped = number, None

    def step(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def taken(*args: Any, **options: Any) -> Any:
            nonlocal left, stopped
            left -= 1
            if left <= 0:
                stopped = stopped or f"{name} {args[0] if args else ''}"
                raise Stopped
            return real(*args, **options)

        return taken

    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, step(name))
        with suppress(Stopped):  # what was open is closed on the way, and its locks are free
            run()
    return stopped
