"""Draw the loss along the line between two trained adapters, on the validation data of the first one's run."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any, cast

from lora_lightning.errors import DataError, RunFolderError, SettingsError

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
        DataError: no validation batches.
    """
    if args.output.suffix != ".png":
        raise SettingsError(f'--output is "{args.output}"; it must end in .png.')
    if args.batches is not None and args.batches < 1:
        raise SettingsError(f"--batches is {args.batches}; it must be at least 1.")
    if not (args.run / CONFIG).is_file():
        raise RunFolderError(f'"{args.run}" holds no {CONFIG}, so it is no run folder; its data are to be measured.')
    folders = [_adapter(folder) for folder in (args.run, args.other)]

    import torch
    from lightning.fabric.utilities.apply_func import move_data_to_device

    from ll_rebasin.barrier import SPACES, linear_barrier
    from ll_rebasin.picture import draw_barrier
    from lora_lightning.adapters.adapted_layer import AdaptedLayer
    from lora_lightning.cli.lightning import build
    from lora_lightning.injection.records import injected_root
    from lora_lightning.storage.load import load_adapter

    module, data = build(["--config", str(args.run / CONFIG)])
    module.configure_model()
    root = injected_root(module)
    for name, folder in zip("ab", folders, strict=True):
        load_adapter(root, folder, name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.to(device)
    data.prepare_data()
    data.setup("validate")
    loader: Any = data.val_dataloader()
    if not len(list(itertools.islice(loader or (), 1))):
        raise DataError(f'the data of "{args.run}" have no validation batches.')

    def loss() -> float:
        batches = (move_data_to_device(batch, device) for batch in itertools.islice(loader, args.batches))
        return module.measure_batches(cast(Any, batches))["loss"]

    layers = [layer for layer in root.modules() if isinstance(layer, AdaptedLayer)]
    low_rank = all(layer.low_rank(n) is not None for layer in layers for n in "ab" if n in layer.adapters)
    found = [linear_barrier(root, loss, "a", "b", args.points, space) for space in SPACES[: None if low_rank else 1]]
    for one in found:
        ends = f"{one.losses[0]:.4f} and {one.losses[-1]:.4f} at the ends"
        print(f"{one.space}: barrier {one.height:.4f} (loss {max(one.losses):.4f} at most, {ends})")
    if not low_rank:
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
