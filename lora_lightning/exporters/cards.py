"""The model card of an export: how each format is loaded, and what the run around the adapter has measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lora_lightning.exporters.report import Origin
from lora_lightning.models.published import shown_name
from lora_lightning.storage.card import OWN_LIBRARY, Loading, base_code, card

_FOLDER = 'folder = "."  # this folder; on the hub: "OWNER/NAME"'
_HERE = 'folder = "."  # this folder; on the hub: huggingface_hub.snapshot_download("OWNER/NAME")'


def export_card(description: Mapping[str, Any], format: str, measured: Mapping[str, Any] | None) -> str:
    """The card of an export.

    Args:
        description: of the adapter.
        format: of the export; one that a plugin brings has a card without code.
        measured: summary of the run, where there is one.
    """
    loading = _LOADING.get(format)
    if loading is None:
        return card(description, Loading(OWN_LIBRARY, f'an export of an adapter in the format "{format}"'), measured)
    return card(description, loading(description), measured)


def run_summary(origin: Origin | None) -> dict[str, Any] | None:
    """summary.json of the run that an adapter folder lies in; None where it lies in none."""
    if origin is None:
        return None
    path = origin.adapter.resolve().parent / "summary.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"values", "steps", "rate", "seed"} <= found.keys() else None


def _peft(description: Mapping[str, Any]) -> Loading:
    base = base_code(description)
    room = _room(description)
    return Loading(
        "peft",
        "a LoRA adapter in peft's format",
        (
            (
                "In peft",
                f"import transformers\nfrom peft import PeftModel\n\n{_FOLDER}\n{base}\n{room}"
                "model = PeftModel.from_pretrained(model, folder)",
            ),
            *(
                [("In transformers", f"import transformers\n\n{_FOLDER}\n{base}\nmodel.load_adapter(folder)")]
                if not description["trained"]  # it knows factors, no heads and no rows
                else []
            ),
            (
                "In lora_lightning",
                f"import transformers\n\nimport lora_lightning as ll\n\n{_HERE}\n{base}\nll.import_peft(model, folder)",
            ),
        ),
    )


def _room(description: Mapping[str, Any]) -> str:
    """The line that gives the model rows for new tokens."""
    added = description["vocabulary"]
    return f"model.resize_token_embeddings({added['first'] + len(added['tokens'])})\n" if added else ""


def _merged(description: Mapping[str, Any]) -> Loading:
    architecture = description["fingerprint"]["architecture"]
    code = f"import transformers\n\n{_FOLDER}\nmodel = transformers.{architecture}.from_pretrained(folder)"
    what = f"{shown_name(description['base'])} with the adapter merged into its weights"
    return Loading("transformers", what, (("In transformers", code),))


_LOADING = {"peft": _peft, "merged": _merged}
