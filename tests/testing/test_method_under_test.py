"""What the contracts stand on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from broken_methods import Pair, contract_of

from lora_lightning.testing.method_under_test import MODES
from lora_lightning.testing.toy_models import QUANTIZED


def test_a_model_of_one_layer_is_the_same_each_time_and_leaves_random_numbers_alone() -> None:
    contract = contract_of(Pair)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model, layer, adapter, x = contract._one_layer("Linear")
    assert torch.equal(torch.rand(1), expected)
    assert model[0] is layer
    assert layer.adapter("default") is adapter
    again, _, _, same = contract._one_layer("Linear")
    assert torch.equal(same, x)
    assert torch.equal(again(x), model(x))
    plain, _, _, _ = contract._one_layer("Linear", perturbed=False)
    assert not torch.equal(plain(x), model(x))


def test_closeness_says_by_how_much_two_tensors_differ() -> None:
    contract, zeros = contract_of(Pair), torch.zeros(2)
    contract._close(zeros, zeros + 1e-12)
    contract._close(torch.zeros(0), torch.zeros(0))
    with pytest.raises(AssertionError, match=r"differ by 0\.5; 1e-10 is allowed"):
        contract._close(zeros, torch.tensor([0.0, 0.5]))


@pytest.mark.parametrize(("mode", "dtype"), [("float32", torch.float32), ("autocast to bfloat16", torch.bfloat16)])
def test_modes_are_contexts(mode: str, dtype: torch.dtype) -> None:
    with MODES[mode][1]():
        assert torch.nn.functional.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype == dtype


@pytest.mark.parametrize(
    ("fixture", "kinds", "expected"),
    [
        ("kind", ("Linear", "Embedding"), ("Linear", "Embedding")),
        ("quantized", ("Linear", "Embedding"), tuple(QUANTIZED)),
        ("quantized", ("Embedding",), ()),
    ],
)
def test_tests_run_once_for_each_kind_that_is_declared(
    fixture: str, kinds: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    contract, asked = contract_of(Pair), {}
    type(contract).base_kinds = kinds
    metafunc = SimpleNamespace(fixturenames=[fixture], parametrize=asked.__setitem__)
    contract.pytest_generate_tests(metafunc)  # type: ignore[arg-type]
    assert {name: tuple(values) for name, values in asked.items()} == {fixture: expected}
