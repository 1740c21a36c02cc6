"""Which layers get an adapter: patterns to layers, with the reason for every layer that is left out.

`targets` is "all-linear", a scope ("attention", "vision", "vision.mlp", ...), a list of name suffixes and scopes, or
one regular expression over whole paths. Heads, poolers and routers are never matched by accident: a pattern reaches
them only by naming them. Of a vision-language model, towers other than the language tower are not either: their scope
reaches them, and a pattern that holds their name or fits nothing in the language tower.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import TargetError, did_you_mean, nearest
from lora_lightning.models.anatomy import Heads, all_layers, fused_experts, other_users, protected_layers
from lora_lightning.models.heads import full_match, head_prefixes, segments, within
from lora_lightning.models.new_tokens import row_names
from lora_lightning.models.scopes import ALL, SCOPES, TOWERS, Scopes, inside, is_scope, join

Targets = str | Sequence[str]
PRODUCTS = ("linear", "experts")
"""Kinds of layer that scopes mean."""


@dataclass
class Selection:
    """What a set of patterns selects."""

    layers: dict[str, BaseLayer] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Path of a layer that was left out, and why."""
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Path of a selected layer, and the other places that use its weight."""

    def skip(self, paths: Iterable[str], reason: str) -> None:
        """Leave out layers that were selected."""
        for path in paths:
            del self.layers[path]
            self.tied.pop(path, None)
            self.skipped[path] = reason


def as_patterns(patterns: str | Sequence[str]) -> list[str]:
    """Patterns as a list; one string is one pattern."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def select(model: nn.Module, targets: Targets = ALL, exclude: Sequence[str] = ()) -> Selection:
    """Layers of `model` that `targets` names and `exclude` does not.

    Raises:
        TargetError: a pattern that matches nothing (with the nearest names), a scope that the model has not, a fused
            expert tensor that would be skipped, a layer kind that takes no adapter, two layers that share one weight.
    """
    layers = {path: (module, base) for path, module, base in all_layers(model)}
    adaptable = {path: base for path, (_, base) in layers.items() if base is not None}
    scopes, fused, patterns = Scopes(model), fused_experts(model), as_patterns(exclude)
    protected = protected_layers(model, scopes)
    wanted = _wanted(model, targets, layers, adaptable, fused, scopes)
    excluded = _excluded(model, patterns, adaptable, fused, scopes)
    selection = Selection()
    for path, named_by in wanted.items():
        reason = "excluded" if path in excluded else _reason(path, named_by, protected, scopes)
        if reason is None:
            selection.layers[path] = adaptable[path]
        else:
            selection.skipped[path] = reason
    unknown = [path for path in fused if path not in adaptable and path not in excluded]
    _refuse_fused(model, targets, unknown, scopes)
    if not selection.layers:
        left_out = ", ".join(f"{path} ({reason})" for path, reason in list(selection.skipped.items())[:5])
        left_out = left_out or f"all that exclude={patterns} names"
        raise TargetError(f"targets={targets!r} leaves no layer to adapt; left out: {left_out}.")
    selection.skipped |= _out_of_reach(layers, targets, scopes)
    selection.skipped |= _other_towers(adaptable, targets, selection, protected, scopes)
    selection.tied = other_users(model, selection.layers)
    for path, others in selection.tied.items():
        both = [other for other in others if other in selection.layers]
        if both:
            raise TargetError(f"{path} and {both[0]} share one weight; adapt one of them and exclude the other.")
    return selection


def _excluded(
    model: nn.Module, patterns: Sequence[str], adaptable: dict[str, BaseLayer], fused: Sequence[str], scopes: Scopes
) -> set[str]:
    """Paths of layers and fused tensors that `exclude` names, by a part of the path or by a scope."""
    found: set[str] = set()
    for pattern in patterns:
        paths = [*adaptable, *fused]
        hits = [p for p in paths if within(pattern, p)]
        hits = hits or [p for p in paths if is_scope(pattern) and scopes.means(pattern, p)]
        if not hits:
            raise TargetError(_no_match("exclude", [pattern], adaptable, model))
        found |= set(hits)
    return found


def _reason(path: str, named_by: str, protected: Mapping[str, str], scopes: Scopes) -> str | None:
    """Why a wanted layer stays as it is; None where it gets an adapter."""
    shield = next((p for p in protected if inside(path, p)), None)
    if shield is not None and segments(shield)[-1] not in named_by:
        return protected[shield]
    return next((reason for block, reason in scopes.unused.items() if inside(path, block)), None)


def _other_towers(
    adaptable: dict[str, BaseLayer],
    targets: Targets,
    selection: Selection,
    protected: Mapping[str, str],
    scopes: Scopes,
) -> dict[str, str]:
    """Towers of a vision-language model that nobody named, with how to name them."""
    if any(is_scope(word) and word.partition(".")[0] in TOWERS for word in as_patterns(targets)):
        return {}
    taken = {scopes.tower(path) for path in selection.layers} | {None, "language"}
    return scopes.left_out(
        path
        for path, base in adaptable.items()
        if base.kind in PRODUCTS
        and scopes.tower(path) not in taken
        and _reason(path, "", protected, scopes) is None
        and path not in selection.skipped
    )


def _out_of_reach(
    layers: dict[str, tuple[nn.Module, BaseLayer | None]], targets: Targets, scopes: Scopes
) -> dict[str, str]:
    """Linear maps a scope means but no base layer serves, with the reason; they stay frozen, and that is said."""
    found: dict[str, str] = {}
    for path, (module, base) in layers.items():
        if base is None and isinstance(module, nn.Linear):
            found[path] = f"{type(module).__name__} takes no adapter"
        if isinstance(module, nn.MultiheadAttention):
            names = [name for name, _ in module.named_parameters(recurse=False) if name.endswith("_proj_weight")]
            found |= {f"{path}.{name}": "a bare parameter of nn.MultiheadAttention, not a layer" for name in names}
    words = [word for word in as_patterns(targets) if is_scope(word)]
    return {path: reason for path, reason in found.items() if any(scopes.means(word, path) for word in words)}


def _wanted(
    model: nn.Module,
    targets: Targets,
    layers: dict[str, tuple[nn.Module, BaseLayer | None]],
    adaptable: dict[str, BaseLayer],
    fused: Sequence[str],
    scopes: Scopes,
) -> dict[str, str]:
    """Matched paths, each with the pattern that named it ("" for scopes)."""
    if isinstance(targets, str) and not is_scope(targets):
        if re.fullmatch(r"[\w-]+", targets):
            hint = did_you_mean(targets, [ALL, *SCOPES]) or f' For a name suffix write ["{targets}"].'
            raise TargetError(f'targets="{targets}" is neither "all-linear" nor a scope ({", ".join(SCOPES)}).{hint}')
        hits = [path for path in adaptable if full_match(targets, path, "targets")]
        if not hits and not any(full_match(targets, path, "targets") for path in fused):
            raise TargetError(_no_match("targets", targets, adaptable, model))
        return dict.fromkeys(scopes.reach(targets, hits), targets)
    if not targets:
        raise TargetError('targets is empty; name at least one layer, or write "all-linear".')
    wanted: dict[str, str] = {}
    for pattern in as_patterns(targets):
        hits = [path for path in layers if path == pattern or path.endswith(f".{pattern}")]
        served = [path for path in hits if path in adaptable]
        if is_scope(pattern) and (isinstance(targets, str) or not served):
            wanted |= dict.fromkeys(_meant(model, pattern, layers, adaptable, fused, scopes), "")
            continue
        blocks = [path for path in hits if any(inner.startswith(f"{path}.") for inner in adaptable)]
        other = [p for p in hits if p not in adaptable and p not in blocks and _holds_weights(layers[p][0])]
        if other:
            kind = type(layers[other[0]][0]).__name__
            raise TargetError(
                f'targets: "{pattern}" names {other[0]} ({kind}), a kind of module that takes no adapter.'
            )
        if not served and not any(path == pattern or path.endswith(f".{pattern}") for path in fused):
            raise TargetError(_no_match("targets", [pattern], adaptable, model) + _inside(pattern, hits, adaptable))
        wanted |= dict.fromkeys(scopes.reach(pattern, served), pattern)
    return {path: wanted[path] for path in layers if path in wanted}


def _meant(
    model: nn.Module,
    word: str,
    layers: dict[str, tuple[nn.Module, BaseLayer | None]],
    adaptable: dict[str, BaseLayer],
    fused: Sequence[str],
    scopes: Scopes,
) -> list[str]:
    """Linear layers that a scope means.

    Raises:
        TargetError: there are none, naming the scopes that the model has.
    """
    linear = [path for path, base in adaptable.items() if base.kind in PRODUCTS]
    found = [path for path in linear if scopes.means(word, path)]
    if found or any(_means_fused(word, path, scopes) for path in fused if path not in adaptable):
        return found
    bare = [
        join(path, name)
        for path, (module, base) in layers.items()
        for name, parameter in module.named_parameters(recurse=False)
        if base is None and parameter.dim() == 2 and word in TOWERS and scopes.means(word, join(path, name))
    ]
    hint = f" {bare[0]} is a bare parameter, not a layer; also_train can name it." if bare else ""
    raise TargetError(
        f'targets="{word}" means no linear layer of {_kind(model)}. Its scopes: '
        f"{', '.join(scopes.present(linear)) or 'none'}.{hint}"
    )


def _inside(pattern: str, blocks: Sequence[str], adaptable: Iterable[str]) -> str:
    """Hint for a pattern that names blocks instead of layers."""
    names = sorted({segments(path)[-1] for path in adaptable for block in blocks if path.startswith(f"{block}.")})
    return f' "{pattern}" is a block; its layers are: {", ".join(names)}.' if names else ""


def _holds_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _no_match(where: str, pattern: Targets, adaptable: dict[str, BaseLayer], model: nn.Module) -> str:
    shown = f'["{pattern[0]}"]' if not isinstance(pattern, str) and len(pattern) == 1 else f"{pattern!r}"
    names = Counter(segments(path)[-1] for path in adaptable)
    word = segments(pattern if isinstance(pattern, str) else pattern[0])[-1]
    close = nearest(word, names) or [name for name, _ in names.most_common(5)]
    listed = ", ".join(f'"{name}" ({names[name]} layer{"s" * (names[name] > 1)})' for name in close) or "none"
    count = len(adaptable)
    return f"{where}={shown} matched none of the {count} adaptable layers of {_kind(model)}. Nearest: {listed}."


def _kind(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _means_fused(word: str, path: str, scopes: Scopes) -> bool:
    """Whether a scope means a fused expert tensor, which is the MLP of its block."""
    return scopes.means(word, path) or scopes.means(re.sub("mlp$", "experts", word), path)


def _refuse_fused(model: nn.Module, targets: Targets, fused: Sequence[str], scopes: Scopes) -> None:
    """Raise `TargetError` for expert tensors that the targets mean, but whose layout is not known."""
    scoped = [word for word in as_patterns(targets) if is_scope(word)]
    meant = [path for path in fused if any(_means_fused(word, path, scopes) for word in scoped)]
    if isinstance(targets, str):
        meant = meant or [path for path in fused if re.fullmatch(targets, path)]
    else:
        meant = meant or [path for path in fused if any(f".{path}".endswith(f".{pattern}") for pattern in targets)]
    if meant:
        owner = type(model.get_submodule(meant[0].rpartition(".")[0])).__name__
        raise TargetError(
            f"targets={targets!r} means {len(meant)} fused expert tensors, such as {meant[0]}, but {owner} does not "
            "say whether its matrices are stored as (out, in) or (in, out): set is_transposed to False or True on it. "
            f'To leave them frozen, say so: exclude=["{meant[0]}"].'
        )


def _refuse_second_name(model: nn.Module, pattern: str) -> None:
    """Raise `TargetError` where a pattern matches a parameter by one of its other names only."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if within(pattern, name) and first[id(parameter)] != name:
            raise TargetError(
                f'also_train: "{pattern}" matches {name}, which is {first[id(parameter)]} as well; name that one to '
                "train both."
            )


def trained_parameters(model: nn.Module, also_train: Heads) -> list[str]:
    """Names of base parameters that train in full beside the adapters; rows of new tokens always do.

    Raises:
        TargetError: a pattern that matches no parameter.
    """
    adapted = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, AdaptedLayer))
    names = [name for name, _ in model.named_parameters() if not name.startswith(adapted)]
    rows = row_names(model)
    if also_train == "heads":
        prefixes = tuple(f"{prefix}." for prefix in head_prefixes(model))
        return [name for name in names if name.startswith(prefixes) or name in rows]
    found: dict[str, None] = dict.fromkeys(rows)
    for pattern in as_patterns(also_train):
        hits = [name for name in names if within(pattern, name)]
        if not hits:
            _refuse_second_name(model, pattern)
            close = nearest(pattern, {segments(name)[-2] for name in names if "." in name} | set(names))
            raise TargetError(
                f'also_train: "{pattern}" matches no parameter outside adapted layers. '
                f"Nearest: {', '.join(close) or 'none'}."
            )
        found |= dict.fromkeys(hits)
    return list(found)
