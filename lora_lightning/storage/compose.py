"""Several adapter folders as one: the sum of their updates, without a model.

    D = sum_i w_i s_i B_i A_i      exact: factors stand side by side, the rank is the sum of ranks
    rank=k                         the best approximation of D of rank k, with the part of its size that is lost

Sums are of updates, never of factors: those of two adapters mean nothing to one another. Each adapter must state its
update as a product (`Adapter.low_rank`, what it has folded included); the result is a plain pair of factors.

A folder names a layer's sizes nowhere, so they are found: of all pairs of sizes that its tensors have, one gives an
adapter whose tensors have the stored shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.folded import FactoredUpdate, update_like
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.adapters.spectrum import factored_svd
from lora_lightning.errors import AdapterFileError, SettingsError
from lora_lightning.injection.plan import built
from lora_lightning.methods import Method, plain_settings
from lora_lightning.plugins import registry, restore_settings
from lora_lightning.storage.below import SHOWN
from lora_lightning.storage.fingerprint import differences
from lora_lightning.storage.folded import folded_tensors
from lora_lightning.storage.folder import write_adapter
from lora_lightning.storage.sealed import SCHEMA
from lora_lightning.storage.stored import Stored, read_folder

Update = tuple[Tensor, Tensor]
"""A (R, d_in) and B (d_out, R) in float64; the update is B A."""
NAME = "default"


@dataclass(frozen=True)
class Composed:
    """What `compose` has written."""

    folder: Path
    ranks: dict[str, int]
    """Rank by layer path."""
    discarded: dict[str, float]
    """Fraction of an update's squared size that a limited rank has lost, by layer path."""
    errors: dict[str, float] = field(default_factory=dict)
    """Relative error of an update that stands for one that depends on the input, by layer path."""


def compose(
    folders: Sequence[str | Path],
    directory: str | Path,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    heads: Literal["refuse", "first"] = "refuse",
    approximate: bool = False,
) -> Composed:
    """Write the weighted sum of the updates of several adapter folders as one adapter folder, and read it back.

    Args:
        folders: adapter folders of one base model; a layer need not be in all of them.
        directory: the folder to write.
        weights: of each adapter, negative ones too; None takes 1 for each.
        rank: largest rank of a layer; None keeps the sum exactly.
        heads: what becomes of parameters that trained in full: "refuse" them, or take those of the "first" folder.
        approximate: take, for updates that depend on the input, the fixed ones that their methods offer instead.

    Raises:
        AdapterFileError: folders of other base models, updates that are no product, or a file that does not read back.
        SettingsError: another number of weights than of folders, or a rank below 1.
    """
    given = [1.0] * len(folders) if weights is None else list(weights)
    if not folders or len(given) != len(folders):
        raise SettingsError(f"{len(folders)} folders and {len(given)} weights; there must be a weight for each folder.")
    if rank is not None and rank < 1:
        raise SettingsError(f"rank is {rank}; it must be at least 1, or None for the exact sum.")
    stored = [read_folder(folder) for folder in folders]
    _check_fit(stored, folders, heads)
    errors: dict[str, float] = {}
    near = errors if approximate else None
    parts = [updates(one, folder, near) for one, folder in zip(stored, folders, strict=True)]
    sums: dict[str, Update] = {}
    discarded: dict[str, float] = {}
    for path in dict.fromkeys(path for part in parts for path in part):
        A, B = weighted_sum([(part[path], w) for part, w in zip(parts, given, strict=True) if path in part])
        largest = min(A.shape[1], B.shape[0])  # a wider pair has no more to say
        sums[path], discarded[path] = truncated(A, B, min(largest, rank or largest))
    source = {str(Path(folder)): float(weight) for folder, weight in zip(folders, given, strict=True)}
    _write(Path(directory), stored[0], sums, source)
    return Composed(Path(directory), {path: len(A) for path, (A, _) in sums.items()}, discarded, errors)


def weighted_sum(parts: Sequence[tuple[Update, float]]) -> Update:
    """Factors of sum_i w_i B_i A_i, side by side."""
    A = torch.cat([A for (A, _), _ in parts])
    return A, torch.cat([weight * B for (_, B), weight in parts], dim=1)


def truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Update, float]:
    """The best approximation of B A of a rank, and the fraction of its squared size that is lost.

    B A is never formed, see `adapters.spectrum`.
    """
    if len(A) <= rank:
        return (A, B), 0.0
    U, S, Vh = factored_svd(A, B)
    root, energy = S[:rank].sqrt(), S.square()
    lost = float(energy[rank:].sum() / energy.sum()) if bool(energy.any()) else 0.0
    return (root[:, None] * Vh[:rank], U[:, :rank] * root), lost


def updates(stored: Stored, where: str | Path, errors: dict[str, float] | None = None) -> dict[str, Update]:
    """The update of each layer of an adapter folder, what it has folded included.

    Args:
        stored: the folder as it was read.
        where: its name, for errors.
        errors: takes the errors of approximations, by path; None refuses them.

    Raises:
        AdapterFileError: an update that is no product of two factors, changes a bias, or reads what layers share.
    """
    method_class = registry().method(stored.method, where=f'"{where}"')
    folded = folded_tensors(stored.tensors, stored.name)
    found: dict[str, Update] = {}
    for path, own in stored.layers.items():
        method = restore_settings(method_class, f"layers[{path}]", {**stored.settings, **own})
        prefix = f"{path}.adapters.{stored.name}."
        tensors = {key.removeprefix(prefix): t for key, t in stored.tensors.items() if key.startswith(prefix)}
        base, adapter = _rebuilt(method, tensors, f'"{where}": {path}')
        factors = adapter.low_rank()
        if factors is None and errors is not None and (near := adapter.approximation()) is not None:
            factors, errors[path] = (near.A, near.B), max(near.error, errors.get(path, 0.0))
        if stored.linked or adapter.reads_peers or factors is None or adapter.merged_bias(None) is not None:
            raise AdapterFileError(
                f'"{where}": the update of {stored.method} on {path} is no product of two factors of its own, so it '
                "cannot be added up here."
            )
        pairs = [factors]
        if path in folded:
            pairs.insert(0, _folded(base, folded[path], f'"{where}": {path}'))
        found[path] = weighted_sum([((A.double(), B.double()), 1.0) for A, B in pairs])
    return found


def _rebuilt(method: Method, tensors: Mapping[str, Tensor], where: str) -> tuple[BaseLayer, Adapter]:
    """An adapter with stored values, on a stand-in of its layer that has sizes and no weight."""
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    fitting: list[tuple[BaseLayer, Adapter]] = []
    for d_out, d_in in itertools.product({size for shape in shapes.values() for size in shape}, repeat=2):
        base = cast(BaseLayer, core_base_layer(nn.Linear(d_in, d_out, bias=False, device="meta", dtype=torch.float64)))
        try:
            adapter = built(method, base)
        except SettingsError:
            continue  # a rank above one of these sizes
        if {key: tensor.shape for key, tensor in adapter.state_dict().items()} == shapes:
            fitting.append((base, adapter))
    if len(fitting) != 1:
        raise AdapterFileError(
            f"{where}: {type(method).__name__} has tensors of other shapes than on a linear layer of any size; only "
            "updates of matrices are added up."
        )
    base, adapter = fitting[0]
    adapter.to_empty(device="cpu")
    adapter.load_state_dict(dict(tensors))
    return base, adapter


def _folded(base: BaseLayer, tensors: Mapping[str, Tensor], where: str) -> Update:
    shift = update_like(base, tensors)
    if not isinstance(shift, FactoredUpdate):
        raise AdapterFileError(f"{where} has folded an update that is no product of factors; export it merged instead.")
    shift.to_empty(device="cpu").load_state_dict(dict(tensors))
    return shift.low_rank()


def _check_fit(stored: Sequence[Stored], folders: Sequence[str | Path], heads: str) -> None:
    """One base model, no rows of new tokens, and heads only where it is said what becomes of them."""
    for one, folder in zip(stored, folders, strict=True):
        # heads that train in full are not in the names, so other ones may have trained
        same_heads = set(one.trained) == set(stored[0].trained)
        for part in differences(one.fingerprint, stored[0].fingerprint):
            if same_heads or part == "architecture":
                raise AdapterFileError(f'"{folder}" was trained on another base model than "{folders[0]}" ({part}).')
        for under in one.below:
            if under["digest"] not in {other.digest for other in stored}:
                raise AdapterFileError(
                    f'"{folder}" was trained on top of "{under["source"]}" (sha256 {under["digest"][:SHOWN]}), which '
                    "is not among the folders; add it, and the sum holds both."
                )
        if one.vocabulary is not None:
            raise AdapterFileError(f'"{folder}" has rows of new tokens, which do not add up.')
        if one.trained and heads == "refuse":
            raise AdapterFileError(
                f'"{folder}" has {one.trained[0]}, which trained in full, and heads do not add up; heads="first" takes '
                f'those of "{folders[0]}".'
            )


def _plain_method() -> type[Method]:
    """The installed method whose adapter is one pair of factors and nothing else."""
    for method in registry().methods.values():
        if method.peft_type and not method.peft_options and method.export == "native":
            return method
    raise AdapterFileError("no installed method is a plain pair of factors, which the sum would be written as.")


def _write(folder: Path, stored: Stored, sums: Mapping[str, Update], source: Mapping[str, float]) -> None:
    plain = _plain_method()
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in stored.tensors.values()) else torch.float32
    method = restore_settings(plain, "settings", {"rank": 1, "alpha": 1.0})
    tensors = {key: t for key, t in stored.tensors.items() if not _is_adapters(key, stored.name)}
    layers: dict[str, dict[str, Any]] = {}
    for path, (A, B) in sums.items():
        layers[path] = {"rank": len(A), "alpha": float(len(A))}
        settings = restore_settings(plain, "settings", layers[path])
        stand_in = nn.Linear(A.shape[1], B.shape[0], bias=False, device="meta", dtype=dtype)
        adapter = settings.build(cast(BaseLayer, core_base_layer(stand_in))).to_empty(device="cpu")
        adapter.reset(torch.Generator())  # whatever else it owns, masks among them
        (pair,) = adapter.factor_pairs()
        pair.lora_A.data.copy_(A)
        pair.lora_B.data.copy_(B / pair.scaling)
        tensors |= {f"{path}.adapters.{NAME}.{key}": value.detach() for key, value in adapter.state_dict().items()}
    description = {
        **{key: value for key, value in stored.description.items() if key != "below"},
        "schema_version": SCHEMA,
        "name": NAME,
        "method": plain.__name__,
        "settings": plain_settings(method),
        "layers": layers,
        "plan": {},
        "linked": [],
        "composed": dict(source),
    }
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    write_adapter(folder, tensors, description, {}, lambda found: _check_reads_back(found, folder, sums))


def _is_adapters(key: str, name: str) -> bool:
    return f".adapters.{name}." in key or f".shifts.{name}." in key


def _check_reads_back(written: Stored, folder: Path, sums: Mapping[str, Update]) -> None:
    found = updates(written, folder)
    for path, (A, B) in sums.items():
        off = _size(*weighted_sum([(found[path], 1.0), ((A, B), -1.0)]))
        if not off <= 1e-5 * _size(A, B) + 1e-30:
            raise AdapterFileError(f'"{folder}": the sum on {path} does not read back; it is off by {off:.3g}.')


def _size(A: Tensor, B: Tensor) -> float:
    """Frobenius norm of B A."""
    return float(torch.linalg.matrix_norm(torch.linalg.qr(B)[1] @ torch.linalg.qr(A.mT)[1].mT))
