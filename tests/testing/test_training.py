"""The training contract names what a method breaks."""

from __future__ import annotations

import pytest
import torch
from broken_methods import BreaksTheGraph, NeverUses, Pair, check_breaks, contract_of

from lora_lightning.adapters.base import GroupSpec
from lora_lightning.methods import Adapters, Method


def test_a_parameter_without_use_fails() -> None:
    check_breaks(NeverUses, "test_only_declared_parameters_train")


def test_a_forgotten_group_fails() -> None:
    def param_groups(self: Method, adapters: Adapters) -> dict[str, GroupSpec]:
        return {"A": GroupSpec(params=[a.get_parameter("A") for a in adapters.values()])}

    contract_of(Pair).test_param_groups_hold_every_trainable_once()
    with pytest.raises(AssertionError):
        contract_of(Pair, param_groups=param_groups).test_param_groups_hold_every_trainable_once()


def test_a_graph_break_needs_a_reason() -> None:
    contract = contract_of(BreaksTheGraph)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"graph_break\(\)"):
        contract.test_compiles()
    type(contract).compile_reason = "sorts on the CPU"
    with pytest.raises(pytest.skip.Exception, match=r"torch\.compile: sorts on the CPU"):
        contract.test_compiles()
