"""The closing summary and the picture of a run."""

from __future__ import annotations

import io

import pytest
from matplotlib.image import imread
from rich.console import Console

from lora_lightning.training.summary import draw, progress_line, summary_table, verdicts


def text(renderable) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize("names", [("sparsity",), ("sparsity", "rank"), ()])
def test_picture_has_a_panel_for_each_curve(tmp_path, names):
    history = [{"step": s, "train_loss": 1 / s, **dict.fromkeys(names, 0.1 * s)} for s in range(1, 6)]
    history.append({"step": 5, "val_loss": 0.3, "val_accuracy": 0.7})
    draw(tmp_path / "report.png", history, "accuracy", {"linear baseline": 0.5})
    height, width, _ = imread(tmp_path / "report.png").shape
    assert width / height == pytest.approx((2 + len(names)) * 4.2 / 3.2, rel=0.02)


def summary(**more):
    return {
        "metric": "accuracy",
        "has_head": True,
        "untrained": {"accuracy": 0.5},
        "linear_baseline": {"accuracy": 0.625},
        "method": "LoRA",
        "values": {"accuracy": 0.75},
        "trainable_parameters": 1234,
        "surviving_parameters": 1000,
        "report": {"density": 0.25, "layers": {"a": 1}},
        "changed": {"a": 0.5, "b": 0.125},
        "damping_raised": {},
        "seconds": 12.3,
        "adapter_dir": "runs/001/adapter",
        **more,
    }


def test_the_summary_tells_every_number():
    lines = text(summary_table(summary(data={"train": {"dropped": 3, "skipped": 0}}))).splitlines()
    rows = [" ".join(line.strip("│┃ ").replace("│", " ").split()) for line in lines]
    for expected in ("untrained head 0.5000", "linear baseline, as many steps 0.6250", "LoRA 0.7500"):
        assert expected in rows
    assert "trained 1,234 parameters; 1,000 adapter entries are not zero" in rows
    assert "facts density 0.2500" in rows
    assert "changed all 2 trained tensors, the least by 0.12 (b)" in rows
    assert "data 3 train examples had nothing to learn and were left out" in rows
    assert not any("rows were left out" in row or row.startswith("damping") for row in rows)


def test_rows_that_were_left_out_are_told_by_kind():
    why = "2 with an unknown role (first: x.jsonl, line 3), 1 no JSON object (first: x.jsonl, line 9)"
    facts = {"train": {"dropped": 0, "skipped": 3}, "validation": {"dropped": 0, "skipped": 1}}
    shown = " ".join(text(summary_table(summary(data=facts, left_out={"train": why}))).split())
    assert f"data 3 train rows were left out: {why}" in shown
    assert "data 1 validation rows were left out time" in shown
    assert "could not be read" not in shown


def test_the_summary_of_a_folded_layer_and_raised_damping():
    changed = {"head": 0.5, "layer (folded)": 0.25}
    raised = {"a": 1, "b": 2, "c": 3, "d": 4}
    shown = text(summary_table(summary(changed=changed, damping_raised=raised, linear_baseline=None, has_head=False)))
    assert "all 2 trained tensors and folded layers, the least by 0.25 (layer (folded))" in shown
    assert "was raised at 1 step for a, 2 steps for b, 3 steps for c, and for 1 pair more" in shown
    assert "before training" in shown
    assert "linear baseline" not in shown


BASE = {"metric": "accuracy", "higher_is_better": True, "untrained": {"accuracy": 0.3}, "linear_baseline": None}
VERDICTS = {
    "better": ({"values": {"accuracy": 0.9}, "chance": 0.5}, []),
    "nothing measured": ({"values": {}}, []),
    "where it began": (
        {"values": {"accuracy": 0.3}},
        ["no better than before training (accuracy 0.3000, it was 0.3000)"],
    ),
    "at chance": (
        {"values": {"accuracy": 0.5}, "chance": 0.5},
        ["no better than always naming the most frequent class"],
    ),
    "both": ({"values": {"accuracy": 0.2}, "chance": 0.5}, ["no better than before", "no better than always"]),
    "behind a linear head": (
        {"values": {"accuracy": 0.7}, "linear_baseline": {"accuracy": 0.8}},
        ["worse than a linear head on frozen features (accuracy 0.8000)"],
    ),
    "a loss that grew": (
        {
            "metric": "loss",
            "higher_is_better": False,
            "untrained": {"loss": 2.0},
            "values": {"loss": 4.3},
            "rate": 0.005,
        },
        ["no better than before training (loss 4.3000, it was 2.0000); the rate was 0.005, try others"],
    ),
    "a loss that fell": (
        {"metric": "loss", "higher_is_better": False, "untrained": {"loss": 2.0}, "values": {"loss": 1.0}},
        [],
    ),
    "a loss that is no number": (
        {"metric": "loss", "higher_is_better": False, "untrained": {"loss": 2.0}, "values": {"loss": float("nan")}},
        ["no better than before training"],
    ),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_a_run_that_ends_no_better_than_it_began_says_so(case):
    changes, expected = VERDICTS[case]
    found = verdicts({**BASE, **changes})
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True)), found


def test_a_line_of_a_log():
    assert (
        progress_line(4, 8, {"train_loss": 1.23456, "val_loss": 2e-7})
        == "step 4 of 8: train_loss 1.235, val_loss 2e-07"
    )
    assert progress_line(4, None, {"train_loss": 1.0}) == "step 4: train_loss 1"
