"""Rows of tokens, new or known, in a folder of peft's format, which names them by their ids only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from lora_lightning.adapters.base import write_values
from lora_lightning.errors import AdapterFileError, ModelError, SettingsError, TargetError, did_you_mean
from lora_lightning.exporters.peft.folder import PeftFolder
from lora_lightning.exporters.peft.read_back import rows_once
from lora_lightning.exporters.peft.read_heads import same, tensors_of
from lora_lightning.exporters.peft.rules import following_rows, input_embedding
from lora_lightning.injection.also_train import check_rows_free
from lora_lightning.models.anatomy import Anatomy
from lora_lightning.models.new_tokens import (
    ExtendedLayer,
    Vocabulary,
    add_rows,
    check_extendable,
    check_same_tokens,
    extended_layers,
    plain_vocabulary,
    remove_rows,
    tokenizer_files,
    vocabulary,
)
from lora_lightning.models.paths import inside
from lora_lightning.models.token_rows import TokenRows, layers_with, row_parameters, rows_at
from lora_lightning.models.vocabulary_size import following, token_embedding

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
    if not may_extend(model, folder, state, directory):
        return None, folder, {}
    name = _embedding_name(model, state)
    whole = folder.heads[name]
    first = _first_other(state[name], whole)
    tokenizer = _tokenizer(directory)
    size = len(tokenizer)
    if not first < size <= len(whole) or not set(range(first, size)) <= set(tokenizer.get_added_vocab().values()):
        return None, folder, {}
    added = Vocabulary(tuple(tokenizer.convert_ids_to_tokens(range(first, size))), first, tokenizer_files(tokenizer))
    matrices, rows, keys = {}, dict(folder.rows), dict(folder.keys)
    layers = _layers_of_tokens(model)
    for key, value in folder.heads.items():
        path, _, leaf = key.rpartition(".")
        follows = key in state and len(value) == len(whole) and len(state[key]) == len(state[name])
        if follows or any(inside(path, layer) for layer in layers):  # an embedding may hold a norm, say
            matrices[key] = value
            source = keys.pop((key, "head"))
            if path in layers and leaf == "weight":
                rows[path], keys[path, "rows"] = value[first:size], source
    heads = {key: value for key, value in folder.heads.items() if key not in matrices}
    config = {**folder.config, SETTING: list(range(first, size))}
    return added, replace(folder, config=config, heads=heads, rows=rows, keys=keys), matrices


def may_extend(model: nn.Module, folder: PeftFolder, state: Mapping[str, Tensor], directory: str | Path) -> bool:
    """Whether the folder has a whole embedding, and a tokenizer that may say which of its rows are new tokens."""
    whole = _embedding_name(model, state) in folder.heads
    stated = vocabulary(model) is not None or folder.config.get(SETTING)
    return whole and not stated and _tokenizer(directory) is not None


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


def new_tokens(model: nn.Module, folder: PeftFolder, directory: str | Path) -> Vocabulary | None:
    """The new tokens that a folder has rows of, named by the tokenizer that lies beside them; None for none.

    They are a tokenizer's last ones that it has added, with rows for all layers that have one for each token. Other
    ids are those of known tokens.

    Raises:
        AdapterFileError: an id without a row in the model, and no tokenizer that says which token it is.
    """
    stated = {path: folder.ids(path) for path in folder.rows}
    if not stated:
        return None
    tokenizer = _tokenizer(directory)
    layers = _layers_of_tokens(model)
    size = max((len(cast(Tensor, layer.weight)) for layer in layers.values()), default=0)
    ids = _last_added(list(stated.values()), tokenizer)
    shared = {id(getattr(layers[path], "base", layers[path]).weight) for path in stated if path in layers}
    covered = all(id(getattr(layer, "base", layer).weight) in shared for layer in layers.values())
    if ids and (covered or ids[-1] >= size):
        return Vocabulary(tuple(tokenizer.convert_ids_to_tokens(ids)), ids[0], tokenizer_files(tokenizer))
    beyond = [i for own in stated.values() for i in own if i >= size]
    if beyond and layers:
        why = "no tokenizer that says which token it is"
        if tokenizer is not None:
            why = f"its tokenizer, of {len(tokenizer)} tokens, has it not among the last that were added"
        raise AdapterFileError(
            f'"{directory}" has {SETTING} {folder.config.get(SETTING)}; the model has no row {beyond[0]} (it has {size}'
            f"), and {why}. Save the tokenizer it was trained with into the folder, or call "
            f"model.resize_token_embeddings({max(beyond) + 1}) first."
        )
    return None


def _layers_of_tokens(model: nn.Module) -> dict[str, nn.Module]:
    """Layers with a row for each token, by path; none where the model does not say."""
    if vocabulary(model) is not None:
        found: dict[str, nn.Module] = {p: one for p, one in extended_layers(model).items() if one.new_rows is not None}
        return found
    try:
        return following(model).layers
    except ModelError:
        return {}


def _last_added(stated: Sequence[Sequence[int]], tokenizer: Any) -> list[int]:
    """Those ids, common to all layers, that are the last of a tokenizer and were added to it."""
    if tokenizer is None:
        return []
    added, first = set(tokenizer.get_added_vocab().values()).intersection(*stated), len(tokenizer)
    while first - 1 in added:
        first -= 1
    return list(range(first, len(tokenizer)))


def known_tokens(
    anatomy: Anatomy, folder: PeftFolder, new: Vocabulary | None, directory: str | Path
) -> dict[str, TokenRows]:
    """Rows of known tokens that a folder has, by the path of the layer.

    Raises:
        AdapterFileError: rows that no layer of the model has, or other ones for layers that share their weight.
    """
    added = range(new.first, new.first + len(new.tokens)) if new else ()
    wanted = {path: TokenRows(tuple(sorted(set(folder.ids(path)) - set(added)))) for path in folder.rows}
    try:
        found = rows_at(anatomy, {path: rows for path, rows in wanted.items() if rows.ids})
        check_rows_free(anatomy, found)
        for path in wanted:
            _check_tied(anatomy, path, folder)
        having = layers_with(anatomy, [path for path in wanted if path in anatomy.modules])
    except (SettingsError, TargetError) as error:
        raise AdapterFileError(f'"{directory}" has {SETTING} {folder.config.get(SETTING)}: {error}') from error
    stated = folder.config.get(SETTING) or []
    if stated and not having:
        raise AdapterFileError(_saved_in_part(directory, stated, "the embedding"))
    for name in stated if isinstance(stated, dict) else ():
        if not any(path == name or path.endswith(f".{name}") for path in having):
            raise AdapterFileError(_saved_in_part(directory, stated, name))
    return found


def _saved_in_part(directory: str | Path, stated: object, name: str) -> str:
    return f'"{directory}" has {SETTING} {stated}, but no rows of {name}. The file was saved in part; save it whole.'


def _check_tied(anatomy: Anatomy, path: str, folder: PeftFolder) -> None:
    """Raise `TargetError` where peft gives rows to some only of the layers that share a matrix."""
    layers = layers_with(anatomy, [path])
    having = {p for p in layers if p in folder.rows}
    embedding = input_embedding(anatomy.model)
    if any(anatomy.modules[p] is embedding for p in having):
        having |= set(following_rows(anatomy.model, layers))
    left = [p for p in layers if p not in having]
    if left:
        plain_layers = [getattr(layer, "base", layer) for layer in map(anatomy.modules.__getitem__, layers)]
        way_out = f"Name all of them in {SETTING} in peft."
        if len(layers) == 2 and any(isinstance(layer, nn.Linear) for layer in plain_layers):
            way_out = "import_peft(..., untie=True) gives the output layer a weight of its own."
        raise TargetError(
            f"{path} shares its matrix with {', '.join(left)}, and peft has trained rows of it alone. {way_out}"
        )


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


def names_of_rows(anatomy: Anatomy, folder: PeftFolder, known: Mapping[str, TokenRows]) -> list[str]:
    """Names of the parameters that hold the rows of a folder."""
    new = anatomy.row_names if folder.rows or folder.config.get(SETTING) else []
    return [*new, *row_parameters(anatomy, known)]


def fill_rows(anatomy: Anatomy, folder: PeftFolder, directory: str | Path) -> None:
    """Write the folder's rows into the model.

    Raises:
        AdapterFileError: rows of a layer that has none, of another shape, or missing for one that has.
    """
    layers = anatomy.extended
    if not folder.rows and not folder.config.get(SETTING):
        return
    rows_once(folder, {path: id(_parameters(layer)[0]) for path, layer in layers.items()}, directory)
    filled = set()
    for path, values in folder.rows.items():
        if path not in layers:
            raise AdapterFileError(
                f'"{directory}" has rows of tokens for {path}, which has none here.{did_you_mean(path, layers)}'
            )
        layer, ids = layers[path], folder.ids(path)
        needed = (len(layer.own_ids), layer.own_rows.shape[1])
        if tuple(values.shape) != needed or sorted(ids) != sorted(layer.own_ids):
            raise AdapterFileError(
                f'"{directory}": the rows of {path} are {tuple(values.shape)}; the model needs {needed}, those '
                f"of {TokenRows(layer.own_ids)}."
            )
        parts = values[[ids.index(i) for i in layer.own_ids]].split([len(rows) for rows in _parameters(layer)])
        for rows, part in zip(_parameters(layer), parts, strict=True):
            write_values(rows, part)
            filled.add(id(rows))
    for path, layer in layers.items():
        if layer.new_rows is not None and id(layer.new_rows) not in filled:
            raise AdapterFileError(f'"{directory}" has no rows of new tokens for {path}, which does not share others.')


def _parameters(layer: ExtendedLayer) -> list[Tensor]:
    """Those whose rows `own_rows` lists, in its order."""
    return [rows for rows in (layer.token_rows, layer.new_rows) if rows is not None]
