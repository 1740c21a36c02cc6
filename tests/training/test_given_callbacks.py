"""Callbacks of a module beside those that its trainer was given."""

from __future__ import annotations

from lora_lightning.callbacks.guard import TrainingGuard
from lora_lightning.callbacks.meters import Meters
from lora_lightning.training.given_callbacks import yielding


def test_a_given_one_replaces_that_of_the_module_and_says_what_differs(capsys):
    guard, meters = TrainingGuard(stop_unreached=True), Meters()
    assert yielding([guard, meters], []) == [guard, meters]
    assert yielding([guard, meters], [TrainingGuard(stop_unreached=True)]) == [meters]
    assert capsys.readouterr().out == ""
    assert yielding([guard], [TrainingGuard(patience_steps=7, stop_unreached=True)]) == []
    assert capsys.readouterr().out == "TrainingGuard: the trainer's replaces the method's (patience_steps=7)\n"
