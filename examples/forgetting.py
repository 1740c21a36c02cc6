"""What LoRA and full fine-tuning learn and forget, in a Lightning project of one's own (arXiv:2405.09673, small).

    python examples/forgetting.py [--steps 300] [--output forgetting]

A network learns to tell ten kinds of points apart (the source). Then it learns others (the target), three times: with
LoRA of rank 2, with LoRA of rank 8, and fully. `Forgetting` measures both sets all along, `UpdateSpectrum` the rank of
what each layer has learned, and `analyse` draws them.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lora_lightning as ll
from ll_weight_change.spectrum import UpdateSpectrum
from lora_lightning.callbacks import Forgetting, InjectAdapters
from lora_lightning.cli.main import main as lora_lightning

WIDTH, KINDS = 32, 10


def points(seed: int, rows: int) -> TensorDataset:
    """Points around the centres of ten kinds, three for each; of one seed always the same kinds."""
    centres = torch.randn(KINDS, 3, WIDTH, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(rows)
    kinds = torch.randint(KINDS, (rows,), generator=generator)
    chosen = centres[kinds, torch.randint(3, (rows,), generator=generator)]
    return TensorDataset(chosen + 0.7 * torch.randn(rows, WIDTH, generator=generator), kinds)


def loader(seed: int, rows: int, shuffle: bool = False) -> DataLoader:
    """Batches of them."""
    return DataLoader(points(seed, rows), batch_size=64, shuffle=shuffle)


class Classifier(LightningModule):
    """A project that knows nothing of adapters."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.hidden = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.out = nn.Linear(WIDTH, KINDS)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for layer in self.hidden:
            x = x + torch.relu(layer(x))
        return self.out(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """What Forgetting measures, too."""
        logits = self(batch[0])
        self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean())
        self.log("loss", cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of what trains."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def train(module: Classifier, seed: int, steps: int, callbacks: list[Callback], folder: Path) -> None:
    """Train on the kinds of a seed."""
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        max_steps=steps,
        callbacks=callbacks,
        default_root_dir=folder,
        accelerator="cpu",
        val_check_interval=max(1, steps // 10),
        check_val_every_n_epoch=None,
        enable_progress_bar=False,
        **options,
    )
    trainer.fit(module, loader(seed, 4096, shuffle=True), loader(seed, 1000))


def main() -> int:
    """A base model, three runs from it, a table and two pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("forgetting"))
    args = parser.parse_args()
    source, target = 1, 2
    seed_everything(0, verbose=False)
    base = Classifier(lr=3e-3)
    train(base, source, args.steps, [], args.output)
    folders = []
    for label, rank, lr in (("LoRA, rank 2", 2, 1e-2), ("LoRA, rank 8", 8, 1e-2), ("full fine-tuning", None, 1e-3)):
        module = copy.deepcopy(base)
        module.lr = lr
        folder = args.output / label.replace(", ", "-").replace(" ", "-")
        callbacks: list[Callback] = [Forgetting(loader(source, 1000), label=label), UpdateSpectrum(label=label)]
        if rank is not None:
            method = ll.method("LoRA")(rank=rank, alpha=2 * rank)
            callbacks.append(InjectAdapters(method, "all-linear", seed=0))
        train(module, target, args.steps, callbacks, folder)
        folders.append(str(folder))
    return lora_lightning(["analyse", *folders, "--metric", "accuracy", "--output", str(args.output / "analysis.png")])


if __name__ == "__main__":
    sys.exit(main())
