"""Environment variables that the parser reads: what they set is said, and one that sets nothing is refused."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable
from typing import NoReturn

from lora_lightning.errors import SettingsError, did_you_mean
from lora_lightning.registry import TRAINING_VERBS

PREFIX = "LORA_LIGHTNING_"
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Variables of launchers that number processes, in the order in which Lightning asks them."""
OWN = ("CACHE_GB", "COMPLETE", "DEBUG", "RUN", "TEST_DATA")
"""Names behind the prefix that are no setting of a verb."""


def used(parser: argparse.ArgumentParser, verb: str | None) -> list[str]:
    """One line for each variable that sets something for a verb.

    Raises:
        SettingsError: a variable that no setting and nothing else has, naming the nearest; or one that is no number.
    """
    if verb is None:
        return []
    start = f"{PREFIX}{verb.upper()}__"
    inner = next(
        (a.choices[verb] for a in parser._actions if isinstance(a.choices, dict) and verb in a.choices), parser
    )
    known = {f"{start}{action.dest.replace('.', '__').upper()}": action.dest for action in inner._actions}
    known.pop(f"{start}HELP", None)
    _refuse_strangers(known)
    found = [name for name in os.environ if name.startswith(start)]
    for name in found:
        if name not in known:
            raise SettingsError(
                f"the environment sets {name}, which is no setting of {verb}.{did_you_mean(name, known)} Unset it, or "
                "give the setting on the command line."
            )
    return [
        f"environment: {name}={os.environ[name]} sets {known[name]}, unless a config or a flag does"
        for name in sorted(found)
    ]


def refuse_rank(rank: int) -> NoReturn:
    """Raise `SettingsError` for a run of one process that the environment calls another than the first."""
    named = next((name for name in RANKS if os.environ.get(name) == str(rank)), RANKS[0])
    raise SettingsError(
        f"the environment sets {named}={rank}, as a launcher does for a process beside the first, and this run has one "
        "process. Unset it, or give trainer.devices and trainer.num_nodes as they were launched."
    )


def _refuse_strangers(known: Iterable[str]) -> None:
    """Raise `SettingsError` for variables that nothing reads, and for a size that is no number."""
    own = [f"{PREFIX}{name}" for name in OWN]
    starts = tuple(f"{PREFIX}{verb.upper()}__" for verb in TRAINING_VERBS)
    for name in os.environ:
        if name.startswith(PREFIX) and name not in own and not name.startswith(starts):
            raise SettingsError(
                f"the environment sets {name}, which nothing reads.{did_you_mean(name, [*own, *known])} Unset it, or "
                "give the setting on the command line."
            )
    size = os.environ.get(f"{PREFIX}CACHE_GB", "10")
    try:
        right = 0 <= float(size) < math.inf
    except ValueError:
        right = False
    if not right:
        raise SettingsError(
            f'the environment sets {PREFIX}CACHE_GB to "{size}"; it must be a number of gigabytes, at least 0.'
        )
