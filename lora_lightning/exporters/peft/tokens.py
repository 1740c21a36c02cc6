"""Rows of new tokens in a folder of peft's format, which names them by their ids only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from lora_lightning.adapters.base import write_values
from lora_lightning.errors import AdapterFileError, did_you_mean
from lora_lightning.exporters.peft.folder import PeftFolder
from lora_lightning.models.anatomy import Anatomy
from lora_lightning.models.new_tokens import (
    Vocabulary,
    add_rows,
    check_extendable,
    check_same_tokens,
    remove_rows,
    tokenizer_files,
    vocabulary,
)

SETTING = "trainable_token_indices"


def new_tokens(folder: PeftFolder, directory: str | Path) -> Vocabulary | None:
    """The new tokens that a folder has rows of, named by the tokenizer that lies beside them; None for none.

    Raises:
        AdapterFileError: other tokens than a tokenizer's last ones, or no tokenizer that tells what they are.
    """
    from transformers import AutoTokenizer

    stated = folder.config.get(SETTING) or []
    lists = list(stated.values()) if isinstance(stated, dict) else [stated]
    ids = list(lists[0])
    if not ids:
        return None
    if any(list(other) != list(range(ids[0], ids[0] + len(ids))) for other in lists):
        raise AdapterFileError(
            f'"{directory}" has {SETTING} {stated}; only new tokens are read: the last ids, one after the other, the '
            "same for each layer. Rows of known tokens can be trained with also_train."
        )
    if not (Path(directory) / "tokenizer_config.json").is_file():
        raise AdapterFileError(
            f'"{directory}" has {SETTING} {stated}, but no tokenizer that says which tokens these are. Save the one it '
            "was trained with into the folder."
        )
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if ids[-1] + 1 != len(tokenizer):
        raise AdapterFileError(
            f'"{directory}" has {SETTING} {stated}; its tokenizer has {len(tokenizer)} tokens, so these are not its '
            "last. Only new tokens are read."
        )
    return Vocabulary(tuple(tokenizer.convert_ids_to_tokens(ids)), ids[0], tokenizer_files(tokenizer))


@contextmanager
def room_for(model: nn.Module, added: Vocabulary | None, directory: str | Path) -> Iterator[bool]:
    """Give the model the rows of `added`, unless it has them; says so, and takes them off again on an error."""
    if added is None:
        yield False
        return
    check_same_tokens(model, added, f'"{directory}"')
    fresh = vocabulary(model) is None
    if fresh:
        check_extendable(model, added.first, added.tokens)
        add_rows(model, added)
    try:
        yield fresh
    except BaseException:
        if fresh:
            remove_rows(model)
        raise


def fill_rows(anatomy: Anatomy, folder: PeftFolder, directory: str | Path) -> list[str]:
    """Write the folder's rows into the model; the names of the parameters that hold them.

    Raises:
        AdapterFileError: rows of a layer that has none, of another shape, or missing for one that has.
    """
    layers = anatomy.extended
    if not folder.rows and not folder.config.get(SETTING):
        return []
    filled = set()
    for path, values in folder.rows.items():
        if path not in layers:
            raise AdapterFileError(
                f'"{directory}" has rows of new tokens for {path}, which has none here.{did_you_mean(path, layers)}'
            )
        rows = layers[path].new_rows
        if rows.shape != values.shape:
            raise AdapterFileError(
                f'"{directory}": the rows of {path} are {tuple(values.shape)}; the model needs {tuple(rows.shape)}.'
            )
        write_values(rows, values)
        filled.add(id(rows))
    bare = [path for path, layer in layers.items() if id(layer.new_rows) not in filled]
    if bare:
        raise AdapterFileError(f'"{directory}" has no rows of new tokens for {bare[0]}, which does not share others.')
    return anatomy.row_names
