"""Which base parameters are fully trained beside the adapters: heads, rows of new tokens, and what is named."""

from __future__ import annotations

from collections.abc import Sequence

from lora_lightning.errors import TargetError, nearest
from lora_lightning.injection.targets import as_patterns
from lora_lightning.models.anatomy import Anatomy, Heads
from lora_lightning.models.paths import segments, starting_with, within


def trained_parameters(anatomy: Anatomy, also_train: Heads) -> list[str]:
    """Names of fully trained base parameters beside the adapters; rows of new tokens always train.

    Raises:
        TargetError: a pattern that matches no parameter.
    """
    adapted = starting_with((f"{path}." for path in anatomy.adapted), anatomy.parameters)
    names = [name for name in anatomy.parameters if name not in adapted]
    if also_train == "heads":
        whole = {*anatomy.heads, *anatomy.row_names}
        below = starting_with((f"{head}." for head in anatomy.heads), names)
        return [name for name in names if name in whole or name in below]
    found: dict[str, None] = dict.fromkeys(anatomy.row_names)
    for pattern in as_patterns(also_train):
        hits = [name for name in names if within(pattern, name)]
        if not hits:
            _refuse_second_name(anatomy, pattern)
            raise TargetError(_no_match(pattern, names))
        found |= dict.fromkeys(hits)
    return list(found)


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
