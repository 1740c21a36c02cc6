"""Formulas of notes/005-scale.md against what is counted, at a few of the sizes of examples/measure_scale."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "measure_scale"


@pytest.fixture(scope="module")
def scale():
    """Everything that the scripts in the folder define."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        modules = [importlib.import_module(name) for name in ("formulas", "counting", "processes")]
    return {name: value for module in modules for name, value in vars(module).items()}


@pytest.mark.parametrize(
    "size",
    [("DoRA", 2, 6), ("DoRA", 2, 12), ("MoELoRA", 2, 6, 4), ("MoELoRA", 2, 12, 3), ("LoRASC", 2, 6), ("CELoRA", 2, 12)],
    ids=str,
)
def test_products_of_a_step_are_those_of_the_formulas(scale, size):
    (step, formula), (optimizer, own) = scale["flops"](scale["Point"](*size))
    assert step == formula > 0
    assert optimizer == own
    assert (own > 0) == (size[0] == "MoELoRA")


def test_what_is_kept_for_backward(scale):
    """Beside the inputs of adapters, which are the same for all."""
    sizes = [("RoseLoRA", 2, 6), ("LoRA", 2, 12), ("DoRA", 2, 12), ("MoELoRA", 2, 6, 3), ("CELoRA", 2, 6)]
    inputs = []
    for size in sizes:
        point = scale["Point"](*size)
        own = sum(scale["kept_for_backward"](point, at) for at in scale["adapted"](scale["network"](point)))
        inputs.append(scale["held"](point) - own)
    assert set(inputs) == {inputs[0]}


@pytest.mark.parametrize("size", [("RoseLoRA", 2, 6), ("CELoRA", 2, 6), ("LoRASC", 2, 12)], ids=str)
def test_what_stays_between_steps(scale, size):
    point, frozen = scale["Point"](*size), scale["Point"]("frozen", size[1])
    formula = sum(scale["derived"](point, at) for at in scale["adapted"](scale["network"](point)))
    assert scale["between_steps"](point) - scale["between_steps"](frozen) == formula > 0


@pytest.mark.multi
@pytest.mark.timeout(600)
def test_two_processes_send_what_estimate_and_formulas_say(scale):
    rows = scale["spread"]("traffic of first points", 2)
    assert {(system, strategy) for system, strategy, *_ in rows} == {
        (system, strategy) for system in scale["METHODS"] for strategy in ("ddp", "fsdp2")
    }
    for row in rows:
        assert float(row[-1]) <= 120, row  # position tables of the model, and what Lightning agrees on
        assert float(row[4]) >= float(row[5]) > 30_000
