"""The law's contract names what a method breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from broken_methods import (
    CountsItsCalls,
    DrawsGlobally,
    DrawsOnTheDefaultDevice,
    ForgetsTheScaleInLowRank,
    ForgetsTheScaleInTheMerge,
    LeavesTheDtype,
    LowRankKeepsTheGraph,
    MergesInPlace,
    MisshapenMask,
    MixesRows,
    NotAFunctionOfTheProduct,
    Pair,
    ReplacesItsParameter,
    SaysItCannotMerge,
    ScaledRows,
    ScoresWithoutAMask,
    SharesAFactor,
    StartsElsewhere,
    TrainsInHalf,
    check_breaks,
    contract_of,
)

from lora_lightning.adapters.base import Adapter

ARGUMENTS: dict[str, dict[str, Any]] = {
    "test_starts_at_base": {"kind": "Linear", "mode": "float32", "training": False},
    "test_several_adapters": {},
    "test_dtypes": {"kind": "Linear", "dtype": torch.bfloat16},
    "test_start_is_a_function_of_seed_and_path": {},
    "test_merge_and_unmerge": {"kind": "Linear", "dtype": torch.float32},
    "test_batch_shapes": {"shape": (3, 6), "training": False},
    "test_unmergeable_refuses_to_merge": {},
    "test_disable": {},
}
BROKEN = [
    (
        ForgetsTheScaleInTheMerge,
        "test_forward_equals_merged_weight",
        r"on Linear: the output must be that of the plain layer with the merged weight and bias\. "
        r"Look at ForgetsTheScaleInTheMerge\.forward and ForgetsTheScaleInTheMerge\.merged_weight, .*differ by \d",
    ),
    (
        ForgetsTheScaleInTheMerge,
        "test_merge_and_unmerge",
        r"on Linear, torch\.float32: a merged model must compute what the adapted one does\..*merged_weight\. Tensor",
    ),
    (
        ForgetsTheScaleInLowRank,
        "test_low_rank",
        r"on Linear: B @ A of `low_rank` must be what `merged_weight` adds, scaling included\.",
    ),
    (LowRankKeepsTheGraph, "test_low_rank", r"factor A of `low_rank` requires a gradient; it must be detached\."),
    (
        StartsElsewhere,
        "test_starts_at_base",
        r"on Linear, float32, evaluating: `starts_at_base` is True.* Look at StartsElsewhere\.reset and .*"
        r"or declare `starts_at_base = False`\. 15 of 15 numbers differ",
    ),
    (StartsElsewhere, "test_reset", r"after `reset` the output must be the base layer's.* StartsElsewhere\.reset\. 15"),
    (DrawsGlobally, "test_reset", r"two generators with seed 1 gave different starts\..*Tensor A: 12 of 12 numbers"),
    (
        DrawsGlobally,
        "test_start_is_a_function_of_seed_and_path",
        r"a\.adapters\.default\.A must start the same at seed 1, whatever was drawn before\.",
    ),
    (
        SharesAFactor,
        "test_start_is_a_function_of_seed_and_path",
        r"layers a and b of one shape start the same at seed 1 \(.*\.A, .*\.B\)\. .* layers share .*`Method\.link`",
    ),
    (
        DrawsOnTheDefaultDevice,
        "test_start_is_a_function_of_seed_and_path",
        r"must work whatever torch's default device is, such as meta\..*device=generator\.device",
    ),
    (ReplacesItsParameter, "test_reset", r"put another Parameter in the place of A;.*use `write_values`\.$"),
    (
        NotAFunctionOfTheProduct,
        "test_factor_pairs_depend_on_the_product_alone",
        r'must depend on lora_B @ lora_A alone in factor pair 0 \(""\);.*NotAFunctionOfTheProduct\.factor_pairs',
    ),
    (ScaledRows, "test_several_adapters", r"`additive` is True, so two adapters must add.*or set `additive = False`"),
    (
        LeavesTheDtype,
        "test_dtypes",
        r"output is torch\.float32 on a base layer in torch\.bfloat16.*LeavesTheDtype\.forw",
    ),
    (
        TrainsInHalf,
        "test_dtypes",
        r"A is torch\.bfloat16 on a base.*it must be torch\.float32\..*`base\.adapter_dtype`",
    ),
    (
        MisshapenMask,
        "test_entry_masks_fit_their_parameters",
        r"the entry mask of A has shape \(2,\), the parameter \(2, 6\)\. Look at MisshapenMask\.masks\.$",
    ),
    (
        ScoresWithoutAMask,
        "test_rank_mask_removes_components",
        r"`rank_scores` answers scores, and there is no `rank_mask`\.",
    ),
    (MergesInPlace, "test_merge_and_unmerge", r"adapters disabled must compute what the base.*change nothing in place"),
    (MixesRows, "test_batch_shapes", r"each row of an input of shape \(3, 6\) must be computed on its own\."),
    (
        SaysItCannotMerge,
        "test_unmergeable_refuses_to_merge",
        r"SaysItCannotMerge\.mergeable is False, and Broken\.mergeable True\.",
    ),
    (CountsItsCalls, "test_disable", r"after its adapters were disabled for a moment a model must compute what it did"),
]


@pytest.mark.parametrize(("adapter", "test", "says"), BROKEN)
def test_a_broken_method_fails_where_it_is_broken_and_is_told(adapter: type[Adapter], test: str, says: str) -> None:
    check_breaks(adapter, test, says, **ARGUMENTS.get(test, {"kind": "Linear"}))


def test_a_kind_left_out_must_be_refused() -> None:
    contract = contract_of(Pair)
    type(contract).base_kinds = ("Linear", "Linear without bias", "Conv1D")
    said = "Broken on Conv1d: a kind of layer that `base_kinds` leaves out must be refused .* Nothing was raised"
    with pytest.raises(AssertionError, match=said):
        contract.test_refuses_other_kinds_of_layer()
