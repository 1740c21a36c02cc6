"""How messages are built, and whose an error is."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lora_lightning.errors import (
    LoraLightningError,
    SettingsError,
    TargetError,
    check,
    did_you_mean,
    nearest,
    raised_in,
    wrapped_error,
)


@dataclass
class Owner:
    rank: int = 0


def test_check_names_class_field_value_and_rule() -> None:
    check(True, Owner(), "rank", "never read")
    with pytest.raises(SettingsError, match=r"^Owner\.rank is 0; it must be at least 1\.$") as caught:
        check(False, Owner(), "rank", "it must be at least 1.")
    assert caught.value.setting == ("Owner", "rank")


def test_the_nearest_choices_are_best_first_whatever_their_case() -> None:
    assert nearest("Qeury", ["key", "query", "query_norm"]) == ["query", "query_norm", "key"]
    assert nearest("LORA", ["LoRA", "DoRA", "xyz"])[0] == "LoRA"
    assert nearest("something", ["a", "b"]) == []
    assert did_you_mean("quary", ["query"]) == ' Did you mean "query"?'
    assert did_you_mean("something", ["a"]) == ""


def test_an_error_of_ours_is_found_below_what_a_library_wrapped_around_it() -> None:
    ours = TargetError("no such layer")
    theirs = ValueError("it could not be parsed")
    theirs.__cause__ = RuntimeError("in between")
    theirs.__cause__.__context__ = ours
    assert wrapped_error(theirs) is ours
    assert wrapped_error(ours) is ours
    assert wrapped_error(ValueError("alone")) is None
    assert wrapped_error(None) is None


def test_where_an_error_was_raised() -> None:
    with pytest.raises(LoraLightningError) as caught:
        check(False, Owner(), "rank", "it must be at least 1.")
    assert raised_in(caught.value, "lora_lightning")
    assert not raised_in(caught.value, "torch")
    assert not raised_in(ValueError("never raised"), "lora_lightning")
