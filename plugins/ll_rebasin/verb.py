"""Draw the loss along the line between two trained adapters, on the validation data of the first one's run."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_lightning.errors import RunFolderError, SettingsError

CONFIG = "config.yaml"
ADAPTER = "adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two runs, and how finely the line between them is measured."""
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="run folder of the adapter at t = 0; its data are measured"
    )
    parser.add_argument("other", metavar="RUN|ADAPTER", type=Path, help="run or adapter folder of the one at t = 1")
    parser.add_argument("--points", type=int, default=11, metavar="N", help="places on the line, ends included; 11")
    parser.add_argument("--batches", type=int, metavar="N", help="validation batches to measure (all)")
    parser.add_argument("--output", metavar="FILE.png", type=Path, default=Path("barrier.png"), help="(barrier.png)")


def run(args: argparse.Namespace) -> int:
    """Load both adapters into one model, walk the line, print the barriers and draw them.

    Raises:
        SettingsError: an output that is no .png, or a number outside its rule.
        RunFolderError: a folder that holds no run or no adapter.
    """
    if args.output.suffix != ".png":
        raise SettingsError(f'--output is "{args.output}"; it must end in .png.')
    if args.batches is not None and args.batches < 1:
        raise SettingsError(f"--batches is {args.batches}; it must be at least 1.")
    if not (args.run / CONFIG).is_file():
        raise RunFolderError(f'"{args.run}" holds no {CONFIG}, so it is no run folder; its data are to be measured.')
    first, second = _adapter(args.run), _adapter(args.other)

    from lightning.pytorch import Trainer

    from ll_rebasin.picture import draw_barrier
    from ll_rebasin.walk import Walk
    from lora_lightning.cli.lightning import build

    module, data = build(["--config", str(args.run / CONFIG)])
    walk = Walk(first, second, points=args.points, batches=args.batches)
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        callbacks=[walk],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,  # the walk reads them itself
    )
    trainer.validate(module, datamodule=data, verbose=False)
    found = walk.found
    for one in found:
        ends = f"{one.losses[0]:.4f} and {one.losses[-1]:.4f} at the ends"
        print(f"{one.space}: barrier {one.height:.4f} (loss {max(one.losses):.4f} at most, {ends})")
    if len(found) == 1:
        print("the adapters are no product of factors, so that their updates alone are mixed")
    draw_barrier(args.output, found, str(args.run), str(args.other), "validation loss")
    print(args.output)
    return 0


def _adapter(folder: Path) -> Path:
    """The adapter of a run folder, or the adapter folder itself."""
    for found in (folder / ADAPTER, folder):
        if (found / "adapter.json").is_file():
            return found
    raise RunFolderError(f'"{folder}" holds no adapter: neither {ADAPTER}/adapter.json nor adapter.json is there.')
