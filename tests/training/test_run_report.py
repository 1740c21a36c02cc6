"""Tables and pictures, and what a run report records."""

from __future__ import annotations

import io
import json

import pytest
from projects import Plain, loader
from rich.console import Console
from toy_runs import classification, encoder_folder, labelled_data, labelled_file, trainer

from ll_lora import LoRA
from ll_rose import RoseLoRA
from lora_lightning import load_adapter
from lora_lightning.callbacks import InjectAdapters, TrainingGuard
from lora_lightning.data import LabelledText
from lora_lightning.training.run_report import RunReport
from lora_lightning.training.summary import summary_table


def text(renderable) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder"))


def test_a_run_in_any_project_is_reported(tmp_path):
    module = Plain()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    report = RunReport(tmp_path)
    callbacks = [InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"]), TrainingGuard(), report]
    trainer(tmp_path, callbacks, max_steps=6).fit(module, loader())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == json.loads(json.dumps(report.summary))
    assert summary["trainable_parameters"] == 2 * 8 + 10
    assert summary["steps"] == 6
    assert set(summary["changed"]) == {
        "head.weight",
        "head.bias",
        "used.adapters.default.lora_A",
        "used.adapters.default.lora_B",
    }
    other = Plain()
    other.load_state_dict(start)
    load_adapter(other, tmp_path / "adapter")
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_training_loss_is_recorded_as_its_mean_and_curves_survive_a_resume(encoder, tmp_path):
    losses = []

    class Look(RunReport):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    report = Look(tmp_path)
    module = classification(encoder, LoRA(rank=2))
    trainer(tmp_path, [report], max_steps=10, log_every_n_steps=5).fit(module, datamodule=labelled_data(encoder))
    points = {point["step"]: point["train_loss"] for point in report.history if "train_loss" in point}
    assert points[1] == pytest.approx(losses[0])
    assert points[5] == pytest.approx(sum(losses[:5]) / 5)
    assert points[10] == pytest.approx(sum(losses[5:10]) / 5)
    resumed = RunReport(tmp_path)
    resumed.load_state_dict(report.state_dict())
    assert resumed.history == report.history


def test_validations_within_one_step_are_told_once(encoder, tmp_path, capsys):
    """Validations count batches, and a step of four has four of them, which measure the same weights."""
    report = RunReport(tmp_path)
    settings = {"max_steps": 2, "accumulate_grad_batches": 4, "val_check_interval": 1, "log_every_n_steps": 1}
    trainer(tmp_path, [report], **settings).fit(
        classification(encoder, LoRA(rank=2)), datamodule=labelled_data(encoder)
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    validated = [line.partition(":")[0] for line in lines if "val_loss" in line]
    assert validated == ["step 0 of 2", "step 1 of 2", "step 2 of 2"]
    assert len(lines) == 5
    assert [point["step"] for point in report.history if "val_loss" in point] == [0, 1, 2]


def test_final_values_are_those_of_the_state_that_is_written(encoder, tmp_path):
    """Without a validation at the last step the report measures it, as `validate` would."""
    report = RunReport(tmp_path)
    module = classification(encoder, RoseLoRA(rank=2, sparsity=0.5))
    data = labelled_data(encoder)
    run = trainer(tmp_path, [report], max_steps=9, limit_val_batches=1.0)
    run.fit(module, datamodule=data)
    measured = trainer(tmp_path, limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)[0]
    for name, value in report.summary["values"].items():
        assert value == pytest.approx(measured[f"val_{name}"], abs=1e-6)
    assert "RoseLoRA" in text(summary_table(report.summary))
    assert "density bound" in text(summary_table(report.summary))
    small = text(summary_table(report.summary | {"report": {"dM": 0.00214, "dD": 4.25e-5, "zero_rows": 0}}))
    assert "dM 0.00214, dD 4.25e-05, zero rows 0" in small


def test_the_summary_says_why_rows_were_left_out(encoder, tmp_path):
    """An empty label and a row with too many fields are no rows that could not be read; their lines are the file's."""
    file = tmp_path / "rows.csv"
    rows = labelled_file(file).read_text().splitlines()
    file.write_text("\n".join([*rows[:5], "w1 w2,", *rows[5:9], "w1,c0,more", *rows[9:], "w3,"]) + "\n")
    report = RunReport(tmp_path)
    data = LabelledText(train=str(file), validation_fraction=0.0, tokenizer=str(encoder), on_error="skip", cache=False)
    trainer(tmp_path, [report], max_steps=2, limit_val_batches=0).fit(
        classification(encoder, LoRA(rank=2)), datamodule=data
    )
    why = "2 without a label (first: rows.csv, line 6), 1 with more fields than columns (first: rows.csv, line 11)"
    assert report.summary["left_out"] == {"train": why}
    shown = " ".join(text(summary_table(report.summary)).split())
    assert f"data 3 train rows were left out: {why}" in shown
