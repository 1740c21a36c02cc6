"""What the contracts stand on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from broken_methods import Pair, contract_of

from lora_lightning.errors import SettingsError
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


def test_a_message_names_the_method_the_place_the_promise_and_where_to_look() -> None:
    contract = contract_of(Pair)
    said = contract._broken("A must be B", "Conv2d", "Pair.reset")
    assert said == "Broken on Conv2d: A must be B. Look at Pair.reset."
    assert contract._broken("A must be B") == "Broken: A must be B."


def test_closeness_says_by_how_much_two_tensors_differ() -> None:
    contract, zeros = contract_of(Pair), torch.zeros(2)
    contract._close(zeros, zeros + 1e-12, "Equal.")
    contract._close(torch.zeros(0), torch.zeros(0), "Equal.")
    with pytest.raises(AssertionError, match=r"^Equal\. They differ by 0\.5; 1e-10 is allowed\."):
        contract._close(zeros, torch.tensor([0.0, 0.5]), "Equal.")
    with pytest.raises(AssertionError, match=r"^Equal\. The shape is \(2,\), and must be \(3,\)\."):
        contract._close(zeros, torch.zeros(3), "Equal.")


@pytest.mark.parametrize(
    ("found", "expected", "text"),
    [
        (torch.zeros(3), torch.tensor([0.0, 0.5, -2.0]), r"2 of 3 numbers differ, by 2 at most\."),
        (torch.zeros(2), torch.zeros(3), r"It is float32 of shape \(2,\), and must be float32 of shape \(3,\)\."),
        (torch.zeros(2), torch.zeros(2).double(), r"It is float32 of shape \(2,\), and must be float64 of shape"),
        (torch.tensor([True]), torch.tensor([False]), r"1 of 1 numbers differ, by 1 at most\."),
        (torch.tensor([1.0, torch.nan]), torch.ones(2), r"1 of 2 numbers differ, by nan at most\."),
    ],
)
def test_equality_says_how_two_tensors_differ(found: torch.Tensor, expected: torch.Tensor, text: str) -> None:
    contract = contract_of(Pair)
    contract._equal(expected, expected.clone(), "Same.")
    with pytest.raises(AssertionError, match=f"^Same\\. {text}"):
        contract._equal(found, expected, "Same.")


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ({"a": torch.zeros(1)}, r"Missing: b\."),
        ({"a": torch.zeros(1), "b": torch.zeros(1), "c": torch.zeros(1)}, r"Not among the expected: c\."),
        ({"a": torch.zeros(1), "b": torch.ones(1)}, r"Tensor b: 1 of 1 numbers differ, by 1 at most\."),
    ],
)
def test_states_name_the_tensor_that_differs(found: dict[str, torch.Tensor], text: str) -> None:
    with pytest.raises(AssertionError, match=f"^Same\\. {text}"):
        contract_of(Pair)._equal_states(found, {"a": torch.zeros(1), "b": torch.zeros(1)}, "Same.")


@pytest.mark.parametrize(
    ("raised", "text"),
    [
        (None, r"Nothing was raised; it must be SettingsError\.$"),
        (ZeroDivisionError("by zero"), r"It raised ZeroDivisionError instead: by zero$"),
        (SettingsError("too large"), r'It says "too large", without a match for "small"\.$'),
    ],
)
def test_a_refusal_that_is_none_says_what_came_instead(raised: Exception | None, text: str) -> None:
    contract = contract_of(Pair)
    with contract._refusing(SettingsError, "small", "Refused."):
        raise SettingsError("too small")

    def refused() -> None:
        with contract._refusing(SettingsError, "small", "Refused."):
            if raised is not None:
                raise raised

    with pytest.raises(AssertionError, match=rf"^Refused\. {text}"):
        refused()


@pytest.mark.parametrize(
    ("starts", "first", "text"),
    [
        (
            True,
            torch.ones(2),
            "the first output must be the base layer's bit for bit.* Look at Pair.reset and Pair.forw",
        ),
        (False, torch.zeros(2), "`starts_at_base` is False, and the first output is the base layer's all the same"),
        (True, torch.zeros(2).double(), "the output is torch.float64 and must be torch.float32"),
    ],
)
def test_a_start_that_is_not_the_declared_one(starts: bool, first: torch.Tensor, text: str) -> None:
    contract = contract_of(Pair, starts_at_base=starts)
    _, _, adapter, _ = contract._one_layer("Linear")
    with pytest.raises(AssertionError, match=f"^Broken on Linear: .*{text}"):
        contract._check_start(first, torch.zeros(2), "Linear", adapter)


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
