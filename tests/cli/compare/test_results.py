from __future__ import annotations

import json

import comparisons
from optuna.trial import TrialState

from lora_lightning.cli.compare.outcomes import outcomes
from lora_lightning.cli.compare.results import command, results
from lora_lightning.cli.compare.studies import Studies

PEFT = {
    "run_info": {
        "created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg",
    },
    "train_info": {
        "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time",
        "file_size", "num_trainable_params", "num_total_params", "status", "metrics",
    },
    "meta_info": {"package_info", "system_info"},
}  # fmt: skip
"""What peft's method comparison reads of a run."""


def test_every_run_has_the_fields_of_pefts_comparison(finished):
    found = results(*finished)
    json.dumps(found, allow_nan=False)
    assert len(found["runs"]) == 9
    for run in found["runs"]:
        assert {part: set(run[part]) for part in PEFT} == PEFT
        last = run["train_info"]["metrics"][-1]
        assert {"step", "train loss", "train samples"} <= set(last)
        assert last["valid accuracy"] == run["train_info"]["metrics"][1]["valid accuracy"]
        assert "peft-version" in run["meta_info"]["package_info"]


def test_a_failed_run_is_an_entry_with_its_reason(tmp_path):
    plan = comparisons.plan(tune_rate=False, seeds=1)
    plan.write(tmp_path)
    studies = Studies(tmp_path, plan)
    job = studies.take()
    studies.tell(job, float("nan"), TrialState.FAIL, "out of memory")
    (run,) = results(tmp_path, plan, outcomes(tmp_path, plan))["runs"]
    assert run["train_info"]["status"] == "failed"
    assert run["run_info"]["error_msg"] == "out of memory"


def test_the_words_that_repeat_an_arm(finished):
    _, plan, found = finished
    one = found[1]
    words = command(plan, one, 2)
    assert words == [
        "--config", "lora", "--model.optimizer", "AdamW", "--model.optimizer.lr", str(one.best["lr"]),
        "--seed_everything", "2", "--data.seed", "2",
    ]  # fmt: skip
