"""A Lightning project of ten lines that knows nothing of adapters, a wider one, and a callback that watches it."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy_runs import trainer


class Plain(LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.used, self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.head(torch.relu(self.used(x))), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def loader(rows: int = 16):
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=2)


def fit(module, folder, callbacks, **options):
    run = trainer(folder, callbacks, **{"max_steps": 6, **options})
    run.fit(module, loader())
    return run


class Watch(Callback):
    """Keeps, per optimizer step, the effective weight before stages end (phase 4) or after (phase 6)."""

    def __init__(self, phase):
        self.phase, self.seen, self.states = phase, {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        layer = pl_module.used
        self.seen[trainer.global_step] = layer.weight.detach().clone()
        adapter = layer.adapter("default")
        self.states[trainer.global_step] = [len(trainer.optimizers[0].state.get(p, {})) for p in adapter.parameters()]


class Wide(Plain):
    """Layers large enough that two stages of rank 1 are fewer numbers than the weight."""

    def __init__(self, lr=0.1, momentum=0.0, dtype=torch.float64):
        super().__init__(lr)
        torch.manual_seed(5)
        self.used, self.unused, self.head = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(12, 2)
        self.momentum = momentum
        self.to(dtype)

    def training_step(self, batch):
        return super().training_step([batch[0].to(self.head.weight.dtype), batch[1]])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)
