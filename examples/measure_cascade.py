"""What a cascade keeps of ten stages over a thousand layers: bytes after each stage, and what cut factors have lost.

    python examples/measure_cascade.py [--layers 1000] [--width 96] [--stages 10]

A chain of square linear layers learns what another one of the same shape computes; every layer has a LoRA. Three runs:
factors as they come, factors cut to the rank of two stages, and a rank at which one dense matrix is smaller than the
factors, so that it is taken. Bytes are those of the tensors that belong to what was folded, with originals of weights
that a dense update has changed. Prints the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lora_lightning as ll
from lora_lightning.callbacks import Cascade, InjectAdapters
from lora_lightning.callbacks.step_counting import STAGE_ENDS
from lora_lightning.injection.records import iter_adapters

STEPS = 2
"""Optimizer steps of a stage."""


class Chain(LightningModule):
    """h <- h + tanh(W h) / sqrt(layers), layer after layer."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({f"layer{i}": nn.Linear(width, width, bias=False) for i in range(layers)})

    def forward(self, h: Tensor) -> Tensor:
        """(rows, width) to the same."""
        for layer in self.layers.values():
            h = h + torch.tanh(layer(h)) / len(self.layers) ** 0.5
        return h

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Squared distance from the other chain's output."""
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Adam over what trains."""
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=3e-3)


class Kept(Callback):
    """Bytes of all that was folded, and the largest relative error so far, after each stage."""

    phase = STAGE_ENDS + 1

    def __init__(self, cascade: Cascade) -> None:
        self.cascade, self.bytes, self.errors = cascade, [], []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count where a stage has ended."""
        if trainer.global_step % STEPS:
            return
        tensors: list[Tensor] = []
        for _, layer in iter_adapters(pl_module):
            tensors += layer.shifts.state_dict().values()
            original = layer.base_weight.original
            tensors += [] if original is None else [part for part in original if part is not None]
        self.bytes.append(sum(tensor.nbytes for tensor in tensors))
        self.errors.append(self.cascade.metrics().get("log_error", 0.0))


def measure(layers: int, width: int, stages: int, rank: int, log_rank: int | None) -> Kept:
    """One run."""
    seed_everything(0, verbose=False)
    other, module = Chain(layers, width), Chain(layers, width)
    x = torch.randn(64, width)
    with torch.no_grad():
        rows = DataLoader(TensorDataset(x, other(x)), batch_size=16)
    cascade = Cascade(stage_steps=STEPS, log_rank=log_rank)
    kept = Kept(cascade)
    inject = InjectAdapters(ll.method("LoRA")(rank=rank), "all-linear", also_train=(), seed=0)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    options |= {"accelerator": "cpu", "max_steps": stages * STEPS, "enable_progress_bar": False}
    with tempfile.TemporaryDirectory() as folder:
        Trainer(callbacks=[inject, cascade, kept], default_root_dir=folder, **options).fit(module, rows)
    return kept


def main() -> None:
    """Run the three, and print a row a stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    for name, default in (("layers", 1000), ("width", 96), ("stages", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rank = max(1, (asked.width - 1) // (2 * asked.stages))  # all factors together are fewer numbers than a matrix
    small = measure(asked.layers, asked.width, asked.stages, rank, None)
    cut = measure(asked.layers, asked.width, asked.stages, rank, 2 * rank)
    dense = measure(asked.layers, asked.width, asked.stages, 2 * rank, None)
    print(f"\n| stage | factors, rank {rank} | cut to rank {2 * rank} | lost | dense, rank {2 * rank} |")
    print("| --- | --- | --- | --- | --- |")
    for stage, row in enumerate(zip(small.bytes, cut.bytes, cut.errors, dense.bytes, strict=True), 1):
        whole, bounded, error, matrix = row
        print(f"| {stage} | {whole / 1e6:.2f} | {bounded / 1e6:.2f} | {error:.1%} | {matrix / 1e6:.2f} |")


if __name__ == "__main__":
    main()
