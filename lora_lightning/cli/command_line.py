"""Our own flags, read off the command line before any parser sees it.

They cannot be arguments of the parser: blocking decides which classes it knows, a run folder decides which config
comes first, and a second config argument is refused there.

    -p no:NAME           load no plugin NAME                     anywhere on the line, also -p=no:NAME
    --config NAME|PATH   a file, or a config this package carries        also -c, and with "="
    --run DIR            validate, test, predict: DIR/config.yaml goes first, weights from DIR/last.ckpt
    --resume DIR         fit: the same, and training continues
    --trust-run          with --run: take callbacks, loggers and classes of any package from DIR/config.yaml, too
    --output FILE        predict: where the predictions go, .csv or .jsonl

`sys.argv` is left whole, because launchers of further processes start them from it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_lightning.cli import other_tools
from lora_lightning.cli.configs import find_config, has_arms, is_path
from lora_lightning.errors import LoraLightningError, PluginError, RunFolderError, nearest
from lora_lightning.registry import TRAINING_VERBS

_USAGE = {
    "-p": "-p no:NAME, the name of a plugin not to load",
    "--config": "--config NAME or --config PATH",
    "--run": "--run DIR, the folder of a run",
    "--resume": "--resume DIR, the folder of a run",
    "--output": "--output FILE, ending in .csv or .jsonl",
}
_FLAGS = {"-c": "--config"} | {flag: flag for flag in _USAGE}


@dataclass(frozen=True)
class Line:
    """A command line, taken apart."""

    rest: tuple[str, ...]
    """For the parser: the verb, the run folder's config, and everything else in the order given."""
    verb: str | None = None
    """First word; None where the line starts with a flag or is empty."""
    blocked: tuple[str, ...] = ()
    """Names of plugins not to load."""
    configs: tuple[str, ...] = ()
    """Config files in the order in which they are read, the run folder's first."""
    folder: Path | None = None
    """Run folder given by --run or --resume."""
    resume: bool = False
    """Whether training continues in `folder`."""
    checkpoint: Path | None = None
    """`folder`'s last.ckpt; None without a folder, or where --ckpt_path is given."""
    output: str = "predictions.csv"
    """File that `predict` writes."""
    trusted: bool = False
    """Whether everything that `folder`'s config names may be imported."""
    stem: str = "run"
    """Name for new run folders: the first config's, or the one under which `folder` stands."""


def read(argv: Sequence[str]) -> Line:
    """Take our flags off `argv`, which is not changed.

    Raises:
        PluginError: a -p that is not no:NAME.
        SettingsError: a config that is neither a file nor carried by this package.
        RunFolderError: a run folder that is missing or incomplete, or given to the wrong verb.
    """
    trusted = "--trust-run" in argv
    words = list(_split([word for word in argv if word != "--trust-run"]))
    verb = _take_verb(words)
    lead = () if verb is None else (verb,)
    blocked = tuple(_plugin(value) for flag, value in words if flag == "-p")
    folders = [(flag, value) for flag, value in words if flag in ("--run", "--resume") and not _own(flag, verb)]
    words = [(flag, find_config(value)) if flag == "--config" else (flag, value) for flag, value in words]
    configs = [value for flag, value in words if flag == "--config"]
    if verb != "compare" and (arms := next((one for one in configs if is_path(one) and has_arms(Path(one))), None)):
        raise LoraLightningError(
            f'config "{arms}" holds the arms of a comparison; python -m lora_lightning compare {arms} takes it.'
        )
    outputs = [value for flag, value in words if flag == "--output" and verb == "predict"]
    output = outputs[-1] if outputs else "predictions.csv"
    rest = [word for flag, value in words for word in _for_parser(flag, value, verb)]
    if trusted and not any(flag == "--run" for flag, _ in folders):
        raise RunFolderError("--trust-run goes with --run DIR; a config given by --config is trusted.")
    if not folders:
        stem = Path(configs[0]).stem if configs and is_path(configs[0]) else "run"
        return Line((*lead, *rest), verb, blocked=blocked, configs=tuple(configs), output=output, stem=stem)
    if len(folders) > 1:
        raise RunFolderError(f"{' and '.join(' '.join(pair) for pair in folders)}: only one run folder can be given.")
    flag, folder = folders[0][0], Path(folders[0][1])
    own_checkpoint = any(word.split("=")[0] == "--ckpt_path" for word in rest)
    _check_folder(flag, folder, verb, needs_checkpoint=not own_checkpoint)
    first = str(folder / "config.yaml")
    return Line(
        (*lead, "--config", first, *rest),
        verb,
        blocked=blocked,
        configs=(first, *configs),
        output=output,
        folder=folder,
        resume=flag == "--resume",
        trusted=trusted or flag == "--resume",
        checkpoint=None if own_checkpoint else folder / "last.ckpt",
        stem=folder.absolute().parent.name or "run",
    )


def _split(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(flag, value) for ours, ("", word) for the rest."""
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in _FLAGS:
            yield "", word
            continue
        if not equals:
            value = next(words, "")
        if not value or value.startswith("--"):
            raise LoraLightningError(f"{name} needs a value: {_USAGE[_FLAGS[name]]}.")
        yield _FLAGS[name], value


def _plugin(value: str) -> str:
    name = value.removeprefix("no:")
    if name == value or not name:
        raise PluginError(f'-p {value}: only "no:NAME" is understood; it leaves plugin NAME out.')
    return name


def _take_verb(words: list[tuple[str, str]]) -> str | None:
    """Remove the verb, which our flags may precede, from `words`; None where another flag comes first."""
    for i, (flag, value) in enumerate(words):
        if not flag:
            return None if value.startswith("-") else words.pop(i)[1]
    return None


def _for_parser(flag: str, value: str, verb: str | None) -> Sequence[str]:
    if flag == "--config" or _own(flag, verb):
        return (flag, value)
    return () if flag else (value,)


def _own(flag: str, verb: str | None) -> bool:
    """Whether a flag of ours is a verb's own."""
    return (flag == "--output" and verb != "predict") or (flag == "--resume" and verb == "compare")


def _check_folder(flag: str, folder: Path, verb: str | None, *, needs_checkpoint: bool) -> None:
    verbs = ("fit",) if flag == "--resume" else TRAINING_VERBS[1:]
    if meant := other_tools.VERBS.get(verb or ""):
        raise RunFolderError(f'no verb "{verb}". Here it is "{meant}".')
    if verb not in verbs:
        other = "fit continues a run with --resume DIR" if flag == "--run" else "the others read one with --run DIR"
        raise RunFolderError(f"{flag} {folder}: only {', '.join(verbs)} takes {flag}; {other}.")
    if folder.is_file():
        raise RunFolderError(f"{flag} {folder}: this is a file; give the folder, {flag} {folder.parent}.")
    if not folder.is_dir():
        raise RunFolderError(f"{flag} {folder}: no such folder.{_near(folder)}")
    if not (folder / "config.yaml").is_file():
        raise RunFolderError(f"{flag} {folder}: no config.yaml in it, so it is no run folder.{_runs_in(folder)}")
    if needs_checkpoint and not (folder / "last.ckpt").is_file():
        raise RunFolderError(
            f"{flag} {folder}: no last.ckpt in it; the run wrote no checkpoint. "
            f"Start it again with fit --config {shlex.quote(str(folder / 'config.yaml'))}.{_near(folder, 'last.ckpt')}"
        )


def _near(folder: Path, holding: str = "config.yaml") -> str:
    """The folders most like the first missing part of `folder`, or those beside it that hold a file."""
    missing = folder.absolute()
    while not missing.parent.is_dir():
        missing = missing.parent
    beside = sorted(path for path in missing.parent.glob("*") if path.is_dir() and path != missing)
    runs = [path.name for path in beside if (path / holding).is_file()]
    close = nearest(missing.name, runs if folder.is_dir() else [path.name for path in beside]) or runs[-3:]
    shown = _shown(folder, missing).parent
    return f" Nearest: {', '.join(str(shown / name) for name in close)}." if close else ""


def _shown(folder: Path, part: Path) -> Path:
    """`part`, a parent of `folder` or itself, written as the user wrote `folder`."""
    depth = len(folder.absolute().parts) - len(part.parts)
    return [folder, *folder.parents][depth] if depth <= len(folder.parents) else part


def _runs_in(folder: Path) -> str:
    inside = sorted(str(path.parent) for path in folder.glob("*/config.yaml"))[-3:]
    return f" Runs in it: {', '.join(inside)}." if inside else _near(folder)
