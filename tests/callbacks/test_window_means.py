"""Means over the last steps of a statistic: what a window holds, writes, saves and forgets."""

from __future__ import annotations

import io
from types import SimpleNamespace

import torch
from torch import nn

from lora_lightning.adapters.base import RunningSum
from lora_lightning.callbacks.window_means import WindowMeans


class Counting(nn.Module):
    """Stands for an adapter with a statistic of two numbers and the buffer of its mean."""

    def __init__(self):
        super().__init__()
        self.sums = RunningSum()
        self.register_buffer("means", torch.zeros(2))

    def statistics(self):
        return {"means": self.sums}


def started(adapter, state=None):
    callback = WindowMeans("means", 3)
    callback.module = SimpleNamespace(device=torch.device("cpu"))
    callback.trainer = SimpleNamespace(global_rank=0)
    if state is not None:
        callback.load_state_dict(state)
    callback.on_start(10, {"a": adapter})
    return callback


def see(adapter, value, count=1):
    adapter.sums.add(torch.tensor([value, 2.0 * value]) * count, count)


def test_the_mean_reaches_back_as_many_steps_as_the_window_has():
    adapter = Counting()
    callback = started(adapter)
    assert callback.accepts(adapter)
    assert not WindowMeans("others", 3).accepts(adapter)
    written = []
    for step, value in enumerate((1.0, 5.0, 3.0, 10.0), 1):
        see(adapter, value)
        callback.on_stepped(step, {"a": adapter})
        written.append(adapter.means.tolist())
    assert written == [[1.0, 2.0], [3.0, 6.0], [3.0, 6.0], [6.0, 12.0]]


def test_micro_batches_count_by_their_observations_and_a_skipped_step_by_none():
    adapter = Counting()
    callback = started(adapter)
    see(adapter, 1.0, 3), see(adapter, 5.0, 1)
    callback.on_stepped(1, {"a": adapter})
    see(adapter, torch.inf)
    callback.on_skipped(2)
    callback.on_stepped(3, {"a": adapter})  # nothing was observed
    assert adapter.means.tolist() == [2.0, 4.0]


def test_a_resume_inside_a_step_goes_on_exactly():
    straight = Counting()
    first = started(straight)
    for step in (1, 2):
        see(straight, float(step))
        first.on_stepped(step, {"a": straight})
    see(straight, 7.0)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = Counting()
    second = started(resumed, torch.load(file, weights_only=True))
    for callback, adapter in ((first, straight), (second, resumed)):
        see(adapter, 9.0)
        callback.on_stepped(3, {"a": adapter})
    assert torch.equal(straight.means, resumed.means)
    torch.testing.assert_close(straight.means, torch.tensor([11.0 / 3, 22.0 / 3]))
