"""A Lightning project of ten lines that knows nothing of adapters, for tests of callbacks."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
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
