"""The contract accepts methods that keep it, and names what others break."""

from __future__ import annotations

import doctest
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import lora_lightning.testing as testing
from lora_lightning.adapters.base import Adapter, FactorPair, GroupSpec, write_values
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.low_rank import add_low_rank
from lora_lightning.errors import SettingsError
from lora_lightning.methods import Adapters, Method
from lora_lightning.plugins import registry
from lora_lightning.testing import BASE_KINDS, MethodContract, TinyMLP, contract, perturb, tiny_decoder, tiny_encoder

LINEAR = ("Linear", "Linear without bias", "Conv1D")


def linear_only(base: BaseLayer) -> BaseLayer:
    if base.kind != "linear":
        raise SettingsError(f"takes linear layers only, not {base.kind}.")
    return base


# -- two methods unlike LoRA that keep the contract --------------------------------------------------------------------


class RowScaleAdapter(Adapter):
    """W' = diag(1 + m) W."""

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.magnitude = nn.Parameter(torch.zeros(base.d_out, dtype=base.adapter_dtype))

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        y = base(x)
        product = y if base.bias is None else y - base.per_output(base.bias)
        return y + (base.per_output(self.magnitude) * product).to(y.dtype)

    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight * (1 + self.magnitude.to(weight.dtype))[:, None]

    def reset(self, generator: torch.Generator) -> None:
        write_values(self.magnitude, torch.zeros(self.magnitude.shape))


@dataclass(frozen=True, kw_only=True)
class RowScale(Method):
    """A factor for each output."""

    def build(self, base: BaseLayer) -> Adapter:
        return RowScaleAdapter(base)


class TestRowScale(MethodContract):
    method = RowScale()
    random_start = False


class RoutedAdapter(Adapter):
    """base(x) + B (softmax(R x) * A x)."""

    mergeable = False

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.zeros(rank, base.d_in, dtype=base.adapter_dtype))
        self.down = nn.Parameter(torch.zeros(rank, base.d_in, dtype=base.adapter_dtype))
        self.up = nn.Parameter(torch.zeros(base.d_out, rank, dtype=base.adapter_dtype))

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        gates = base.down(x, self.router.to(x.dtype)).softmax(-1)
        return add_low_rank(base, x, self.down, self.up, gates)

    def merged_weight(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def reset(self, generator: torch.Generator) -> None:
        write_values(self.router, torch.randn(self.router.shape, generator=generator))
        write_values(self.down, torch.randn(self.down.shape, generator=generator))
        write_values(self.up, torch.zeros(self.up.shape))


@dataclass(frozen=True, kw_only=True)
class RoutedByInput(Method):
    """Rank components weighted by the input."""

    mergeable: ClassVar[bool] = False
    export: ClassVar[str] = "not expressible"
    rank: int = 2

    def build(self, base: BaseLayer) -> Adapter:
        return RoutedAdapter(linear_only(base), self.rank)

    def penalty(self, adapters: Adapters) -> Tensor | None:
        return sum((a.get_parameter("router").square().sum() for a in adapters.values()), torch.zeros(()))


class TestRouted(MethodContract):
    method = RoutedByInput()
    base_kinds = LINEAR


# -- methods that break it ---------------------------------------------------------------------------------------------


class Pair(Adapter):
    """A correct low-rank adapter of plain torch, for the wrong ones to differ from in one thing."""

    additive = True

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(2, base.d_in, dtype=base.adapter_dtype))
        self.B = nn.Parameter(torch.zeros(base.d_out, 2, dtype=base.adapter_dtype))

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return add_low_rank(base, x, self.A, self.B, 2.0)

    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight + 2.0 * self.B.to(weight.dtype) @ self.A.to(weight.dtype)

    def reset(self, generator: torch.Generator) -> None:
        write_values(self.A, torch.randn(self.A.shape, generator=generator))
        write_values(self.B, torch.zeros(self.B.shape))

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        return self.A.detach(), 2.0 * self.B.detach()

    def factor_pairs(self) -> tuple[FactorPair, ...]:
        return (FactorPair("", self.A, self.B, 2.0),)


class ForgetsTheScaleInTheMerge(Pair):
    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


class ForgetsTheScaleInLowRank(Pair):
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        return self.A.detach(), self.B.detach()


class StartsElsewhere(Pair):
    def reset(self, generator: torch.Generator) -> None:
        write_values(self.A, torch.randn(self.A.shape, generator=generator))
        write_values(self.B, torch.ones(self.B.shape))


class DrawsGlobally(Pair):
    def reset(self, generator: torch.Generator) -> None:
        write_values(self.A, torch.randn(self.A.shape))
        write_values(self.B, torch.zeros(self.B.shape))


class ReplacesItsParameter(Pair):
    def reset(self, generator: torch.Generator) -> None:
        self.A = nn.Parameter(torch.randn(self.A.shape, generator=generator, dtype=self.A.dtype))
        write_values(self.B, torch.zeros(self.B.shape))


class HidesState(Pair):
    def reset(self, generator: torch.Generator) -> None:
        Pair.reset(self, generator)
        self.hidden = torch.rand((), generator=generator)

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return add_low_rank(base, x, self.A, self.B, 2.0) * (1 + self.B.sum() * self.hidden * self.A.sum())


class NeverUses(Pair):
    def __init__(self, base: BaseLayer) -> None:
        super().__init__(base)
        self.idle_weight = nn.Parameter(torch.zeros(3, dtype=base.adapter_dtype))


class NotAFunctionOfTheProduct(Pair):
    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return add_low_rank(base, x, self.A * self.A, self.B, 2.0)


class OnlySaysItIsAdditive(RowScaleAdapter):
    additive = True


class LeavesTheDtype(Pair):
    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return base(x) + 2.0 * x.to(self.A.dtype) @ self.A.T @ self.B.T


class BreaksTheGraph(Pair):
    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        torch._dynamo.graph_break()
        return add_low_rank(base, x, self.A, self.B, 2.0)


class MisshapenMask(Pair):
    def masks(self) -> Any:
        from lora_lightning.adapters.base import EntryMask

        return (EntryMask(self.A, torch.ones(2, dtype=torch.bool), 1, "zero"),)


@dataclass(frozen=True, kw_only=True)
class Broken(Method):
    """Builds what it is told to."""

    kind: ClassVar[type[Adapter]] = Pair

    def build(self, base: BaseLayer) -> Adapter:
        return self.kind(base)  # type: ignore[call-arg]


def contract_of(adapter: type[Adapter], **changes: Any) -> MethodContract:
    method_class = type("Broken", (Broken,), {"kind": adapter, "__doc__": "x", **changes})
    return type("TestBroken", (MethodContract,), {"method": method_class()})()


ARGUMENTS: dict[str, dict[str, Any]] = {
    "test_starts_at_base": {"kind": "Linear", "mode": "float32", "training": False},
    "test_several_adapters": {},
    "test_only_declared_parameters_train": {},
    "test_compiles": {},
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
        (HidesState, "test_state_dict_round_trip"),
        (NeverUses, "test_only_declared_parameters_train"),
        (NotAFunctionOfTheProduct, "test_factor_pairs_depend_on_the_product_alone"),
        (OnlySaysItIsAdditive, "test_several_adapters"),
        (LeavesTheDtype, "test_dtypes"),
        (MisshapenMask, "test_entry_masks_fit_their_parameters"),
    ],
)
def test_a_broken_method_fails_where_it_is_broken(adapter: type[Adapter], test: str) -> None:
    getattr(contract_of(Pair), test)(**ARGUMENTS.get(test, {"kind": "Linear"}))
    with pytest.raises((AssertionError, RuntimeError)):
        getattr(contract_of(adapter), test)(**ARGUMENTS.get(test, {"kind": "Linear"}))


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


def test_a_kind_left_out_must_be_refused() -> None:
    contract = contract_of(Pair)
    type(contract).base_kinds = LINEAR
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        contract.test_refuses_other_kinds_of_layer()


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


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two methods of this file as if a plugin provided them."""
    for method in (RowScale, RoutedByInput):
        monkeypatch.setitem(registry().methods, method.__name__, method)


# -- the rest of the public module -------------------------------------------------------------------------------------


def test_the_example_in_the_docstring_runs() -> None:
    assert doctest.testmod(contract).failed == 0
    assert any(example.examples for example in doctest.DocTestFinder().find(MethodContract))


def test_public_names_exist() -> None:
    assert all(hasattr(testing, name) for name in testing.__all__)
    assert "Conv2d grouped" in BASE_KINDS


@pytest.mark.parametrize("make", [tiny_encoder, tiny_decoder, TinyMLP])
def test_tiny_models_are_small_repeatable_and_leave_random_numbers_alone(make: Any) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second, other = make(), make(), make(seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert sum(p.numel() for p in first.parameters()) < 6000
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_perturb_moves_every_parameter_by_its_seed() -> None:
    first, second = TinyMLP(), TinyMLP()
    perturb(first, 1)
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    perturb(second, 1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
