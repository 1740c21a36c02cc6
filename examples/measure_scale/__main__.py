"""What a training step costs, counted against formulas: the tables of `lora_lightning/notes/005-scale.md`.

    python examples/measure_scale [--only flops,memory,traffic,peaks] [--gpu examples/measured/gpu.jsonl]

Nothing is timed. Products are counted by torch's FlopCounterMode, memory by the storages that are alive, traffic by the
tensors that real processes (gloo) hand to collectives while Lightning trains under DDP and FSDP2. Each count is of a
small random Llama with adapters on all linear layers, batches of 2 x 16 tokens, float32, AdamW (MoELoRA:
RiemannianAdamW), and is printed beside its formula.

    i, o   inputs and outputs of a layer     N   tokens of a batch        n   processes
    P      i o, its frozen numbers           r   rank, E experts, k of them a token, R = E r
    C      columns of what was folded        K   kept channels, r0 the width of CELoRA's split
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from counting import METHODS, adapted, between_steps, flops, held, network, parts, writes
from formulas import PROCESSES, Layer, derived, kept_for_backward, points, trained
from processes import inside, spread


def markdown(head: list[str], rows: list[list[Any]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def print_flops() -> None:
    """Products of a step, counted and by formula."""
    rows: list[list[Any]] = []
    for system in METHODS:
        for name, p in points(system).items():
            (step, formula), (optimizer, own) = flops(p)
            rows.append([system, name, step, formula, optimizer, own])
    print(markdown(["system", "point", "step, counted", "formula", "optimizer, counted", "formula"], rows), flush=True)


def print_memory() -> None:
    """Bytes kept for backward beside the inputs of adapters, and between steps, counted and by formula; writes."""
    rows: list[list[Any]] = []
    for system in METHODS:
        for name, p in points(system).items():
            same = replace(p, system="RoseLoRA", experts=1)  # which keeps nothing of its own but 4 N r
            layers = adapted(network(p))
            inputs = held(same) - sum(kept_for_backward(same, at) for at in layers)
            counted, formula = held(p) - inputs, sum(kept_for_backward(p, at) for at in layers)
            numbers = sum(trained(p, at) for at in layers)
            state = between_steps(p) - between_steps(replace(p, system="frozen"))
            count = parts(p)
            steps = 0 if system == "MoELoRA" else 4 * sum(tensor.requires_grad for tensor in network(p).parameters())
            moments = 8 * numbers + steps  # AdamW counts the steps of each tensor in a tensor
            row = [counted, formula, count.trained, 4 * numbers, count.optimizer, moments]
            rows.append([system, name, *row, state, sum(derived(p, at) for at in layers), *writes(p)])
    head = [
        "system",
        "point",
        "kept, counted",
        "formula",
        "trained, counted",
        "formula",
        "optimizer, counted",
        "formula",
    ]
    print(markdown([*head, "operations", "numbers written"], rows), flush=True)


def print_traffic() -> None:
    """Bytes sent in a step."""
    rows = [row for n in (2, *PROCESSES) for row in spread("traffic", n)]
    head = ["system", "strategy", "n", "point", "sent in step 2", "estimate", "own, by event", "largest difference"]
    print(markdown(head, rows), flush=True)


def print_peaks() -> None:
    """Most memory of a process."""
    head = ["system", "layers", "strategy", "n", "peak, measured", "estimate", "ratio"]
    print(markdown(head, spread("peaks", 2)), flush=True)


def print_gpu(file: Path) -> None:
    """Peaks above LoRA's on the GPU, 1B shape with kept activations, beside the formulas at two bytes an activation."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    runs = {
        r["method"]: r for r in lines if (r["library"], r["model"], r["recompute"]) == ("lora_lightning", "1B", False)
    }
    narrow, wide, kv = 2048, 8192, 512
    shapes = [(narrow, narrow), (narrow, kv), (narrow, kv), (narrow, narrow), (narrow, wide), (narrow, wide)]
    first = [Layer(i, o, passes=index > 2) for index, (i, o) in enumerate([*shapes, (wide, narrow)])]
    layers = first + 15 * [replace(at, passes=True) for at in first]
    both, outputs, N = sum(at.i + at.o for at in layers), sum(at.o for at in layers), runs["LoRA"]["tokens"]
    formulas = {
        "DoRA": (2 * N + 2 * 16 + 16) * outputs,  # product, c B in bfloat16, magnitudes with gradient and AdamW's
        "RoseLoRA": 10 * 16 * both,
        "LoRASC": (4 + 2) * 2 * 16 * both,  # two stages, and their factors cast to bfloat16
        "CELoRA": sum(2 * 14 * (at.i + at.o) + 4 * at.o + 8 * at.kept for at in layers if at.passes),
    }
    rows = [
        [system, runs[system]["peak_bytes"] - runs["LoRA"]["peak_bytes"], formula]
        for system, formula in formulas.items()
    ]
    print(markdown(["system", "above LoRA, measured", "formula"], rows))


def main() -> None:
    """Count what is asked for, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {"flops": print_flops, "memory": print_memory, "traffic": print_traffic, "peaks": print_peaks}
    parser.add_argument("--only", default=",".join(kinds), help="of flops, memory, traffic, peaks")
    parser.add_argument("--gpu", type=Path, help="results of measure_gpu.py, to be set beside the formulas")
    parser.add_argument("--inside", nargs=2, metavar=("WHAT", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.inside:
        inside(args.inside[0], Path(args.inside[1]))
        return
    unknown = set(args.only.split(",")) - {*kinds, ""}
    if unknown:
        raise SystemExit(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(kinds)}.")
    for kind in filter(None, args.only.split(",")):
        kinds[kind]()
    if args.gpu:
        print_gpu(args.gpu)


if __name__ == "__main__":
    main()
