"""The contract accepts methods that keep it."""

from __future__ import annotations

import ast
import doctest
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import lora_lightning.testing as testing
from lora_lightning.adapters.base import Adapter, write_values
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.low_rank import add_low_rank
from lora_lightning.errors import SettingsError
from lora_lightning.methods import Adapters, Method
from lora_lightning.plugins import registry
from lora_lightning.testing import BASE_KINDS, MethodContract, contract

PARTS = ("Law", "Training", "Storage", "Sharing", "Quantized")
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


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two methods of this file as if a plugin provided them."""
    for method in (RowScale, RoutedByInput):
        monkeypatch.setitem(registry().methods, method.__name__, method)


# -- the public class --------------------------------------------------------------------------------------------------


def test_the_example_in_the_docstring_runs() -> None:
    assert doctest.testmod(contract).failed == 0
    assert any(example.examples for example in doctest.DocTestFinder().find(MethodContract))


def test_public_names_exist() -> None:
    assert all(hasattr(testing, name) for name in testing.__all__)
    assert "Conv2d grouped" in BASE_KINDS


def test_the_one_public_class_is_all_contracts() -> None:
    """Each test comes from one of them, so that none hides another's."""
    parts = MethodContract.__bases__
    assert {part.__name__ for part in parts} == {f"{name}Contract" for name in PARTS}
    tests = [name for part in parts for name in vars(part) if name.startswith("test_")]
    assert len(tests) == len(set(tests)) == 38
    assert set(tests) == {name for name in dir(MethodContract) if name.startswith("test_")}


def messageless(source: str) -> list[int]:
    """Lines with an assertion that says nothing when it fails."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            silent = node.msg is None
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")[2]
            told = {keyword.arg for keyword in node.keywords}
            silent = called == "raises" or (called == "assert_close" and "msg" not in told)
        else:
            continue
        if silent:
            found.append(node.lineno)
    return found


def test_every_assertion_of_the_suite_has_a_message() -> None:
    """Outside this repository pytest shows no more of a failed assertion than what the assertion says."""
    lines = [
        "assert a",
        "assert a, b",
        "torch.testing.assert_close(a, b)",
        "assert_close(a, b, msg=c)",
        "pytest.raises(E)",
    ]
    assert messageless("\n".join(lines)) == [1, 3, 5]
    files = sorted(Path(testing.__file__).parent.glob("*.py"))
    assert len(files) > 5
    assert {file.name: lines for file in files if (lines := messageless(file.read_text()))} == {}
