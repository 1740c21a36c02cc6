"""`results.json`: one entry a run in the form of peft's method comparison, with our fields beside."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_lightning.cli.compare.outcomes import ArmOutcome, FinalRun
from lora_lightning.cli.compare.plan import Plan, rate_words, seed_words
from lora_lightning.cli.compare.studies import RATE, Done
from lora_lightning.version import __version__

PACKAGES = ("peft", "transformers", "datasets", "torch", "bitsandbytes", "lightning", "lora-lightning", "optuna")


def results(folder: Path, plan: Plan, found: Sequence[ArmOutcome]) -> dict[str, Any]:
    """All runs and what was made of them.

    `runs` has what peft's `method_comparison` reads of each: run_info, train_info, meta_info. A number that is not
    known is null.
    """
    return {
        "comparison": {
            "folder": folder.name,
            "metric": plan.metric,
            "higher_is_better": plan.higher_is_better,
            "version": __version__,
            "arms": [_arm(plan, one) for one in found],
        },
        "runs": [_entry(plan, one, run) for one in found for run in one.finals]
        + [_failed(plan, one, done) for one in found for done in one.failures],
    }


def command(plan: Plan, one: ArmOutcome, seed: int) -> list[str]:
    """The words that repeat a final run of an arm."""
    planned = one.planned
    words = [*planned.words, *rate_words(planned, one.best[RATE]), *seed_words(planned, seed)]
    for name in plan.searched:
        if name in one.best:
            words += [f"--{name}", repr(one.best[name])]
    return words


def _arm(plan: Plan, one: ArmOutcome) -> dict[str, Any]:
    difference = one.difference
    return {
        "name": one.name,
        "method": one.planned.facts.method,
        "words": command(plan, one, 0),
        "values": {str(run.seed): run.value for run in one.finals},
        "mean": _known(one.mean),
        "standard_deviation": _known(one.deviation),
        "best": one.best,
        "rate_on_edge": one.on_edge,
        "rates": [
            {**done.job.values, "value": _known(done.value), "state": done.state, "reason": done.reason}
            for done in one.tuning
        ],
        "against": one.against or None,
        "difference": None
        if difference is None
        else {
            "mean": difference.mean,
            "low": difference.low,
            "high": difference.high,
            "p_holm": difference.p,
            "verdict": difference.verdict,
            "over_rows_and_seeds": difference.over_rows,
        },
        "trained_numbers": one.planned.facts.trained_numbers,
        "step_seconds": _known(one.cost("step_seconds")),
        "change_beside": one.forgetting(plan.metric),
    }


def _entry(plan: Plan, one: ArmOutcome, run: FinalRun) -> dict[str, Any]:
    facts, cost = one.planned.facts, run.cost
    curve = [
        {"step": point["step"], **{f"valid {name}": value for name, value in point["values"].items()}}
        for point in run.curve
    ]
    last = {"step": cost.get("steps"), f"valid {plan.metric}": run.value, "train loss": None, "train samples": None}
    file = run.folder / "adapter" / "adapter.safetensors"
    return {
        "run_info": _run_info(plan, one, run.seed, run.folder, cost.get("seconds"), ""),
        "train_info": {
            "accelerator_memory_reserved_avg": None,
            "accelerator_memory_max": cost.get("peak_device_bytes"),
            "accelerator_memory_reserved_99th": None,
            "train_time": cost.get("seconds"),
            "file_size": file.stat().st_size if file.is_file() else None,
            "num_trainable_params": facts.trained_numbers,
            "num_total_params": facts.total_numbers,
            "status": "success",
            "metrics": [*curve, last],
        },
        "meta_info": _meta(),
        "lora_lightning": {"arm": one.name, "seed": run.seed, "peak_bytes": cost.get("peak_bytes"), "cost": cost},
    }


def _failed(plan: Plan, one: ArmOutcome, done: Done) -> dict[str, Any]:
    return {
        "run_info": _run_info(plan, one, done.job.seed, done.job.folder, None, done.reason),
        "train_info": {"status": "failed", "metrics": []},
        "meta_info": _meta(),
        "lora_lightning": {"arm": one.name, "seed": done.job.seed},
    }


def _run_info(plan: Plan, one: ArmOutcome, seed: int, folder: Path, seconds: Any, error: str) -> dict[str, Any]:
    at = (folder / "summary.json") if (folder / "summary.json").is_file() else folder
    created = datetime.fromtimestamp(at.stat().st_mtime, UTC).isoformat(timespec="seconds") if at.exists() else None
    facts = one.planned.facts
    full = facts.adapter_numbers == 0
    return {
        "created_at": created,
        "total_time": seconds,
        "experiment_name": f"{one.name}/seed-{seed}",
        "peft_branch": f"lora_lightning {__version__}",
        "train_config": {"words": command(plan, one, seed), "seed": seed, "optimizer_kwargs": {"lr": one.best[RATE]}},
        "peft_config": None if full else {"peft_type": facts.method.upper()},
        "error_msg": error,
    }


def _meta() -> dict[str, Any]:
    return {
        "package_info": {f"{name}-version": found for name, found in packages().items()},
        "system_info": {
            "system": platform.system(),
            "machine": platform.machine(),
            "python": platform.python_version(),
        },
    }


def packages() -> dict[str, str | None]:
    """Versions of what took part, by package."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _known(value: float) -> float | None:
    return None if value != value else value
