"""Plans of methods: who wins, what is skipped, that they are asked once; EVA in miniature on data of known rank."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from miniatures import installed
from miniatures.starts import EVA
from torch import nn

from ll_lora import LoRA
from lora_lightning import inject, load_adapter, save_adapter
from lora_lightning.errors import PluginError, SettingsError, TargetError
from lora_lightning.injection.probe import Probe
from lora_lightning.injection.records import adapters_named, records
from lora_lightning.methods import Method, WrapperMethod
from lora_lightning.testing import TinyMLP


@dataclass(frozen=True, kw_only=True)
class Planned(LoRA):
    """LoRA with a plan given as a setting."""

    own_plan: dict | None = None

    def plan(self, model, targets, probe):
        assert list(targets) == list(probe.layers)
        return self.own_plan or {}


@dataclass(frozen=True, kw_only=True)
class Around(WrapperMethod):
    """A method around another."""


@pytest.fixture(autouse=True, scope="module")
def _installed():
    with installed(EVA, Planned, Around):
        yield


def ranks(model: nn.Module) -> dict[str, int]:
    return {path: len(adapter.lora_A) for path, adapter in adapters_named(model, "default").items()}


def planned(plan, overrides=None, method=Planned):
    model = TinyMLP()
    report = inject(
        model, method(rank=2, own_plan=plan), ["first", "second"], overrides=overrides, also_train=(), seed=0
    )
    return model, report


def test_override_wins_over_plan_wins_over_field():
    model, _ = planned({"first": {"rank": 3, "alpha": 5.0}}, {"first": {"alpha": 7.0}})
    settings = records(model)["default"].layers
    assert (settings["first"].rank, settings["first"].alpha) == (3, 7.0)
    assert (settings["second"].rank, settings["second"].alpha) == (2, 16.0)
    assert ranks(model) == {"first": 3, "second": 2}
    assert records(model)["default"].plan == {"first": {"rank": 3, "alpha": 5.0}}


def test_rank_zero_skips_a_layer_unless_an_override_gives_it_one():
    model, report = planned({"first": {"rank": 0, "alpha": 1.0}}, {"first": {"dropout": 0.1}})
    assert ranks(model) == {"second": 2}
    assert type(model.first) is nn.Linear
    assert report.skipped["first"] == "rank 0 in the method's plan"
    model, _ = planned({"first": {"rank": 0, "alpha": 1.0}}, {"first": {"rank": 1}})
    assert ranks(model) == {"first": 1, "second": 2}
    assert records(model)["default"].layers["first"].alpha == 1.0
    with pytest.raises(TargetError, match="every layer rank 0"):
        planned({"first": {"rank": 0}, "second": {"rank": 0}})


def test_a_plan_of_a_method_inside_is_of_its_fields():
    model = TinyMLP()
    inner = Planned(rank=2, own_plan={"first": {"rank": 0}, "second": {"rank": 3}})
    inject(model, Around(inner=inner), ["first", "second"], also_train=())
    assert ranks(model) == {"second": 3}


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ({"frist": {"rank": 1}}, PluginError, 'names frist, which is none .* Did you mean "first"'),
        ({"first": {"rnak": 1}}, SettingsError, r'plan\[first\]: Planned has no "rnak"'),
        ({"first": {"rank": -1}}, SettingsError, "rank is -1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_and_the_model_is_as_it_was(plan, error, message):
    model = TinyMLP()
    with pytest.raises(error, match=message):
        inject(model, Planned(own_plan=plan), ["first", "second"], also_train=())
    assert list(model.state_dict()) == list(TinyMLP().state_dict())


def test_same_ranks_by_hand_give_the_same_adapter_bit_for_bit():
    one, _ = planned({"first": {"rank": 3}})
    two, _ = planned(None, {"first": {"rank": 3}})
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(one.state_dict()[key], value) for key, value in two.state_dict().items())


# -- EVA ---------------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two layers that see inputs of rank 1 and of rank 4."""

    def __init__(self) -> None:
        super().__init__()
        self.poor, self.rich = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x):
        return self.poor(x[0]) + self.rich(x[1])


def branches() -> tuple[Branches, list, torch.Tensor]:
    subspace = torch.linalg.qr(torch.randn(8, 5, dtype=torch.float64))[0].mT
    line = torch.randn(64, 1, dtype=torch.float64) @ subspace[:1]
    space = torch.randn(64, 4, dtype=torch.float64) @ subspace[1:]
    return Branches().double(), [(line[:32], space[:32]), (line[32:], space[32:])], subspace


def probe_of(batches) -> Probe:
    return Probe(batches, lambda model, batch: model(batch).square().mean())


def test_ranks_go_where_the_variance_is_and_rows_span_the_inputs():
    model, batches, subspace = branches()
    x = batches[0]
    before = model(x)
    probe = probe_of(batches)
    inject(model, EVA(rank=2, alpha=3.0), ["poor", "rich"], also_train=(), probe=probe)
    assert ranks(model) == {"poor": 1, "rich": 3}  # the budget is 2 a layer; the line needs one direction
    assert probe.passes == 2
    assert torch.equal(model(x), before)
    for path, layer in adapters_named(model, "default").items():
        A = layer.lora_A.detach()
        torch.testing.assert_close(A @ A.mT, torch.eye(len(A), dtype=torch.float64), rtol=0, atol=1e-12)
        own = subspace[:1] if path == "poor" else subspace[1:]
        torch.testing.assert_close(A @ own.mT @ own, A, rtol=0, atol=1e-10)
        assert layer.scaling == 1.5  # the same at every rank


def test_without_redistribution_every_layer_has_the_rank():
    model, batches, _ = branches()
    full = [(b[1], b[1]) for b in batches]
    inject(model, EVA(rank=2, rho=1.0), ["poor", "rich"], also_train=(), probe=probe_of(full))
    assert ranks(model) == {"poor": 2, "rich": 2}


def test_without_batches_the_method_says_what_it_needs():
    with pytest.raises(SettingsError, match=r"probe=Probe\(batches\)"):
        inject(TinyMLP(), EVA(), ["first"], also_train=())


def test_a_saved_adapter_is_loaded_without_asking(tmp_path):
    model, batches, _ = branches()
    inject(model, EVA(rank=2), ["poor", "rich"], also_train=(), probe=probe_of(batches))
    save_adapter(model, tmp_path / "adapter")
    fresh = Branches().double()
    fresh.load_state_dict({k.replace(".base", ""): v for k, v in model.state_dict().items() if "adapters" not in k})
    load_adapter(fresh, tmp_path / "adapter")
    assert ranks(fresh) == {"poor": 1, "rich": 3}
    assert records(fresh)["default"].plan == records(model)["default"].plan
    x = batches[0]
    assert torch.equal(fresh(x), model(x))


def test_a_plan_that_is_given_is_not_asked_for():
    model, batches, _ = branches()
    plan = {"poor": {"rank": 0, "alpha": 0.0}, "rich": {"rank": 4, "alpha": 4.0}}
    probe = probe_of(batches)
    inject(model, EVA(rank=2), ["poor", "rich"], also_train=(), probe=probe, planned=plan)
    assert ranks(model) == {"rich": 4}
    assert probe.passes == 0


def test_a_method_that_plans_nothing_asks_nothing():
    assert Method.plan is LoRA.plan
    model = TinyMLP()
    probe = Probe([torch.zeros(1, 6)])
    inject(model, LoRA(rank=2), ["first"], also_train=(), probe=probe)
    assert probe.passes == 0
    assert records(model)["default"].plan == {}
