"""Where pretrained weights lie: a local folder, a folder that an installed package carries, or the hub."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from lora_lightning.errors import ModelError, nearest
from lora_lightning.models.random import is_random

PACKAGE = "pkg:"
"""Prefix of `pkg:IMPORT_NAME/FOLDER`, weights that an installed package carries."""
WEIGHTS = "model.safetensors"
"""File of a model's weights; of several files the beginning of their index's name."""


def resolve(name: str, field: str = "model.pretrained", needs: str | None = "config.json") -> str:
    """The local folder that `name` means, or `name` itself where it is a hub id or a model without pretrained weights.

    Args:
        name: Path, hub id, or `pkg:IMPORT_NAME/FOLDER`; the package is found without importing it.
        field: The setting that holds `name`, for messages.
        needs: A file that the folder must hold.

    Raises:
        ModelError: a package that is not installed, a folder that does not exist or lacks the file `needs`.
    """
    if is_random(name):
        return name
    if name.startswith(PACKAGE):
        folder = _package_folder(name, field)
    elif Path(name).expanduser().exists() or _looks_like_path(name):
        folder = Path(name).expanduser()
    else:
        return name
    if not folder.is_dir():
        raise ModelError(f'{field} is "{name}"; no such folder.{_nearest_folder(folder)}')
    if needs is not None and not (folder / needs).is_file():
        below = sorted(f'"{name}/{path.parent.name}"' for path in folder.glob(f"*/{needs}"))
        hint = f" Nearest: {', '.join(below)}." if below else ""
        raise ModelError(f'{field} is "{name}"; the folder holds no {needs}.{hint}')
    return str(folder)


def check_reachable(name: str) -> None:
    """Check that the hub, or its cache here, has the configuration of a model that no local folder holds.

    What is taken from the model, such as its tokenizer, is then not blamed for the model.

    Raises:
        ModelError: there is none.
    """
    if is_random(name) or Path(resolve(name)).is_dir():
        return
    from transformers.utils import cached_file

    try:
        cached_file(name, "config.json")
    except (OSError, ValueError) as error:
        raise unreachable(name, error) from error


def unreachable(name: str, error: BaseException) -> ModelError:
    """A `ModelError` with the first line of what transformers said of a model, and what helps."""
    reason = " ".join(str(error).split("\n", maxsplit=1)[0].split())
    help_text = ""
    if "connect" in reason:
        near = nearest(name, (path.name for path in Path().iterdir() if path.is_dir()))
        help_text = f" Folders here that are called alike: {', '.join(near)}." if near else ""
        help_text += f" Give a local folder, or fetch the model once where there is a network: hf download {name}"
    return ModelError(f'model.pretrained is "{name}": {reason}{help_text}')


def check_weights(name: str) -> None:
    """Check that a local model has its files of weights, without opening one; says nothing of the hub's.

    Raises:
        ModelError: a file that is missing, or only pickles, which are never opened.
    """
    folder = Path(resolve(name))
    if is_random(name) or not folder.is_dir() or (folder / WEIGHTS).is_file():
        return
    index = folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" {pickles[0]} is a pickle, which is never opened; convert it." if pickles else ""
        raise ModelError(f'model.pretrained is "{name}"; the folder holds no {WEIGHTS}.{hint}')
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f'model.pretrained is "{name}"; its {index.name} cannot be read: {error}.') from error
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ModelError(
            f'model.pretrained is "{name}"; {len(missing)} of its {len(files)} files of weights are missing, such as '
            f"{missing[0]}."
        )


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and Path(name).parent.is_dir())


def _package_folder(name: str, field: str) -> Path:
    package, _, folder = name.removeprefix(PACKAGE).partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f'{field} is "{name}"; no package "{package}" is installed.'
            ' The package of the demo model comes with: pip install "lora-lightning[demo]"'
        )
    return Path(next(iter(spec.submodule_search_locations)), folder)


def _nearest_folder(missing: Path) -> str:
    if not missing.parent.is_dir():
        return f" There is no folder {missing.parent} either."
    close = nearest(missing.name, (path.name for path in missing.parent.iterdir() if path.is_dir()))
    return f" Nearest: {', '.join(close)} in {missing.parent}." if close else f" None in {missing.parent} is near."
