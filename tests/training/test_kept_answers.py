"""Answers from data are found again by all that they depend on, and by nothing else."""

from __future__ import annotations

import pytest
import torch
from miniatures import installed
from miniatures.starts import EVA
from toy_runs import classification, encoder_folder, labelled_data, trainer

from lora_lightning.injection.answers import Answer
from lora_lightning.injection.probe import Probe
from lora_lightning.injection.records import records
from lora_lightning.models.tasks import find_task
from lora_lightning.testing import TinyMLP
from lora_lightning.training import kept_answers
from lora_lightning.training.kept_answers import KeptAnswers


@pytest.fixture(autouse=True)
def _kept_here(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_answers, "_folder", lambda: tmp_path / "answers")
    monkeypatch.setattr(kept_answers, "LEAST", 0.0)


def ask(method=None, batch=0.0, weight=0.0, question="plan", before=0.0, layers=("first",), task="causal-lm"):
    """The answer, and a list that holds something where it was made anew."""
    model = TinyMLP()
    with torch.no_grad():
        model.first.weight.add_(weight)
    made = []

    def make():
        made.append(1)
        return Answer({"first": {"rank": 3}}, {"0.lora_A": torch.ones(2, 3), "0.mask": torch.tensor([True])})

    keep = KeptAnswers(method or EVA(), find_task(task, None))
    with Probe([{"x": torch.full((2,), batch)}, [batch]]).on(model, dict.fromkeys(layers)) as probe:
        return keep(probe, question, make, {"a": torch.full((1,), before)}), made


def test_an_answer_is_found_again_with_its_tensors():
    first, made = ask()
    assert made
    second, made = ask()
    assert not made
    assert second.plain == first.plain == {"first": {"rank": 3}}
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[key], value) for key, value in second.tensors.items())


@pytest.mark.parametrize(
    "other",
    [
        {"method": EVA(rank=2)},
        {"batch": 1.0},
        {"weight": 1e-3},
        {"question": "start"},
        {"before": 1.0},
        {"layers": ("first", "second")},
        {"task": "masked-lm"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_whatever_it_depends_on_makes_it_another_question(other):
    ask()
    assert ask(**other)[1]
    assert not ask(**other)[1]


def test_another_source_of_the_method_is_another_question(monkeypatch):
    ask()
    monkeypatch.setattr(kept_answers, "_sources", lambda method: "changed")
    assert ask()[1]


def test_what_took_no_time_is_not_kept(monkeypatch):
    monkeypatch.setattr(kept_answers, "LEAST", 1e9)
    assert ask()[1]
    assert ask()[1]


def test_a_folder_that_cannot_be_written_is_said(tmp_path, caplog):
    (tmp_path / "answers").write_text("")
    assert ask()[1]
    assert "the answer is not kept" in caplog.text


def test_a_second_run_computes_nothing_and_trains_alike(tmp_path, monkeypatch, capsys):
    folder = encoder_folder(tmp_path / "model")
    passes, states = [], []
    run = Probe._run
    monkeypatch.setattr(Probe, "_run", lambda self, *args, **kw: (passes.append(1), run(self, *args, **kw))[1])
    with installed(EVA):
        for _ in range(2):
            own = classification(folder, EVA(rank=2), num_labels=3)
            data, fit = labelled_data(folder), trainer(tmp_path, [], max_steps=1)
            torch.manual_seed(0)
            fit.fit(own, datamodule=data)
            states.append((own.state_dict(), records(own.model)["default"].plan))
    assert len(passes) == 2
    assert "EVA: plan of an earlier run" in capsys.readouterr().out
    assert states[0][1] == states[1][1]
    assert all(torch.equal(value, states[1][0][key]) for key, value in states[0][0].items())
