"""The training contract names what a method breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from broken_methods import (
    BreaksTheGraph,
    CountsItsCalls,
    IgnoresItsFactors,
    NeverUses,
    Pair,
    SharesAGain,
    WritesIntoTheBase,
    check_breaks,
    contract_of,
)

from lora_lightning.adapters.base import Adapter, GroupSpec
from lora_lightning.methods import Adapters, Method

BROKEN = [
    (
        NeverUses,
        "test_only_declared_parameters_train",
        r"on TinyMLP: first\.adapters\.default\.idle_weight, second\.\S+ got no gradient in two steps\..*in `idle`",
    ),
    (
        IgnoresItsFactors,
        "test_only_declared_parameters_train",
        r"the output does not depend on any parameter that trains\. Look at the adapter's `forward`\.",
    ),
    (
        WritesIntoTheBase,
        "test_only_declared_parameters_train",
        r"frozen tensors must not change in a step\..* Tensor first\.base\.weight: 48 of 48 numbers differ",
    ),
    (
        SharesAGain,  # trained by both layers, and no module above them owns it
        "test_param_groups_hold_every_trainable_once",
        r"first\.adapters\.default\.gain must be in one parameter group once, not in .* comes from `Method\.link`",
    ),
    (
        CountsItsCalls,
        "test_gradient_checkpointing",
        r"gradients with recomputed activations must be those without\..* Tensor first\.adapters\.default\.A: \d+ of",
    ),
]


@pytest.mark.parametrize(("adapter", "test", "says"), BROKEN)
def test_a_broken_method_fails_where_it_is_broken_and_is_told(adapter: type[Adapter], test: str, says: str) -> None:
    check_breaks(adapter, test, says, **({"reentrant": False} if "checkpointing" in test else {}))


def group_of_a(self: Method, adapters: Adapters) -> dict[str, GroupSpec]:
    return {"A": GroupSpec(params=[a.get_parameter("A") for a in adapters.values()])}


def group_of_strangers(self: Method, adapters: Adapters) -> dict[str, GroupSpec]:
    both = [p for adapter in adapters.values() for p in adapter.parameters()]
    return {"all": GroupSpec(params=both), "extra": GroupSpec(params=[torch.nn.Parameter(torch.zeros(1))])}


@pytest.mark.parametrize(
    ("param_groups", "says"),
    [
        (
            group_of_a,
            r"first\.adapters\.default\.B must be in one parameter group once, not in none\. Look at `param_gr",
        ),
        (group_of_strangers, r'group "extra" holds 1 parameters that do not train or are not the model\'s'),
    ],
)
def test_groups_that_do_not_hold_the_trainables(param_groups: Any, says: str) -> None:
    contract_of(Pair).test_param_groups_hold_every_trainable_once()
    with pytest.raises(AssertionError, match=says):
        contract_of(Pair, param_groups=param_groups).test_param_groups_hold_every_trainable_once()


@pytest.mark.parametrize(
    ("name", "answer", "says"),
    [
        ("penalty", torch.zeros(2), r"the penalty must be one number, a tensor of shape \(\), not of shape \(2,\)"),
        ("penalty", torch.tensor(torch.inf), r"the penalty is inf; it must be finite"),
        ("report", {"norm": torch.zeros(())}, r'"norm" of the report is tensor\(0\.\); it must be plain data'),
        ("report", {"paths": {1, 2}}, r'"paths" of the report is \{1, 2\}; it must be plain data that JSON can hold'),
    ],
)
def test_answers_of_a_wrong_form(name: str, answer: Any, says: str) -> None:
    contract_of(Pair).test_penalty_and_report()
    with pytest.raises(AssertionError, match=says):
        contract_of(Pair, **{name: lambda self, adapters: answer}).test_penalty_and_report()


def test_a_graph_break_needs_a_reason() -> None:
    contract = contract_of(BreaksTheGraph)
    says = (
        r"must take the adapter as it is\..*give a `compile_reason` on the test class\. It says: [^$]*graph_break\(\)"
    )
    with pytest.raises(AssertionError, match=says):
        contract.test_compiles()
    type(contract).compile_reason = "sorts on the CPU"
    with pytest.raises(pytest.skip.Exception, match=r"torch\.compile: sorts on the CPU"):
        contract.test_compiles()
