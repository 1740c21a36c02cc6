"""Known tokens whose rows train: which ones, in which layers, put into a model and taken off again.

    train_tokens=["<tool>", 128005]                     rows of the input's embedding, and of what shares its weight
    train_tokens={"embed_tokens": [3], "lm_head": [3]}  rows of these layers

A row starts as the base model's own. It stands in the place of that row, at `<path>.token_rows` of an `ExtendedLayer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from lora_lightning.errors import AdapterStateError, SettingsError, TargetError, did_you_mean
from lora_lightning.models.anatomy import Anatomy, survey
from lora_lightning.models.new_tokens import ExtendedLayer, take_off
from lora_lightning.models.paths import join, plain

Tokens = Sequence[str | int] | Mapping[str, Sequence[str | int]]
"""Texts or ids of tokens, or of some layers each."""
SETTING = "train_tokens"


@dataclass(frozen=True)
class TokenRows:
    """Rows of one layer that train."""

    ids: tuple[int, ...]
    """Ascending."""
    tokens: tuple[str, ...] = ()
    """Their texts, where a tokenizer was known."""

    def __str__(self) -> str:
        shown = (
            [f'"{token}" ({i})' for token, i in zip(self.tokens, self.ids, strict=True)] if self.tokens else self.ids
        )
        return ", ".join(map(str, shown[:8])) + (", ..." if len(shown) > 8 else "")


def has_texts(tokens: Tokens) -> bool:
    """Whether any of them is a text, which only a tokenizer has the id of."""
    each = tokens.values() if isinstance(tokens, Mapping) else [tokens]
    return any(isinstance(token, str) for own in each for token in own)


def as_ids(tokens: Tokens, tokenizer: Any) -> Tokens:
    """The same with ids in the place of texts.

    Raises:
        SettingsError: a text that is no token, or texts without a tokenizer.
    """
    if isinstance(tokens, Mapping):
        return {name: cast("Sequence[str | int]", as_ids(own, tokenizer)) for name, own in tokens.items()}
    texts = [token for token in tokens if isinstance(token, str)]
    if texts and tokenizer is None:
        raise SettingsError(
            f'{SETTING}: "{texts[0]}" is a text, and no tokenizer says which token it is; give `tokenizer`, or the '
            "token's id."
        )
    known = tokenizer.get_vocab() if texts else {}
    for text in texts:
        if text not in known:
            raise SettingsError(
                f'{SETTING}: "{text}" is no token of the tokenizer.{did_you_mean(text, known)} A text that is to '
                "become one is a new token: add_tokens, or data.new_tokens."
            )
    return [known[token] if isinstance(token, str) else token for token in tokens]


def choose_rows(anatomy: Anatomy, tokens: Tokens, tokenizer: Any = None) -> dict[str, TokenRows]:
    """The rows that a setting names, by the path of the layer; of layers that share a weight, the first.

    Raises:
        SettingsError: a text that is no token, an id out of range, or a row named twice.
        TargetError: a layer that there is not, that has no rows, or that is adapted.
    """
    ids = as_ids(tokens, tokenizer)
    if not isinstance(ids, Mapping):
        ids = {_input_embedding(anatomy): ids} if ids else {}
    each: list[tuple[str, TokenRows]] = []
    for name, own in ids.items():
        for path in _named(anatomy, name):
            rows = TokenRows(tuple(sorted(_checked(anatomy, path, cast("Sequence[int]", own)))))
            each.append((path, rows))
    found = _once(anatomy, each)
    if tokenizer is None:
        return found
    texts = {path: tuple(map(str, tokenizer.convert_ids_to_tokens(list(rows.ids)))) for path, rows in found.items()}
    return {path: TokenRows(rows.ids, texts[path]) for path, rows in found.items()}


def _input_embedding(anatomy: Anatomy) -> str:
    for prefix, model in anatomy.pretrained.items():
        try:
            embedding = cast(Any, model).get_input_embeddings()
        except (NotImplementedError, AttributeError):
            continue
        path = next((path for path, module in model.named_modules() if module is embedding), None)
        if path is not None and isinstance(getattr(embedding, "base", embedding), nn.Embedding):
            return join(prefix, path)
    raise TargetError(
        f"{SETTING}: {type(anatomy.model).__name__} does not say which layer embeds its tokens; name it: "
        f"{SETTING}={{LAYER: IDS}}. {_embeddings(anatomy)}"
    )


def _embeddings(anatomy: Anatomy) -> str:
    paths = [plain(path) for path, module in anatomy.modules.items() if isinstance(module, nn.Embedding)]
    return f"It has {', '.join(paths[:4])}." if paths else "It has no embedding."


def _named(anatomy: Anatomy, name: str) -> list[str]:
    """Paths of the layers that a name means."""
    matched = [
        path
        for path, module in anatomy.modules.items()
        if (path == name or path.endswith(f".{name}")) and _weight(module) is not None
    ]
    if not matched:
        with_rows = [plain(path) for path, module in anatomy.modules.items() if _weight(module) is not None]
        raise TargetError(
            f'{SETTING}: "{name}" is no embedding and no linear layer.{did_you_mean(name, with_rows)} '
            f"{_embeddings(anatomy)}"
        )
    return matched


def _once(anatomy: Anatomy, each: Iterable[tuple[str, TokenRows]]) -> dict[str, TokenRows]:
    """Rows of layers by path; of layers that share a matrix, of the first."""
    found: dict[str, TokenRows] = {}
    for path, rows in each:
        first = next(iter(_sharing(anatomy, path)))
        if found.setdefault(first, rows).ids != rows.ids:
            raise SettingsError(
                f"{SETTING}: rows {found[first]} and {rows} of layers that share one matrix ({first}, {path}); name "
                "the same for both, or give each its own weight, with untie=True."
            )
    return found


def _weight(module: nn.Module) -> nn.Parameter | None:
    """The plain matrix of an embedding or linear layer, (rows, width)."""
    layer = module.base if isinstance(module, ExtendedLayer) else module
    weight = layer._parameters.get("weight") if isinstance(layer, nn.Embedding | nn.Linear) else None
    return weight if weight is not None and weight.is_floating_point() and weight.dim() == 2 else None


def _sharing(anatomy: Anatomy, path: str) -> dict[str, nn.Module]:
    """Every layer that uses the matrix of the one at `path`, by path."""
    users = anatomy.users[id(_weight(anatomy.modules[path]))].values()
    return {owner: anatomy.modules[owner] for owner in users}


def _checked(anatomy: Anatomy, path: str, ids: Sequence[int]) -> Sequence[int]:
    module = anatomy.modules[path]
    weight = cast(nn.Parameter, _weight(module))
    new = (
        range(module.first, module.num_embeddings)
        if isinstance(module, ExtendedLayer) and module.new_rows is not None
        else ()
    )
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int):
            raise SettingsError(f"{SETTING}: {i!r} is no token; name texts or ids.")
        if i in new:
            raise SettingsError(f"{SETTING}: {i} is the id of a new token, whose row trains already; leave it out.")
        if not 0 <= i < len(weight):
            raise SettingsError(f"{SETTING}: {path} has no row {i}; ids go from 0 to {len(weight) - 1}.")
        if list(ids).count(i) > 1:
            raise SettingsError(f"{SETTING} names row {i} of {path} twice; name it once.")
    if not ids:
        raise SettingsError(f"{SETTING} names no row of {path}; name at least one, or leave the layer out.")
    return ids


@contextmanager
def room_for_rows(anatomy: Anatomy, wanted: Mapping[str, TokenRows]) -> Iterator[Anatomy]:
    """Give layers the rows that are wanted, and survey the model anew; on an error in the block take them off again.

    Raises:
        AdapterStateError, TargetError: as `put_rows`.
    """
    fresh = put_rows(anatomy, wanted)
    try:
        yield survey(anatomy.model) if fresh else anatomy
    except BaseException:
        remove_token_rows(anatomy.model, fresh)
        raise


def put_rows(anatomy: Anatomy, wanted: Mapping[str, TokenRows]) -> list[str]:
    """Give layers, by path, the rows that are wanted, and the same to all that share a matrix.

    Returns:
        Names of the parameters that were made; none for layers that have these rows already.

    Raises:
        AdapterStateError: a layer has other rows of an adapter that is there.
        TargetError: a layer that cannot have any: adapted, quantized, or one whose padding row gets no gradient.
    """
    for path, rows in wanted.items():
        for owner, module in _sharing(anatomy, path).items():
            _check_layer(owner, module, rows)
    made: list[str] = []
    for path, rows in wanted.items():
        weight = cast(nn.Parameter, _weight(anatomy.modules[path]))
        values: nn.Parameter | None = None
        for owner, module in _sharing(anatomy, path).items():
            if isinstance(module, ExtendedLayer) and module.token_ids:
                continue
            if values is None:
                start = weight.detach()[torch.tensor(rows.ids, device=weight.device)]
                values = nn.Parameter(start.to(torch.promote_types(weight.dtype, torch.float32)))
                made.append(join(owner, "token_rows"))
            layer = module
            if not isinstance(layer, ExtendedLayer):
                layer = ExtendedLayer(module)
                for parent, name in anatomy.places[id(module)]:
                    setattr(parent, name, layer)
            layer.set_token_rows(rows.ids, values)
    return made


def _check_layer(path: str, module: nn.Module, rows: TokenRows) -> None:
    layer = module.base if isinstance(module, ExtendedLayer) else module
    if not isinstance(layer, nn.Embedding | nn.Linear):
        raise TargetError(
            f"{SETTING}: {path} ({type(module).__name__}) uses the matrix too, and has no rows of its own here. Take "
            "the rows out, or exclude it from what is adapted."
        )
    if isinstance(module, ExtendedLayer) and module.token_ids not in ((), rows.ids):
        raise AdapterStateError(
            f"another adapter of the model trains rows {TokenRows(module.token_ids)} of {path}, this one {rows}; name "
            "the same rows for both, or eject that one first."
        )
    padding = getattr(layer, "padding_idx", None)
    if padding in rows.ids and isinstance(layer, nn.Embedding) and type(layer).forward is not nn.Embedding.forward:
        raise TargetError(
            f"{SETTING}: {padding} is the padding token of {path}, whose row gets no gradient there; leave it out."
        )


def remove_token_rows(model: nn.Module, names: Iterable[str]) -> None:
    """Take rows of known tokens off again, by the names of their parameters; plain layers come back."""
    gone = {id(parameter) for parameter in map(dict(model.named_parameters()).get, names) if parameter is not None}
    anatomy = survey(model)
    for layer in anatomy.extended.values():
        if layer.token_rows is not None and id(layer.token_rows) in gone:
            layer.set_token_rows((), None)
            take_off(layer, anatomy.places)


def layers_with(anatomy: Anatomy, wanted: Iterable[str]) -> list[str]:
    """Paths of all layers that use the matrices of those at `wanted`."""
    return [owner for path in wanted for owner in _sharing(anatomy, path)]


def row_notes(anatomy: Anatomy, wanted: Mapping[str, TokenRows]) -> list[str]:
    """For people: which rows train, and in which layers."""
    found = []
    for path, rows in wanted.items():
        where = " and ".join(layers_with(anatomy, [path]))
        count = f"{len(rows.ids)} known token{'s' * (len(rows.ids) > 1)}"
        found.append(f"the rows of {count} train in {where}: {rows}")
    return found


def rows_at(anatomy: Anatomy, rows: Mapping[str, TokenRows]) -> dict[str, TokenRows]:
    """Rows by the path of the layer in this model, for such by the path without wrappers; raises as `choose_rows`."""
    paths = {plain(path): path for path, module in anatomy.modules.items() if _weight(module) is not None}
    for path, own in rows.items():
        if path not in paths:
            raise TargetError(f"{path} is no embedding and no linear layer here.{did_you_mean(path, paths)}")
        _checked(anatomy, paths[path], own.ids)
    return _once(anatomy, ((paths[path], own) for path, own in rows.items()))


def row_parameters(anatomy: Anatomy, wanted: Iterable[str]) -> list[str]:
    """Names of the parameters that hold the rows of known tokens of layers, by path; of those that share them, one."""
    own = {id(anatomy.extended[path].token_rows) for path in wanted}
    return [name for name, parameter in anatomy.parameters.items() if id(parameter) in own]


@torch.no_grad()
def write_into_base(anatomy: Anatomy) -> None:
    """Write rows of known tokens into the matrices that they stand for."""
    for layer in anatomy.extended.values():
        if layer.token_rows is not None:
            weight = cast(nn.Parameter, layer.base.weight)
            weight.data.index_copy_(0, layer.ids, layer.token_rows.to(weight.dtype))
