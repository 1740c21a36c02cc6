"""What an export says of itself."""

from __future__ import annotations

from pathlib import Path

from lora_lightning.exporters.report import ExportReport


def report(**options: object) -> str:
    given = {"kind": "native", "layers": 3, "difference": 1e-7, "format": "peft", "files": ("a", "b")} | options
    return str(ExportReport(directory=Path("out"), **given))  # type: ignore[arg-type]


def test_what_was_written_and_how_exact_it_is() -> None:
    assert report() == 'peft (native): 3 layers to "out": a, b\n  verified by reading back; largest difference 1e-07'
    assert "  not verified: verify=False" in report(difference=None)
    assert "  verified by peft 9; largest difference 1e-07" in report(verified_by="peft 9")
    assert report(verified_by="", not_run="no inputs").splitlines()[1:] == [
        "  read back tensor by tensor, but not run: no inputs"
    ]
    assert report(notes=("one", "two")).endswith("  note: one\n  note: two")


def test_a_truncation_names_its_worst_layer_and_all_others() -> None:
    lines = report(discarded={"x": 0.01, "y": 0.25}).splitlines()
    assert lines[2] == "  truncated: 2 layers lose part of their update, most y (25.000% of its energy)"
    assert lines[3:] == ["    x: 1.000%", "    y: 25.000%"]
