"""Fused experts in peft's LORA format: one pair a parameter, experts side by side, an owner's wrappers nested.

<owner>.lora_A.weight               (E r, d_in)     the last of the owner's targeted parameters
<owner>.lora_B.weight               (d_out, r E)    column j E + e is column j of expert e
<owner>.base_layer.lora_A.weight                    the one before it, and so on inwards

target_parameters names the parameters; their order is the owner's own. What lies inside an owner has the wrappers in
its name too:

<owner>.base_layer.<inner>.lora_A.weight            a layer inside an owner of one targeted parameter
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from lora_lightning.adapters.layers.kinds import ExpertStack
from lora_lightning.models.anatomy import Layer
from lora_lightning.models.experts import stands_for_parameter
from lora_lightning.models.paths import plain

Stacks = Mapping[str, Sequence[tuple[str, int]]]
"""Expert parameters with their number of experts, in the owner's order, by the owner's path."""


def find_stacks(layers: Mapping[str, Layer]) -> Stacks:
    """Every expert parameter among the layers of a model that can be adapted, adapted or not."""
    found: dict[str, list[tuple[int, str, int]]] = {}
    for path, (module, _) in layers.items():
        if isinstance(module, ExpertStack) and stands_for_parameter(module):
            owner, _, name = plain(path).rpartition(".")
            place = module.siblings.index(name), plain(path), 1 if module.weight.dim() == 2 else module.weight.shape[0]
            found.setdefault(owner, []).append(place)
    return {owner: [(path, experts) for _, path, experts in sorted(places)] for owner, places in found.items()}


def named_in_file(stacks: Stacks, targets: Iterable[str]) -> dict[str, tuple[str, int]]:
    """(parameter, experts) by the path under which a file has its factors, for `target_parameters`."""
    found = {}
    for owner, parameters in stacks.items():
        wrapped = [p for p in parameters if is_target(p[0], targets)]
        for depth, parameter in enumerate(reversed(wrapped)):
            found[owner + ".base_layer" * depth] = parameter
    return found


def wrappers(stacks: Stacks, targets: Iterable[str]) -> dict[str, int]:
    """How many wrappers a file has around each owner, for `target_parameters`; owners without any left out."""
    stated = list(targets)
    found = {owner: sum(is_target(path, stated) for path, _ in parameters) for owner, parameters in stacks.items()}
    return {owner: count for owner, count in found.items() if count}


def inside_wrappers(path: str, around: Mapping[str, int]) -> str:
    """Name in a file of what stands at `path` of the model; `around` is what `wrappers` gives."""
    for owner in sorted(around, key=len, reverse=True):
        if path.startswith(f"{owner}."):
            path = f"{owner}{'.base_layer' * around[owner]}{path.removeprefix(owner)}"
    return path


def without_wrappers(path: str, around: Mapping[str, int]) -> str:
    """The inverse of `inside_wrappers`."""
    for owner in sorted(around, key=len):
        start = f"{owner}{'.base_layer' * around[owner]}."
        if path.startswith(start):
            path = f"{owner}.{path.removeprefix(start)}"
    return path


def is_target(parameter: str, targets: Iterable[str]) -> bool:
    """Whether `target_parameters` selects a parameter."""
    return any(parameter == target or parameter.endswith(f".{target}") for target in targets)


def side_by_side(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """(E, r, d_in) and (E, d_out, r) as a file has them."""
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def stacked(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(E, r, d_in) and (E, d_out, r) of what a file has."""
    return A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)


def unlike(owner: nn.Module, stack: ExpertStack) -> str | None:
    """Why peft computes something else for a parameter of `owner` with the same factors; None where it does not."""
    if stack.weight.dim() == 3 and stack.weight.shape[0] == 1 and stack.transposed:
        return "it holds one matrix, stored as (in, out), and peft adds what it would add to one stored as (out, in)"
    if stack.weight.dim() == 3 and stack.transposed != bool(getattr(owner, "is_transposed", False)):
        return f"{type(owner).__name__} stores matrices as (in, out) without saying so, and peft reads them otherwise"
    return None
