"""Every error a user can cause, and the one way its message is built: field, value, rule, nearest valid choice."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable


class LoraLightningError(Exception):
    """Base of all errors raised on purpose here; the command line prints them as one line and exits with 2."""


class SettingsError(LoraLightningError, ValueError):
    """A setting has a value outside its rule.

    Attributes:
        setting: class and field of that setting, where it is a single one that `check` has judged.
    """

    setting: tuple[str, str] | None = None


class UnknownMethodError(LoraLightningError, LookupError):
    """No installed plugin provides a method of that name."""


class DuplicateMethodError(LoraLightningError):
    """Two plugins provide one name."""


class PluginError(LoraLightningError):
    """A plugin that is needed could not be loaded."""


class TargetError(LoraLightningError, ValueError):
    """A target, exclude or override pattern does not select what it should."""


class ModelError(LoraLightningError):
    """A pretrained model cannot be found, read or used for the task."""


class DataError(LoraLightningError):
    """A data file, column, label or split is not what the settings say."""


class AdapterStateError(LoraLightningError, RuntimeError):
    """An adapter is not in a state that allows the operation (merged, missing, not mergeable, ...)."""


class AdapterFileError(LoraLightningError):
    """An adapter folder is missing, truncated, foreign, or does not fit the model."""


class ExportError(LoraLightningError):
    """An adapter cannot be written in the format asked for."""


class NoEffectError(LoraLightningError):
    """A callback found nothing to act on."""


class TrainingError(LoraLightningError, RuntimeError):
    """A run would leave something silently untrained, or its loss is not a number."""


class ResumeError(LoraLightningError):
    """A checkpoint cannot continue this run exactly."""


class ProcessError(LoraLightningError):
    """Another process failed, so this one stops as well."""


class RunFolderError(LoraLightningError):
    """A run folder cannot be read or written."""


def wrapped_error(error: BaseException | None) -> LoraLightningError | None:
    """The error of ours that a library has raised another one from, or `error` itself; None where there is none."""
    while error is not None and not isinstance(error, LoraLightningError):
        error = error.__cause__ or error.__context__
    return error


def raised_in(error: BaseException, package: str) -> bool:
    """Whether a module of `package` has raised `error` itself."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).partition(".")[0] == package


def nearest(word: str, choices: Iterable[str], n: int = 3) -> list[str]:
    """The choices most like `word`, best first; case does not count."""
    by_folded = {choice.lower(): choice for choice in sorted(choices, reverse=True)}
    return [by_folded[match] for match in difflib.get_close_matches(word.lower(), by_folded, n=n, cutoff=0.5)]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """` Did you mean "x"?` for the nearest choice, or nothing where none is near."""
    close = nearest(word, choices, n=1)
    return f' Did you mean "{close[0]}"?' if close else ""


def check(condition: bool, owner: object, field: str, rule: str) -> None:
    """Raise `SettingsError` "Owner.field is value; rule" unless `condition` holds.

    `owner` is the settings object; its class gives the name, its attribute the value.
    """
    if not condition:
        name = type(owner).__name__
        error = SettingsError(f"{name}.{field} is {getattr(owner, field)!r}; {rule}")
        error.setting = (name, field)
        raise error
