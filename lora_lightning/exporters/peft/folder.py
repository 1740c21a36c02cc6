"""A folder in peft's LORA format, read without peft and without a model.

base_model.model.<path>.lora_A.weight          (r, d_in)            convolutions (r, in, *kernel)
base_model.model.<path>.lora_B.weight          (d_out, r)           convolutions (d_out, r, 1, ...)
base_model.model.<path>.lora_B.bias            (d_out,)             times the scaling
                                               fused experts: see `experts.py`
base_model.model.<path>.lora_embedding_A       (r, vocabulary)      lora_embedding_B (width, r)
base_model.model.<path>.lora_magnitude_vector  (d_out,)             convolutions (1, d_out, 1, ...)
base_model.model.<path>.token_adapter.trainable_tokens_delta   rows of new tokens (n, width)
base_model.model.<path>.base_layer.weight      an adapted layer's own weight
base_model.model.<path>.base_layer.bias        its bias, trained in full with bias="all" or "lora_only"
base_model.model.<name>                        a parameter of a module that is saved whole

delta = lora_alpha / r * B @ A,   use_rslora: lora_alpha / sqrt(r)
merged weight: W + delta,   use_dora: magnitude_j (W + delta)_j / |(W + delta)_j| for each row j of (d_out, d_in)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_lightning.errors import AdapterFileError, nearest
from lora_lightning.exporters.peft.experts import Stacks, is_target, named_in_file, stacked, without_wrappers, wrappers
from lora_lightning.exporters.peft.grouped import per_group
from lora_lightning.exporters.peft.keys import MAGNITUDE, Name, understand
from lora_lightning.exporters.peft.rules import CONFIG, DEFAULT_ALPHA, DEFAULT_RANK, TENSORS, pattern_value
from lora_lightning.exporters.peft.triplets import (
    TRIPLETS,
    WEIGHTS,
    alpha_of,
    at_least_one,
    in_lora_terms,
    scaling_of,
)
from lora_lightning.storage.atomic import write_json

PICKLE = "adapter_model.bin"


@dataclass(frozen=True)
class PeftLayer:
    """One layer's factors, as written."""

    A: Tensor
    B: Tensor
    bias: Tensor | None
    """`lora_B.bias`, before the scaling."""
    base: Tensor | None
    """The layer's own weight, where it travels along."""
    alpha: float
    scaling: float
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors beside the factors, (d_out,) or, of rank components, (r,), by name."""
    lead: tuple[int, ...] = ()
    """(E,) for stacked experts: leading axis of both factors."""
    base_bias: Tensor | None = None
    """The layer's own bias, where it travels along."""
    trains_base_bias: bool = False
    """Whether that has trained, with `bias="all"` or "lora_only"."""

    @property
    def rank(self) -> int:
        """Inner width."""
        return self.matrices[0].shape[-2]

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """(A (*lead, r, d_in), B (*lead, d_out, r)); kernels of a convolution flattened."""
        return (self.A, self.B) if self.lead else (self.A.flatten(1), self.B.flatten(1))

    def delta(self) -> Tensor:
        """The product of the factors, scaled, (*lead, d_out, d_in), in float64."""
        A, B = self.matrices
        weighted = B.double() * self.extra[WEIGHTS].double() if WEIGHTS in self.extra else B.double()
        return self.scaling * (weighted @ A.double())

    def bias_delta(self, own: Tensor | None) -> Tensor | None:
        """What the layer adds to its own bias, (d_out,), in float32; None where no bias trained."""
        delta = None if self.bias is None else self.scaling * self.bias.float()
        if self.trains_base_bias and self.base_bias is not None and own is not None:
            change = self.base_bias.float() - (torch.zeros(own.shape) if own.is_meta else own.detach().cpu().float())
            delta = change if delta is None else delta + change
        return delta

    def update(self, weight: Tensor) -> Tensor:
        """What the layer adds to its weight (d_out, d_in), in float64; NaN in a row by whose length 0 peft divides."""
        delta = self.delta()
        if MAGNITUDE not in self.extra:
            return delta
        directed = weight.double() + delta
        lengths: Tensor = directed.norm(dim=1)
        return (self.extra[MAGNITUDE].double() / lengths)[:, None] * directed - weight


@dataclass(frozen=True)
class PeftFolder:
    """A folder in peft's LORA format."""

    config: dict[str, Any]
    layers: dict[str, PeftLayer]
    heads: dict[str, Tensor]
    """Tensors of modules that are saved whole, by their name in the plain model."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """Rows of tokens, (n, width), by the layer's path."""
    keys: dict[tuple[str, str], str] = field(default_factory=dict)
    """Name of each tensor in the file, by what it belongs to and its role (see `keys.Name`)."""
    former: tuple[str, ...] = ()
    """Paths of the layers in the file, where the model has other names now."""

    def ids(self, path: str) -> list[int]:
        """Ids of the tokens that `rows` of a layer belong to, in their order."""
        stated = self.config.get("trainable_token_indices") or []
        if isinstance(stated, dict):
            stated = next((ids for key, ids in stated.items() if path == key or path.endswith(f".{key}")), [])
        return list(stated)


def read(directory: str | Path, stacks: Stacks, values: bool = True) -> PeftFolder:
    """Read such a folder.

    Args:
        directory: the folder.
        stacks: expert parameters of the model that it is for.
        values: whether to read the values; else tensors have shapes and dtypes of the file, and are not filled.

    Raises:
        AdapterFileError: missing, damaged, pickled, or with a tensor that this format does not have.
    """
    config, tensors = read_config(directory), read_tensors(Path(directory), values)
    found: dict[str, dict[str, Tensor]] = {}
    others: dict[str, dict[str, Tensor]] = {"head": {}, "rows": {}}
    stated = config.get("target_parameters") or ()
    around = wrappers(stacks, stated)
    understood = understand(tensors, f'"{directory}"', lambda name: without_wrappers(name, around))
    names = _without_copies(understood, tensors, directory)
    for name in names:
        if name.role in others:
            others[name.role][name.path] = tensors[name.key]
        else:
            found.setdefault(name.path, {})[name.role] = tensors[name.key]
    try:
        experts = named_in_file(stacks, stated)
        layers = dict(_layer(*experts.get(path, (path, 0)), parts, config) for path, parts in found.items())
    except (re.error, IndexError, TypeError, ZeroDivisionError) as error:
        raise AdapterFileError(f'"{directory}": {CONFIG} cannot be read: {error}.') from error
    if not layers:
        raise AdapterFileError(f'"{directory}" holds no factor pair; an adapter without layers changes nothing.')
    keys = {(experts.get(name.path, (name.path, 0))[0], name.role): name.key for name in names}
    return PeftFolder(config, layers, others["head"], others["rows"], keys)


def _without_copies(names: list[Name], tensors: dict[str, Tensor], directory: str | Path) -> list[Name]:
    """Those that count.

    Raises:
        AdapterFileError: a head and its copy differ.
    """
    heads = {name.path: name for name in names if name.role == "head"}
    for name in names:
        if name.role == "copy":
            head = heads.get(name.path)
            if head is None or not torch.equal(tensors[head.key], tensors[name.key]):
                what = f"{head.key} and {name.key} differ" if head else f"{name.key} comes without the tensor itself"
                raise AdapterFileError(f'"{directory}": {what}; save the adapter with save_pretrained of peft.')
    return [name for name in names if name.role not in ("copy", "original")]


def _layer(path: str, experts: int, parts: dict[str, Tensor], config: dict[str, Any]) -> tuple[str, PeftLayer]:
    """The layer at `path`; of a parameter with so many experts, or 0 for a module."""
    if "A" not in parts or "B" not in parts:
        raise AdapterFileError(f"{path}: the file holds {', '.join(sorted(parts))} only, no pair of factors.")
    rank = parts["A"].shape[0] // (experts or 1)
    named = f"{path}.weight" if is_target(f"{path}.weight", config.get("target_parameters") or ()) else path
    named = named.partition(".base_layer.")[0]  # the projection inside an attention of torch follows its owner
    stated = pattern_value(config.get("rank_pattern") or {}, named, config.get("r", DEFAULT_RANK))
    width = rank * (experts or 1)
    grouped = parts["B"].dim() > 2 and parts["B"].shape[1] and not width % parts["B"].shape[1]  # of a convolution
    if rank != stated or not (parts["A"].shape[0] == width and (grouped or parts["B"].shape[1] == width)):
        raise AdapterFileError(
            f"{path}: factors of shape {tuple(parts['A'].shape)} and {tuple(parts['B'].shape)} do not fit rank "
            f"{stated}, which {CONFIG} states."
        )
    alpha = pattern_value(config.get("alpha_pattern") or {}, named, config.get("lora_alpha", DEFAULT_ALPHA))
    if config.get("peft_type") == TRIPLETS or WEIGHTS in parts:
        return path, _triplets(path, parts, config, alpha)
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    extra = {MAGNITUDE: parts[MAGNITUDE].flatten()} if MAGNITUDE in parts else {}
    if bool(extra) != bool(config.get("use_dora")):
        raise AdapterFileError(
            f"{path}: the file has {'a' if extra else 'no'} {MAGNITUDE}, while {CONFIG} has use_dora="
            f"{config.get('use_dora', False)}; they belong together."
        )
    A, B = stacked(parts["A"], parts["B"], experts) if experts else (parts["A"], parts["B"])
    if not experts and B.shape[1] != width:
        A, B = _of_groups(path, A, B, bool(extra))
        alpha = scaling * (math.sqrt(len(A)) if config.get("use_rslora") else len(A))
    return path, PeftLayer(
        A=A,
        B=B,
        bias=parts.get("bias"),
        base=parts.get("base"),
        alpha=alpha,
        scaling=scaling,
        extra=extra,
        lead=(experts,) if experts else (),
        base_bias=parts.get("base_bias"),
        trains_base_bias=config.get("bias", "none") != "none",
    )


def _triplets(path: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], alpha: float) -> PeftLayer:
    """A layer with a weight for each rank component."""
    kind = config.get("peft_type")
    if kind != TRIPLETS or WEIGHTS not in parts or parts[WEIGHTS].numel() != len(parts["A"]):
        found = f"{WEIGHTS} of shape {tuple(parts[WEIGHTS].shape)}" if WEIGHTS in parts else f"no {WEIGHTS}"
        raise AdapterFileError(
            f"{path}: the file has {found}, while {CONFIG} has peft_type {kind!r} and the factors rank "
            f"{len(parts['A'])}; they belong together."
        )
    scaling = scaling_of(config, alpha)
    A, B, weights = at_least_one(parts["A"], parts["B"], parts[WEIGHTS])
    return PeftLayer(
        A=A,
        B=B,
        alpha=alpha_of(scaling, len(A)),
        scaling=scaling,
        bias=parts.get("bias"),
        base=parts.get("base"),
        extra={WEIGHTS: weights},
        base_bias=parts.get("base_bias"),
        trains_base_bias=config.get("bias", "none") != "none",
    )


def _of_groups(path: str, A: Tensor, B: Tensor, directed: bool) -> tuple[Tensor, Tensor]:
    """Factors of a grouped convolution as they are here; `directed` are those of DoRA."""
    found, what = per_group(A, B), f"{path} is a convolution of {len(A) // B.shape[1]} groups"
    if directed:
        raise AdapterFileError(
            f"{what} with use_dora, of which peft takes the lengths of other rows than it adds up, and which it cannot "
            "merge. Train it here, and export it merged."
        )
    if found is None:
        raise AdapterFileError(
            f"{what}, and its factors let a group see the channels "
            "of others: no weight of it says that, and peft cannot merge it either. Leave the layer out of "
            "target_modules in peft, or train it here, where a group sees its own channels, and peft computes the same."
        )
    return found


def read_config(directory: str | Path) -> dict[str, Any]:
    """The settings of such a folder.

    Raises:
        AdapterFileError: there are none, or they are damaged.
    """
    folder = Path(directory)
    path = folder / CONFIG
    if not path.is_file():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
        close = inside or nearest(folder.name, [p.parent.name for p in folder.parent.glob(f"*/{CONFIG}")])
        hint = f" Nearest: {', '.join(close)}." if close else ""
        raise AdapterFileError(f'"{folder}" holds no {CONFIG}, so it is no adapter of peft.{hint}')
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterFileError(f'"{path}" is damaged: {error}.') from error
    if not isinstance(config, dict):
        raise AdapterFileError(f'"{path}" holds no settings.')
    config = in_lora_terms(config)
    for key, (kinds, what) in _KINDS.items():
        value = config.get(key)
        unset = value is None and (key not in config or key not in ("r", "lora_alpha"))
        fine = type(value) in kinds and (type(value) is not float or math.isfinite(value))
        if not unset and not fine:
            raise AdapterFileError(f'"{path}" has {key}={value!r}; it must be {what}.')
    return config


_NUMBER, _NAMES = ((int, float), "a finite number"), ((list,), "a list of names")
_NAMES_OR_ONE = ((list, str), "a list of names, or an expression")
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "r": ((int,), "a whole number"),
    "lora_alpha": _NUMBER,
    "lora_dropout": _NUMBER,
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ((dict,), "numbers by name")),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), _NAMES_OR_ONE),
    **dict.fromkeys(("modules_to_save", "target_parameters"), _NAMES),
    "layers_to_transform": ((list, int), "a list of block numbers, or one"),
    "trainable_token_indices": ((list, dict), "a list of token ids, or such lists by layer"),
    **dict.fromkeys(
        ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"), ((bool,), "true or false")
    ),
}
"""What peft writes for each setting that is read here; all but rank and alpha may be null."""


def write_config(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of such a folder."""
    write_json(folder / CONFIG, settings)


def read_tensors(folder: Path, values: bool) -> dict[str, Tensor]:
    """The tensors of such a folder by their names, or outlines of them.

    Raises:
        AdapterFileError: there are none, they are damaged, pickled or not finite.
    """
    path = folder / TENSORS
    if not path.is_file():
        if (folder / PICKLE).is_file():
            raise AdapterFileError(
                f'"{folder}" holds {PICKLE}, a pickle, which can run any code and is not opened. Load it with peft '
                "where you trust it, and save it again with safe_serialization=True."
            )
        raise AdapterFileError(f'"{folder}" holds no {TENSORS}.')
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            tensors = {key: file.get_tensor(key) if values else _outline(file.get_slice(key)) for key in keys}
    except SafetensorError as error:
        raise AdapterFileError(f'"{path}" is truncated or damaged: {error}.') from error
    if not values:
        return tensors
    for key, tensor in tensors.items():
        wide = tensor if tensor.element_size() > 1 else tensor.float()  # 8-bit types know no isfinite
        if not torch.isfinite(wide).all():
            raise AdapterFileError(
                f'"{folder}": tensor {key} holds NaN or infinity, so the adapter would give no numbers. It comes '
                "from a run that diverged, or was damaged; take an earlier checkpoint."
            )
    return tensors


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}


def _outline(stored: Any) -> Tensor:
    """A tensor like one of a file."""
    return torch.empty(stored.get_shape(), dtype=_DTYPES.get(stored.get_dtype(), torch.float32))
