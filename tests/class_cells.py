"""What is done with every class of `model_classes.py`, and what comes of it: right, or refused before training.

`python tests/class_cells.py` writes docs/classes.md; with names of classes it goes through these and shows what is
wrong. It takes some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import peft
import tokenizers
import torch
import transformers
from model_classes import TASKS, VOCABULARY, ModelClass, model_classes
from pages import DOCS
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import ExportError, ModelError, TargetError
from lora_lightning.exporters.preview import refusals
from lora_lightning.models.anatomy import survey
from lora_lightning.models.new_tokens import Vocabulary, add_rows, remove_rows
from lora_lightning.testing.toy_models import seeded

PAGE = DOCS / "classes.md"
IDS = torch.tensor([[5, 6, 9, 7, 3, 2], [8, 4, 5, 6, 7, 2]])
NEW = ("<one>", "<two>")
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


@functools.cache
def added() -> Vocabulary:
    """Two new tokens, with the files of a tokenizer that has them."""
    words = tokenizers.models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words))
    tokenizer.add_tokens(list(NEW))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return Vocabulary(NEW, VOCABULARY, {path.name: path.read_bytes() for path in Path(folder).iterdir()})


def buildable(part: int = 0, parts: int = 1, skip: Collection[str] = ()) -> Iterator[ModelClass]:
    """Classes whose smallest model can be built here, and is small; every `parts`-th one, from number `part` on."""
    for found in list(model_classes())[part::parts]:
        if found.name in skip:
            continue
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
    unchecked = _cannot(found, found.build())  # some keep what they have computed with gradients
    try:
        unreached = _check_adapter(found, model, not unchecked, refused)
    except TargetError as error:
        return Cell({"adapters": str(error)}, (), unchecked)
    if found.task not in ("image classification", "audio classification"):
        rows = found.build()
        try:
            add_rows(rows, added())
        except ModelError as error:
            refused["new tokens"] = str(error)
        else:
            remove_rows(rows)
            _check_rows(found, rows, not unchecked, refused)
    return Cell(refused, unreached, unchecked)


def _cannot(found: ModelClass, model: nn.Module) -> str:
    """Why transformers does not compute or train a plain model; empty where it does."""
    try:
        _backward(found, model)
        model.zero_grad()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return ""


def scores(found: ModelClass, model: Any, ids: Tensor = IDS) -> Tensor:
    """What the model says, with its random numbers fixed, and nothing that trains.

    A product with a weight that requires a gradient may sum in another order, with autograd off as well.
    """
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in training:
        parameter.requires_grad_(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model(**found.batch(model, ids)).logits
    finally:
        for parameter in training:
            parameter.requires_grad_(True)


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


def _check_adapter(found: ModelClass, model: Any, computes: bool, refused: dict[str, str]) -> tuple[str, ...]:
    unreached: tuple[str, ...] = ()
    base = scores(found, model) if computes else None
    report = _inject(found, model)
    if found.task in CLASSIFIES and survey(found.build(device="meta")).output_layers == []:
        assert _head_trains(found, model), f"the head does not train: {list(report.trained)}"
    if base is not None:
        assert torch.equal(scores(found, model), base), "the adapted model does not start as the base model"
        unreached = _unreached(found, model)
    _disturb(model)
    _check_files(found, model, computes, IDS, refused)
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
    _backward(found, model)
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    heads = [name for name in missing if ".adapters." not in name]
    assert not heads, f"no gradient: {heads[:3]}"
    return tuple(sorted({name.partition(".adapters.")[0].rpartition(".")[2] for name in missing}))


def _backward(found: ModelClass, model: Any) -> None:
    with torch.random.fork_rng(devices=[]), seeded(0):
        output = model(**found.batch(model, IDS)).logits
        (output * torch.randn(output.shape)).sum().backward()


def _disturb(model: nn.Module) -> None:
    with torch.no_grad(), seeded(3):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))


def _check_files(
    found: ModelClass, model: Any, computes: bool, ids: Tensor, refused: dict[str, str], with_rows: str = ""
) -> None:
    """The adapter folder, the folder in peft's format, and the merged folder give what the model gives."""
    expected = scores(found, model, ids) if computes else None
    told = refusals(model)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ll.save_adapter(model, folder / "adapter")
        fresh = found.build()
        ll.load_adapter(fresh, folder / "adapter")
        _check_same(fresh, model)
        if expected is not None:
            assert torch.equal(scores(found, fresh, ids), expected), "loaded, it computes something else"
        for form, check in (("peft", _check_peft), ("merged", _check_merged)):
            if form in told:
                refused[f"{form}{with_rows}"] = told[form]
                with contextlib.suppress(ExportError):
                    ll.export(model, folder / form, format=form, verify=False)
                    raise AssertionError(f"{form} is said to be refused, and is not: {told[form]}")
                continue
            ll.export(model, folder / form, format=form, verify=form != "peft" or not computes)
            check(found, model, folder / form, ids, expected)


def _check_same(fresh: nn.Module, model: nn.Module) -> None:
    state = fresh.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), f"{key} is not loaded as it was saved"


def _check_merged(found: ModelClass, model: Any, folder: Path, ids: Tensor, expected: Tensor | None) -> None:
    opened = type(model).from_pretrained(folder).eval()
    if expected is not None:
        torch.testing.assert_close(scores(found, opened, ids), expected, rtol=1e-3, atol=1e-4)


def _check_peft(found: ModelClass, model: Any, folder: Path, ids: Tensor, expected: Tensor | None) -> None:
    """It is read again here, and peft itself computes the same from it."""
    fresh, plain = found.build(), found.build()
    if int(ids.max()) >= VOCABULARY:
        plain.resize_token_embeddings(VOCABULARY + len(NEW), mean_resizing=False)
        if "trainable_token_indices" not in json.loads((folder / "adapter_config.json").read_text()):
            fresh.resize_token_embeddings(VOCABULARY + len(NEW), mean_resizing=False)  # whole matrices, as is reported
    ll.import_peft(fresh, folder)
    if expected is None:
        return
    torch.testing.assert_close(scores(found, fresh, ids), expected, rtol=1e-4, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(plain, folder).eval()
    torch.testing.assert_close(scores(found, theirs, ids), expected, rtol=1e-4, atol=1e-5)


def _check_rows(found: ModelClass, model: Any, computes: bool, refused: dict[str, str]) -> None:
    ids = IDS.clone()
    ids[:, 1:3] = torch.tensor([VOCABULARY, VOCABULARY + 1])
    add_rows(model, added())
    _inject(found, model)
    _disturb(model)
    _check_files(found, model, computes, ids, refused, " with new tokens")


# -- the page ----------------------------------------------------------------------------------------------------------


def lines_of(found: ModelClass, cell: Cell) -> set[str]:
    """The lines of the page's tables that are about one class; none for a class in which all is right."""
    lines = {_line(found.name, what, message.replace(found.name, "it")) for what, message in cell.refused.items()}
    if cell.unreached:
        lines.add(_line(found.name, "gradient", ", ".join(cell.unreached)))
    if cell.unchecked:
        lines.add(_line(found.name, "numbers", cell.unchecked.replace(found.name, "it")))
    return lines


def _line(*cells: str) -> str:
    return "| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in cells) + " |"


def whole(cell: Cell) -> bool:
    """Whether everything has been gone through with a class, and is right."""
    return not (cell.refused or cell.unreached or cell.unchecked)


def page(cells: Mapping[ModelClass, Cell]) -> str:
    """The page about them."""
    head = ["# Classes of transformers", "", INTRODUCTION, "", _line("task", "classes", "all right"), "|---|---|---|"]
    for task in TASKS:
        own = [cell for found, cell in cells.items() if found.task == task]
        head.append(_line(task, str(len(own)), str(sum(map(whole, own)))))
    head.append(_line("together", str(len(cells)), str(sum(map(whole, cells.values())))))
    every = sorted(line for found, cell in cells.items() for line in lines_of(found, cell))
    tables: list[str] = []
    for kind, (title, text, column) in PARTS.items():
        own_lines = [line for line in every if (_what(line) if _what(line) in PARTS else "") == kind]
        tables += ["", f"## {title}", "", text, "", _line("class", "what", column), "|---|---|---|", *own_lines]
    names = [found.name for found, cell in cells.items() if whole(cell)]
    return "\n".join([*head, *tables, "", "## All right", "", ",\n".join(f"`{name}`" for name in names) + ".", ""])


def _what(line: str) -> str:
    return line.split(" | ")[1]


INTRODUCTION = """Each class is built from its smallest configuration, with random weights. Then

* its head is found and trains, and LoRA on all linear layers (on the convolutions, where there are none) starts at the
  base model, bit for bit;
* every adapter has a gradient;
* the adapter is saved, and loaded into a fresh model, bit for bit;
* it is written in peft's format, opened by peft, which computes the same, and read back;
* the merged folder is opened by `from_pretrained`, and computes the same;
* all of it again with two new tokens, where the class reads tokens.

Classes that want a library which is not here, or that have no small configuration, are left out.
`python tests/class_cells.py` writes this page. A slow test goes through all classes and compares."""
PARTS = {
    "": (
        "Refused before training",
        "The message stands in the report before training, or is the error that stops it.",
        "message",
    ),
    "gradient": (
        "Layers without a part in the output",
        """These layers, which "all-linear" adapts, have no part in the output of the class: the attention to an encoder
that is not given, or experts that no token is sent to. A fit names the former after its first backward, with the
`exclude` to paste.""",
        "layers",
    ),
    "numbers": (
        "Numbers not compared",
        "Files and names are compared as everywhere; transformers does not compute with the inputs that were tried.",
        "what transformers says",
    ),
}
"""Parts of the page by what their lines are about: title, text, head of the last column."""


Found = tuple[ModelClass, Cell | str]
"""A class with what came of it, or with what is wrong."""


def run(names: Iterable[str] = (), part: int = 0, parts: int = 1, skip: Iterable[str] = ()) -> Iterator[Found]:
    """Go through classes, all where none is named, but for those to skip."""
    before, left_out = torch.get_num_threads(), set(skip)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # such small products take longer on more
    try:
        for found in buildable(part, parts, left_out):
            if names and found.name not in names:
                continue
            try:
                with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of models' own code
                    came = outcome(found)
            except Exception as error:
                yield found, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            else:
                yield found, came
    finally:
        torch.set_num_threads(before)
        transformers.logging.enable_progress_bar()


def _run_into(file: Path, names: list[str], part: int) -> None:
    """Append what comes of every second class to a file, but for classes that stand there."""
    for found, came in run(names, part, 2, _kept(file)):
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps([found.name, came]) + "\n")


def _kept(file: Path) -> dict[str, Cell | str]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {
        name: came if isinstance(came, str) else Cell(came[0], tuple(came[1]), came[2])
        for name, came in map(json.loads, lines)
    }


def main() -> int:
    """Write the page, or show what came of the classes named."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", help="classes; all where none is named")
    parser.add_argument("--into", type=Path, help="file that keeps what has been done; given again, it goes on there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = given.into or Path(folder, "cells.jsonl")
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            for done in [pool.submit(_run_into, file, given.names, part) for part in range(2)]:
                done.result()
        kept = _kept(file)
    wrong = [f"{name}: {came}" for name, came in kept.items() if isinstance(came, str)]
    cells = {found: came for found in model_classes() if isinstance(came := kept.get(found.name), Cell)}
    if given.names:
        print(*(f"{found.name}: {cell}" for found, cell in cells.items()), sep="\n")
    elif not wrong:
        PAGE.write_text(page(cells), encoding="utf-8")
    print(*(f"WRONG {line}" for line in wrong), sep="\n")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(bool(main()))
