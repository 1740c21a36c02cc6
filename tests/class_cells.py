"""What is done with every class of `model_classes.py`, and what comes of it: right, or refused before training.

`python tests/class_cells.py` prints a table of it; it takes some minutes.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from model_classes import TASKS, VOCABULARY, ModelClass, model_classes
from torch import Tensor, nn

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import ModelError, TargetError
from lora_lightning.models.anatomy import survey
from lora_lightning.models.new_tokens import Vocabulary, add_rows, remove_rows
from lora_lightning.testing.toy_models import seeded

IDS = torch.tensor([[5, 6, 9, 7, 3, 2], [8, 4, 5, 6, 7, 2]])
ADDED = Vocabulary(("<one>", "<two>"), VOCABULARY)
LARGEST = 1_000_000
"""Weights of a model that is built; a class whose smallest is larger is left out."""
CLASSIFIES = tuple(task for task in TASKS if task.endswith("classification"))


class Cell(NamedTuple):
    """What came of one class."""

    refused: dict[str, str]
    """What is refused before training, with the message."""
    unreached: tuple[str, ...]
    """Names of layers that have an adapter, but no part in the output; a fit stops there and names them."""
    unchecked: str
    """Why its numbers were not looked at: transformers itself does not compute with such inputs; "" where they were."""


def buildable() -> Iterator[ModelClass]:
    """Classes whose smallest model can be built here, and is small."""
    for found in model_classes():
        with contextlib.suppress(Exception):  # it wants a library, or settings that fit together
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                model = found.build(device="meta")
            if sum(parameter.numel() for parameter in model.parameters()) <= LARGEST and _consistent(model.config):
                yield found


def _consistent(config: Any) -> bool:
    """Whether a configuration that was made small is read again as it is."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        again = type(config).from_pretrained(folder)
    return {**again.to_dict(), "transformers_version": ""} == {**config.to_dict(), "transformers_version": ""}


def outcome(found: ModelClass) -> Cell:
    """Go through everything with one class.

    Raises:
        AssertionError: something is wrong.
    """
    refused: dict[str, str] = {}
    model = found.build()
    unchecked = _cannot(found, model)
    try:
        unreached = _check_adapter(found, model, not unchecked)
    except TargetError as error:
        refused["adapters"] = str(error)
        return Cell(refused, (), unchecked)
    if found.task not in ("image classification", "audio classification"):
        rows = found.build()
        try:
            add_rows(rows, ADDED)
        except ModelError as error:
            refused["new tokens"] = str(error)
        else:
            remove_rows(rows)
            _check_rows(found, rows, not unchecked)
    return Cell(refused, unreached, unchecked)


def _cannot(found: ModelClass, model: nn.Module) -> str:
    try:
        scores(found, model)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return ""


def scores(found: ModelClass, model: Any, ids: Tensor = IDS) -> Tensor:
    """What the model says, with its random numbers fixed."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(**found.batch(model, ids)).logits


def _inject(found: ModelClass, model: nn.Module) -> Any:
    """On all linear layers, or, in a network without any, on its convolutions."""
    try:
        return ll.inject(model, LoRA(rank=1), seed=0)
    except TargetError as error:
        convolutions = [
            path for path, base in survey(model).adaptable.items() if base.kind == "conv" and base.d_in * base.d_out > 1
        ]
        if "leaves no layer to adapt" not in str(error) and "means no linear layer" not in str(error):
            raise
        if not convolutions:
            raise
        return ll.inject(model, LoRA(rank=1), convolutions, seed=0)


def _check_adapter(found: ModelClass, model: Any, computes: bool) -> tuple[str, ...]:
    unreached: tuple[str, ...] = ()
    base = scores(found, model) if computes else None
    report = _inject(found, model)
    if found.task in CLASSIFIES and survey(found.build()).output_layers == []:
        assert _head_trains(found, model), f"the head does not train: {list(report.trained)}"
    if base is not None:
        # a matrix product may sum in another order for a tensor that lies elsewhere
        torch.testing.assert_close(scores(found, model), base, rtol=1e-6, atol=2e-7)
        unreached = _unreached(found, model)
    _disturb(model)
    _check_files(found, model, computes, IDS)
    return unreached


def _head_trains(found: ModelClass, model: nn.Module) -> bool:
    """Every tensor whose shape follows the number of labels trains."""
    more = found.build(found.config(num_labels=5), device="meta")
    shapes = {name: parameter.shape for name, parameter in more.named_parameters()}
    plain = dict(found.build(device="meta").named_parameters())
    following = [name for name, parameter in plain.items() if shapes[name] != parameter.shape]
    return all(model.get_parameter(name).requires_grad for name in following)


def _unreached(found: ModelClass, model: Any) -> tuple[str, ...]:
    """Names of adapted layers without a gradient, last part only; heads all have one."""
    with torch.random.fork_rng(devices=[]), seeded(0):
        output = model(**found.batch(model, IDS)).logits
        (output * torch.randn(output.shape)).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    heads = [name for name in missing if ".adapters." not in name]
    assert not heads, f"no gradient: {heads[:3]}"
    return tuple(sorted({name.partition(".adapters.")[0].rpartition(".")[2] for name in missing}))


def _disturb(model: nn.Module) -> None:
    with torch.no_grad(), seeded(3):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))


def _check_files(found: ModelClass, model: Any, computes: bool, ids: Tensor) -> None:
    """The adapter folder and the merged folder give what the model gives."""
    expected = scores(found, model, ids) if computes else None
    with tempfile.TemporaryDirectory() as folder:
        ll.save_adapter(model, Path(folder, "adapter"))
        fresh = found.build()
        ll.load_adapter(fresh, Path(folder, "adapter"))
        state = fresh.state_dict()
        for key, value in model.state_dict().items():
            assert torch.equal(state[key], value), f"{key} is not loaded as it was saved"
        ll.export(model, Path(folder, "merged"), format="merged")
        plain = type(model).from_pretrained(Path(folder, "merged")).eval()
        if expected is not None:
            assert torch.equal(scores(found, fresh, ids), expected), "loaded, it computes something else"
            torch.testing.assert_close(scores(found, plain, ids), expected, rtol=1e-3, atol=1e-4)


def _check_rows(found: ModelClass, model: Any, computes: bool) -> None:
    ids = IDS.clone()
    ids[:, 1:3] = torch.tensor([VOCABULARY, VOCABULARY + 1])
    add_rows(model, ADDED)
    _inject(found, model)
    _disturb(model)
    _check_files(found, model, computes, ids)


def table(cells: dict[ModelClass, Cell]) -> str:
    """Markdown: how many classes of each task were gone through, and what is refused in which of them."""
    lines = []
    for task in TASKS:
        own = {found: cell for found, cell in cells.items() if found.task == task}
        computed = sum(not cell.unchecked for cell in own.values())
        whole = sum(not cell.refused for cell in own.values())
        lines.append(f"| {task} | {len(own)} | {computed} | {whole} |")
    refused: dict[tuple[str, str], list[str]] = defaultdict(list)
    for found, cell in cells.items():
        for what, message in cell.refused.items():
            refused[what, message.replace(found.name, "This class")].append(found.name)
    lost = [f"| {found.name} | {', '.join(cell.unreached)} |" for found, cell in cells.items() if cell.unreached]
    head = "| task | classes | computed with | nothing refused |\n|---|---|---|---|\n"
    rows = [f"| {what} | {', '.join(names)} | {message} |" for (what, message), names in refused.items()]
    return (
        head
        + "\n".join(lines)
        + "\n\n| refused | in | message |\n|---|---|---|\n"
        + "\n".join(rows)
        + ("\n\n| class | layers without a part in its output |\n|---|---|\n" + "\n".join(lost) + "\n")
    )


if __name__ == "__main__":
    import sys
    import time
    import traceback

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    start, done = time.time(), {}
    for each in buildable():
        if sys.argv[1:] and each.name not in sys.argv[1:]:
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                done[each] = outcome(each)
        except Exception as error:
            print("WRONG", each, type(error).__name__, " ".join(str(error).split())[:300], file=sys.stderr, flush=True)
            if sys.argv[1:]:
                traceback.print_exc()
    print(table(done))
    print(f"{time.time() - start:.0f} s", file=sys.stderr)
