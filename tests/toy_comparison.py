"""A comparison small enough to be trained in a test."""

from __future__ import annotations

from pathlib import Path

from toy_runs import encoder_folder, labelled_file


def words(folder: Path, steps: int = 6) -> list[str]:
    """Flags of `fit` for a random encoder on labelled words, with a validation file of its own."""
    model, file = encoder_folder(folder / "model"), labelled_file(folder / "train.csv")
    validation = labelled_file(folder / "validation.csv")
    return [
        "--model.pretrained", str(model), "--model.method", "LoRA", "--model.method.rank", "2",
        "--data", "LabelledText",
        "--data.train", str(file), "--data.validation", str(validation), "--data.batch_size", "4",
        "--trainer.max_steps", str(steps), "--trainer.val_check_interval", "3",
        "--trainer.accelerator", "cpu",        "--trainer.check_val_every_n_epoch", "null", "--trainer.logger", "false",
    ]  # fmt: skip
