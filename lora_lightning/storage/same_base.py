"""Whether a model is the base that an adapter file was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_lightning.errors import AdapterFileError
from lora_lightning.models.anatomy import Anatomy
from lora_lightning.storage.fingerprint import differences, fingerprint, say_how_compared
from lora_lightning.storage.stored import Stored


def check_base(anatomy: Anatomy, stored: Stored, below: Iterable[str], directory: str | Path) -> None:
    """Compare a model with the base that a file states.

    Args:
        anatomy: the model.
        stored: what the file states.
        below: parameters that adapters below train in full, which are none of the base.
        directory: where the file lies, for messages.

    Raises:
        AdapterFileError: it is another base.
    """
    own = fingerprint(anatomy, [*stored.trained, *below])
    refuse_other_base(own, stored, directory, differences(own, stored.fingerprint))
    say_how_compared(own, stored.fingerprint, anatomy.formats, stored.quantization)


def refuse_other_base(own: Mapping[str, Any], stored: Stored, directory: str | Path, parts: Iterable[str]) -> None:
    """Raise `AdapterFileError` for the first of `parts` in which the fingerprint of another base model differs."""
    theirs, base = stored.fingerprint, f"(base: {stored.base or 'unknown'})"
    reasons = {
        "architecture": f"{theirs['architecture']}; this model is {own['architecture']}.",
        "names": f"a {theirs['architecture']} whose parameters have other names or shapes {base}.",
        "weights": f"other base weights than this model has {base}; load the same pretrained weights first.",
        "statistics": f"other running statistics, as of batch normalisation, than this model has {base}; load the same "
        "pretrained model first, and let nothing move them (also_train trains and saves them).",
        "buffers": f"other buffers than this model has {base}, such as bounds or corrections of a router; load the "
        "same pretrained model first.",
    }
    for part in parts:
        if part in ("weights", "statistics", "buffers") or own[part] != theirs[part]:
            raise AdapterFileError(f'"{directory}" was trained on {reasons[part]}')
