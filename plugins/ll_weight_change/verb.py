"""Draw how training changed magnitudes and directions of weights, from files that WeightDecomposition wrote."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_lightning.errors import SettingsError, did_you_mean


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recorded runs, and where the pictures go."""
    parser.add_argument("files", metavar="FILE.json", nargs="+", type=Path, help="recorded runs, or their run folders")
    parser.add_argument("--output", metavar="FILE.png", type=Path, default=Path("analysis.png"), help="(analysis.png)")
    parser.add_argument("--modules", metavar="NAME", nargs="+", help="module types to draw, such as query value (all)")


def run(args: argparse.Namespace) -> int:
    """Print correlation and slope for each run and module type, and write two pictures.

    Raises:
        SettingsError: an output that is no .png, or a module type that no run has.
        DataError: a file that WeightDecomposition did not write.
    """
    from ll_weight_change import picture, records
    from lora_lightning.cli.console import print_table

    if args.output.suffix != ".png":
        raise SettingsError(f'--output is "{args.output}"; it must end in .png.')
    runs = [records.read(path) for path in args.files]
    known = list(dict.fromkeys(kind for run in runs for kind in run.kinds()))
    kinds = args.modules or known
    for kind in kinds:
        if kind not in known:
            raise SettingsError(
                f'--modules names "{kind}".{did_you_mean(kind, known)} The runs have: {", ".join(known)}.'
            )
    fits = picture.fits(runs, kinds)
    print_table(
        ("Run", "Module", "Points", "Pearson r", "Slope", "dM at the end", "dD at the end"),
        [(fit.run.label, fit.kind, str(len(fit.points)), *(f"{value:.4g}" for value in fit.numbers())) for fit in fits],
    )
    for each in runs:
        if each.skipped:
            print(f"{each.label}: {each.skipped} zero vectors have no direction and were left out.")
    layers = args.output.with_name(f"{args.output.stem}-layers.png")
    picture.draw_scatter(args.output, fits)
    picture.draw_layers(layers, fits)
    print(f"{args.output}\n{layers}")
    return 0
