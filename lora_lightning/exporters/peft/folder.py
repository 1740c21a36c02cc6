"""A folder in peft's LORA format, read without peft and without a model.

base_model.model.<path>.lora_A.weight          (r, d_in)            convolutions (r, in, *kernel)
base_model.model.<path>.lora_B.weight          (d_out, r)           convolutions (d_out, r, 1, ...)
base_model.model.<path>.lora_B.bias            (d_out,)             times the scaling
                                               fused experts: see `experts.py`
base_model.model.<path>.lora_embedding_A       (r, vocabulary)      lora_embedding_B (width, r)
base_model.model.<path>.lora_magnitude_vector  (d_out,)             convolutions (1, d_out, 1, ...)
base_model.model.<path>.token_adapter.trainable_tokens_delta   rows of new tokens (n, width)
base_model.model.<path>.base_layer.weight      an adapted layer's own weight
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

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_lightning.errors import AdapterFileError, nearest
from lora_lightning.exporters.peft.experts import Stacks, named_in_file, stacked
from lora_lightning.exporters.peft.rules import CONFIG, DEFAULT_ALPHA, DEFAULT_RANK, PREFIX, TENSORS, pattern_value

PICKLE = "adapter_model.bin"
MAGNITUDE = "lora_magnitude_vector"
ROWS = ".token_adapter.trainable_tokens_delta"
_ROLES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".base_layer.weight": "base",
    f".{MAGNITUDE}": MAGNITUDE,
}


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
    """Tensors beside the factors, (d_out,), by name."""
    lead: tuple[int, ...] = ()
    """(E,) for stacked experts: leading axis of both factors."""

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
        return self.scaling * (B.double() @ A.double())

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
    """Rows of new tokens, (n, width), by the layer's path."""


def read(directory: str | Path, stacks: Stacks) -> PeftFolder:
    """Read such a folder.

    Args:
        directory: the folder.
        stacks: expert parameters of the model that it is for.

    Raises:
        AdapterFileError: missing, damaged, pickled, or with a tensor that this format does not have.
    """
    config, tensors = _config(Path(directory)), _tensors(Path(directory))
    found: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise AdapterFileError(f'"{directory}": tensor {key} does not start with "{PREFIX}".')
        name = key.removeprefix(PREFIX)
        ending = next((ending for ending in _ROLES if name.endswith(ending)), None)
        if ending is not None:
            found.setdefault(name.removesuffix(ending), {})[_ROLES[ending]] = tensor
        elif name.endswith(ROWS):
            rows[name.removesuffix(ROWS)] = tensor
        elif ".lora_" in name or ".token_adapter." in name or ".base_layer." in name:
            raise AdapterFileError(f'"{directory}": tensor {name} belongs to a variant that is not read here.')
        else:
            heads[name] = tensor
    try:
        experts = named_in_file(stacks, config.get("target_parameters") or ())
        layers = dict(_layer(*experts.get(path, (path, 0)), parts, config) for path, parts in found.items())
    except (re.error, IndexError, TypeError, ZeroDivisionError) as error:
        raise AdapterFileError(f'"{directory}": {CONFIG} cannot be read: {error}.') from error
    if not layers:
        raise AdapterFileError(f'"{directory}" holds no factor pair; an adapter without layers changes nothing.')
    return PeftFolder(config, layers, heads, rows)


def _layer(path: str, experts: int, parts: dict[str, Tensor], config: dict[str, Any]) -> tuple[str, PeftLayer]:
    """The layer at `path`; of a parameter with so many experts, or 0 for a module."""
    if "A" not in parts or "B" not in parts:
        raise AdapterFileError(f"{path}: the file holds {', '.join(sorted(parts))} only, no pair of factors.")
    rank = parts["A"].shape[0] // (experts or 1)
    stated = pattern_value(config.get("rank_pattern") or {}, path, config.get("r", DEFAULT_RANK))
    width = rank * (experts or 1)
    if rank != stated or not parts["A"].shape[0] == parts["B"].shape[1] == width:
        raise AdapterFileError(
            f"{path}: factors of shape {tuple(parts['A'].shape)} and {tuple(parts['B'].shape)} do not fit rank "
            f"{stated}, which {CONFIG} states."
        )
    alpha = pattern_value(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", DEFAULT_ALPHA))
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    extra = {MAGNITUDE: parts[MAGNITUDE].flatten()} if MAGNITUDE in parts else {}
    if bool(extra) != bool(config.get("use_dora")):
        raise AdapterFileError(
            f"{path}: the file has {'a' if extra else 'no'} {MAGNITUDE}, while {CONFIG} has use_dora="
            f"{config.get('use_dora', False)}; they belong together."
        )
    A, B = stacked(parts["A"], parts["B"], experts) if experts else (parts["A"], parts["B"])
    lead = (experts,) if experts else ()
    return path, PeftLayer(A, B, parts.get("bias"), parts.get("base"), alpha, scaling, extra, lead)


def _config(folder: Path) -> dict[str, Any]:
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
    return config


def _tensors(folder: Path) -> dict[str, Tensor]:
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
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise AdapterFileError(f'"{path}" is truncated or damaged: {error}.') from error
