"""Words of function documentation with what they name: tokens and tags, as for named entities.

A word that is a parameter of the function described is one, which its signature tells and the text does not; built-in
types (exceptions too) and constants are known by name.
"""

from __future__ import annotations

import builtins
import re

import datasets

from ll_demo.areas import AREA_NAMES, AREA_OF
from ll_demo.documented import Documented, documented

CONSTANTS = frozenset({"None", "True", "False", "NotImplemented", "Ellipsis"})
TYPES = frozenset(name for name, value in vars(builtins).items() if isinstance(value, type))
ENGLISH = frozenset({"a", "an", "the", "this", "that", "it", "to", "on", "by", "of", "at", "no", "i"})
"""Parameters of such a name cannot be told from the word."""
WORD = re.compile(r"\w+|[^\w\s]")
FEWEST, MOST = 5, 60
"""Words of a text."""


def table() -> datasets.Dataset:
    """Texts that name at least one parameter of their function: columns tokens, tags, name."""
    rows: dict[tuple[str, ...], tuple[list[str], str]] = {}
    for entry in documented():
        words = WORD.findall(entry.paragraphs[0])
        tags = [tag(word, entry) for word in words]
        if FEWEST <= len(words) <= MOST and "parameter" in tags:
            rows.setdefault(tuple(words), (tags, entry.name))
    columns = {
        "tokens": [list(words) for words in rows],
        "tags": [tags for tags, _ in rows.values()],
        "name": [name for _, name in rows.values()],
    }
    return datasets.Dataset.from_dict(columns)


def internet() -> datasets.Dataset:
    """Those about modules for the internet."""
    return _about("internet", True)


def elsewhere() -> datasets.Dataset:
    """Those about all other modules of an area."""
    return _about("internet", False)


def _about(area: str, wanted: bool) -> datasets.Dataset:
    rows = table()
    areas = [AREA_OF.get(name.partition(".")[0]) for name in rows["name"]]
    label = AREA_NAMES.index(area)
    return rows.select([at for at, found in enumerate(areas) if found is not None and (found == label) == wanted])


def tag(word: str, entry: Documented) -> str:
    """What `word` names in the text about `entry`."""
    if word in entry.parameters and word.lower() not in ENGLISH:
        return "parameter"
    kinds = {"constant": CONSTANTS, "type": TYPES}
    return next((kind for kind, names in kinds.items() if word in names), "other")
