"""A comparison that has ended, written by hand: its numbers are known, and nothing was trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import TrialState

from lora_lightning.callbacks.forgetting import FILENAME, FORMAT
from lora_lightning.cli.compare.arms import Arm
from lora_lightning.cli.compare.child import BESIDE
from lora_lightning.cli.compare.describe import Described
from lora_lightning.cli.compare.measured import MEASURED, POINTS, ROWS
from lora_lightning.cli.compare.plan import Plan, PlannedArm
from lora_lightning.cli.compare.studies import Job, Studies

FACTS = Described(
    method="LoRA", metric="accuracy", higher_is_better=True, adapter_numbers=1000, head_numbers=10,
    total_numbers=10_000, size_field="model.method.rank", rate=1e-3,
    rate_field="model.optimizer.lr", optimizer_words=("--model.optimizer", "AdamW"),
    data_seed=True, tunable=True, data="LabelledText",
)  # fmt: skip
RIGHT = {"first": 0.60, "better": 0.70, "same": 0.605}
"""Fraction of rows that each arm has right."""
ROW_COUNT = 400


def plan(**changed: Any) -> Plan:
    """Three arms, of which the last is the smallest."""
    arms = tuple(
        PlannedArm(Arm(name, {"model.method": "LoRA"}), replace(FACTS, adapter_numbers=size), ("--config", "lora"))
        for name, size in {"first": 1000, "better": 2000, "same": 500}.items()
    )
    settings: dict[str, Any] = {
        "arms": arms, "seeds": 3, "tune_rate": True, "fraction": 0.2, "searched": {}, "searches": 0, "pruner": "median",
        "same_time": False, "also": (), "minutes": None, "memory_gib": None, "until": None, "storage": "",
    }  # fmt: skip
    return Plan(**{**settings, **changed})


def write_run(job: Job, value: float, right: Any = None) -> None:
    """What a run that came out leaves in its folder."""
    folder = job.folder
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    (folder / "adapter" / "adapter.safetensors").write_bytes(b"x" * 2048)
    (folder / "config.yaml").write_text(f"seed_everything: {job.seed}\n")
    (folder / "summary.json").write_text(json.dumps({"values": {"accuracy": value}}))
    cost = {"step_seconds": 0.05, "steps": 20, "seconds": 2.0, "peak_bytes": 2**28, "peak_device_bytes": None}
    (folder / MEASURED).write_text(json.dumps(cost))
    lost = [(0, "before", 0.0), (10, "during", 0.02), (20, "during", 0.03), (20, "after", 0.01 * job.seed)]
    beside = [{"step": s, "when": when, "sets": {BESIDE: {"accuracy": 0.9 - less}}} for s, when, less in lost]
    course = {"format": FORMAT, "label": job.arm, "sources": [BESIDE], "target": None, "records": beside}
    (folder / FILENAME).write_text(json.dumps(course))
    lines = [{"step": 10, "values": {"accuracy": value / 2}}, {"step": 20, "values": {"accuracy": value}}]
    (folder / POINTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if right is not None:
        np.savez(folder / ROWS, sums=right, counts=np.ones(len(right)))


def ended(folder: Path, **changed: Any) -> Plan:
    """Run a plan to its end with known values: the best rate of each arm is 3.16 times its own."""
    folder.mkdir(parents=True, exist_ok=True)
    planned = plan(**changed)
    planned.write(folder)
    studies = Studies(folder, planned)
    while (job := studies.take()) is not None:
        assert isinstance(job, Job)
        if job.kind == "final":
            rng = np.random.default_rng(job.seed)
            hard = rng.random(ROW_COUNT)
            right = (hard < RIGHT[job.arm]).astype(float)
            value = float(right.mean())
            write_run(job, value, right)
        else:
            value = 0.5 - 0.1 * abs(np.log10(job.values["lr"] / 3.16e-3))
            write_run(job, value)
        studies.tell(job, value, TrialState.COMPLETE)
    return planned
