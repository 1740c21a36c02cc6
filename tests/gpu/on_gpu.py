"""The device under test, every registered method at a small size, and small runs on that device."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from small_methods import small_methods
from torch import Tensor, nn

from lora_lightning.injection.inject import inject
from lora_lightning.injection.records import adapters_named
from lora_lightning.methods import Method
from lora_lightning.testing import perturb, tiny_decoder, tiny_encoder
from lora_lightning.testing.toy_models import seeded

DEVICE = "cuda"
ACCELERATOR = "gpu"
BACKEND = "nccl"
ROOT = Path(__file__).resolve().parents[2]

METHODS: dict[str, Method] = small_methods(router_lr_ratio=1.0)
"""Every installed method by name."""
MERGEABLE = [name for name, method in METHODS.items() if method.mergeable]
MODELS = {"encoder": tiny_encoder, "decoder": tiny_decoder}
"""BERT with a classification head, and Llama."""


def reason_to_skip() -> str:
    """Why nothing here can run; empty where it can."""
    return "" if torch.cuda.is_available() else "no CUDA device"


def adapted(model: str, method: Method, moved: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model on the device with adapters on its linear layers, in eval mode."""
    net: nn.Module = MODELS[model]().to(DEVICE, dtype)
    inject(net, method, seed=0)
    if moved:
        for i, adapter in enumerate(adapters_named(net, "default").values()):
            perturb(adapter, i, size=0.05)
    return net


def tokens(rows: int = 4, length: int = 8) -> Tensor:
    """Token ids of the tiny models, none of which is padding."""
    with seeded(3):
        return torch.randint(3, 32, (rows, length)).to(DEVICE)


class Losses(Callback):
    """The loss of every micro-batch, and the backend of the process group."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.backend = ""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))
        if torch.distributed.is_initialized():
            self.backend = torch.distributed.get_backend()


def command_line(folder: Path, *words: str) -> str:
    """One command line in a process of its own; its output."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = str(listener.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-m", "lora_lightning", *words],
        cwd=folder,
        env=os.environ | {"MASTER_PORT": port},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout
