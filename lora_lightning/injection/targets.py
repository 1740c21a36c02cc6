"""Which layers get an adapter: patterns to layers, with the reason for every layer that is left out.

`targets` is "all-linear", a scope ("attention", "vision", "vision.mlp", ...), a list of name suffixes and scopes, or
one regular expression over whole paths. Heads, poolers and routers are never matched by accident: a pattern reaches
them only by naming them. Of a vision-language model, towers other than the language tower are not either: their scope
reaches them, and a pattern that holds their name or fits nothing in the language tower.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import TargetError, did_you_mean, nearest
from lora_lightning.models.anatomy import Anatomy
from lora_lightning.models.new_tokens import ExtendedLayer
from lora_lightning.models.paths import full_match, inside, join, segments, within
from lora_lightning.models.scopes import ALL, NONE, SCOPES, TOWERS, is_scope

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


def select(anatomy: Anatomy, targets: Targets = ALL, exclude: Sequence[str] = ()) -> Selection:
    """Layers of a model that `targets` names and `exclude` does not.

    Raises:
        TargetError: a pattern that matches nothing (with the nearest names), a scope that the model has not, a fused
            expert tensor that would be skipped, a layer kind that takes no adapter, two layers that share one weight.
    """
    named = _named(anatomy, targets)
    excluded = _excluded(anatomy, as_patterns(exclude))
    selection = Selection()
    for path, named_by in named.items():
        reason = "excluded" if path in excluded else _reason(anatomy, path, named_by)
        if reason is None:
            selection.layers[path] = anatomy.reachable[path]
        else:
            selection.skipped[path] = reason
    _refuse_fused(anatomy, targets, excluded)
    _refuse_empty(selection, targets, exclude)
    selection.skipped |= _out_of_reach(anatomy, targets)
    selection.skipped |= _other_towers(anatomy, targets, selection)
    selection.tied = anatomy.tied(selection.layers)
    _leave_sharers(selection, named)
    _refuse_both_sides(selection)
    return selection


# -- what patterns name ------------------------------------------------------------------------------------------------


def _named(anatomy: Anatomy, targets: Targets) -> dict[str, str]:
    """Matched paths in the model's order, each with the pattern that named it ("" for scopes)."""
    if targets == NONE:
        return {}
    if isinstance(targets, str) and not is_scope(targets):
        return _by_expression(anatomy, targets)
    if not targets:
        raise TargetError('targets is empty; name at least one layer, or write "all-linear".')
    found: dict[str, str] = {}
    for pattern in as_patterns(targets):
        hits = [path for path in anatomy.layers if _ends(path, pattern)]
        is_name = not isinstance(targets, str) and any(path in anatomy.adaptable for path in hits)
        if is_scope(pattern) and not is_name:
            found |= dict.fromkeys(_meant(anatomy, pattern), "")
        else:
            found |= dict.fromkeys(_by_name(anatomy, pattern, hits), pattern)
    return {path: found[path] for path in anatomy.layers if path in found}


def _by_expression(anatomy: Anatomy, targets: str) -> dict[str, str]:
    """Layers whose whole path a regular expression fits."""
    if re.fullmatch(r"[\w-]+", targets):
        hint = did_you_mean(targets, [ALL, *SCOPES]) or f' For a name suffix write ["{targets}"].'
        raise TargetError(f'targets="{targets}" is neither "all-linear" nor a scope ({", ".join(SCOPES)}).{hint}')
    hits = [path for path in anatomy.adaptable if full_match(targets, path, "targets")]
    hits += [path for path in _matrices(anatomy) if _spells(targets, path) and full_match(targets, path, "targets")]
    if not hits and not any(full_match(targets, path, "targets") for path in anatomy.fused):
        raise TargetError(_no_match(anatomy, "targets", targets))
    return dict.fromkeys(anatomy.scopes.reach(targets, hits), targets)


def _by_name(anatomy: Anatomy, pattern: str, hits: Sequence[str]) -> list[str]:
    """Of the modules whose path ends in a pattern, the layers that it reaches; else matrices, by their owner too."""
    served = [path for path in hits if path in anatomy.adaptable] or _named_matrices(anatomy, pattern, hits)
    if served and served[0] not in anatomy.adaptable:
        return served
    blocks = [path for path in hits if any(inner.startswith(f"{path}.") for inner in anatomy.adaptable)]
    for path in hits:
        module = anatomy.layers[path].module
        if path not in served and path not in blocks and next(module.parameters(recurse=False), None) is not None:
            raise TargetError(
                f'targets: "{pattern}" names {path} ({type(module).__name__}), a kind of module that takes no adapter. '
                f"{_way_out(anatomy, path, module)}"
            )
    if not served and not any(_ends(path, pattern) for path in anatomy.fused):
        raise TargetError(_no_match(anatomy, "targets", [pattern]) + _inside_blocks(anatomy, pattern, blocks))
    return anatomy.scopes.reach(pattern, served)


def _matrices(anatomy: Anatomy) -> list[str]:
    return [path for path in anatomy.reachable if path not in anatomy.adaptable]


def _spells(pattern: str, path: str) -> bool:
    """Whether a pattern holds the last two names of a path, or the last one where that says enough."""
    owner, name = segments(path)[-2:] if "." in path else ("", path)
    return name in pattern and (name != "weight" or owner in pattern)


def _named_matrices(anatomy: Anatomy, pattern: str, hits: Sequence[str]) -> list[str]:
    """Single parameters whose path ends in a pattern, and matrices that are all that a module of that name has."""
    found = [path for path in _matrices(anatomy) if _ends(path, pattern)]
    for path in hits:
        own = [inner for inner in _matrices(anatomy) if inner.rpartition(".")[0] == path]
        if (
            len(own) == 1
            and anatomy.reachable[own[0]].stored.dim() == 2
            and not any(inner.startswith(f"{path}.") for inner in anatomy.adaptable)
        ):
            found += own
    return list(dict.fromkeys(found))


def _way_out(anatomy: Anatomy, path: str, module: nn.Module) -> str:
    if isinstance(module, ExtendedLayer):
        return "Rows of its tokens train already; leave it out of targets."
    own = [inner for inner in _matrices(anatomy) if inner.rpartition(".")[0] == path]
    if own:
        names = ", ".join(f'"{segments(path)[-1]}.{segments(inner)[-1]}"' for inner in own)
        return f"Its parameters do: targets=[{names}]."
    return f'Train it in full instead: also_train=["{path}"].'


def _meant(anatomy: Anatomy, word: str) -> list[str]:
    """Linear layers that a scope means.

    Raises:
        TargetError: there are none, naming the scopes that the model has.
    """
    linear = [path for path, base in anatomy.adaptable.items() if base.kind in PRODUCTS]
    found = [path for path in linear if anatomy.scopes.means(word, path)]
    unknown = [path for path in anatomy.fused if path not in anatomy.adaptable]
    if found or any(_means_fused(anatomy, word, path) for path in unknown):
        return found
    bare = _bare_parameters(anatomy, word) if word in TOWERS else []
    hint = f" {bare[0]} is a bare parameter, not a layer; also_train can name it." if bare else ""
    raise TargetError(
        f'targets="{word}" means no linear layer of {_kind(anatomy.model)}. Its scopes: '
        f"{', '.join(anatomy.scopes.present(linear)) or 'none'}.{hint}"
    )


def _bare_parameters(anatomy: Anatomy, tower: str) -> list[str]:
    """Matrices of a tower that are no layer's."""
    found = []
    for path, (module, base) in anatomy.layers.items():
        if base is not None:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2 and anatomy.scopes.means(tower, join(path, name)):
                found.append(join(path, name))
    return found


def _ends(path: str, pattern: str) -> bool:
    return path == pattern or path.endswith(f".{pattern}")


def _inside_blocks(anatomy: Anatomy, pattern: str, blocks: Sequence[str]) -> str:
    """Hint for a pattern that names blocks instead of layers."""
    names = {segments(path)[-1] for path in anatomy.reachable for block in blocks if path.startswith(f"{block}.")}
    return f' "{pattern}" is a block; its layers are: {", ".join(sorted(names))}.' if names else ""


def _no_match(anatomy: Anatomy, where: str, pattern: Targets) -> str:
    shown = f'["{pattern[0]}"]' if not isinstance(pattern, str) and len(pattern) == 1 else f"{pattern!r}"
    names = Counter(segments(path)[-1] for path in anatomy.adaptable)
    word = segments(pattern if isinstance(pattern, str) else pattern[0])[-1]
    several = f" Several names are a list: [{', '.join(word.split(','))}]." if "," in word else ""
    close = nearest(word, names) or [name for name, _ in names.most_common(5)]
    listed = ", ".join(f'"{name}" ({names[name]} layer{"s" * (names[name] > 1)})' for name in close) or "none"
    if where == "targets":
        _refuse_parameter(anatomy, shown, pattern)
    return (
        f"{where}={shown} matched none of the {len(anatomy.adaptable)} adaptable layers of {_kind(anatomy.model)}. "
        f"Nearest: {listed}.{several}"
    )


def _refuse_parameter(anatomy: Anatomy, shown: str, pattern: Targets) -> None:
    """Raise `TargetError` where a pattern names parameters that no layer has, with what reaches or trains them."""
    if isinstance(pattern, str):
        names = [name for name in anatomy.parameters if full_match(pattern, name, "targets")]
    else:
        names = [name for name in anatomy.parameters if _ends(name, pattern[0])]
    if names and names[0] in _matrices(anatomy):
        raise TargetError(
            f"targets={shown} fits {names[0]}, which is no layer's weight; only its own name reaches it: "
            f'targets=["{names[0]}"].'
        )
    if names:
        module = anatomy.modules[names[0].rpartition(".")[0]]
        shape = tuple(anatomy.parameters[names[0]].shape)
        raise TargetError(
            f"targets={shown} names {names[0]} {shape}, a parameter that {type(module).__name__} reads itself and that "
            f"takes no adapter: {_why_none(shape)}. Train it in full instead: "
            f'also_train=["{pattern if isinstance(pattern, str) else pattern[0]}"].'
        )


def _why_none(shape: tuple[int, ...]) -> str:
    return "nothing says how it is read" if len(shape) in (2, 3) else "it is no matrix, and no stack of matrices"


def _kind(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


# -- what stays as it is -----------------------------------------------------------------------------------------------


def _excluded(anatomy: Anatomy, patterns: Sequence[str]) -> set[str]:
    """Paths of layers and fused tensors that `exclude` names, by a part of the path or by a scope."""
    found: set[str] = set()
    paths = [*anatomy.adaptable, *anatomy.fused]
    for pattern in patterns:
        hits = [path for path in paths if within(pattern, path)]
        if not hits and is_scope(pattern):
            hits = [path for path in paths if anatomy.scopes.means(pattern, path)]
        if not hits:
            raise TargetError(_no_match(anatomy, "exclude", [pattern]))
        found.update(hits)
    return found


def _reason(anatomy: Anatomy, path: str, named_by: str) -> str | None:
    """Why a layer that a pattern named stays as it is; None where it gets an adapter."""
    for shield, what in anatomy.protected.items():
        if inside(path, shield):
            if segments(shield)[-1] not in named_by:
                return what
            break
    return next((reason for block, reason in anatomy.scopes.unused.items() if inside(path, block)), None)


def _out_of_reach(anatomy: Anatomy, targets: Targets) -> dict[str, str]:
    """Linear maps a scope means but no base layer serves, with the reason; they stay frozen, and that is said."""
    words = [word for word in as_patterns(targets) if is_scope(word)]
    return {path: why for path, why in _unserved(anatomy) if any(anatomy.scopes.means(word, path) for word in words)}


def _unserved(anatomy: Anatomy) -> Iterator[tuple[str, str]]:
    """Linear maps without a base layer, each with the reason."""
    for path, (module, base) in anatomy.layers.items():
        if base is None and isinstance(module, nn.Linear):
            yield path, f"{type(module).__name__} takes no adapter"
        if isinstance(module, nn.MultiheadAttention):
            for name, _ in module.named_parameters(recurse=False):
                if name.endswith("_proj_weight"):
                    why = "a bare parameter of nn.MultiheadAttention, not a layer"
                    yield join(path, name), f'{why}; targets name it: "{name}"'


def _other_towers(anatomy: Anatomy, targets: Targets, selection: Selection) -> dict[str, str]:
    """Towers of a vision-language model that nobody named, with how to name them."""
    if any(is_scope(word) and word.partition(".")[0] in TOWERS for word in as_patterns(targets)):
        return {}
    tower = anatomy.scopes.tower
    reached = {tower(path) for path in selection.layers} | {None, "language"}
    left = []
    for path, base in anatomy.adaptable.items():
        if base.kind not in PRODUCTS or path in selection.skipped or tower(path) in reached:
            continue
        if _reason(anatomy, path, "") is None:
            left.append(path)
    return anatomy.scopes.left_out(left)


# -- what is refused ---------------------------------------------------------------------------------------------------


def _refuse_empty(selection: Selection, targets: Targets, exclude: Sequence[str]) -> None:
    """Raise `TargetError` where nothing is left to adapt."""
    if selection.layers or targets == NONE:
        return
    left_out = ", ".join(f"{path} ({reason})" for path, reason in list(selection.skipped.items())[:5])
    left_out = left_out or f"all that exclude={as_patterns(exclude)} names"
    raise TargetError(f"targets={targets!r} leaves no layer to adapt; left out: {left_out}.")


def _leave_sharers(selection: Selection, named: Mapping[str, str]) -> None:
    """Of layers that a scope means and that share one weight, the first is adapted; the others stay as they are."""
    for path in list(selection.layers):
        others = [other for other in selection.tied.get(path, ()) if other in selection.layers]
        if others and not named[path] and not any(named[other] for other in others):
            selection.skip(others, f"shares its weight with {path}, which is adapted")


def _refuse_both_sides(selection: Selection) -> None:
    """Raise `TargetError` for two selected layers that share one weight."""
    for path, others in selection.tied.items():
        both = [other for other in others if other in selection.layers]
        if both:
            raise TargetError(
                f"{path} and {both[0]} share one weight; adapt one of them and exclude the other, or, of an "
                "embedding and its output layer, give each its own with untie=True."
            )


def _means_fused(anatomy: Anatomy, word: str, path: str) -> bool:
    """Whether a scope means a fused expert tensor, which is the MLP of its block."""
    return anatomy.scopes.means(word, path) or anatomy.scopes.means(re.sub("mlp$", "experts", word), path)


def _names_tensor(targets: Targets, path: str) -> bool:
    """Whether a regular expression fits a path, or one of several names ends it."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(_ends(path, pattern) for pattern in targets)


def _refuse_fused(anatomy: Anatomy, targets: Targets, excluded: set[str]) -> None:
    """Raise `TargetError` for expert tensors that the targets mean, but whose layout is not known."""
    unknown = [path for path in anatomy.fused if path not in anatomy.adaptable and path not in excluded]
    scoped = [word for word in as_patterns(targets) if is_scope(word)]
    meant = [path for path in unknown if any(_means_fused(anatomy, word, path) for word in scoped)]
    meant = meant or [path for path in unknown if _names_tensor(targets, path)]
    if meant:
        owner = type(anatomy.modules[meant[0].rpartition(".")[0]]).__name__
        raise TargetError(
            f"targets={targets!r} means {len(meant)} fused expert tensors, such as {meant[0]}, but {owner} does not "
            "say whether its matrices are stored as (out, in) or (in, out): set is_transposed to False or True on it. "
            f'To leave them frozen, say so: exclude=["{meant[0]}"].'
        )
