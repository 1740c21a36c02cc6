"""Trainer checkpoints that a kill or a full disk leaves whole, and the one that every run keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from lora_lightning.errors import RunFolderError
from lora_lightning.storage.atomic import write_atomically
from lora_lightning.storage.checkpoint import check_checkpoint, write_checkpoint


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes beside, flushes to the disk, replaces; reads what is whole only. For `Trainer(plugins=[...])`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            RunFolderError: the folder cannot be written; the checkpoint that was there is intact.
        """
        try:
            write_atomically(Path(path), lambda file: write_checkpoint(checkpoint, file))
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "write" not in str(error) and "unexpected pos" not in str(error):
                raise
            reason = getattr(error, "strerror", None) or error
            raise RunFolderError(
                f'cannot write the checkpoint "{path}": {reason}. The one that was there before is intact.'
            ) from error

    def load_checkpoint(self, path: _PATH, *args: Any, **options: Any) -> dict[str, Any]:
        """The checkpoint at `path`, after everything in it has been compared with its digests.

        Raises:
            ResumeError: it is truncated or damaged.
        """
        check_checkpoint(path)
        return super().load_checkpoint(path, *args, **options)


def read_by_all(strategy: Strategy, path: _PATH, weights_only: bool | None) -> dict[str, Any]:
    """A checkpoint that one process could have written, read by all processes from the first one's path."""
    path = Path(strategy.broadcast(path))
    torch.cuda.empty_cache()
    return strategy.checkpoint_io.load_checkpoint(path, map_location="cpu", weights_only=weights_only)


class LastCheckpoint(ModelCheckpoint):
    """Keeps last.ckpt in a folder; a class of its own, so that users can add a ModelCheckpoint of any settings.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, "last", save_top_k=1, enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: a folder that was moved since has its checkpoint at another path."""
