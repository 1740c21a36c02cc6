"""The law's contract names what a method breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from broken_methods import (
    DrawsGlobally,
    ForgetsTheScaleInLowRank,
    ForgetsTheScaleInTheMerge,
    LeavesTheDtype,
    MisshapenMask,
    NotAFunctionOfTheProduct,
    Pair,
    ReplacesItsParameter,
    ScaledRows,
    StartsElsewhere,
    check_breaks,
    contract_of,
)

from lora_lightning.adapters.base import Adapter

ARGUMENTS: dict[str, dict[str, Any]] = {
    "test_starts_at_base": {"kind": "Linear", "mode": "float32", "training": False},
    "test_several_adapters": {},
    "test_dtypes": {"kind": "Linear", "dtype": torch.bfloat16},
    "test_start_is_a_function_of_seed_and_path": {},
}


@pytest.mark.parametrize(
    ("adapter", "test"),
    [
        (ForgetsTheScaleInTheMerge, "test_forward_equals_merged_weight"),
        (ForgetsTheScaleInLowRank, "test_low_rank"),
        (StartsElsewhere, "test_starts_at_base"),
        (StartsElsewhere, "test_reset"),
        (DrawsGlobally, "test_reset"),
        (DrawsGlobally, "test_start_is_a_function_of_seed_and_path"),
        (ReplacesItsParameter, "test_reset"),
        (NotAFunctionOfTheProduct, "test_factor_pairs_depend_on_the_product_alone"),
        (ScaledRows, "test_several_adapters"),
        (LeavesTheDtype, "test_dtypes"),
        (MisshapenMask, "test_entry_masks_fit_their_parameters"),
    ],
)
def test_a_broken_method_fails_where_it_is_broken(adapter: type[Adapter], test: str) -> None:
    check_breaks(adapter, test, **ARGUMENTS.get(test, {"kind": "Linear"}))


def test_a_kind_left_out_must_be_refused() -> None:
    contract = contract_of(Pair)
    type(contract).base_kinds = ("Linear", "Linear without bias", "Conv1D")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        contract.test_refuses_other_kinds_of_layer()
