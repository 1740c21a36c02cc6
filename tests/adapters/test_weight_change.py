"""dM and dD of a weight, their correlation and their line, against the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from ll_dora import DoRA
from lora_lightning.adapters import weight_change
from lora_lightning.injection.inject import inject


def reference(weight, start):
    """dM, dD by the definition, one row at a time."""
    magnitudes, directions = [], []
    for new, old in zip(weight.numpy(), start.numpy(), strict=True):
        a, b = math.sqrt(sum(v * v for v in new)), math.sqrt(sum(v * v for v in old))
        magnitudes.append(abs(a - b))
        directions.append(1 - sum(v * w for v, w in zip(new, old, strict=True)) / (a * b))
    return sum(magnitudes) / len(magnitudes), sum(directions) / len(directions)


@pytest.mark.parametrize("chunk", [1, 17, 10_000])
def test_changes_equal_the_definition(monkeypatch, chunk):
    monkeypatch.setattr(weight_change, "_CHUNK", chunk)
    start, weight = torch.randn(9, 7, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    for axis, new, old in (("out", weight, start), ("in", weight.T, start.T)):
        change = weight_change.weight_change(weight, start, axis)
        assert (change.magnitude, change.direction) == pytest.approx(reference(new, old), abs=1e-14)
        assert (change.vectors, change.skipped) == (len(new), 0)


def test_15_no_change_at_the_start_and_rescaling_turns_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6))
    inject(model, DoRA(rank=2), ["0"], also_train=())
    adapter, weight = model[0].adapter("default"), model[0].base.weight.detach()
    change = weight_change.weight_change(adapter.merged_weight(weight), weight)
    assert (change.magnitude, change.direction) == (0.0, 0.0)
    with torch.no_grad():
        adapter.magnitude *= torch.linspace(0.5, 3, 6)
    change = weight_change.weight_change(adapter.merged_weight(weight), weight)
    assert change.magnitude > 0.1
    assert change.direction < 1e-12


def test_15_a_negative_magnitude_turns_a_row_round():
    weight = torch.randn(4, 5, dtype=torch.float64)
    change = weight_change.weight_change(weight * torch.tensor([[-1.0], [1], [1], [1]]), weight)
    assert change.magnitude == pytest.approx(0, abs=1e-15)
    assert change.direction == pytest.approx(2 / 4)


def test_small_turns_keep_their_digits():
    """An angle t gives 1 - cos t = t^2 / 2, which float32 rows and cosines would lose."""
    angles = torch.tensor([1e-3, 1e-6, 1e-7], dtype=torch.float64)
    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(3, 1)
    for i, angle in enumerate(angles):
        row = torch.stack([angle.cos(), angle.sin()])[None]
        change = weight_change.weight_change(row, start[i : i + 1])
        assert change.direction == pytest.approx(float(angle**2) / 2, rel=1e-6)


def test_zero_vectors_are_left_out_and_counted():
    start, weight = torch.randn(5, 3), torch.randn(5, 3)
    start[1], weight[3] = 0, 0
    kept = [0, 2, 4]
    change = weight_change.weight_change(weight, start)
    assert change.magnitude == pytest.approx(weight_change.weight_change(weight[kept], start[kept]).magnitude)
    assert change.direction == pytest.approx(weight_change.weight_change(weight[kept], start[kept]).direction)
    assert (change.vectors, change.skipped) == (3, 2)
    none = weight_change.weight_change(torch.zeros(2, 3), start[:2])
    assert math.isnan(none.magnitude)
    assert (none.vectors, none.skipped) == (0, 2)


def test_correlation_and_line_equal_numpys():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=20), generator.normal(size=20)
    assert weight_change.pearson(x.tolist(), y.tolist()) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert weight_change.least_squares(x.tolist(), y.tolist()) == pytest.approx(np.polyfit(x, y, 1), abs=1e-12)
    assert weight_change.pearson([1.0, 2.0, 4.0], [-2.0, -4.0, -8.0]) == pytest.approx(-1)
    assert math.isnan(weight_change.pearson([1.0], [2.0]))
    assert math.isnan(weight_change.pearson([1.0, 1.0], [2.0, 3.0]))
    assert math.isnan(weight_change.least_squares([1.0, 1.0], [2.0, 3.0])[0])
