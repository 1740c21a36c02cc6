"""RoseLoRA, stages and a Riemannian optimizer in a loop of your own: torch, and no Lightning.

    python examples/plain_torch.py

A small network learns scikit-learn's digits, then the same digits turned by a right angle with adapters only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lora_lightning as ll
from ll_optimizers.riemannian import RiemannianAdamW
from lora_lightning.adapters.folded import FactoredUpdate
from lora_lightning.callbacks.keep_masks import keep_count, keep_top, kept_density, sensitivity
from lora_lightning.injection.records import trainable_adapters
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.optim.state import clear
from lora_lightning.seeds import generator


def batches(x: Tensor, y: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of 64, drawn with a seed."""
    drawn = torch.randint(len(x), (steps, 64), generator=torch.Generator().manual_seed(0))
    return [(x[rows], y[rows]) for rows in drawn]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of digits that are told right."""
    with torch.no_grad():
        return float((model(x).argmax(-1) == y).float().mean())


def sparse(model: nn.Module, data: list[tuple[Tensor, Tensor]], sparsity: float = 0.5, beta: float = 0.8) -> None:
    """RoseLoRA: entries of least averaged sensitivity go along a cubic ramp."""
    ll.inject(model, ll.method("RoseLoRA")(rank=8), targets=["0", "2"], also_train=["4"], seed=0)
    optimizer = build_optimizer(model, lambda groups: torch.optim.AdamW(groups, lr=3e-3))
    entries = [entry for adapter in trainable_adapters(model).values() for entry in adapter.masks()]
    average = [torch.zeros_like(entry.param) for entry in entries]
    start, end = max(2, len(data) // 10), max(4, len(data) * 8 // 10)
    for step, (x, y) in enumerate(data, 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for mean, entry in zip(average, entries, strict=True):
            assert entry.param.grad is not None
            mean.lerp_(sensitivity(entry.param, entry.param.grad), 1 - beta)
        optimizer.step()
        share = kept_density(step, start, end, 1 - sparsity)
        for mean, entry in zip(average, entries, strict=True):
            scores = mean if entry.by_row else mean.mT
            kept = keep_top(scores, keep_count(share, scores.shape[-1]))
            with torch.no_grad():
                entry.mask.copy_(kept if entry.by_row else kept.mT)
                entry.param.mul_(entry.mask)


def in_stages(model: nn.Module, data: list[tuple[Tensor, Tensor]], stages: int = 2) -> None:
    """LoRA in stages, by an optimizer that sees factor pairs: at each end the update is folded."""
    ll.inject(model, ll.method("LoRA")(rank=4), targets=["0", "2"], also_train=["4"], seed=0)
    optimizer = build_optimizer(model, lambda groups: RiemannianAdamW(groups, lr=3e-3))
    layers = dict(ll.iter_adapters(model))
    for layer in layers.values():
        layer.set_folded("default", FactoredUpdate(layer.base_layer))
    for stage in range(stages):
        for x, y in data[stage::stages]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        for path, layer in layers.items():
            layer.fold("default")
            layer.adapter("default").reset(generator(0, "stage", stage, path))
            clear(optimizer, layer.adapter("default").parameters())


def main() -> None:
    """Learn upright digits, then turned ones in two ways; write, merge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("plain_torch"))
    args = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    turned = x.reshape(-1, 8, 8).rot90(1, (1, 2)).flatten(1)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for part, target in batches(x[:1400], y[:1400], args.steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(base(part), target).backward()
        optimizer.step()
    start = {name: value.clone() for name, value in base.state_dict().items()}
    print(f"{'turned, before':<36}{accuracy(base, turned[1400:], y[1400:]):.3f}")

    for name, train in (("RoseLoRA", sparse), ("LoRA in stages, Riemannian", in_stages)):
        base.load_state_dict(start)
        train(base, batches(turned[:1400], y[:1400], args.steps))
        ll.save_adapter(base, args.output / train.__name__)
        ll.merge(base)
        print(f"{'turned, ' + name:<36}{accuracy(base, turned[1400:], y[1400:]):.3f}")
        ll.eject(base)


if __name__ == "__main__":
    main()
