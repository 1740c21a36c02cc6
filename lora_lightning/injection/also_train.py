"""Which base parameters are fully trained beside the adapters: heads, rows of new tokens, and what is named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lora_lightning.errors import TargetError, nearest
from lora_lightning.injection.records import records
from lora_lightning.injection.targets import as_patterns
from lora_lightning.models.anatomy import Anatomy, Heads
from lora_lightning.models.paths import segments, starting_with, within
from lora_lightning.models.token_rows import TokenRows, layers_with


def trained_parameters(anatomy: Anatomy, also_train: Heads) -> list[str]:
    """Names of fully trained base parameters beside the adapters; rows of new tokens always train.

    Raises:
        TargetError: a pattern that matches no parameter.
    """
    adapted = starting_with((f"{path}." for path in anatomy.adapted), anatomy.parameters)
    known = {id(layer.token_rows) for layer in anatomy.extended.values()}  # these train where they are asked for
    names = [
        name for name, parameter in anatomy.parameters.items() if name not in adapted and id(parameter) not in known
    ]
    if also_train == "heads":
        whole = {*anatomy.heads, *anatomy.row_names}
        below = starting_with((f"{head}." for head in anatomy.heads), names)
        return [name for name in names if name in whole or name in below]
    if also_train == "all":
        return names
    found: dict[str, None] = dict.fromkeys(anatomy.row_names)
    for pattern in as_patterns(also_train):
        hits = [name for name in names if within(pattern, name)]
        if not hits:
            _refuse_second_name(anatomy, pattern)
            raise TargetError(_no_match(pattern, names))
        found |= dict.fromkeys(hits)
    return list(found)


def check_disjoint(anatomy: Anatomy, layers: Iterable[str], trained: Sequence[str]) -> None:
    """Raise `TargetError` unless each layer is adapted, or trains in full, or in rows, under every adapter's name."""
    before = {parameter: name for name, record in records(anatomy.model).items() for parameter in record.trained}
    owners = {parameter.rpartition(".")[0] for parameter in trained} | set(trained)
    owners_before = {parameter.rpartition(".")[0]: name for parameter, name in before.items()} | before
    for path in layers:
        if path in owners:
            raise TargetError(f"{path} would be adapted and trained in full; exclude it, or take it out of also_train.")
        if path in owners_before:
            raise TargetError(f'{path} trains in full with adapter "{owners_before[path]}"; exclude it.')
    own = {id(anatomy.parameters[name]): name for name in trained}
    for path, layer in anatomy.extended.items():
        whole = next((own[id(p)] for p in layer.base.parameters() if id(p) in own), None)
        if layer.token_rows is None or whole is None:
            continue
        if id(layer.token_rows) not in own:
            raise TargetError(
                f"{whole} would train in full, and rows of {path} train with another adapter; eject that one, or take "
                "it out of also_train."
            )
        if own.get(id(layer.base.weight)):
            raise TargetError(
                f"{path} would train in full, and rows of it besides; take it out of also_train, or the rows out of "
                "train_tokens."
            )


def check_rows_free(anatomy: Anatomy, wanted: Mapping[str, TokenRows]) -> None:
    """Raise `TargetError` where something of a layer that is to have rows trains with another adapter."""
    for name, record in records(anatomy.model).items():
        taken = {parameter.rpartition(".")[0]: parameter for parameter in record.trained}
        for path in layers_with(anatomy, wanted):
            if path in taken and path not in anatomy.extended:
                raise TargetError(
                    f'train_tokens: {taken[path]} trains in full with adapter "{name}"; eject that one, or leave the '
                    "rows out."
                )


def _no_match(pattern: str, names: Sequence[str]) -> str:
    owners = {segments(name)[-2] for name in names if "." in name}
    close = ", ".join(nearest(pattern, owners | set(names))) or "none"
    return f'also_train: "{pattern}" matches no parameter outside adapted layers. Nearest: {close}.'


def _refuse_second_name(anatomy: Anatomy, pattern: str) -> None:
    """Raise `TargetError` where a pattern matches a parameter by one of its other names only."""
    first = {id(parameter): name for name, parameter in anatomy.parameters.items()}
    for number, names in anatomy.users.items():
        for name in names:
            if within(pattern, name) and first[number] != name:
                raise TargetError(
                    f'also_train: "{pattern}" matches {name}, which is {first[number]} as well; name that one to '
                    "train both."
                )
