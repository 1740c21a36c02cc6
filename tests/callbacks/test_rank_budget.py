"""A budget of rank components over layers: what is kept, what may come back, what stays, what is not reached."""

from __future__ import annotations

import pytest
import torch
from one_layer import base_of

from ll_lora import LoRA
from lora_lightning.adapters.weighted import Components, WeightedAdapter
from lora_lightning.callbacks.rank_budget import RankBudget, average, component_scores
from lora_lightning.errors import NoEffectError, ResumeError, SettingsError
from lora_lightning.testing import perturb


def adapters(kinds: tuple[str, ...] = ("Linear", "Conv1D"), competes: bool = True) -> dict[str, WeightedAdapter]:
    found = {}
    for i, kind in enumerate(kinds):
        found[f"{kind}.adapters.a"] = WeightedAdapter(
            base_of(kind)[0], rank=4, scaling=1.0, components=Components("budgeted" if competes else "free")
        )
        perturb(found[f"{kind}.adapters.a"], seed=i)
    return found


def drive(schedule: RankBudget, found: dict[str, WeightedAdapter], steps: range) -> None:
    """Steps with drawn gradients, after which each parameter moves."""
    for step in steps:
        for i, adapter in enumerate(found.values()):
            for j, parameter in enumerate(adapter.parameters()):
                drawn = torch.Generator().manual_seed(100 * step + 10 * i + j)
                parameter.grad = torch.randn(parameter.shape, generator=drawn, dtype=torch.float64)
        schedule.on_gradients(step, found)
        with torch.no_grad():
            for adapter in found.values():
                for parameter in adapter.parameters():
                    parameter.sub_(0.1 * parameter.grad)
            schedule.on_stepped(step, found)


def open_weights(found: dict[str, WeightedAdapter]) -> int:
    return sum(int(adapter.gate.count_nonzero()) for adapter in found.values())


def test_the_budget_shrinks_along_the_ramp_and_stands_at_its_end() -> None:
    found, schedule = adapters(), RankBudget(0.5, start=2, end=8)
    schedule.on_start(12, found)
    left = []
    for step in range(1, 13):
        drive(schedule, found, range(step, step + 1))
        left.append(open_weights(found))
        assert schedule.metrics() == {"rank": left[-1] / 2}
    assert left == [8, 8, *(int(4 + 4 * (1 - (t - 2) / 6) ** 3) for t in range(3, 8)), 4, 4, 4, 4, 4]


def test_what_was_left_out_grows_again_between_choices_and_no_more_at_the_end() -> None:
    found, schedule = adapters(), RankBudget(0.25, start=2, end=10, every_n_steps=4)
    schedule.on_start(12, found)
    left = {}
    for step in range(1, 13):
        drive(schedule, found, range(step, step + 1))
        left[step] = open_weights(found)
    assert left[3] == 8
    assert left[4] < 8
    assert left[5] == 8
    assert left[10] == left[11] == left[12] == 2


def test_factors_are_never_written() -> None:
    found, schedule = adapters(), RankBudget(0.5, start=2, end=4)
    schedule.on_start(6, found)
    drive(schedule, found, range(1, 6))
    before = {path: (a.lora_A.clone(), a.lora_B.clone()) for path, a in found.items()}
    with torch.no_grad():
        schedule.on_stepped(6, found)
    for path, (A, B) in before.items():
        assert torch.equal(found[path].lora_A, A)
        assert torch.equal(found[path].lora_B, B)


def test_experts_compete_each_for_itself() -> None:
    found, schedule = adapters(("Experts", "Linear")), RankBudget(0.5, start=2, end=4)
    schedule.on_start(6, found)
    drive(schedule, found, range(1, 7))
    assert open_weights(found) == (3 * 4 + 4) // 2


def test_a_layer_without_gradient_loses_to_those_with() -> None:
    found, schedule = adapters(), RankBudget(0.5, start=2, end=4)
    reached, unreached = found.values()
    schedule.on_start(6, found)
    for step in range(1, 6):
        drive(schedule, {"Linear.adapters.a": reached}, range(step, step + 1))
    assert (int(reached.gate.count_nonzero()), int(unreached.gate.count_nonzero())) == (4, 0)


def test_averages_and_scores_are_those_of_the_equations() -> None:
    smooth, spread = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.5, 0.0]).double()
    average(torch.tensor([2.0, -1.0]).double(), torch.tensor([-3.0, 4.0]).double(), smooth, spread, 0.9, 0.5)
    torch.testing.assert_close(smooth, torch.tensor([0.9 + 0.6, 1.8 + 0.4]).double())
    torch.testing.assert_close(spread, torch.tensor([0.25 + 0.5 * 4.5, 0.5 * 1.8]).double())
    scores = component_scores(torch.ones(2, 3), torch.full((2, 3, 4), 2.0), torch.full((2, 5, 3), 4.0))
    assert torch.equal(scores, torch.full((2, 3), 7.0))


def test_a_checkpoint_goes_on_with_the_choice_that_stands() -> None:
    whole, first = adapters(), adapters()
    straight, before, after = (RankBudget(0.5, start=2, end=5) for _ in range(3))
    straight.on_start(8, whole)
    drive(straight, whole, range(1, 9))
    before.on_start(8, first)
    drive(before, first, range(1, 7))
    after.load_state_dict(before.state_dict())
    after.on_start(8, first)
    drive(after, first, range(7, 9))
    for path, adapter in whole.items():
        assert torch.equal(adapter.gate, first[path].gate)
    after.load_state_dict(before.state_dict() | {"smooth": {}})
    with pytest.raises(ResumeError, match=r'holds no table "smooth" for Linear.adapters.a.gate'):
        after.on_start(8, first)


def test_adapters_whose_components_do_not_compete_are_none_of_its() -> None:
    schedule = RankBudget(0.5)
    plain = LoRA(rank=2).build(base_of("Linear")[0])
    for others in ({"0": plain}, adapters(competes=False)):
        with pytest.raises(
            NoEffectError, match=r"RankBudget found nothing to act on: it needs .* compete for a budget"
        ):
            schedule.select(others)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 1.5}, r"RankBudget.budget is 1.5; it must lie in \(0, 1\]"),
        ({"budget": 0.5, "every_n_steps": 0}, r"RankBudget.every_n_steps is 0; it must be at least 1"),
    ],
)
def test_settings_outside_their_rules(settings: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        RankBudget(**settings)  # type: ignore[arg-type]


def test_a_ramp_that_does_not_fit_the_run_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"RankBudget.end is step 9; the run has 8 steps"):
        RankBudget(0.5, start=2, end=9).check_run(8, [])
