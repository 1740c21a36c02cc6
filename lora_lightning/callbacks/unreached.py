"""Adapted layers that a backward pass did not reach, and the `exclude` that leaves them out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from lora_lightning.injection.records import injected_roots
from lora_lightning.models.paths import plain, segments, within


def unreached(reached: Mapping[str, bool]) -> list[str]:
    """Layers outside the loss, as far as one backward shows it.

    One that is not reached, while a layer of the same name in another block or expert is, may be reached with other
    data: no token was sent to it, or its block was dropped at random.

    Args:
        reached: paths of adapted layers, with whether any tensor of their adapters has a gradient.
    """
    alike = {_kind(path) for path, has in reached.items() if has}
    return [path for path, has in reached.items() if not has and _kind(path) not in alike]


def _kind(path: str) -> str:
    """A path with its numbers left out."""
    return re.sub(r"\d+", "*", path)


def exclude_for(lost: Collection[str], kept: Iterable[str]) -> list[str]:
    """Parts of names that all of `lost` have, each at least one of them, and none of `kept`; as short as there are.

    Args:
        lost: paths of layers.
        kept: paths of other layers.
    """
    found: list[str] = []
    left, others = list(lost), list(kept)
    while left:
        fitting = [run for run in _runs(left) if not any(within(run, path) for path in others)]
        if not fitting:
            return [*found, *left]
        cover = {run: sum(within(run, path) for path in left) for run in fitting}
        best = max(fitting, key=lambda run: (cover[run], -len(segments(run)), -len(run), run))
        found.append(best)
        left = [path for path in left if not within(best, path)]
    return found


def _runs(paths: Iterable[str]) -> set[str]:
    """Runs of whole names inside paths that neither begin nor end with a number; paths themselves, too."""
    found = set(paths)
    for path in paths:
        parts = segments(path)
        for start in range(len(parts)):
            for end in range(start + 1, len(parts) + 1):
                if not parts[start].isdigit() and not parts[end - 1].isdigit():
                    found.add(".".join(parts[start:end]))
    return found


def layers_of(module: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Names of adapters' tensors by the path of their layer, as `inject` knew it; other names are left out."""
    roots = set(map(id, injected_roots(module)))
    prefixes = [f"{plain(path)}." for path, part in module.named_modules() if path and id(part) in roots]
    found: dict[str, list[str]] = {}
    for name in names:
        layer, adapted, _ = name.partition(".adapters.")
        if adapted:
            prefix = next((prefix for prefix in prefixes if layer.startswith(prefix)), "")
            found.setdefault(layer.removeprefix(prefix), []).append(name)
    return found


def leave_out(lost: Collection[str], kept: Iterable[str]) -> str:
    """The sentence that says how to leave layers out; empty where nothing would be left."""
    others = list(kept)
    if not lost or not others:
        return ""
    quoted = ", ".join(f'"{name}"' for name in exclude_for(lost, others))
    return f" To leave them out: exclude=[{quoted}]."
