"""Environment variables that the parser reads: what they set is said, and one that sets nothing is refused."""

from __future__ import annotations

import argparse
import os

from lora_lightning.errors import SettingsError, did_you_mean

PREFIX = "LORA_LIGHTNING_"


def used(parser: argparse.ArgumentParser, verb: str | None) -> list[str]:
    """One line for each variable that sets something for a verb.

    Raises:
        SettingsError: a variable for the verb that no setting has, naming the nearest.
    """
    if verb is None:
        return []
    start = f"{PREFIX}{verb.upper()}__"
    inner = next(
        (a.choices[verb] for a in parser._actions if isinstance(a.choices, dict) and verb in a.choices), parser
    )
    known = {f"{start}{action.dest.replace('.', '__').upper()}": action.dest for action in inner._actions}
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
