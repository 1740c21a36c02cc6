"""Rows of new tokens in a folder of peft's format, which names them by their ids only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters.base import write_values
from lora_lightning.errors import AdapterFileError, ModelError, did_you_mean
from lora_lightning.exporters.peft.folder import PeftFolder
from lora_lightning.exporters.peft.read_back import rows_once
from lora_lightning.exporters.peft.read_heads import same, tensors_of
from lora_lightning.models.anatomy import Anatomy
from lora_lightning.models.new_tokens import (
    Vocabulary,
    add_rows,
    check_extendable,
    check_same_tokens,
    plain_vocabulary,
    remove_rows,
    tokenizer_files,
    vocabulary,
)
from lora_lightning.models.vocabulary_size import token_embedding

SETTING = "trainable_token_indices"


def whole_matrices(
    model: nn.Module, folder: PeftFolder, state: Mapping[str, Tensor], directory: str | Path
) -> tuple[Vocabulary | None, PeftFolder, dict[str, Tensor]]:
    """Whole matrices of a larger vocabulary as rows of new tokens, where they are the model's own up to these.

    Args:
        model: the plain model.
        folder: the folder's content.
        state: the model's tensors, by all of their names.
        directory: the folder, whose tokenizer says which tokens they are.

    Returns:
        The new tokens (None for none), the folder with rows in the place of matrices, and the matrices by name.
    """
    name = _embedding_name(model, state)
    whole = folder.heads.get(name)
    if vocabulary(model) is not None or whole is None or folder.config.get(SETTING):
        return None, folder, {}
    first = _first_other(state[name], whole)
    tokenizer = _tokenizer(directory)
    size = 0 if tokenizer is None else len(tokenizer)
    if not first < size <= len(whole) or not set(range(first, size)) <= set(tokenizer.get_added_vocab().values()):
        return None, folder, {}
    added = Vocabulary(tuple(tokenizer.convert_ids_to_tokens(range(first, size))), first, tokenizer_files(tokenizer))
    matrices, rows, keys = {}, dict(folder.rows), dict(folder.keys)
    for key, value in folder.heads.items():
        if len(value) == len(whole) and key in state and len(state[key]) == len(state[name]):
            matrices[key] = value
            source = keys.pop((key, "head"))
            if value.dim() == 2 and value.shape == whole.shape:
                rows[key.removesuffix(".weight")] = value[first:size]
                keys[key.removesuffix(".weight"), "rows"] = source
    heads = {key: value for key, value in folder.heads.items() if key not in matrices}
    config = {**folder.config, SETTING: list(range(first, size))}
    return added, replace(folder, config=config, heads=heads, rows=rows, keys=keys), matrices


def check_matrices(anatomy: Anatomy, matrices: Mapping[str, Tensor], directory: str | Path) -> None:
    """Raise `AdapterFileError` unless the model, with its new rows, has these tensors."""
    if not matrices:
        return
    with plain_vocabulary(list(anatomy.extended.values()), anatomy.places):
        state = tensors_of(anatomy.model)
    for name, value in matrices.items():
        if not same(value, state[name]):
            raise AdapterFileError(
                f'"{directory}" carries {name}, which differs from the model\'s own in more than its new tokens. '
                f"Call resize_token_embeddings({len(value)}), and load the weights that the adapter was trained on."
            )


def _embedding_name(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    try:
        weight = token_embedding(model).weight
    except ModelError:  # a model of images, say
        return ""
    return next((name for name, tensor in state.items() if tensor is weight), "")


def _first_other(own: Tensor, whole: Tensor) -> int:
    """The first row that is not the model's own."""
    known = min(len(own), len(whole))
    if own.shape[1:] != whole.shape[1:]:
        return 0
    differ = (whole[:known].to(own.dtype) != own[:known].detach().cpu()).any(dim=1).nonzero()
    return int(differ[0]) if len(differ) else known


def _tokenizer(directory: str | Path) -> Any:
    from transformers import AutoTokenizer

    there = (Path(directory) / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False) if there else None


def new_tokens(folder: PeftFolder, directory: str | Path) -> Vocabulary | None:
    """The new tokens that a folder has rows of, named by the tokenizer that lies beside them; None for none.

    Raises:
        AdapterFileError: other tokens than a tokenizer's last ones, or no tokenizer that tells what they are.
    """
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
    tokenizer = _tokenizer(directory)
    if tokenizer is None:
        raise AdapterFileError(
            f'"{directory}" has {SETTING} {stated}, but no tokenizer that says which tokens these are. Save the one it '
            "was trained with into the folder."
        )
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
    rows_once(folder, {path: id(layer.new_rows) for path, layer in layers.items()}, directory)
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
