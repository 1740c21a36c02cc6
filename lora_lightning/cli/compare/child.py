"""One run of a comparison, in a process of its own: `python -m lora_lightning.cli.compare.child FOLDER`.

The folder holds `job.json`: the words of `fit`, and what is measured beside.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from lora_lightning.callbacks.forgetting import Forgetting
from lora_lightning.cli import lightning
from lora_lightning.cli.compare.measured import Measured
from lora_lightning.cli.main import told
from lora_lightning.cli.run_folder import VARIABLE
from lora_lightning.errors import LoraLightningError

SPEC = "job.json"
BESIDE = "beside"
"""Name of the data of `--also` in what a run leaves."""


@dataclass(frozen=True)
class Spec:
    """What a run is to do."""

    words: list[str]
    """Flags of `fit`."""
    hold_out: float
    """Fraction of the training rows that is validated on, and not trained on; 0 takes the validation data."""
    keep_rows: bool
    also: list[str]
    """Flags whose `data` is measured before, while and after training, or none."""

    def write(self, folder: Path) -> None:
        """Into `job.json`."""
        (folder / SPEC).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Spec:
        """From `job.json`."""
        return cls(**json.loads((folder / SPEC).read_text(encoding="utf-8")))


class MeasuredCLI(lightning.CLI):
    """`fit`, with what a comparison measures."""

    spec: Spec
    folder: Path

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """As always, with our callbacks."""
        trainer = super().instantiate_trainer(**kwargs)
        ours: list[Callback] = [Measured(self.folder, self.spec.keep_rows)]
        if self.spec.also:
            # the target's values are those of validation, which Measured keeps
            beside = Forgetting({BESIDE: lightning.build(self.spec.also)[1]}, target=None, directory=self.folder)
            ours.insert(0, beside)
        trainer.callbacks.extend(ours)  # type: ignore[attr-defined]
        return trainer

    def before_fit(self) -> None:
        """Hold the rows out before anything is read."""
        if self.spec.hold_out:
            self.datamodule.hold_out(self.spec.hold_out)
        super().before_fit()


def main(args: Sequence[str]) -> int:
    """Begin the run of a folder, or go on with it where it was cut; returns the exit code."""
    folder = Path(args[0]).absolute()
    MeasuredCLI.spec, MeasuredCLI.folder = Spec.read(folder), folder
    if (folder / "last.ckpt").is_file():
        words = ["fit", "--resume", str(folder)]
    else:
        os.environ[VARIABLE] = str(folder)
        words = ["fit", *MeasuredCLI.spec.words]
    try:
        return lightning.main(words, MeasuredCLI)
    except LoraLightningError as error:
        return told(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
