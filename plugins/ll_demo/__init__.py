"""Data that needs no file and no network: PyDocs, and small tables for configs that show a task."""

from __future__ import annotations

from collections.abc import Mapping

from lora_lightning import hookimpl

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_datamodules() -> Mapping[str, str]:
    """PyDocs."""
    return {"PyDocs": "ll_demo.pydocs:PyDocs"}


@hookimpl
def lora_lightning_tables() -> Mapping[str, str]:
    """Made from the running interpreter's standard library, or drawn from a fixed seed."""
    return {
        "python-docs": "ll_demo.docs:table",
        "python-words": "ll_demo.words:table",
        "python-words-internet": "ll_demo.words:internet",
        "python-words-elsewhere": "ll_demo.words:elsewhere",
        "python-traits": "ll_demo.traits:table",
        "python-pairs": "ll_demo.pairs:table",
        "python-kin": "ll_demo.kin:table",
        "python-sizes": "ll_demo.sizes:table",
        "dates": "ll_demo.dates:table",
        "chosen-dates": "ll_demo.chosen_dates:table",
        "chosen-docs": "ll_demo.chosen_docs:table",
        "weekdays": "ll_demo.weekdays:table",
        "shapes": "ll_demo.shapes:table",
        "asked-shapes": "ll_demo.asked_shapes:table",
    }
