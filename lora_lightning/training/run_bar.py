"""RunBar: one progress bar for the whole run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from lora_lightning.callbacks.step_counting import total_steps


class RunBar(TQDMProgressBar):
    """Counts batches of the run, not of an epoch, so that the remaining time is the run's.

    Validations have bars of their own.
    """

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Go on with the same bar."""
        steps, bar = total_steps(trainer), self.train_progress_bar
        total = None if steps is None else steps * trainer.accumulate_grad_batches
        if bar.total != total:
            bar.reset(total)
            bar.initial = bar.n = trainer.fit_loop.total_batch_idx + 1  # of a resumed run, what it had done
        bar.set_description("training")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count the batch."""
        bar, done = self.train_progress_bar, trainer.fit_loop.total_batch_idx + 1
        if done % max(1, self.refresh_rate) == 0 or done == bar.total:
            bar.n = done
            bar.refresh()
            bar.set_postfix(self.get_metrics(trainer, pl_module))
