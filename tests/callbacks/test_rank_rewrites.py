"""Weak rank components become copies of strong ones: which, when, with which moments, and what stays as it is."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ll_beamlora import BeamLoRA
from ll_sora import SoRA
from lora_lightning.adapters.layers.kinds import ExpertStack
from lora_lightning.callbacks.rank_rewrites import RankRewrites, mass_at, pairing, pruned_counts
from lora_lightning.errors import NoEffectError, SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.records import trainable_adapters

# -- the equations -----------------------------------------------------------------------------------------------------


def test_the_mass_falls_along_half_a_cosine() -> None:
    assert [mass_at(t, 10, 0.4) for t in (0, 5, 10, 11)] == pytest.approx([0.4, 0.2, 0.0, 0.0], abs=1e-16)
    assert mass_at(2, 10, 0.4) == pytest.approx(0.2 * (1 + math.cos(0.2 * math.pi)))


@pytest.mark.parametrize("mass", [0.01, 0.1, 0.3, 0.6])
def test_the_pruned_ones_are_those_behind_the_first_sum_above_the_rest(mass: float) -> None:
    drawn = torch.Generator().manual_seed(0)
    weights = {"a": torch.rand(1, 6, generator=drawn), "b": torch.rand(3, 8, generator=drawn)}
    counts = pruned_counts(weights, mass)
    everyone = sorted(
        ((float(v), p, m) for p, w in weights.items() for m, row in enumerate(w) for v in row), reverse=True
    )
    total, so_far, expected = sum(v for v, _, _ in everyone), 0.0, {}
    for value, path, row in everyone:
        if so_far > (1 - mass) * total:
            expected[path, row] = expected.get((path, row), 0) + 1
        so_far += value
    for path, count in counts.items():
        half = weights[path].shape[-1] // 2
        assert count.tolist() == [min(expected.get((path, row), 0), half) for row in range(len(count))]
    lost = sum(
        float(weights[p][m].sort().values[: int(c)].sum()) for p, row in counts.items() for m, c in enumerate(row)
    )
    assert lost <= mass * total


def test_nothing_is_pruned_where_the_mass_is_zero_whatever_rounding_gives() -> None:
    weights = {"a": torch.rand(50, 7, generator=torch.Generator().manual_seed(0))}
    assert not pruned_counts(weights, 0.0)["a"].any()


def test_pairs_are_the_weakest_and_the_strongest_apart() -> None:
    weights = torch.tensor([0.5, 2.0, 0.1, 1.4, 1.0, 1.0])
    P, Q = pairing(weights, 3, torch.Generator().manual_seed(0))
    assert set(P.tolist()) == {5, 0, 2}  # of equal ones the last are weak
    assert set(Q.tolist()) == {1, 3, 4}
    orders = {tuple(pairing(weights, 3, torch.Generator().manual_seed(seed))[1].tolist()) for seed in range(20)}
    assert len(orders) > 3
    empty = pairing(weights, 0, torch.Generator().manual_seed(0))
    assert [len(side) for side in empty] == [0, 0]


# -- the schedule ------------------------------------------------------------------------------------------------------


class Loop:
    """Two layers with gates that differ, and the callback driven by hand."""

    def __init__(self, total: int | None = 20, optimizer=torch.optim.AdamW, **settings) -> None:
        given = {"stage_steps": 4, "pruned_mass": 0.3, "end": 18, **settings}
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7)).double()
        inject(self.model, BeamLoRA(rank=6, temperature=0.5, **given), seed=0)
        self.adapters = trainable_adapters(self.model)
        with torch.no_grad():
            for i, adapter in enumerate(self.adapters.values()):
                adapter.gate.copy_(torch.randn(6, generator=torch.Generator().manual_seed(i), dtype=torch.float64))
        self.optimizer = optimizer([p for p in self.model.parameters() if p.requires_grad], lr=0.01)
        self.schedule = RankRewrites(**given)
        self.start(total)
        self.t = 0

    def start(self, total: int | None) -> None:
        self.schedule.module, self.schedule.total = self.model, total
        self.schedule.trainer = SimpleNamespace(optimizers=[self.optimizer])
        self.schedule.on_start(total, self.adapters)

    def train(self) -> None:
        self.t += 1
        drawn = torch.Generator().manual_seed(self.t)
        x = torch.randn(5, 9, generator=drawn, dtype=torch.float64)
        self.optimizer.zero_grad()
        (self.model(x) - torch.randn(5, 7, generator=drawn, dtype=torch.float64)).square().mean().backward()
        self.optimizer.step()

    def act(self) -> None:
        with torch.no_grad():
            self.schedule.on_stepped(self.t, self.adapters)

    def steps(self, until: int) -> None:
        while self.t < until:
            self.train()
            self.act()

    def tensors(self) -> dict[tuple[str, str, str], Tensor]:
        """Values and moments by adapter, side and kind."""
        found = {}
        for path, adapter in self.adapters.items():
            for side in ("gate", "lora_A", "lora_B"):
                parameter = adapter.get_parameter(side)
                state = {key: v for key, v in self.optimizer.state[parameter].items() if v.shape == parameter.shape}
                for kind, value in {"value": parameter.detach(), **state}.items():
                    found[path, side, kind] = value.clone()
        return found


def rewritten(loop: Loop, released: bool = False) -> int:
    """Take the loop over its next rewrite, and check every tensor against the equations."""
    first = loop.t
    loop.steps(first + 2 + released)
    old = loop.tensors()
    loop.steps(first + 3)
    loop.train()
    before = loop.tensors()
    loop.act()
    after = loop.tensors()
    step = loop.t - released
    weights = {path: 6 * torch.softmax(before[path, "gate", "value"] / 0.5, -1)[None] for path in loop.adapters}
    counts = pruned_counts(weights, mass_at(step, 18, 0.3))
    total = 0
    for path in loop.adapters:
        order = weights[path][0].argsort(descending=True, stable=True).tolist()
        k = int(counts[path])
        P, best = order[6 - k :], set(order[:k])
        total += k
        taken = []
        for p in P:
            source = [
                q for q in best if torch.equal(after[path, "lora_A", "value"][p], old[path, "lora_A", "value"][q])
            ]
            (q,) = source
            taken.append(q)
            assert torch.equal(after[path, "lora_B", "value"][:, p], old[path, "lora_B", "value"][:, q])
            mean = (before[path, "gate", "value"][p] + before[path, "gate", "value"][q]) / 2
            assert after[path, "gate", "value"][p] == after[path, "gate", "value"][q] == mean
            for kind in ("exp_avg", "exp_avg_sq"):
                moment_A, moment_B = after[path, "lora_A", kind][p], after[path, "lora_B", kind][:, p]
                kept = before if released else old
                at = p if released else q
                assert torch.equal(moment_A, kept[path, "lora_A", kind][at])
                assert torch.equal(moment_B, kept[path, "lora_B", kind][:, at])
        assert sorted(taken) == sorted(best)
        rest = [i for i in range(6) if i not in P]
        for kind in ("value", "exp_avg", "exp_avg_sq"):
            assert torch.equal(after[path, "lora_A", kind][rest], before[path, "lora_A", kind][rest])
            assert torch.equal(after[path, "lora_B", kind][:, rest], before[path, "lora_B", kind][:, rest])
            if kind != "value":
                cleared = bool(k) or released
                assert torch.equal(after[path, "gate", kind], before[path, "gate", kind] * (not cleared))
        others = [i for i in rest if i not in best]
        assert torch.equal(after[path, "gate", "value"][others], before[path, "gate", "value"][others])
    assert loop.schedule.metrics() == {"rewritten": float(total)}
    return total


def test_rewrites_are_those_of_the_equations_and_leave_all_else() -> None:
    loop = Loop()
    assert sum(rewritten(loop) for _ in range(3)) > 4


def test_the_released_details_keep_moments_of_factors_and_clear_those_of_all_gates() -> None:
    loop = Loop(details="released")
    assert sum(rewritten(loop, released=True) for _ in range(3)) > 4


def test_the_last_rewrite_leaves_a_whole_stage() -> None:
    loop, changed = Loop(total=11), []
    for _ in range(11):
        loop.train()
        before = loop.tensors()
        loop.act()
        after = loop.tensors()
        if any(not torch.equal(after[key], before[key]) for key in before):
            changed.append(loop.t)
    assert changed == [4]


def test_nothing_is_rewritten_from_the_end_on_or_without_mass() -> None:
    for settings in ({"end": 6}, {"pruned_mass": 0.0}):
        loop = Loop(**settings)
        loop.steps(4 if "end" in settings else 0)
        while loop.t < 20:
            loop.train()
            before = loop.tensors()
            loop.act()
            assert all(torch.equal(value, before[key]) for key, value in loop.tensors().items())
        assert loop.schedule.state_dict()["snapshot"] == {}


def test_a_step_that_a_scaler_skipped_delays_what_was_due() -> None:
    loop = Loop()
    loop.steps(1)
    loop.train()  # step 2, where the snapshot is due
    loop.steps(3)
    assert loop.schedule.state_dict()["due"] == 4
    loop.train()  # step 4
    loop.train()
    before = loop.tensors()
    loop.act()
    assert any(not torch.equal(value, before[key]) for key, value in loop.tensors().items())


@pytest.mark.parametrize("step", [1, 2, 3, 4, 7])
def test_a_checkpoint_at_any_step_goes_on_alike(step: int) -> None:
    straight, first = Loop(), Loop()
    straight.steps(13)
    first.steps(step)
    saved = first.schedule.state_dict()
    first.schedule = RankRewrites(stage_steps=4, pruned_mass=0.3, end=18)
    first.schedule.load_state_dict(saved)
    first.start(20)
    first.steps(13)
    for key, value in straight.tensors().items():
        assert torch.equal(value, first.tensors()[key]), key


def test_experts_are_rewritten_each_for_itself() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(ExpertStack(nn.Parameter(torch.randn(3, 5, 6)), False)).double()
    inject(model, BeamLoRA(rank=4, temperature=0.5, stage_steps=2), ["0"], seed=0)
    ((path, adapter),) = trainable_adapters(model).items()
    with torch.no_grad():
        adapter.gate[1].copy_(torch.tensor([0.0, -1.0, 0.1, 0.2]))
        adapter.lora_B.normal_(generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = RankRewrites(2, 0.05, 100)
    schedule.module, schedule.total, schedule.trainer = model, 8, SimpleNamespace(optimizers=[optimizer])
    schedule.on_start(8, {path: adapter})
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    for step in (1, 2):
        with torch.no_grad():
            schedule.on_stepped(step, {path: adapter})
    assert torch.equal(adapter.lora_A[[0, 2]], before["lora_A"][[0, 2]])
    assert torch.equal(adapter.lora_A[1, 1], before["lora_A"][1, 3])
    assert torch.equal(adapter.lora_B[1, :, 1], before["lora_B"][1, :, 3])
    assert adapter.gate[1].tolist() == pytest.approx([0.0, -0.4, 0.1, -0.4])


def test_an_optimizer_whose_state_has_another_shape_is_refused_by_name() -> None:
    loop = Loop(optimizer=torch.optim.Adafactor)
    with pytest.raises(SettingsError, match=r'Adafactor keeps "row_var" of shape \(6, 1\) for a parameter of shape'):
        loop.steps(3)


def test_other_adapters_are_none_of_its() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, SoRA(rank=2), seed=0)
    with pytest.raises(NoEffectError, match=r"RankRewrites found nothing to act on: .* may be overwritten"):
        RankRewrites(4).select(trainable_adapters(model))


@pytest.mark.parametrize(
    ("settings", "total", "message"),
    [
        ({"stage_steps": 11}, 20, r"stage_steps is 11, here 11; a run of 20 steps with end at step 13 .* at most 10"),
        (
            {"stage_steps": 8, "end": 6},
            20,
            r"end at step 6 rewrites nothing then, so it must be at most 5. pruned_mass 0",
        ),
        ({"stage_steps": 0.08}, 3, r"is 0.08, here 2; a run of 3 steps .* so a run needs 4 steps or more"),
        ({"stage_steps": 0.08, "details": "released"}, 5, r"here 3; a run of 5 .* so a run needs 6 steps or more"),
        ({"stage_steps": 8}, None, r"RankRewrites.end is 0.67, a fraction of all steps, but nothing bounds"),
    ],
)
def test_a_run_without_a_rewrite_is_refused(settings, total, message) -> None:
    with pytest.raises(SettingsError, match=message):
        RankRewrites(**settings).check_run(total, [])
    RankRewrites(**settings, pruned_mass=0.0).check_run(total, [])
