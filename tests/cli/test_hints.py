"""Hints that do not concern an adapter run stay out of the terminal; other warnings do not."""

from __future__ import annotations

import warnings

from lora_lightning.cli.hints import hide_hints


def test_hints_are_hidden_and_other_warnings_are_not():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hide_hints()
        warnings.warn("The dataloader does not have many workers which may be a bottleneck", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(one.message) for one in seen] == ["something else"]
