"""Running, saving in the middle, resuming, and comparing two runs bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from toy_runs import trainer

from lora_lightning.training.trainer_checkpoints import AtomicCheckpoints


class SaveAt(Callback):
    """Saves when `when(trainer, batch_idx)` first holds, after everything else of the batch."""

    phase = 9

    def __init__(self, path: Path, when) -> None:
        self.path, self.when = path, when

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not self.path.exists() and self.when(trainer, batch_idx):
            trainer.save_checkpoint(self.path)


def at_step(step: int):
    return lambda trainer, batch_idx: trainer.global_step == step


def run(module, data, folder, callbacks=(), checkpoint=None, seed=3, **options):
    seed_everything(seed, verbose=False)
    fit = trainer(folder, list(callbacks), plugins=[AtomicCheckpoints()], **options)
    fit.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return {
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizer": fit.optimizers[0].state_dict()["state"],
        "rate": fit.optimizers[0].param_groups[0]["lr"],
        "step": fit.global_step,
        "rng": torch.get_rng_state(),
        "numpy": int(np.random.randint(2**31)),
    }


def assert_equal_runs(one, other):
    assert one["step"] == other["step"]
    assert one["rate"] == other["rate"]
    assert torch.equal(one["rng"], other["rng"])
    assert one["numpy"] == other["numpy"]
    for name, value in one["state"].items():
        assert torch.equal(value, other["state"][name]), name
    for index, state in one["optimizer"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other["optimizer"][index][name])), (index, name)
