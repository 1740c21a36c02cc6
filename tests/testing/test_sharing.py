"""The contract on methods whose layers share tensors, frozen and trained, and on starts that are subtracted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest
import torch
from miniatures import installed
from miniatures.sharing import ScaledAdapter, SharedFactors, TiedLoRA, VeRA
from miniatures.starts import PiSSA
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, GroupSpec, write_values
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.linked import Linked
from lora_lightning.adapters.low_rank import add_low_rank
from lora_lightning.methods import Adapters, Method
from lora_lightning.testing import BASE_KINDS, MethodContract

WITHOUT_EXPERTS = tuple(kind for kind in BASE_KINDS if not kind.startswith("Experts"))


@pytest.fixture(autouse=True, scope="module")
def _installed() -> Iterator[None]:
    with installed(VeRA, TiedLoRA, PiSSA):
        yield


class TestVeRA(MethodContract):
    method = VeRA(rank=2)
    base_kinds = WITHOUT_EXPERTS
    random_start = False  # a layer's own tensors; the shared ones are drawn


@pytest.mark.slow
class TestTiedLoRA(MethodContract):
    method = TiedLoRA(rank=2)
    base_kinds = WITHOUT_EXPERTS
    random_start = False


@pytest.mark.slow
class TestPiSSA(MethodContract):
    method = PiSSA(rank=2, alpha=3.0)
    random_start = False


# -- methods that share wrongly ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HoldsTheSharedModule(TiedLoRA):
    """Each of its adapters registers what it reads."""

    def link(self, model: nn.Module, adapters: Adapters) -> Mapping[str, Linked]:
        linked = TiedLoRA.link(self, model, adapters)
        for adapter in adapters.values():
            adapter.own = next(iter(linked.values()))
        return linked


class DrawnGlobally(SharedFactors):
    def reset(self, generator: torch.Generator) -> None:
        write_values(self.lora_A, torch.rand(self.lora_A.shape))


@dataclass(frozen=True, kw_only=True)
class DrawsSharedStartsGlobally(TiedLoRA):
    """Its shared factors start where torch's own random numbers happen to be."""

    def link(self, model: nn.Module, adapters: Adapters) -> Mapping[str, Linked]:
        linked = TiedLoRA.link(self, model, adapters)
        for shared in linked.values():
            shared.__class__ = DrawnGlobally
        return linked


class OneSided(ScaledAdapter):
    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        A, B = self.factors()
        return add_low_rank(base, x, A, B.detach() + self.out_scale[:, None], self.rank_scale)


@dataclass(frozen=True, kw_only=True)
class DetachesAFactor(TiedLoRA):
    """No gradient reaches its shared B."""

    def build(self, base: BaseLayer) -> Adapter:
        return OneSided(base, self.rank)


@dataclass(frozen=True, kw_only=True)
class ForgetsItsGroup(TiedLoRA):
    """Its groups leave out what is shared."""

    def param_groups(self, adapters: Adapters) -> dict[str, GroupSpec]:
        own = [p for adapter in adapters.values() for p in adapter.parameters()]
        return {"own": GroupSpec(params=own)}


@pytest.mark.parametrize(
    ("method", "test", "says"),
    [
        (
            HoldsTheSharedModule,
            "test_linked_modules_stay_one_thing",
            r"^HoldsTheSharedModule: one shared tensor must have one name, not 3: .*\.own\.lora_A.* Look at `link`",
        ),
        (
            DrawsSharedStartsGlobally,
            "test_linked_start_is_a_function_of_the_seed",
            r"shared tensors must start the same at seed 1, whatever was drawn before\..*`Linked\.reset`.*lora_A: ",
        ),
        (DetachesAFactor, "test_linked_parameters_train_once", r"lora_B has no gradient, so no layer reads it\."),
        (
            ForgetsItsGroup,
            "test_param_groups_hold_every_trainable_once",
            r"adapters\.default\.lora_A must be in one parameter group once, not in none\. Look at `param_groups`",
        ),
    ],
)
def test_a_method_that_shares_wrongly_is_told(method: type[Method], test: str, says: str) -> None:
    with installed(method):
        contract = type("TestShared", (MethodContract,), {"method": method()})()
        with pytest.raises(AssertionError, match=says):
            getattr(contract, test)()
