"""The storage contract names what a method breaks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from broken_methods import Broken, HidesState, Pair, check_breaks, contract_of


def test_state_beside_the_tensors_fails() -> None:
    check_breaks(HidesState, "test_state_dict_round_trip", kind="Linear")


def test_settings_that_plain_data_cannot_hold_fail() -> None:
    @dataclass(frozen=True, kw_only=True)
    class WithTuple(Broken):
        """x."""

        ranks: tuple[int, ...] = (1, 2)

    contract = contract_of(Pair)
    type(contract).method = WithTuple()
    with pytest.raises(AssertionError):
        contract.test_settings_round_trip_as_plain_data()


def test_a_method_that_is_no_plugin_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match='no method "Broken"'):
        contract_of(Pair).test_save_and_load(tmp_path)
