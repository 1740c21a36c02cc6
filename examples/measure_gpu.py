"""Step time and peak memory on a GPU, beside peft's, and the table of them in docs/performance.md.

    python examples/measure_gpu.py --output gpu.jsonl [--models 1B,7B] [--methods LoRA,DoRA]
    python examples/measure_gpu.py --output gpu.jsonl --table

Models have random bfloat16 weights in the shapes of published ones and are built on the device. Both libraries train
through the same LightningModule and Trainer: bf16-mixed, AdamW on all linear layers of the blocks, rank 16, no dropout,
adapters in float32, every method of ours with its own schedule. A step is a whole one: forward, backward, optimizer.
Its time, by events on the device, is the median of --steps after --warm-up of them. The peak is the most memory that
tensors held at any moment of the timed steps; "above weights" is the part of it that the frozen weights are not.

Before anything is timed, both libraries get the same factors on a two-layer model of the same width in float32, and
their outputs and gradients are compared. Each result is one line of the output file; what is there is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.injection.records import adapters_named
from lora_lightning.testing import perturb
from lora_lightning.training.assembly import enable_checkpointing

RANK, ALPHA = 16, 32
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "batch": 2, "length": 16,
    },
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True, "batch": 8, "length": 1024,
    },
    "7B": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "batch": 4, "length": 1024,
    },
}  # fmt: skip
"""Llama's settings of Llama 3.2 1B and Llama 2 7B, and the batch."""
METHODS: dict[str, Callable[[], ll.Method]] = {
    "LoRA": lambda: ll.method("LoRA")(rank=RANK, alpha=ALPHA),
    "DoRA": lambda: ll.method("DoRA")(rank=RANK, alpha=ALPHA),
    "RoseLoRA": lambda: ll.method("RoseLoRA")(rank=RANK, alpha=ALPHA),
    "LoRASC": lambda: ll.method("LoRASC")(inner=ll.method("LoRA")(rank=RANK, alpha=ALPHA), stage_steps=6),
    "MoELoRA": lambda: ll.method("MoELoRA")(experts=4, top_k=2, rank=4, alpha=8),
    "CELoRA": lambda: ll.method("CELoRA")(rank=RANK, alpha=ALPHA, svd_rank=14),
}
THEIRS: dict[str, dict[str, Any]] = {"LoRA": {}, "DoRA": {"use_dora": True}}
"""Methods that peft has, with its options for them."""


# -- the two libraries on one base model -------------------------------------------------------------------------------


def base_model(shape: dict[str, Any], device: str, dtype: torch.dtype, **changes: Any) -> Any:
    """A random Llama, built on the device."""
    settings = {key: value for key, value in shape.items() if key not in ("batch", "length")} | changes
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**settings), dtype=dtype)


def with_ours(net: Any, method: str) -> nn.Module:
    """Adapters of this library on all linear layers of the blocks."""
    ll.inject(net, METHODS[method](), also_train=(), seed=0)
    return net  # type: ignore[no-any-return]


def with_peft(net: Any, method: str) -> nn.Module:
    """Adapters of peft on the same layers."""
    options = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(net, peft.LoraConfig(**options, **THEIRS[method]))


def same_function(shape: dict[str, Any], method: str, device: str) -> dict[str, float]:
    """Relative distances |ours - peft's| / |peft's| of logits and adapter gradients, both with the same factors.

    Raises:
        SystemExit: they compute different things.
    """
    ours = with_ours(base_model(shape, device, torch.float32, num_hidden_layers=2, vocab_size=512), method)
    theirs = with_peft(base_model(shape, device, torch.float32, num_hidden_layers=2, vocab_size=512), method)
    adapters = adapters_named(ours, "default")
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    for i, (path, adapter) in enumerate(adapters.items()):
        perturb(adapter, i, size=0.02)
        layer: Any = theirs.get_submodule(f"base_model.model.{path}")
        own = dict(adapter.named_parameters())
        pairs.append((own["lora_A"], layer.lora_A["default"].weight))
        pairs.append((own["lora_B"], layer.lora_B["default"].weight))
        if "magnitude" in own:
            pairs.append((own["magnitude"], layer.lora_magnitude_vector["default"].weight))
    trained = [sum(p.numel() for p in net.parameters() if p.requires_grad) for net in (ours, theirs)]
    ids = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(1)).to(device)
    logits = []
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    for net in (ours, theirs):
        net.train()
        logits.append(net(input_ids=ids, use_cache=False).logits)
        logits[-1].square().mean().backward()
    found = {
        "outputs": _distance([logits[0].detach()], [logits[1].detach()]),
        "gradients": _distance([p.grad for p, _ in pairs], [p.grad for _, p in pairs]),
    }
    if trained[0] != trained[1] or not max(found.values()) < 1e-4:
        raise SystemExit(f"{method}: ours and peft's differ: trained numbers {trained}, relative distances {found}")
    return found


def _distance(ours: list[Any], theirs: list[Any]) -> float:
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs, strict=True))
    return float((difference / sum(float(b.double().square().sum()) for b in theirs)) ** 0.5)


# -- one measurement ---------------------------------------------------------------------------------------------------


class Training(LightningModule):
    """Next-token prediction with either library's model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Tensor) -> Tensor:
        return self.net(input_ids=batch, labels=batch, use_cache=False).loss  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)

    def cpu(self) -> Training:
        """Stay on the device when the trainer is done; a large model would be copied for nothing."""
        return self


class Stopwatch(Callback):
    """Milliseconds of each step after `warm_up`, and the peak of memory over them."""

    phase = 9

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.marks: list[Any] = []
        self.peak = 0

    def _mark(self) -> Any:
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step < self.warm_up:
            return
        if trainer.global_step == self.warm_up and torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.marks.append(self._mark())

    def on_train_end(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()

    def milliseconds(self) -> list[float]:
        """From the end of one step to the end of the next."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if torch.cuda.is_available():
            return [before.elapsed_time(after) for before, after in pairs]
        return [1000 * (after - before) for before, after in pairs]


def measure(library: str, method: str, model: str, recompute: bool, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the results."""
    shape, cuda = SHAPES[model], args.device == "cuda"
    net = base_model(shape, args.device, torch.bfloat16)
    if recompute:
        enable_checkpointing(net)
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    net = (with_ours if library == "lora_lightning" else with_peft)(net, method)
    trained = [p for p in net.parameters() if p.requires_grad]
    if {p.dtype for p in trained} != {torch.float32}:
        raise SystemExit(f"{library}, {method}: trained numbers are not float32")
    watch = Stopwatch(args.warm_up)
    callbacks = list(METHODS[method]().callbacks()) if library == "lora_lightning" else []
    steps = args.warm_up + args.steps
    torch.manual_seed(1)
    rows = torch.randint(0, shape["vocab_size"], (steps, shape["batch"], shape["length"]))
    trainer = Trainer(
        accelerator="gpu" if cuda else "cpu", devices=1, precision="bf16-mixed", max_steps=steps, max_epochs=1,
        callbacks=[*callbacks, watch], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Training(net.train()), torch.utils.data.DataLoader(rows, batch_size=None))
    times = sorted(watch.milliseconds())
    return {
        "step_ms": round(statistics.median(times), 2),
        "fastest_ms": round(times[0], 2),
        "slowest_ms": round(times[-1], 2),
        "steps": len(times),
        "peak_bytes": watch.peak,
        "weight_bytes": weights,
        "trained": sum(p.numel() for p in trained),
        "tokens": shape["batch"] * shape["length"],
    }


def environment(device: str) -> dict[str, str]:
    """Date, device and versions."""
    modules = {"torch": torch, "transformers": transformers, "peft": peft}
    versions = {name: str(module.__version__) for name, module in modules.items()}
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "device": name, **versions}


def release() -> None:
    """Give memory back between measurements."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def read(file: Path) -> list[dict[str, Any]]:
    """Results that are there."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run(args: argparse.Namespace) -> None:
    """Everything asked for and not measured yet, one line each."""
    known = {tuple(row[key] for key in ("library", "method", "model", "recompute")) for row in read(args.output)}
    facts = environment(args.device)
    started = time.monotonic()
    for model in args.models:
        checked = {m: same_function(SHAPES[model], m, args.device) for m in args.methods if m in THEIRS}
        for recompute in (False, True):
            for method in args.methods:
                for library in ("lora_lightning", *(["peft"] if method in THEIRS else [])):
                    case = (library, method, model, recompute)
                    if case in known:
                        continue
                    if args.budget and time.monotonic() - started > args.budget:
                        print(f"{case}: left out, {args.budget} s are over", flush=True)
                        continue
                    release()
                    row = dict(zip(("library", "method", "model", "recompute"), case, strict=True))
                    try:
                        row |= measure(*case, args)
                    except torch.OutOfMemoryError:
                        row["out_of_memory"] = True
                    row |= {"distance": checked.get(method), **facts}
                    with args.output.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(json.dumps(row), flush=True)


# -- the table ---------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what was measured, ours beside peft's, and a line that says on what."""
    cells = {(r["model"], r["recompute"], r["method"], r["library"]): r for r in rows}
    head = ["model", "activations", "method", "trained", "step, ms", "peft", "above weights, GB", "peft"]
    lines = [head, ["---"] * len(head)]
    for (model, recompute, method, library), ours in cells.items():
        if library != "lora_lightning":
            continue
        theirs = cells.get((model, recompute, method, "peft"))
        kept = "recomputed" if recompute else "kept"
        trained = f"{ours['trained'] / 1e6:.1f} M" if "trained" in ours else ""
        pairs = [text for show in (_time, _memory) for text in (show(ours), show(theirs))]
        lines.append([model, kept, method, trained, *pairs])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{_conditions(rows)}\n"


def _time(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return "out of memory" if "out_of_memory" in row else f"{row['step_ms']:.0f}"


def _memory(row: dict[str, Any] | None) -> str:
    if row is None or "out_of_memory" in row:
        return ""
    return f"{(row['peak_bytes'] - row['weight_bytes']) / 1e9:.2f}"


def _conditions(rows: list[dict[str, Any]]) -> str:
    """Where and with what, and how far the two libraries' functions were apart."""
    places = sorted({f"{r['date']}, {r['device']}, torch {r['torch']}, transformers {r['transformers']}, "
                     f"peft {r['peft']}" for r in rows})  # fmt: skip
    weights = {r["model"]: r["weight_bytes"] / 1e9 for r in rows if "weight_bytes" in r}
    sizes = [
        f"{model}: {SHAPES[model]['batch']} x {SHAPES[model]['length']} tokens, {size:.1f} GB of weights"
        for model, size in weights.items()
    ]
    apart = max((max(r["distance"].values()) for r in rows if r.get("distance")), default=0.0)
    return (
        f"{'; '.join(places)}. {'; '.join(sizes)}. Ours and peft's outputs and gradients with the same factors, two "
        f"layers of each width in float32, are {apart:.0e} apart at most."
    )


def main() -> None:
    """Measure what is asked for and not measured yet, or print the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", default="1B,7B")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--budget", type=float, help="seconds after which no further measurement starts")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu is for trying the script out")
    parser.add_argument("--table", action="store_true", help="print the table of the output file and measure nothing")
    args = parser.parse_args()
    args.models, args.methods = args.models.split(","), args.methods.split(",")
    for kind, given, names in (("models", args.models, SHAPES), ("methods", args.methods, METHODS)):
        unknown = set(given) - set(names)
        if unknown:
            raise SystemExit(f"--{kind}: no {', '.join(sorted(unknown))}; there are {', '.join(names)}.")
    if not args.table:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("no CUDA device; --device cpu --models tiny tries the script out")
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        run(args)
    print(table(read(args.output)))


if __name__ == "__main__":
    main()
