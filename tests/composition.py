"""Adapters x optimizers x schedules: what each cell does, and the table of it in docs/optimizers.md.

`python tests/composition.py` runs every cell and prints the table.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from resuming import SaveAt, assert_equal_runs, at_step, run
from small_methods import small_methods, wraps
from toy_runs import classification, encoder_folder, labelled_data

from ll_lorasc.optim import SlowFast
from ll_optimizers.plus import LoRAPlus
from ll_optimizers.riemannian import RiemannianAdamW
from lora_lightning.callbacks import Cascade, NoiseInjection, SparsitySchedule
from lora_lightning.errors import LoraLightningError

STEPS = 4
ADAPTERS: dict[str, Any] = {name: method for name, method in small_methods().items() if not wraps(method)}
"""Every installed method but schedules around others, which are among the columns."""
OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3),
    "RiemannianAdamW": lambda params: RiemannianAdamW(params, lr=1e-3),
    "SlowFast(AdamW)": lambda params: SlowFast(params, every_n_steps=2),
    "LoRAPlus(AdamW)": lambda params: LoRAPlus(params, ratio=4.0),
}
SCHEDULES: dict[str, Any] = {
    "none": list,
    "sparsity": lambda: [SparsitySchedule(sparsity=0.5, start=2, end=3)],
    "noise": lambda: [NoiseInjection(0.1)],
    "cascade": lambda: [Cascade(stage_steps=2)],
}
Cell = tuple[str, str, str]
CELLS: list[Cell] = list(itertools.product(ADAPTERS, OPTIMIZERS, SCHEDULES))
DIAGONAL: list[Cell] = [
    (adapter, list(OPTIMIZERS)[row % len(OPTIMIZERS)], list(SCHEDULES)[(row + row // len(OPTIMIZERS)) % len(SCHEDULES)])
    for row, adapter in enumerate(ADAPTERS)
]
"""A cell of each adapter, with every optimizer and schedule among them; the other cells are slow tests."""
TRAINS = "trains"


def outcome(cell: Cell, encoder: Path, folder: Path) -> str:
    """`TRAINS` where four steps are taken and a resume after the second is exact; else why the run was refused.

    Raises:
        AssertionError: it was refused, but not before the first step, or a resume differs.
    """
    adapter, optimizer, schedule = cell
    saved, started = folder / "saved.ckpt", []

    class Started(SaveAt):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            started.append(trainer.global_step)

    def once(callbacks: list[Any], **options: Any) -> dict[str, Any]:
        module = classification(encoder, ADAPTERS[adapter], optimizer=OPTIMIZERS[optimizer])
        return run(module, labelled_data(encoder), folder, [*SCHEDULES[schedule](), *callbacks], **options)

    try:
        straight = once([Started(saved, at_step(2))], max_steps=STEPS)
    except LoraLightningError as error:
        if started:
            raise AssertionError(f"{cell} was refused after a step") from error
        return str(error)
    assert_equal_runs(straight, once([], checkpoint=saved, seed=77, max_steps=STEPS))
    return TRAINS


def table(outcomes: Mapping[Cell, str]) -> str:
    """Markdown: a row for each adapter and optimizer, a column for each schedule, reasons below."""
    reasons = list(dict.fromkeys(text for text in outcomes.values() if text != TRAINS))
    lines = [["adapter", "optimizer", *SCHEDULES], ["---"] * (2 + len(SCHEDULES))]
    for adapter, optimizer in itertools.product(ADAPTERS, OPTIMIZERS):
        found = [outcomes[adapter, optimizer, schedule] for schedule in SCHEDULES]
        cells = ["yes" if text == TRAINS else f"no ({1 + reasons.index(text)})" for text in found]
        lines.append([adapter, optimizer, *cells])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    return f"{rows}\n\n{notes}\n"


def main() -> None:
    """Run every cell and print the table."""
    with tempfile.TemporaryDirectory() as name:
        encoder = encoder_folder(Path(name) / "encoder", dropout=0.1)
        outcomes = {}
        for number, cell in enumerate(CELLS):
            folder = Path(name) / str(number)
            folder.mkdir()
            outcomes[cell] = outcome(cell, encoder, folder)
    print(table(outcomes))


if __name__ == "__main__":
    main()
