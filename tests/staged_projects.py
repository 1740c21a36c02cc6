"""A project of four adapted layers trained in stages, and a callback that keeps what each step has left."""

from __future__ import annotations

import torch
from lightning.pytorch.callbacks import Callback
from projects import Plain, fit
from torch import nn

from ll_lora import LoRA
from lora_lightning.callbacks import InjectAdapters


class Layers(Plain):
    """Four adapted layers in a row, in float64, trained by Adam."""

    def __init__(self, lr=0.05):
        torch.manual_seed(5)
        super().__init__(lr)
        self.layers = nn.Sequential(*(nn.Linear(12, 12) for _ in range(4)))
        self.first, self.head = nn.Linear(4, 12), nn.Linear(12, 2)
        self.to(torch.float64)

    def training_step(self, batch):
        x, y = batch
        h = torch.relu(self.first(x.to(self.head.weight.dtype)))
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return nn.functional.cross_entropy(self.head(h), y)

    def configure_optimizers(self):
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=self.lr)


class Seen(Callback):
    """Per optimizer step: weights, factors, moments and ranks, before stages end (phase 4) or after (phase 6)."""

    def __init__(self, phase):
        self.phase, self.weights, self.factors, self.moments, self.steps = phase, {}, {}, {}, {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        step, state = trainer.global_step, trainer.optimizers[0].state
        layers = [layer for layer in pl_module.layers if hasattr(layer, "adapters")]
        self.weights[step] = [layer.weight.detach().clone() for layer in layers]
        adapters = [layer.adapter("default") for layer in layers]
        self.factors[step] = [(a.lora_A.detach().clone(), a.lora_B.detach().clone()) for a in adapters]
        self.moments[step] = [[dict(state.get(p, {})) for p in a.parameters()] for a in adapters]
        self.moments[step] = [
            [{k: v.clone() for k, v in s.items() if isinstance(v, torch.Tensor)} for s in adapter]
            for adapter in self.moments[step]
        ]


def staged(tmp_path, cascade=None, method=None, module=None, extra=(), **options):
    """A run of `method`, and of a cascade where it brings none."""
    module = Layers() if module is None else module
    before, after = Seen(4), Seen(6)
    inject = InjectAdapters(method or LoRA(rank=2), ["0", "1", "2", "3"], also_train=["head"], seed=3)
    fit(
        module,
        tmp_path,
        [inject, *([cascade] if cascade else []), before, after, *extra],
        **{"max_steps": 6, **options},
    )
    return module, before, after
