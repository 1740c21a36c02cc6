"""An ordinary Lightning project, and the same project with RoseLoRA: two more callbacks and nothing else.

    python examples/existing_project.py --model cnn
    python examples/existing_project.py --model transformer

The project learns scikit-learn's 8 x 8 digits. Its network then meets the same digits turned by a right angle, first
with every parameter training, as the project always did, then with adapters.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import InjectAdapters, method
from lora_lightning.callbacks import SparsitySchedule

# -- the project: nothing here knows of adapters -------------------------------------------------------------------


class SmallCNN(nn.Module):
    """Two convolutions and a head. Images (n, 8, 8) to logits (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.trunk(x.unsqueeze(1)))
        return logits


class SmallTransformer(nn.Module):
    """Two encoder blocks over the eight rows of an image. Images (n, 8, 8) to logits (n, 10)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(8, width), nn.Parameter(0.02 * torch.randn(8, width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.trunk = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.trunk(self.embed(x) + self.positions).mean(1))
        return logits


class Project(LightningModule):
    """A classifier with its own optimizer and schedule."""

    def __init__(self, network: nn.Module, lr: float = 3e-3) -> None:
        super().__init__()
        self.network, self.lr = network, lr

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Cross-entropy of a batch of images and digits."""
        x, y = batch
        return nn.functional.cross_entropy(self.network(x), y)

    def validation_step(self, batch: list[Tensor]) -> None:
        """Accuracy."""
        x, y = batch
        self.log("val_accuracy", (self.network(x).argmax(-1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW over everything, and a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Digits(LightningDataModule):
    """1,797 digits, the last 397 for validation; `turns` right angles each."""

    def __init__(self, turns: int = 0) -> None:
        super().__init__()
        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32).reshape(-1, 8, 8).rot90(turns, (1, 2)) / 16
        self.train, self.held_out = (
            TensorDataset(x[s], torch.tensor(labels[s])) for s in (slice(1400), slice(1400, None))
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of 32."""
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """All held-out digits as one batch."""
        return DataLoader(self.held_out, batch_size=len(self.held_out))


def fit(module: Project, data: Digits, folder: Path, epochs: int, callbacks: Sequence[Callback] = ()) -> float:
    """Train, keep `last.ckpt`, return the accuracy on held-out digits."""
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "last.ckpt")
    return float(trainer.callback_metrics["val_accuracy"])


# -- RoseLoRA in the project ---------------------------------------------------------------------------------------


def rose(folder: Path) -> list[Callback]:
    """What the project's callbacks gain: adapters on every layer of the trunk, and the schedule that thins them."""
    return [
        InjectAdapters(
            method("RoseLoRA")(rank=4, alpha=8.0),
            targets=r"network\.trunk\..*",
            also_train=["network.head"],
            directory=folder / "adapter",
        ),
        SparsitySchedule(sparsity=0.5),
    ]


def main() -> None:
    """Learn upright digits; then turned ones, with all parameters and with adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("cnn", "transformer"), default="cnn")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("existing_project"))
    args = parser.parse_args()

    def project() -> Project:
        return Project(SmallCNN() if args.model == "cnn" else SmallTransformer())

    seed_everything(0)
    upright, turned = Digits(), Digits(turns=1)
    first = project()
    accuracy = {"upright, from random weights": fit(first, upright, args.output / "upright", args.epochs)}
    for name, callbacks in (("full", []), ("RoseLoRA", rose(args.output / "rose"))):
        module = project()
        module.load_state_dict(first.state_dict())
        accuracy[f"turned, {name}"] = fit(module, turned, args.output / name.lower(), args.epochs, callbacks)
    for what, value in accuracy.items():
        print(f"{what:<30}{value:.3f}")


if __name__ == "__main__":
    main()
