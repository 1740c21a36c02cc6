"""Errors of the operating system: one line that names the file and what helps."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from lora_lightning.cli import main as entry
from lora_lightning.cli.system_errors import DEBUG, system_error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device. Make room"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), '"a/b": Permission denied. Change its permissions'),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), '"a": No such file. It is not there, or was removed'),
        (OSError(errno.ENAMETOOLONG, None, "x" * 5000), f'"{"x" * 120}...": File name too long. Give a shorter'),
        (OSError(errno.EXDEV, "Invalid cross-device link"), "Invalid cross-device link. (The environment"),
    ],
)
def test_it_is_one_line_that_says_what_helps(error, text):
    told = str(system_error(error))
    assert told.startswith(text)
    assert f"{DEBUG}=1" in told


@pytest.mark.parametrize(
    "error", [ValueError("x"), OSError("transformers says this"), BrokenPipeError(errno.EPIPE, "x")]
)
def test_what_the_system_did_not_refuse_is_another_matter(error):
    assert system_error(error) is None


def test_a_traceback_may_be_asked_for(monkeypatch):
    monkeypatch.setenv(DEBUG, "1")
    assert system_error(OSError(errno.ENOSPC, "full")) is None
    monkeypatch.setattr(entry, "_run", lambda _: Path("/" + "x" * 300).stat())
    with pytest.raises(OSError, match="too long"):
        entry.main(["methods"])


def test_any_verb_that_the_system_refuses_ends_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(entry, "_run", lambda _: Path("/" + "x" * 300).stat())
    assert entry.main(["methods"]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: "/xxx')
    assert error.count("\n") == 1
