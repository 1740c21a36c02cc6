"""The bar over several epochs, and of a run that is resumed."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import Callback
from resuming import run
from toy_runs import classification, encoder_folder, labelled_data

from ll_lora import LoRA
from lora_lightning.training.run_bar import RunBar


class Look(Callback):
    """Notes where the bar stands after each batch."""

    def __init__(self, bar):
        self.bar, self.seen = bar, []

    def on_train_batch_end(self, trainer, *_):
        shown = self.bar.train_progress_bar
        self.seen.append((shown.n, shown.total, shown.desc.rstrip(": ")))
        trainer.should_stop = shown.total is None


@pytest.mark.parametrize("window", [1, 2])
def test_it_counts_the_batches_of_the_run(tmp_path, window):
    folder = encoder_folder(tmp_path / "model")
    bar = RunBar()
    look = Look(bar)
    options = {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 4, "enable_progress_bar": True}
    run(
        classification(folder, LoRA(rank=2)),
        labelled_data(folder),
        tmp_path,
        [bar, look],
        **options,
        accumulate_grad_batches=window,
    )
    assert look.seen == [(n, 12, "training") for n in range(1, 13)]


def test_a_run_without_bounds_has_no_end(tmp_path):
    folder = encoder_folder(tmp_path / "model")
    bar = RunBar()
    look = Look(bar)
    options = {"max_steps": -1, "max_epochs": -1, "enable_progress_bar": True}
    run(classification(folder, LoRA(rank=2)), labelled_data(folder), tmp_path, [bar, look], **options)
    assert look.seen[0] == (1, None, "training")
