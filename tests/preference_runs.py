"""Small runs on preferences: a random decoder, pairs of words, and the settings of each loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from toy_runs import WORDS

from ll_lora import LoRA
from lora_lightning.data import Preferences
from lora_lightning.optim.warmup import WarmUp
from lora_lightning.training.module import AdapterModule

LOSSES = ("dpo", "ipo", "orpo", "simpo", "kto")


def pairs_file(path: Path, rows: int = 20) -> Path:
    """Prompts and completions of different lengths."""
    made = [
        {
            "prompt": " ".join(WORDS[(row * n) % 29] for n in range(1, 2 + row % 5)),
            "chosen": " ".join([WORDS[30 + row % 3]] * (1 + row % 4)),
            "rejected": " ".join([WORDS[34 + row % 5]] * (1 + (row * row) % 3)),
        }
        for row in range(rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def preference_data(folder: Path, loss_type: str = "dpo", **settings: Any) -> Preferences:
    file = str(pairs_file(folder / "preferences.jsonl"))
    options = {"train": file, "validation": file, "predict": file, "tokenizer": str(folder), "batch_size": 4}
    return Preferences(**{**options, "cache": False, "unpair": loss_type == "kto", **settings})


def preference(folder: Path, method: Any = None, loss_type: str = "dpo", **settings: Any) -> AdapterModule:
    options = {
        "task": "preference",
        "task_settings": {"loss_type": loss_type},
        "lr_scheduler": WarmUp(warmup_fraction=0.0, decay="constant"),
        "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2, eps=1e-4),
        "seed": 1,
    }
    return AdapterModule(str(folder), method or LoRA(rank=2), **{**options, **settings})
