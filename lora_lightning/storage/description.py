"""The description of an adapter as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from torch import nn

from lora_lightning.injection.records import records, stack_of, trained_in
from lora_lightning.methods import plain_settings
from lora_lightning.models.anatomy import Anatomy
from lora_lightning.models.new_tokens import vocabulary
from lora_lightning.models.paths import plain
from lora_lightning.models.untied import untied
from lora_lightning.plugins import registry
from lora_lightning.storage.fingerprint import fingerprint
from lora_lightning.storage.sealed import SCHEMA, STACKED
from lora_lightning.version import __version__


def describe_adapter(anatomy: Anatomy, name: str) -> dict[str, Any]:
    """The description of an adapter as plain data.

    Args:
        anatomy: of the module that adapters were injected into.
        name: which adapter.
    """
    root = anatomy.model
    record = records(root)[name]
    common, added, own = plain_settings(record.method), vocabulary(root), untied(root)
    layers = {
        plain(path): {key: value for key, value in plain_settings(method).items() if value != common[key]}
        for path, method in record.layers.items()
    }
    provider = registry().providers.get(type(record.method).__name__)
    versions = {package: version(package) for package in ("torch", "transformers")}
    versions["lora_lightning"] = __version__
    if provider is not None:
        versions[provider.package] = provider.version
    below = {"below": [{"digest": one.digest, "source": one.source} for one in record.below]} if record.below else {}
    return {
        "schema_version": STACKED if below else SCHEMA,
        "name": name,
        "method": type(record.method).__name__,
        "settings": common,
        "layers": layers,
        "plan": {plain(path): dict(fields) for path, fields in record.plan.items()},
        "linked": [plain(path) for path in record.linked],
        "trained": [plain(parameter) for parameter in record.trained],
        "labels": _labels(root) if record.trained else None,
        "tokens": {
            plain(path): {"ids": list(rows.ids), "tokens": list(rows.tokens)} for path, rows in record.tokens.items()
        },
        "untied": [] if own is None else [plain(own.output)],
        "seed": record.seed,
        "vocabulary": None if added is None else {"first": added.first, "tokens": list(added.tokens)},
        "base": getattr(getattr(root, "config", None), "_name_or_path", None) or None,
        "fingerprint": fingerprint(anatomy, trained_in(root, stack_of(root, name))),
        "quantization": anatomy.formats,
        "versions": versions,
        **below,
    }


def described_formats(description: Mapping[str, Any]) -> str | None:
    """Formats that base weights were stored in; 0.1 spelled the key otherwise, and older files have none."""
    formats: str | None = description.get("quantization", description.get("quantisation"))
    return formats


def _labels(root: nn.Module) -> list[str] | None:
    """Class names by class number, where the model's configuration has them."""
    names = getattr(getattr(root, "config", None), "id2label", None)
    return [names[number] for number in sorted(names)] if names else None
