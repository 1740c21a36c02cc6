"""A file with one tensor a layer, and the digest that tells it from every other one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lora_lightning.errors import SettingsError
from lora_lightning.storage.atomic import write_atomically


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors by layer path: paths, shapes and values in float32."""
    found = hashlib.sha256()
    for path in sorted(tensors):
        found.update(f"{path}:{tuple(tensors[path].shape)};".encode())
        found.update(tensors[path].detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def write_tensors(file: str | Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors by layer path in float32, as a safetensors file; returns their digest."""
    plain = {path: value.detach().float().cpu().contiguous() for path, value in tensors.items()}
    sha256 = tensors_digest(plain)
    write_atomically(Path(file), lambda opened: opened.write(save(plain, {"sha256": sha256})))
    return sha256


def read_tensors(file: str | Path, setting: str, sha256: str | None = None) -> dict[str, Tensor]:
    """What `write_tensors` has written.

    Args:
        file: the file.
        setting: what names it, for messages.
        sha256: digest that it must have; None takes any.

    Raises:
        SettingsError: it cannot be read, is damaged, or is another one.
    """
    try:
        with safe_open(Path(file), "pt") as opened:
            stated = (opened.metadata() or {}).get("sha256")
            tensors = {path: opened.get_tensor(path) for path in opened.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise SettingsError(f'{setting} names "{file}", which cannot be read: {error}.') from error
    found = tensors_digest(tensors)
    if stated != found:
        raise SettingsError(
            f'{setting}: "{file}" holds tensors of the digest {found} and states {stated}; it is damaged.'
        )
    if sha256 not in (None, found):
        raise SettingsError(
            f'{setting}: "{file}" has the digest {found}, and {sha256} is asked for; it is another one.'
        )
    return tensors
