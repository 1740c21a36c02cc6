"""New tokens: rows of their own for tokens that a model does not know, in its embedding and its output layer.

    embedding   W[id]                     for a known id;   rows[id - first]   for a new one
    output      x W'^T                    W' = W with the rows at first .. first + n

Known tokens can have such rows too (`token_rows.py`): `<path>.token_rows` (n, width), in the place of those of the
matrix.

The pretrained matrices stay as they are, at `<path>.base.weight`, and frozen unless they are named; `<path>.new_rows`
(n, width) trains in full and is saved with the adapter. Where the output layer shares the embedding's weight, it shares
the new rows too. New ids may fall on rows that a padded matrix has already, behind its last token; these rows are then
replaced. Biases of new tokens are zero.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.foreign_saving import check_foreign_saving
from lora_lightning.distributed import is_sharded
from lora_lightning.errors import AdapterStateError, ModelError, SettingsError, did_you_mean
from lora_lightning.models.paths import places
from lora_lightning.models.vocabulary_size import following, token_embedding
from lora_lightning.seeds import generator

_KEY = "_lora_lightning_vocabulary"
_BEFORE = "_lora_lightning_before_vocabulary"


@dataclass(frozen=True)
class Vocabulary:
    """What was added to a model's tokens."""

    tokens: tuple[str, ...]
    first: int
    """Id of the first new token; the others follow."""
    files: dict[str, bytes] = field(default_factory=dict, compare=False, repr=False)
    """The tokenizer that knows them, as its files."""


class ExtendedLayer(nn.Module):
    """An embedding or output layer with rows of its own for new tokens, for known ones, or for both.

    Args:
        base: nn.Embedding or nn.Linear, frozen, at `.base`.
        rows: (n, width), trained; None where there are no new tokens.
        first: id of the first new row.
    """

    renames_weights = True
    ids: Tensor
    new_rows: nn.Parameter | None
    token_rows: nn.Parameter | None

    def __init__(self, base: nn.Module, rows: nn.Parameter | None = None, first: int | None = None) -> None:
        super().__init__()
        check_foreign_saving()
        self.base = base
        self.first = len(cast(Tensor, base.weight)) if first is None else first
        self.register_parameter("new_rows", rows)
        self.register_parameter("token_rows", None)
        self.set_token_rows((), None)
        self.train(base.training)

    def set_token_rows(self, ids: Sequence[int], rows: nn.Parameter | None) -> None:
        """Give known tokens, by their ascending ids, rows of their own (n, width); none for None."""
        device = cast(Tensor, self.base.weight).device
        self.register_buffer("ids", torch.tensor(ids, dtype=torch.long, device=device), persistent=False)
        self.token_ids = tuple(ids)
        self.token_rows = rows

    @property
    def own_ids(self) -> tuple[int, ...]:
        """Ids of all tokens that have rows here: known ones, and then new ones."""
        count = 0 if self.new_rows is None else len(self.new_rows)
        return (*self.token_ids, *range(self.first, self.first + count))

    @property
    def own_rows(self) -> Tensor:
        """Their rows, (len(own_ids), width)."""
        return torch.cat([rows for rows in (self.token_rows, self.new_rows) if rows is not None])

    @property
    def weight(self) -> Tensor:
        """The whole matrix, (vocabulary, width), in the dtype of the pretrained one."""
        own = cast(Tensor, self.base.weight)
        if self.token_rows is not None:
            own = own.index_copy(0, self.ids, self.token_rows.to(own.dtype))
        if self.new_rows is None:
            return own
        rows = self.new_rows
        return torch.cat([own[: self.first], rows.to(own.dtype), own[self.first + len(rows) :]])

    @property
    def bias(self) -> Tensor | None:
        """The output layer's bias, zero for rows that are added."""
        bias = cast("Tensor | None", getattr(self.base, "bias", None))
        added = self.num_embeddings - (0 if bias is None else len(bias))
        return F.pad(bias, (0, added)) if bias is not None and added > 0 else bias

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings of the ids x, or scores of the states x (..., width) for each token."""
        if type(self.base).forward is nn.Embedding.forward:
            return self._embedded(x)
        tensors = {"weight": self.weight}
        if self.bias is not None:
            tensors["bias"] = self.bias
        return cast(Tensor, functional_call(self.base, tensors, (x,)))

    def _embedded(self, x: Tensor) -> Tensor:
        """As a plain embedding, without a copy of the matrix."""
        parts = []
        if self.new_rows is not None:
            place = x - self.first
            new = (place >= 0) & (place < len(self.new_rows))
            parts.append((new, place, self.new_rows))
            x = x.masked_fill(new, 0)
        if self.token_rows is not None:
            place = torch.searchsorted(self.ids, x)
            parts.insert(0, (self.ids[place.clamp_max(len(self.ids) - 1)] == x, place, self.token_rows))
        found = cast(Tensor, self.base(x))
        for own, place, rows in parts:
            values = F.embedding(place.clamp(0, len(rows) - 1), rows)
            found = torch.where(own[..., None], values.to(found.dtype), found)
        return found

    def tensors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Weight and, where there is one, bias: the pretrained one, and the whole one."""
        yield cast(Tensor, self.base.weight), self.weight
        if self.bias is not None:
            yield cast(Tensor, self.base.bias), self.bias

    def plain(self, whole: Mapping[int, nn.Parameter]) -> nn.Module:
        """A plain layer of the same class and full size around whole tensors, by the pretrained ones' ids."""
        layer = copy.copy(self.base)
        layer._parameters = {
            name: None if own is None else whole.get(id(own), own) for name, own in self.base._parameters.items()
        }
        for size in ("num_embeddings", "out_features"):
            if hasattr(layer, size):
                setattr(layer, size, len(cast(Tensor, layer.weight)))
        return layer

    def __getattr__(self, name: str) -> Any:
        """Sizes and options of the layer (`padding_idx`, `embed_scale`, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base" or name.startswith("__"):
                raise
            return getattr(self.base, name)

    @property
    def num_embeddings(self) -> int:
        """Rows."""
        count = 0 if self.new_rows is None else len(self.new_rows)
        return max(len(cast(Tensor, self.base.weight)), self.first + count)

    out_features = num_embeddings


def holds_rows(name: str) -> bool:
    """Whether a parameter of this name holds rows of tokens, which are a part of a layer's matrix."""
    return name.endswith((".new_rows", ".token_rows"))


def vocabulary(model: nn.Module) -> Vocabulary | None:
    """What was added to the tokens of exactly this model; None for nothing."""
    return cast("Vocabulary | None", model.__dict__.get(_KEY))


def extended_layers(model: nn.Module) -> dict[str, ExtendedLayer]:
    """Layers with rows of tokens, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ExtendedLayer)}


def add_tokens(model: nn.Module, tokenizer: Any, tokens: Sequence[str], seed: int = 0) -> Vocabulary:
    """Add new tokens to a tokenizer and a model; call it before `inject`, which makes their rows train.

    Rows start at the mean of the known ones, with noise of a hundredth of their standard deviation to tell them apart.

    Args:
        model: a Hugging Face model, changed in place.
        tokenizer: its tokenizer, changed in place.
        tokens: texts that become one token each, such as "<tool>".
        seed: seed of the start values.

    Returns:
        The tokens and the id of the first.

    Raises:
        SettingsError: no tokens, one given twice, or one that the tokenizer knows already.
        ModelError: not a Hugging Face model, or one whose tokens end before the tokenizer's.
        AdapterStateError: the model has new tokens or adapters already.
    """
    check_new(tokenizer, tokens)
    check_extendable(model, len(tokenizer), tokens)
    initialize_rows(tokenizer, tokens)
    return add_rows_for(model, tokenizer, tokens, seed)


def check_new(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Raise `SettingsError` unless there are tokens, each given once, and the tokenizer knows none of them."""
    if not tokens:
        raise SettingsError("new_tokens is empty; name at least one text that is to become a token.")
    known = tokenizer.get_vocab()
    for token in tokens:
        if token in known or list(tokens).count(token) > 1:
            reason = f"the tokenizer knows it as {known[token]}" if token in known else "it is named twice"
            raise SettingsError(f'new_tokens: "{token}" is not new; {reason}. Name only texts that are no token yet.')


def initialize_rows(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add tokens to a tokenizer; they are never split, never lower-cased, and decoded like any text."""
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])


def add_rows_for(model: nn.Module, tokenizer: Any, tokens: Sequence[str], seed: int = 0) -> Vocabulary:
    """Give the model rows for `tokens`, which the tokenizer knows as its last; raises as `add_tokens`."""
    first = int(tokenizer.convert_tokens_to_ids(tokens[0]))
    check_extendable(model, first, tokens)
    added = Vocabulary(tuple(tokens), first, tokenizer_files(tokenizer))
    add_rows(model, added, seed)
    return added


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """A tokenizer as the files that it is saved as, by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def check_extendable(model: nn.Module, first: int, tokens: Sequence[str]) -> None:
    """Raise `ModelError` or `AdapterStateError` unless the model can be given rows from id `first` on."""
    if vocabulary(model) is None:
        token_embedding(model)
    if is_sharded(model):
        raise AdapterStateError("the model is sharded already; add tokens before fully_shard.")
    before = vocabulary(model)
    if before is not None:
        raise AdapterStateError(f"the model has new tokens already: {', '.join(before.tokens)}; name all at once.")
    if any(isinstance(module, AdaptedLayer) for module in model.modules()):
        raise AdapterStateError("the model has adapters already; add tokens before inject.")
    rows = len(token_embedding(model).weight)
    if first > rows:
        raise ModelError(
            f"the tokenizer has {first} tokens, but {type(model).__name__} only {rows} rows for them, so {tokens[0]} "
            "would not be the first without a row. Use the tokenizer that belongs to the model."
        )


def add_rows(model: nn.Module, added: Vocabulary, seed: int = 0) -> None:
    """Give the model rows for `added`, wherever it has one for each token; shared ones where a weight is shared.

    Raises:
        ModelError: it has no embedding of tokens, or keeps something else for each of them.
    """
    if extended_layers(model):
        raise AdapterStateError(
            "rows of known tokens train in the model already; add new tokens, or load the adapter that has them, first."
        )
    follows = following(model)
    where = places(model.modules())
    size = max(len(follows.embedding.weight), added.first + len(added.tokens))
    rows: dict[int, nn.Parameter] = {}
    for path, layer in follows.layers.items():
        weight = cast(nn.Parameter, layer.weight)
        if id(weight) not in rows:
            rows[id(weight)] = _start(weight, added, seed, path)
        for parent, name in where[id(layer)]:
            setattr(parent, name, ExtendedLayer(layer, rows[id(weight)], added.first))
    numbers = [(holder, name, getattr(holder, name)) for holder, name in follows.numbers]
    before = _Before({}, numbers, follows.unresized)
    for name, buffer in follows.buffers.items():
        before.buffers[name] = buffer
        _set_buffer(model, name, F.pad(buffer, (0, size - buffer.shape[-1])))
    for holder, name in follows.numbers:  # losses and generation of transformers read them
        setattr(holder, name, max(size, getattr(holder, name)))
    model.__dict__[_KEY], model.__dict__[_BEFORE] = added, before


@dataclass
class _Before:
    """What `add_rows` has replaced beside layers: buffers by name, and (object, attribute, number)."""

    buffers: dict[str, Tensor]
    numbers: list[tuple[Any, str, int]]
    unresized: tuple[str, ...] = ()
    """Layers with new rows that `resize_token_embeddings` gives none, by path."""


def buffers_before(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that `add_rows` has replaced by longer ones, as they were before, by name."""
    before = cast("_Before | None", model.__dict__.get(_BEFORE))
    return dict(before.buffers) if before else {}


def unresized(model: nn.Module) -> tuple[str, ...]:
    """Layers with new rows to which transformers' `resize_token_embeddings` gives none, by path."""
    before = cast("_Before | None", model.__dict__.get(_BEFORE))
    return before.unresized if before else ()


def _set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._buffers[leaf] = value


def _start(weight: Tensor, added: Vocabulary, seed: int, path: str) -> nn.Parameter:
    known = weight.detach()[: added.first].to(torch.promote_types(weight.dtype, torch.float32))
    drawn = generator(seed, "new tokens", 0, path)
    noise = torch.randn(len(added.tokens), known.shape[1], generator=drawn, device=drawn.device)
    return nn.Parameter(known.mean(0) + 0.01 * known.std(0) * noise.to(known.device, known.dtype))


def remove_rows(model: nn.Module) -> None:
    """Take new rows off again; the model is as it was before `add_rows`."""
    where = places(model.modules())
    for layer in extended_layers(model).values():
        layer.new_rows, layer.first = None, len(cast(Tensor, layer.base.weight))
        take_off(layer, where)
    model.__dict__.pop(_KEY, None)
    before = model.__dict__.pop(_BEFORE, _Before({}, []))
    for name, buffer in before.buffers.items():
        _set_buffer(model, name, buffer.to(model.get_buffer(name).device))
    for holder, name, number in before.numbers:
        setattr(holder, name, number)


def take_off(layer: ExtendedLayer, where: Mapping[int, Sequence[tuple[nn.Module, str]]]) -> None:
    """Put the plain layer back in all of its places, by id, unless there are rows left."""
    if layer.new_rows is None and layer.token_rows is None:
        for parent, name in where[id(layer)]:
            setattr(parent, name, layer.base)


def without_rows(name: str, names: Collection[str]) -> str:
    """The name that a tensor has without new rows, `<path>.<tensor>` for `<path>.base.<tensor>`; itself for others.

    Args:
        name: a tensor's name in the model with new rows.
        names: those of the model without.
    """
    parts = name.split(".")
    plain_names = (".".join([*parts[:i], *parts[i + 1 :]]) for i, part in enumerate(parts) if part == "base")
    return name if name in names else next((found for found in plain_names if found in names), name)


@contextmanager
def plain_vocabulary(
    layers: Collection[ExtendedLayer], where: Mapping[int, Sequence[tuple[nn.Module, str]]]
) -> Iterator[None]:
    """Inside, layers with new rows are plain ones of the full size; afterwards they are as before.

    Args:
        layers: layers with new rows.
        where: every (parent, name) under which each of them stands, by its id.
    """
    whole: dict[int, nn.Parameter] = {}
    for layer in layers:
        for own, grown in layer.tensors():
            whole.setdefault(id(own), nn.Parameter(grown.detach().clone(), requires_grad=False))
        for parent, name in where[id(layer)]:
            setattr(parent, name, layer.plain(whole))
    bare = []  # a bias of an output layer may be one of the head's as well, which reads none of them itself
    for parent in {id(parent): parent for found in where.values() for parent, _ in found}.values():
        for name, parameter in parent._parameters.items():
            if id(parameter) in whole:
                bare.append((parent, name, parameter))
                parent._parameters[name] = whole[id(parameter)]
    try:
        yield
    finally:
        for parent, name, parameter in bare:
            parent._parameters[name] = parameter
        for layer in layers:
            for parent, name in where[id(layer)]:
                setattr(parent, name, layer)


def check_same_tokens(model: nn.Module, wanted: Vocabulary, where: str) -> None:
    """Raise `AdapterStateError` unless the model's new tokens are those of an adapter."""
    own = vocabulary(model)
    if own is not None and own != wanted:
        missing = [token for token in wanted.tokens if token not in own.tokens] or list(wanted.tokens)
        raise AdapterStateError(
            f"{where} has the new tokens {', '.join(wanted.tokens)} from id {wanted.first}; the model has "
            f"{', '.join(own.tokens)} from {own.first}.{did_you_mean(missing[0], own.tokens)}"
        )
