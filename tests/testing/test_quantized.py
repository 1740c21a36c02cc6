"""The contract on quantized bases: a format that needs no package runs all of it, and a broken method fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from broken_methods import ForgetsTheScaleInTheMerge, LeavesTheDtype, Pair, TrainsInHalf, check_breaks, contract_of
from toy_quantized import RowScaledLinear, row_scaled_base

from ll_lora import LoRA
from lora_lightning.models import base_layers
from lora_lightning.testing import MethodContract
from lora_lightning.testing import quantized as contract


@pytest.fixture(autouse=True)
def _format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_layers, "base_layer_kinds", lambda _: [("toy", row_scaled_base)])
    monkeypatch.setitem(contract.QUANTIZED, "toy", ("torch", RowScaledLinear))


class OnToy(MethodContract):
    method = LoRA(rank=2, alpha=4.0)


@pytest.mark.parametrize("mode", ["float32", "bfloat16 base"])
def test_it_starts_and_trains(mode: str) -> None:
    OnToy().test_quantized_base_starts_and_trains("toy", mode)


def test_it_keeps_the_law_and_merges(capsys: pytest.CaptureFixture[str]) -> None:
    OnToy().test_quantized_base_keeps_the_law("toy")
    OnToy().test_quantized_base_merges("toy", capsys)


def test_it_saves_and_loads(tmp_path: Path) -> None:
    OnToy().test_quantized_base_saves_and_loads("toy", tmp_path)


def test_a_broken_method_fails_where_it_is_broken() -> None:
    says = (
        r"on toy: the output must be that of the dequantized weight with the update\..* They differ by \d\S+ of their"
    )
    check_breaks(ForgetsTheScaleInTheMerge, "test_quantized_base_keeps_the_law", says, quantized="toy")
    says = r"on toy, bfloat16 base, evaluating: the output is torch\.float32 and must be torch\.bfloat16"
    check_breaks(LeavesTheDtype, "test_quantized_base_starts_and_trains", says, quantized="toy", mode="bfloat16 base")
    says = r"on toy, float32, evaluating: A is torch\.bfloat16; on a quantized base it must be torch\.float32\."
    check_breaks(TrainsInHalf, "test_quantized_base_starts_and_trains", says, quantized="toy", mode="float32")


def test_a_quantized_weight_that_changes_is_named() -> None:
    contract = contract_of(Pair)
    with pytest.raises(AssertionError, match=r"^Frozen\. Tensor weight: 1 of 2 numbers differ, by 1 at most\."):
        contract._equal_plain({"weight": torch.tensor([0.0, 1.0])}, {"weight": torch.zeros(2)}, "Frozen.")


def test_a_format_without_its_package_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contract.QUANTIZED, "toy", ("no_such_package", RowScaledLinear))
    with pytest.raises(pytest.skip.Exception, match="needs no_such_package"):
        contract_of(Pair).test_quantized_base_keeps_the_law("toy")
    assert torch.is_grad_enabled()
