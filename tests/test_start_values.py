"""Start: what a start of one's own has to answer, and how a wrong one is told."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.adapters.starts import Factors
from lora_lightning.errors import PluginError, SettingsError
from lora_lightning.injection.records import adapters_named
from lora_lightning.start_values import Start
from lora_lightning.testing import TinyMLP


@dataclass(frozen=True, kw_only=True)
class Ones(Start):
    """Factors of ones."""

    size: float = 1.0

    def of_layer(self, path: str, weight: torch.Tensor, adapter: Any) -> Factors:
        return Factors(self.size * torch.ones_like(adapter.lora_A), torch.ones(weight.shape[0], adapter.rank))


@dataclass(frozen=True, kw_only=True)
class KeptOnes(Ones):
    """The same, not taken off."""

    subtracts: ClassVar[bool] = False


class Nothing(Start):
    """No answer."""


class Forgetful(Ones):
    """No start for some layers."""

    def factors(self, adapters: Any, probe: Any) -> Any:
        yield from list(super().factors(adapters, probe))[:1]


class Wide(Ones):
    """Factors of another shape."""

    def of_layer(self, path: str, weight: torch.Tensor, adapter: Any) -> Factors:
        return Factors(torch.ones(adapter.rank + 1, weight.shape[1]), None)


def adapted(start: Start) -> tuple[nn.Module, nn.Module]:
    plain = TinyMLP().double()
    model = copy.deepcopy(plain)
    ll.inject(model, LoRA(rank=2, alpha=3.0, init=start), ["first", "second"], also_train=())
    return plain, model


def test_a_start_is_taken_off_unless_it_says_otherwise():
    x = torch.ones(3, 6, dtype=torch.float64)
    plain, model = adapted(Ones(size=2.0))
    assert torch.equal(model(x), plain(x))
    assert adapters_named(model, "default")["first"].lora_A.unique().tolist() == [2.0]
    plain, model = adapted(KeptOnes(size=2.0))
    weight = plain.first.weight + 1.5 * 2 * 2.0 * torch.ones(plain.first.weight.shape)
    torch.testing.assert_close(model.first(x), x @ weight.mT + plain.first.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("start", "kind", "said"),
    [
        (Nothing(), NotImplementedError, "a start answers `of_layer`, or `factors`"),
        (Forgetful(), PluginError, r"Forgetful\.factors gives no start for second"),
        (Wide(), SettingsError, r"the start of factor A is \(3, 6\); it is \(2, 6\)"),
        (Ones(size=float("inf")), SettingsError, "the start of factor A holds values that are not finite"),
    ],
)
def test_wrong_starts_are_told(start, kind, said):
    with pytest.raises(kind, match=said):
        adapted(start)


def test_the_base_class_is_no_start():
    with pytest.raises(SettingsError, match=r"LoRA\.init is .*; it must be a start"):
        LoRA(init=Start())
