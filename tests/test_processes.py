"""Two processes on one machine: one run folder, one adapter, the same on both, and every row predicted once."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import encoder_folder, labelled_file

pytestmark = [pytest.mark.multi, pytest.mark.timeout(300)]

CONFIG = """
model:
  pretrained: {encoder}
  targets: [query, value]
{method}
data:
  class_path: LabelledText
  init_args: {{train: {file}, validation: {file}, test: {file}, predict: {file}, batch_size: {batch}}}
trainer:
  accelerator: cpu
  max_steps: 8
  enable_progress_bar: false
  log_every_n_steps: 1
"""

ROSE = """
  method:
    class_path: RoseLoRA
    init_args: {rank: 4, start: 2, end: 6}
"""
METHODS = {
    "RoseLoRA": ROSE,
    "LoRASC": """
  method:
    class_path: LoRASC
    init_args:
      inner: {class_path: LoRA, init_args: {rank: 2}}
      stage_steps: 3
      noise: 0.2
      noise_mode: persist
""",
    "MoELoRA": """
  method:
    class_path: MoELoRA
    init_args: {experts: 3, top_k: 2, rank: 2, router_lr_ratio: 1.0}
  optimizer: {class_path: RiemannianAdamW, init_args: {lr: 1.0e-3, eps: 1.0e-3}}
""",
}
"""`eps` keeps Adam from dividing rounding errors of gradients that are zero by nothing."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def run(folder: Path, *words: str, launcher: tuple[str, ...] = (), **environment: str) -> str:
    """One command line in a process of its own; its output."""
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "lora_lightning", *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port()), **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def logged_losses(folder: Path) -> list[float]:
    """Training losses in the metrics files of a run, of which a resumed one has two."""
    rows = [
        row for path in sorted(folder.glob("metrics*.csv")) for row in csv.DictReader(path.read_text().splitlines())
    ]
    return [float(row["train_loss"]) for row in rows if row.get("train_loss")]


def write_config(folder: Path, batch: int, method: str = ROSE) -> Path:
    encoder = encoder_folder(folder / "encoder", dropout=0.0)
    path = folder / "small.yaml"
    rows = labelled_file(folder / "train.csv", rows=33)
    path.write_text(CONFIG.format(encoder=encoder, file=rows, batch=batch, method=method.strip("\n")))
    return path


def on_two(strategy: str) -> tuple[str, ...]:
    """The words that put a run on two processes."""
    return "--config", f"strategies/{strategy}", "--trainer.devices", "2", "--trainer.accelerator", "cpu"


TWO = on_two("ddp")


def test_a_run_of_two_processes(tmp_path: Path) -> None:
    write_config(tmp_path, batch=2)
    output = run(tmp_path, "fit", "--config", "small.yaml", *TWO)
    assert [path.name for path in (tmp_path / "runs" / "small").iterdir()] == ["001"]
    folder = tmp_path / "runs" / "small" / "001"
    assert output.strip().splitlines()[-1] == f"run: {folder.relative_to(tmp_path)}"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 8
    assert 0 < summary["surviving_parameters"] < summary["trainable_parameters"]
    assert summary["linear_baseline"] is not None
    assert output.count("linear baseline: val_accuracy") == 1
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    assert len(saved["lora_lightning_resume"]["ranks"]) == 2
    run(tmp_path, "predict", "--run", str(folder), "--output", "rows.csv", *TWO)
    with (tmp_path / "rows.csv").open() as file:
        assert [row["index"] for row in csv.DictReader(file)] == [str(i) for i in range(33)]


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("RoseLoRA", "fsdp2"),
        ("LoRASC", "ddp"),
        ("MoELoRA", "ddp"),
    ],
)
def test_two_processes_train_what_one_does_on_the_joint_batch(tmp_path: Path, name: str, strategy: str) -> None:
    """Two samples a process and four in one: a distributed sampler deals the same rows to the same step.

    Validation has an odd number of rows, each of which counts once.
    """
    adapters, summaries, losses = [], [], []
    for folder, batch, words in ((tmp_path / "one", 4, ()), (tmp_path / "two", 2, on_two(strategy))):
        folder.mkdir()
        write_config(folder, batch, METHODS[name])
        even = (folder / "train.csv").read_text().splitlines()[:-1]
        (folder / "even.csv").write_text("\n".join(even) + "\n")
        extra = (
            "--model.lr_scheduler.warmup_fraction",
            "0",
            "--data.group_by_length",
            "false",
            "--data.train",
            "even.csv",
        )
        baseline = (
            *("--model.linear_baseline", "false", "--model.dtype", "float64"),
            *("--trainer.log_every_n_steps", "3"),
        )
        output = run(folder, "fit", "--config", "small.yaml", *extra, *baseline, *words)
        assert output.splitlines()[-1] == "run: runs/small/001"
        done = folder / "runs" / "small" / "001"
        adapters.append(load_file(done / "adapter" / "adapter.safetensors"))
        summaries.append(json.loads((done / "summary.json").read_text()))
        losses.append(logged_losses(done))
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert len(losses[0]) == 2  # after steps 3 and 6
    for values in ("untrained", "values"):
        assert summaries[1][values] == pytest.approx(summaries[0][values], abs=1e-6)
    one, two = adapters
    assert one.keys() == two.keys()
    masks = [tensor for tensor in one.values() if tensor.dtype == torch.bool]
    assert (name == "RoseLoRA") == any(not mask.all() for mask in masks)
    assert (name == "LoRASC") == any(".shifts." in key and bool(one[key].any()) for key in one)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


PAIRS = """
model:
  pretrained: {encoder}
  task: sentence-embedding
  targets: [query, value]
  method: {{class_path: LoRA, init_args: {{rank: 2}}}}
  lr_scheduler: {{warmup_fraction: 0}}
data:
  class_path: TextPairs
  init_args: {{train: {file}, validation: {file}, negative: negative, batch_size: {batch}}}
trainer: {{accelerator: cpu, max_steps: 6, enable_progress_bar: false, precision: 64-true}}
"""


def test_texts_of_all_processes_are_each_others_negatives(tmp_path: Path) -> None:
    """Loss, gradients and metrics are those of one process on the joint batch."""
    adapters, summaries = [], []
    for folder, batch, words in ((tmp_path / "one", 8, ()), (tmp_path / "two", 4, TWO)):
        folder.mkdir()
        encoder = encoder_folder(folder / "encoder", dropout=0.0)
        rows = [f"w{i} w{i % 7},w{i % 5} w{i},w{i % 3} w{39 - i} w{i}" for i in range(32)]
        candidates = [text for row in rows for text in row.split(",")[1:]]
        assert len(set(candidates)) == len(candidates)  # rounding would rank twins
        (folder / "pairs.csv").write_text("\n".join(["anchor,positive,negative", *rows]) + "\n")
        (folder / "pairs.yaml").write_text(PAIRS.format(encoder=encoder, file=folder / "pairs.csv", batch=batch))
        run(folder, "fit", "--config", "pairs.yaml", *words)
        done = folder / "runs" / "pairs" / "001"
        adapters.append(load_file(done / "adapter" / "adapter.safetensors"))
        summaries.append(json.loads((done / "summary.json").read_text()))
    for key, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][key], tensor, rtol=0, atol=1e-10)
    for values in ("untrained", "values"):
        assert summaries[1][values] == pytest.approx(summaries[0][values], abs=1e-6)
    assert summaries[0]["values"]["loss"] != pytest.approx(summaries[0]["untrained"]["loss"], abs=1e-3)


def test_processes_that_another_launcher_started_share_one_run_folder(tmp_path: Path) -> None:
    write_config(tmp_path, batch=2)
    launcher = ("torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "--module")
    output = run(tmp_path, "fit", "--config", "small.yaml", *TWO, launcher=launcher)
    assert [path.name for path in (tmp_path / "runs" / "small").iterdir()] == ["001"]
    assert (tmp_path / "runs" / "small" / "001" / "adapter" / "adapter.safetensors").is_file()
    assert output.count("run: ") == 1
