"""SaveOften: last.ckpt every few minutes, and where a run is asked to stop."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lora_lightning.errors import TrainingError, check
from lora_lightning.storage.inside import shortened


class SaveOften(Checkpoint):
    """Writes last.ckpt into a run folder by the clock, whether or not the run validates.

    SIGTERM and Ctrl-C end a run of one process after the batch that it is at, with a checkpoint from which it goes on;
    a second Ctrl-C ends it at once. Several processes agree after each optimizer step, whichever of them was asked, and
    end together after it.

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
        self._asked = ""
        self._asked_at = 0.0
        self._handlers: dict[int, Any] = {}
        self._last_step = 0
        self._several = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and listen for Ctrl-C; of several processes each for SIGTERM too.

        Lightning's own handler of SIGTERM sends a message to the other processes, which they may take for another one.
        """
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))
        self._saved_at, self._asked, self._last_step = time.monotonic(), "", trainer.global_step
        self._several = trainer.world_size > 1
        with suppress(ValueError):  # outside the main thread nothing can listen
            for number in (signal.SIGINT, signal.SIGTERM) if self._several else (signal.SIGINT,):
                self._handlers[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._asked and not (self._several and self._just_asked()):
            signal.signal(number, self._handlers[number])
            signal.raise_signal(number)
            return
        if not self._asked:
            self._asked, self._asked_at = "Ctrl-C" if number == signal.SIGINT else "SIGTERM", time.monotonic()
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            where = "step" if self._several else "batch"
            print(f"stopping after this {where}, with a checkpoint{again}", flush=True)

    def _just_asked(self) -> bool:
        """Whether a signal may be the same once more: a terminal sends it to all, and a launcher to its own."""
        return time.monotonic() - self._asked_at < 1

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save if it is time, or if the run is to stop."""
        if not self._several:
            self._act(trainer, self._why_stop(trainer), self._is_time())
        elif trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            wishes = [bool(self._asked), self._asked == "Ctrl-C", trainer.is_global_zero and self._is_time()]
            asked, by_hand, is_time = agreed(wishes, trainer)
            self._act(trainer, ("Ctrl-C" if by_hand else "SIGTERM") if asked else "", is_time)

    def _act(self, trainer: Trainer, why: str, is_time: bool) -> None:
        if why:
            self._save(trainer)
            if trainer.is_global_zero:
                raise TrainingError(stopped(why, self.folder, self._start))
            raise SystemExit(2)  # the first process has said it
        if is_time:
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
        """Stop within a validation as if it was over: half of one would give wrong metrics later.

        Several processes stop behind it: they may have unequal numbers of batches.
        """
        if trainer.state.fn != "fit" or trainer.sanity_checking or self._several:
            return
        if why := self._why_stop(trainer):
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset()
            self._act(trainer, why, False)

    def _why_stop(self, trainer: Trainer) -> str:
        return "SIGTERM" if trainer.received_sigterm else self._asked

    def _is_time(self) -> bool:
        if self.checkpoint_minutes is None:
            return False
        return time.monotonic() - self._saved_at >= 60 * self.checkpoint_minutes

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.folder / "last.ckpt", weights_only=False)
        self._saved_at = time.monotonic()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Whoever has written one, the clock starts again."""
        self._saved_at = time.monotonic()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Signals mean again what they meant before."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an error."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def agreed(wishes: Sequence[bool], trainer: Trainer) -> list[bool]:
    """Which of the wishes any process has; all of them take part."""
    mine = torch.tensor(wishes, dtype=torch.float32, device=trainer.strategy.root_device)
    return [bool(value) for value in trainer.strategy.reduce(mine, reduce_op="sum")]


def stopped(why: str, folder: Path, start: Path) -> str:
    """What a run was stopped at, and the line with which it goes on; the folder as seen from `start`."""
    shown = shortened(folder, start)
    if not (folder / "last.ckpt").is_file():
        return f"the run in {shown} was stopped by {why} before its first checkpoint; start it again."
    return f"the run was stopped by {why} before its end; it goes on with fit --resume {shlex.quote(str(shown))}"
