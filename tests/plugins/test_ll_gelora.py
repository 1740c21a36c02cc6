"""GeLoRA: the contract, the estimator against independent computations, and ranks from data."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from resuming import SaveAt, assert_equal_runs, at_step, run
from toy_runs import classification, encoder_folder, labelled_data

from ll_gelora import GeLoRA
from ll_gelora.functional import gain, pooled, two_nn
from ll_lora import LoRA
from lora_lightning.errors import SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.probe import Probe
from lora_lightning.injection.records import adapters_named, records
from lora_lightning.testing import MethodContract, TinyMLP, tiny_encoder


@pytest.mark.slow  # its layers are those of plain pairs
class TestGeLoRA(MethodContract):
    method = GeLoRA(rank=2, alpha=4.0, gains={})
    repeated = ("test_compiles",)


def samples(dimension, n=1500, width=64, seed=0):
    """Gaussian points of a dimension in a linear subspace."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, dimension, generator=generator, dtype=torch.float64))[0]
    return torch.randn(n, dimension, generator=generator, dtype=torch.float64) @ basis.T


def reference(points, estimator, discard=0.1):
    """TwoNN, one point after the other."""
    x = np.unique(points.numpy(), axis=0)
    ratios = []
    for i in range(len(x)):
        distances = sorted(np.linalg.norm(x - x[i], axis=1)[np.arange(len(x)) != i])
        ratios.append(np.log(distances[1] / distances[0]))
    ratios = np.sort(ratios)
    if estimator == "mle":
        return len(ratios) / ratios.sum()
    keep = len(ratios) - max(1, int(discard * len(ratios)))
    y = [-np.log(1 - (k + 1) / len(ratios)) for k in range(keep)]
    return np.linalg.lstsq(ratios[:keep, None], np.array(y), rcond=None)[0][0]


# -- the estimator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["fit", "mle"])
def test_the_estimate_equals_one_point_after_the_other(estimator, monkeypatch):
    points = samples(3, n=150)
    points[7] = points[3]  # an equal point
    monkeypatch.setattr("ll_gelora.functional.CHUNK", 40)
    assert two_nn(points, estimator) == pytest.approx(reference(points, estimator), rel=1e-10)
    assert two_nn(points, estimator, 0.3) == pytest.approx(reference(points, estimator, 0.3), rel=1e-10)


@pytest.mark.parametrize("dimension", [1, 2, 4, 6])
def test_dimensions_of_linear_subspaces_are_recovered(dimension):
    assert two_nn(samples(dimension)) == pytest.approx(dimension, rel=0.15)


@pytest.mark.parametrize("estimator", ["fit", "mle"])
def test_isometries_and_one_scale_of_all_points_change_nothing(estimator):
    points = samples(4, n=300)
    turn = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0]
    other = 3.7 * points @ turn + torch.randn(64, dtype=torch.float64)
    assert two_nn(other, estimator) == pytest.approx(two_nn(points, estimator), rel=1e-8)


def test_points_that_are_all_equal_have_dimension_zero_and_few_are_refused():
    assert two_nn(torch.ones(50, 4)) == 0.0
    with pytest.raises(SettingsError, match=r"estimated from 19 different points; it takes at least 20"):
        two_nn(torch.cat([samples(2, n=19), samples(2, n=19)]))


@pytest.mark.parametrize(("before", "after", "expected"), [(3.2, 5.9, 3), (4.0, 4.0, 0), (9.0, 2.0, 0), (1.0, 1.4, 0)])
def test_a_gain_is_rounded_and_never_negative(before, after, expected):
    assert gain(before, after) == expected


def test_an_example_is_the_mean_the_first_or_the_last_token_that_counts():
    x = torch.arange(12.0).view(1, 4, 3).repeat(2, 1, 1)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    for how, rows in {"mean": [[0, 1, 2], [2, 3]], "first": [[0], [2]], "last": [[2], [3]]}.items():
        expected = torch.stack([x[0, chosen].mean(0) for chosen in rows])
        assert torch.equal(pooled(x, mask, how, False), expected)
    assert torch.equal(pooled(x, None, "last", False), x[:, 3])
    image = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(pooled(image, None, "mean", False), image.mean((2, 3)))
    assert torch.equal(pooled(x, None, "mean", True), x.mean(2))  # a sequence whose channels come first


# -- the plan ----------------------------------------------------------------------------------------------------------


def batches(n=6, size=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        ids = torch.randint(1, 32, (size, 6), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(size, dtype=torch.long)}


def test_ranks_follow_from_the_dimensions_around_each_block():
    model, method = tiny_encoder().double(), GeLoRA()
    plain = copy.deepcopy(model)
    inject(model, method, seed=0, probe=Probe(batches()))
    states = [plain(**batch, output_hidden_states=True).hidden_states for batch in batches()]
    means = [torch.cat([s[i].mean(1) for s in states]).detach() for i in range(3)]
    dimensions = [reference(points, "fit") for points in means]
    for path, adapter in adapters_named(model, "default").items():
        block = int(path.split("layer.")[1][0])
        rank = 1 + max(round(dimensions[block + 1] - dimensions[block]), 0)
        assert (adapter.rank, adapter.scaling) == (rank, 2.0), path
    assert len(records(model)["default"].plan) == 12


def test_layers_in_no_block_are_judged_by_what_enters_and_leaves_them():
    model = TinyMLP()
    with torch.no_grad():  # everything that leaves `first` lies on a line: the dimension falls, then stays
        model.first.weight.copy_(torch.outer(torch.ones(8), torch.randn(6)))
    x = torch.randn(200, 6)
    inject(model, GeLoRA(rank=2, alpha=2.0), seed=0, probe=Probe([x], lambda m, b: m(b).mean()))
    assert {path: a.rank for path, a in adapters_named(model, "default").items()} == {"first": 2, "second": 2}
    noisy, table = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 8)), torch.randn(200, 4)
    noisy[0].register_forward_hook(lambda m, a, y: torch.cat([y[:, :4], table], 1))
    line = x[:, :1] * torch.arange(1.0, 7.0)
    inject(noisy, GeLoRA(), seed=0, probe=Probe([line], lambda m, b: m(b).mean()))
    with torch.no_grad():
        states = [
            line,
            (y := torch.cat([(line @ noisy[0].base.weight.T + noisy[0].base.bias)[:, :4], table], 1)),
            noisy[1].base(y),
        ]
    before, after, last = (reference(s.double(), "fit") for s in states)
    ranks = [1 + max(round(after - before), 0), 1 + max(round(last - after), 0)]
    assert [a.rank for a in adapters_named(noisy, "default").values()] == ranks
    assert ranks[0] > 3


def test_the_same_seed_gives_the_same_ranks_and_nothing_moves():
    plans, state = [], torch.get_rng_state()
    for _ in range(2):
        model = tiny_encoder()
        weights = copy.deepcopy(model.state_dict())
        torch.set_rng_state(state)
        probe = Probe(batches())
        with probe.on(model, {}):
            pass
        inject(model, GeLoRA(), seed=0, probe=probe)
        assert torch.equal(torch.get_rng_state(), state)
        plans.append(records(model)["default"].plan)
        plain = {
            key.replace(".base.", "."): value for key, value in model.state_dict().items() if "adapters" not in key
        }
        assert all(torch.equal(plain[key], value) for key, value in weights.items())
    assert plans[0] == plans[1]


def test_it_is_lora_with_these_ranks_bit_for_bit():
    gains = {"bert.encoder.layer.0": 2}
    own, plain = tiny_encoder(), tiny_encoder()
    inject(own, GeLoRA(rank=1, alpha=2.0, gains=gains), seed=0)
    inject(plain, LoRA(rank=1, alpha=2.0), overrides={"layer.0": {"rank": 3, "alpha": 6.0}}, seed=0)
    for model in (own, plain):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for batch in batches(2, 4):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    ours, theirs = ({key: v for key, v in model.state_dict().items() if "mask" not in key} for model in (own, plain))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_the_report_says_the_ranks():
    model = tiny_encoder()
    inject(model, method := GeLoRA(gains={"bert.encoder.layer.1": 3}), ["query"], seed=0)
    facts = method.report(adapters_named(model, "default"))
    assert list(facts["ranks"].values()) == [1, 4]
    assert facts["mean_rank"] == 2.5


def test_without_batches_the_error_says_what_to_give():
    with pytest.raises(SettingsError, match=r"asks for calibration data, .* probe=Probe\(batches\)"):
        inject(tiny_encoder(), GeLoRA(), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gains": {"bert.encoder.layer.9": 1}}, r'gains names bert.encoder.layer.9, .* Did you mean "bert.encoder'),
        ({"gains": {"a": -1}}, r"GeLoRA.gains is \{'a': -1\}; it must map paths of blocks to whole numbers"),
        ({"discard": 1.0}, r"GeLoRA.discard is 1.0; it must lie in \[0, 1\)"),
        ({"calibration_batches": 0}, r"GeLoRA.calibration_batches is 0; it must be at least 1"),
        ({"pooling": "lst"}, r'GeLoRA.pooling is "lst". Did you mean "last"'),
        ({"rank": 0}, r"GeLoRA.rank is 0; it must be at least 1"),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        inject(tiny_encoder(), GeLoRA(**settings), seed=0)


@pytest.mark.slow
def test_a_run_measures_once_and_resumes_exactly(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(GeLoRA, "_measured", lambda self, targets, blocks, probe: asked.append(1) or {max(blocks): 2})
    folder = encoder_folder(tmp_path / "model")
    saved = tmp_path / "saved.ckpt"
    method = GeLoRA(calibration_batches=8)
    whole = classification(folder, method)
    one = run(whole, labelled_data(folder), tmp_path / "one", [SaveAt(saved, at_step(5))])
    second = classification(folder, method)
    from lightning.pytorch import seed_everything
    from toy_runs import trainer

    from lora_lightning.training.trainer_checkpoints import AtomicCheckpoints

    seed_everything(3, verbose=False)
    fit = trainer(folder, [], plugins=[AtomicCheckpoints()])
    fit.ckpt_path = saved
    fit.fit(second, datamodule=labelled_data(folder), weights_only=True)
    assert len(asked) == 1
    assert {a.rank for a in second.adapters().values()} == {1, 3}
    two = {**one, "state": second.state_dict(), "optimizer": fit.optimizers[0].state_dict()["state"]}
    assert_equal_runs(one, two)
