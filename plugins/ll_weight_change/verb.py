"""Draw how training changed weights, and what it learned and forgot, from the files that recorders wrote."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lightning.errors import DataError, SettingsError, did_you_mean

if TYPE_CHECKING:
    from ll_weight_change.records import Run
    from ll_weight_change.spectrum_records import Spectra
    from lora_lightning.callbacks.forgetting import Course


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recorded runs, and where the pictures go."""
    parser.add_argument("files", metavar="FILE.json", nargs="+", type=Path, help="recorded runs, or their run folders")
    parser.add_argument("--output", metavar="FILE.png", type=Path, default=Path("analysis.png"), help="(analysis.png)")
    parser.add_argument("--modules", metavar="NAME", nargs="+", help="module types to draw, such as query value (all)")
    parser.add_argument("--metric", metavar="NAME", help="metric of learning and forgetting (the first that all have)")


def run(args: argparse.Namespace) -> int:
    """Print what the files say for each run, and write their pictures.

    Raises:
        SettingsError: an output that is no .png, or a module type or a metric that no run has.
        DataError: a file that no recorder wrote, or a folder without one.
    """
    from ll_weight_change import records, spectrum_records
    from lora_lightning.callbacks import forgetting

    if args.output.suffix != ".png":
        raise SettingsError(f'--output is "{args.output}"; it must end in .png.')
    formats = {
        spectrum_records.FORMAT: spectrum_records.FILENAME,
        forgetting.FORMAT: forgetting.FILENAME,
        records.FORMAT: records.FILENAME,
    }
    found: dict[str, list[Path]] = {name: [] for name in formats.values()}
    for path in args.files:
        for file in _files(path, list(formats.values())):
            found[formats.get(_format(file), records.FILENAME)].append(file)
    changes = [records.read(file) for file in found[records.FILENAME]]
    spectra = [spectrum_records.read(file) for file in found[spectrum_records.FILENAME]]
    courses = [forgetting.read_course(file) for file in found[forgetting.FILENAME]]
    in_each = [each.kinds() for each in changes] + [each.kinds() for each in spectra]
    known = list(dict.fromkeys(kind for names in in_each for kind in names))
    kinds = args.modules or known
    for kind in kinds:
        if kind not in known:
            raise SettingsError(
                f'--modules names "{kind}".{did_you_mean(kind, known)} The runs have: {", ".join(known)}.'
            )
    drawn = [
        *(_decomposition(changes, kinds, args.output) if changes else ()),
        *(_spectra(spectra, kinds, _beside(args.output, "spectrum")) if spectra else ()),
        *(_forgetting(courses, args.metric, _beside(args.output, "forgetting")) if courses else ()),
    ]
    print("\n".join(map(str, drawn)))
    return 0


def _files(path: Path, names: Sequence[str]) -> list[Path]:
    """The recorded files of a run folder; a file is its own."""
    if not path.is_dir():
        return [path]
    there = [path / name for name in names if (path / name).is_file()]
    if not there:
        raise DataError(
            f'"{path}" holds none of {", ".join(names)}; UpdateSpectrum, Forgetting and WeightDecomposition in '
            "trainer.callbacks write them."
        )
    return there


def _format(file: Path) -> str:
    with suppress(OSError, ValueError, AttributeError):
        return str(json.loads(file.read_text(encoding="utf-8")).get("format"))
    return ""  # its reader says what is wrong


def _beside(output: Path, what: str) -> Path:
    return output.with_name(f"{output.stem}-{what}.png")


def _decomposition(runs: Sequence[Run], kinds: Sequence[str], output: Path) -> list[Path]:
    from ll_weight_change import picture
    from lora_lightning.cli.console import print_table

    fits = picture.fits(runs, kinds)
    print_table(
        ("Run", "Module", "Points", "Pearson r", "Slope", "dM at the end", "dD at the end"),
        [(fit.run.label, fit.kind, str(len(fit.points)), *(f"{value:.4g}" for value in fit.numbers())) for fit in fits],
    )
    for each in runs:
        if each.skipped:
            print(f"{each.label}: {each.skipped} zero vectors have no direction and were left out.")
    layers = _beside(output, "layers")
    picture.draw_scatter(output, fits)
    picture.draw_layers(layers, fits)
    return [output, layers]


def _spectra(runs: Sequence[Spectra], kinds: Sequence[str], output: Path) -> list[Path]:
    from ll_weight_change.spectrum_picture import draw_spectra
    from lora_lightning.cli.console import print_table

    rows = []
    for each in runs:
        for kind in (kind for kind in kinds if kind in each.kinds()):
            last = each.last(kind)
            stable = sum(rank.stable for rank in last) / len(last)
            ranks = [f"{each.mean(kind, each.steps()[-1]):.4g}", f"{max(rank.effective for rank in last):.4g}"]
            rows.append((each.label, kind, f"{each.fraction:.0%}", *ranks, f"{stable:.4g}", str(last[0].largest)))
    heads = ("Run", "Module", "Of its size", "Effective rank", "Largest", "Stable rank", "Possible")
    print_table(heads, rows)
    draw_spectra(output, runs, kinds)
    return [output]


def _forgetting(runs: Sequence[Course], metric: str | None, output: Path) -> list[Path]:
    from ll_weight_change.forgetting_picture import common_metrics, draw_forgetting
    from lora_lightning.cli.console import print_table

    known = common_metrics(runs)
    if not known:
        raise DataError("the runs have no metric in common on all sets; draw them apart.")
    chosen = metric or known[0]
    if chosen not in known:
        raise SettingsError(
            f'--metric is "{chosen}".{did_you_mean(chosen, known)} All sets of all runs have: {", ".join(known)}.'
        )
    rows = []
    for each in runs:
        for name in (*each.sources, *([each.target] if each.target else ())):
            values = each.values(name, chosen)
            change = each.changes(name, chosen)[-1][1]
            rows.append((each.label, name, f"{values[0][1]:.4g}", f"{values[-1][1]:.4g}", f"{change:+.4g}"))
    print_table(("Run", "Set", f"{chosen} before", "at the end", "change"), rows)
    draw_forgetting(output, runs, chosen)
    return [output]
