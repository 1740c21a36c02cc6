"""Preference: the loss of a batch against its equations in float64, what it refuses, and what it measures."""

from __future__ import annotations

from math import exp, log
from types import SimpleNamespace

import pytest
import torch

from lora_lightning.errors import DataError, SettingsError
from lora_lightning.models.tasks import find_task
from lora_lightning.models.tasks.base import PredictContext

IDS = torch.tensor([[5, 3, 1, 2, 0], [5, 4, 2, 0, 0], [5, 3, 4, 4, 2], [5, 4, 1, 2, 0]])
FIRST = [2, 1, 2, 2]
"""Where completions begin."""


def batch_of(**more):
    labels = IDS.clone()
    for row, first in enumerate(FIRST):
        labels[row, :first] = -100
    labels[IDS == 0] = -100
    return {
        "input_ids": IDS,
        "attention_mask": (IDS > 0).long(),
        "labels": labels,
        "sides": torch.tensor(2),
        "reference": torch.tensor([[-3.0, -5.0], [-2.5, -4.0]]),
        **more,
    }


@pytest.fixture
def scores():
    return torch.randn(6, 6, dtype=torch.float64)


@pytest.fixture
def model(scores):
    """Scores of the next token that depend on the last one alone."""

    def model(input_ids, attention_mask):
        assert input_ids.shape == attention_mask.shape
        return SimpleNamespace(logits=scores[input_ids])

    return model


def tokens(scores, row, first):
    """Log-probabilities of a row's tokens from `first` on."""
    ids = [int(i) for i in IDS[row] if i]
    return [float(scores[a].log_softmax(-1)[b]) for a, b in zip(ids[first - 1 :], ids[first:], strict=False)]


def s(x):
    return 1 / (1 + exp(-x))


def mean(values):
    return sum(values) / len(values)


def dpo(own, reference):
    return [-log(s(0.1 * ((sum(c) - a) - (sum(r) - b)))) for (c, r), (a, b) in zip(own, reference, strict=True)]


def ipo(own, reference):
    ratios = [((sum(c) - a) / len(c), (sum(r) - b) / len(r)) for (c, r), (a, b) in zip(own, reference, strict=True)]
    return [(c - r - 1 / (2 * 0.1)) ** 2 for c, r in ratios]


def simpo(own, reference):
    return [-log(s(2 * mean(c) - 2 * mean(r) - 1)) for c, r in own]


def orpo(own, reference):
    def odds(x):
        return log(exp(x) / (1 - exp(x)))

    return [-mean(c) - 0.1 * log(s(odds(mean(c)) - odds(mean(r)))) for c, r in own]


@pytest.mark.parametrize("equation", [dpo, ipo, simpo, orpo])
def test_losses_of_pairs_with_their_papers_settings(equation, model, scores):
    task, batch = find_task("preference", {"loss_type": equation.__name__}), batch_of()
    own = [(tokens(scores, row, FIRST[row]), tokens(scores, row + 2, FIRST[row + 2])) for row in range(2)]
    loss = task.loss(task.logits(model, batch), batch)
    assert int(loss.count) == 2
    assert float(loss.total) == pytest.approx(sum(equation(own, batch["reference"].tolist())), rel=1e-6)


def test_the_likelihood_of_whole_texts(model, scores):
    batch = batch_of()
    texts, own = (find_task("preference", {"loss_type": "orpo", "likelihood": kind}) for kind in ("text", "completion"))
    found = texts.loss(texts.logits(model, batch), batch).total - own.loss(own.logits(model, batch), batch).total
    every = [value for row in range(2) for value in tokens(scores, row, 1)]
    expected = -2 * mean(every) + sum(mean(tokens(scores, row, FIRST[row])) for row in range(2))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_labels(model, scores):
    """The second half of a batch is other prompts; its mean ratio is the estimate of the divergence."""
    batch = batch_of(desirable=torch.tensor([1, 0]))
    task = find_task("preference", {"loss_type": "kto", "beta": 0.2, "undesirable_weight": 3.0})
    sums = [sum(tokens(scores, row, FIRST[row])) for row in range(4)]
    references = batch["reference"].T.flatten().tolist()
    ratios = [own - reference for own, reference in zip(sums, references, strict=True)]
    kl = max(0.0, mean(ratios[2:]))
    expected = 1 - s(0.2 * (ratios[0] - kl)) + 3 * (1 - s(0.2 * (kl - ratios[1])))
    logits = task.logits(model, batch)
    assert float(task.loss(logits, batch).total) == pytest.approx(expected, rel=1e-6)


def test_other_prompts_get_no_gradient(scores):
    scores.requires_grad_()

    def model(input_ids, attention_mask):
        return SimpleNamespace(logits=scores[input_ids])

    task = find_task("preference", {"loss_type": "kto"})
    own, other = task.logits(model, batch_of(desirable=torch.tensor([1, 0])))
    other.sum().backward(retain_graph=True)
    assert not scores.grad.any()
    own.sum().backward()
    assert scores.grad.any()


def test_rewards_are_measured(measured, model):
    batch, task = batch_of(), find_task("preference", {"beta": 0.5})
    logits = task.logits(model, batch)
    rewards = 0.5 * (logits[..., 0] - batch["reference"].T)
    found = measured(task, [(logits, batch)])
    assert found["margin"] == pytest.approx(float((rewards[0] - rewards[1]).mean()), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((rewards[0] > rewards[1]).double().mean()))
    step = {name: float(value) for name, value in task.loss(logits, batch).beside.items()}
    assert step == pytest.approx({name: found[name] for name in step}, rel=1e-5)
    rows = task.predict(model, batch, PredictContext())
    assert [row["margin"] for row in rows] == pytest.approx((rewards[0] - rewards[1]).tolist(), abs=1e-5)


def test_labels_are_right_where_the_reward_has_their_sign(measured):
    task = find_task("preference", {"loss_type": "kto"})
    batch = batch_of(desirable=torch.tensor([1, 0]))
    moves = torch.tensor([[[2.0], [-1.0]], [[0.0], [0.0]]])
    logits = batch["reference"].T.unsqueeze(-1) + moves
    found = measured(task, [(logits, batch), (batch["reference"].T.unsqueeze(-1), batch)])
    assert found["accuracy"] == 0.75
    assert found["margin"] == pytest.approx(0.1 * 1.5, rel=1e-5)


def test_a_model_compared_with_itself_has_no_margin(model):
    task, batch = find_task("preference"), batch_of()
    logits = task.logits(model, batch)
    batch["reference"] = task.reference(logits)
    assert float(task.loss(logits, batch).total) == pytest.approx(2 * log(2))


def test_a_batch_without_the_reference(model):
    task, batch = find_task("preference"), batch_of()
    del batch["reference"]
    with pytest.raises(DataError, match=r'loss_type is "dpo", and the batch has no `reference`.*take orpo or simpo'):
        task.loss(task.logits(model, batch), batch)
    free = find_task("preference", {"reference_free": True})
    assert free.loss(free.logits(model, batch), batch).total.isfinite()


@pytest.mark.parametrize(("loss_type", "more"), [("kto", {}), ("dpo", {"desirable": torch.tensor([1, 0])})])
def test_a_batch_of_another_form(loss_type, more, model):
    task = find_task("preference", {"loss_type": loss_type})
    with pytest.raises(DataError, match=f'loss_type is "{loss_type}"; its batches need'):
        task.loss(task.logits(model, batch_of(**more)), batch_of(**more))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"loss": "dpo"}, 'preference has no "loss". Did you mean "loss_type"'),
        (
            {"loss_type": "dppo"},
            r"loss_type is 'dppo'; it must be one of dpo, ipo, orpo, simpo, kto. Did you mean \"dpo",
        ),
        ({"beta": 0.0}, "beta is 0.0; it must be positive"),
        ({"label_smoothing": 0.5}, r"label_smoothing is 0.5; it must lie in \[0, 0.5\)"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "ipo has no such setting; dpo and simpo take it"),
        ({"gamma": 1.0}, "gamma is 1.0; dpo has no such setting; simpo take"),
        ({"loss_type": "simpo", "gamma": -1.0}, "gamma is -1.0; it must be at least 0"),
        ({"desirable_weight": 2.0}, "desirable_weight is 2.0; dpo has no such setting; kto take"),
        ({"loss_type": "kto", "undesirable_weight": 0.0}, "undesirable_weight is 0.0; it must be positive"),
        ({"loss_type": "kto", "reference_free": True}, "kto has no such setting; dpo and ipo take it"),
        ({"loss_type": "simpo", "reference_free": True}, "simpo has no such setting; dpo and ipo take it"),
        ({"likelihood": "text"}, "likelihood is 'text'; dpo has no such setting; orpo take"),
        ({"loss_type": "orpo", "likelihood": "all"}, 'likelihood is \'all\'; it must be "completion" or "text"'),
    ],
)
def test_settings_that_do_not_fit(settings, text):
    with pytest.raises(SettingsError, match=text):
        find_task("preference", settings)


@pytest.mark.parametrize(
    ("loss_type", "judged", "text"),
    [
        ("kto", False, r'"kto", which learns from single completions .* data.unpair to true'),
        ("ipo", True, r'"ipo", which learns from pairs, but .* Set loss_type to kto'),
    ],
)
def test_data_of_another_form(loss_type, judged, text):
    task = find_task("preference", {"loss_type": loss_type})
    with pytest.raises(DataError, match=text):
        task.check_data(SimpleNamespace(judged=judged))
    task.check_data(SimpleNamespace(judged=not judged))
    task.check_data(SimpleNamespace())


@pytest.mark.parametrize("loss_type", ["dpo", "kto"])
def test_the_example_that_memory_is_counted_with_has_a_loss(loss_type, model):
    task = find_task("preference", {"loss_type": loss_type})
    batch = task.example(None, 3, 4)
    assert task.loss(task.logits(model, batch), batch).total.isfinite()
