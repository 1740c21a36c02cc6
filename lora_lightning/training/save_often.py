"""SaveOften: last.ckpt every few minutes, and where a run is asked to stop."""

from __future__ import annotations

import shlex
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lora_lightning.errors import TrainingError, check
from lora_lightning.storage.inside import shortened


class SaveOften(Checkpoint):
    """Writes last.ckpt into a run folder by the clock, whether or not the run validates.

    SIGTERM and Ctrl-C end a run of one process after the batch that it is at, with a checkpoint from which it goes on;
    a second Ctrl-C ends it at once. In a run of several processes they end it as Lightning does, with the last
    checkpoint that was written.

    Args:
        folder: the run folder.
        minutes: time between checkpoints; None writes none by the clock.

    Raises:
        SettingsError: not a positive number of minutes.
        TrainingError: the run was asked to stop.
    """

    def __init__(self, folder: str | Path, minutes: float | None = 5.0) -> None:
        self.folder, self.checkpoint_minutes = Path(folder), minutes
        check(minutes is None or minutes > 0, self, "checkpoint_minutes", "it must be above 0, or null for none.")
        self._start = Path.cwd()
        self._saved_at = 0.0
        self._asked = False
        self._handler: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and listen for Ctrl-C."""
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))
        self._saved_at, self._asked = time.monotonic(), False
        if trainer.world_size == 1:
            with suppress(ValueError):  # outside the main thread nothing can listen
                self._handler = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, self._handler)
        self._asked = True
        print("stopping after this batch, with a checkpoint; Ctrl-C again stops at once", flush=True)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save if it is time, or if the run is to stop."""
        self._stop_if_asked(trainer)
        if self._is_time(trainer):
            self._save(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop within a validation as if it was over: half of one would give wrong metrics later."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._why_stop(trainer):
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset()
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if why := self._why_stop(trainer):
            self._save(trainer)
            raise TrainingError(stopped(why, self.folder, self._start))

    def _why_stop(self, trainer: Trainer) -> str:
        if trainer.world_size > 1:  # they would not agree on the batch
            return ""
        return "SIGTERM" if trainer.received_sigterm else "Ctrl-C" if self._asked else ""

    def _is_time(self, trainer: Trainer) -> bool:
        if self.checkpoint_minutes is None:
            return False
        is_time = time.monotonic() - self._saved_at >= 60 * self.checkpoint_minutes
        if trainer.world_size == 1:
            return is_time
        # the first process's clock counts; it is asked as seldom as the run logs
        asks = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        return bool(trainer.strategy.broadcast(is_time)) if asks else False

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.folder / "last.ckpt", weights_only=False)
        self._saved_at = time.monotonic()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Whoever has written one, the clock starts again."""
        self._saved_at = time.monotonic()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ctrl-C means again what it meant before."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an error."""
        self._restore()

    def _restore(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None


def stopped(why: str, folder: Path, start: Path) -> str:
    """What a run was stopped at, and the line with which it goes on; the folder as seen from `start`."""
    shown = shortened(folder, start)
    if not (folder / "last.ckpt").is_file():
        return f"the run in {shown} was stopped by {why} before its first checkpoint; start it again."
    return f"the run was stopped by {why} before its end; it goes on with fit --resume {shlex.quote(str(shown))}"
