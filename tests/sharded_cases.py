"""Runs that two processes must take like one: what they train, with what, and where they are resumed.

`python -m torch.distributed.run --nproc-per-node=2 tests/sharded_cases.py STRATEGY FOLDER [CASE ...]` takes every case
straight, then again from a checkpoint in the middle, and writes the adapter of both. STRATEGY: ddp, fsdp2 or fsdp.
A process that fails ends the launch.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import DDPStrategy
from resuming import SaveAt, at_step
from training import classification, completion_data, decoder_folder, encoder_folder, labelled_data, trainer

from ll_lora import LoRA
from lora_lightning.checkpoint import save_adapter
from lora_lightning.methods import Method
from lora_lightning.module import AdapterModule
from lora_lightning.saving import AtomicCheckpoints
from lora_lightning.strategies import FSDP1, FSDP2

STEPS, SAVED_AT = 6, 3
STRATEGIES: dict[str, Callable[[], Any]] = {"ddp": DDPStrategy, "fsdp2": FSDP2, "fsdp": FSDP1}


@dataclass(frozen=True)
class Case:
    """A run."""

    method: Method
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
    callbacks: Callable[[], list[Any]] = list
    model: str = "encoder"
    """ "encoder" (a classifier) or "decoder" (a causal language model)."""
    module: dict[str, Any] = field(default_factory=dict)
    """More settings of AdapterModule."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """More settings of Trainer."""


CASES: dict[str, Case] = {
    "LoRA": Case(LoRA(rank=3)),
    "LoRA, window of 2, clipped": Case(
        LoRA(rank=3), trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_steps": 4}
    ),
    "LoRA, decoder, checkpointed": Case(LoRA(rank=3), model="decoder", module={"gradient_checkpointing": True}),
}


def take(
    case: Case, folder: Path, batch: int, callbacks: list[Any], checkpoint: Path | None = None, **more: Any
) -> Any:
    """One run; its module, still in pieces where the strategy makes any."""
    seed_everything(3, verbose=False)
    options: dict[str, Any] = {"optimizer": case.optimizer, "dtype": "float64", **case.module}
    if case.model == "encoder":
        module = classification(folder, case.method, **options)
        data: Any = labelled_data(folder, batch_size=batch, group_by_length=False, limit=32)
    else:
        targets = {"targets": "all-linear", "linear_baseline": False, "seed": 1, "task": "causal-lm"}
        module = AdapterModule(str(folder), case.method, **{**targets, **options})
        data = completion_data(folder, batch_size=batch, group_by_length=False)
    settings = {"max_steps": STEPS, "plugins": [AtomicCheckpoints()], **case.trainer, **more}
    run = trainer(folder, [*case.callbacks(), *callbacks], **settings)
    run.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module


def folder_of(base: Path, case: Case) -> Path:
    """A model without dropout, with its tokenizer and data."""
    folder = base / case.model
    if not folder.exists():
        folder = encoder_folder(folder, dropout=0.0) if case.model == "encoder" else decoder_folder(folder)
    return folder


def main(strategy: str, base: Path, names: list[str]) -> None:
    """Every case on this process, straight and resumed."""
    warnings.simplefilter("ignore")
    for name in names or CASES:
        case, out = CASES[name], base / strategy / name
        for kind in ("straight", "resumed"):
            saved = out / "saved.ckpt"
            callbacks = [SaveAt(saved, at_step(min(SAVED_AT, case.trainer.get("max_steps", STEPS) - 1)))]
            more = {"devices": 2, "strategy": STRATEGIES[strategy](), "accelerator": "cpu"}
            resumed = {"checkpoint": saved} if kind == "resumed" else {}
            module = take(case, base / case.model, 2, callbacks if not resumed else [], **resumed, **more)
            save_adapter(module, out / kind) if strategy == "fsdp2" or module.global_rank == 0 else None
            module.trainer.strategy.barrier()
        print(f"{name}: taken", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
