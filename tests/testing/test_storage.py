"""The storage contract names what a method breaks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from broken_methods import Broken, CountsItsCalls, HidesState, Pair, check_breaks, contract_of


def test_state_beside_the_tensors_fails() -> None:
    says = (
        r"on Linear: two adapters with equal state dictionaries must compute the same;.*HidesState\.__init__ and reset"
    )
    check_breaks(HidesState, "test_state_dict_round_trip", says, kind="Linear")


def test_calls_that_change_what_the_next_one_computes_fail() -> None:
    says = r"two steps, a checkpoint and two more steps must give what four.* Tensor \S+: \d+ of \d+ numbers differ"
    check_breaks(CountsItsCalls, "test_resume_equals_uninterrupted", says)


FACTS = [
    (
        {"paper": "2406.10777", "bibtex": "@misc{x, title={X}}"},
        r"^Broken: bibtex must name the arXiv id 2406\.10777 given as `paper`, such as eprint = \{2406\.10777\}\.",
    ),
    ({"__doc__": None}, r"^Broken: the settings class must have a docstring, which `show` prints\."),
    ({"__doc__": "Broken(*, rank: int = 8)"}, r"must have a docstring"),  # what dataclass gives one without
    ({"export": "onnx"}, r'^Broken: `export` is "onnx"; it must be one of "native", "exact LoRA", "merged only", "not'),
    (
        {"mergeable": False},
        r'^Broken: `mergeable` is False, so `export` must be "not expressible", not "merged only"\.',
    ),
]


@pytest.mark.parametrize(("facts", "says"), FACTS)
def test_facts_that_do_not_fit_each_other_are_named(facts: dict[str, Any], says: str) -> None:
    contract_of(Pair).test_class_facts()
    with pytest.raises(AssertionError, match=says):
        contract_of(Pair, **facts).test_class_facts()


def test_settings_that_plain_data_cannot_hold_fail() -> None:
    @dataclass(frozen=True, kw_only=True)
    class WithTuple(Broken):
        """x."""

        ranks: tuple[int, ...] = (1, 2)

    contract = contract_of(Pair)
    type(contract).method = WithTuple()
    says = r"^WithTuple: settings came back from JSON as .*ranks=\[1, 2\].*another type, such as a tuple"
    with pytest.raises(AssertionError, match=says):
        contract.test_settings_round_trip_as_plain_data()


def test_a_method_that_is_no_plugin_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match='no method "Broken"'):
        contract_of(Pair).test_save_and_load(tmp_path)
