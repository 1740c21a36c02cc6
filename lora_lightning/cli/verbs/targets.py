"""Show which layers a config would adapt, and what it leaves out and why."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, cast

from lora_lightning.cli.console import print_table
from lora_lightning.errors import AdapterStateError

if TYPE_CHECKING:
    from lora_lightning.adapters.adapted_layer import AdaptedLayer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A config, and any flags of `fit`."""
    parser.usage = "%(prog)s CONFIG [flags of fit ...]"
    parser.set_defaults(flags=[])


def run(args: argparse.Namespace) -> int:
    """Load the model, inject, and print what happened; nothing is trained or written."""
    from lora_lightning.cli.lightning import build
    from lora_lightning.injection.records import records

    module, datamodule = build(args.flags)
    if module.num_labels is None:
        module.num_labels = getattr(datamodule, "num_labels", None)
    module.configure_model()
    report = module.injection
    if report is None:
        raise AdapterStateError("configure_model injected nothing.")
    layers = {path: cast("AdaptedLayer", module.model.get_submodule(path)) for path in report.layers}
    settings = records(module.model)[report.name].layers
    print_table(
        ("Layer", "Kind", "d_in x d_out", "Rank", "Parameters"),
        [
            (
                path,
                kind,
                f"{d_in} x {d_out}",
                str(getattr(settings[path], "rank", "-")),
                f"{sum(parameter.numel() for parameter in layers[path].adapter(report.name).parameters()):,}",
            )
            for path, (kind, d_in, d_out) in report.layers.items()
        ],
    )
    print(report)
    return 0
