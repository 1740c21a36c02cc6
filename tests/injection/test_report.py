"""What an injection tells of itself, in terminals and notebooks."""

from __future__ import annotations

import io

import torch
from rich.console import Console

from ll_lora import LoRA
from lora_lightning import inject, merge, unmerge
from lora_lightning.injection.report import injection_table


def text(renderable) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


def test_reports_and_adapted_models_are_short_in_terminals_and_notebooks():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
    report = inject(model, LoRA(rank=2), ["0"], also_train=["1"], seed=0)
    assert len(repr(report).splitlines()) == len(str(report).splitlines()) == 2
    assert "LoRA: 1 layers adapted" in text(report)
    assert "│ 0 " in text(report)
    shown = report._repr_mimebundle_()
    assert "<pre" in shown["text/html"]
    assert "1 layers adapted" in shown["text/plain"]
    base = "Linear(in_features=4, out_features=6, bias=True)"
    assert repr(model[0]) == f"AdaptedLayer({base}, default=LowRankAdapter(rank=2, scaling=8, active))"
    merge(model)
    merged = "default=LowRankAdapter(rank=2, scaling=8, active, merged)"
    assert repr(model[0]) == f"AdaptedLayer({base}, {merged})"
    unmerge(model)
    inject(model, LoRA(rank=2), ["0"], also_train=["1"], name="second", seed=0)
    assert "default=LowRankAdapter(rank=2, scaling=8, frozen), second=LowRankAdapter(" in repr(model[0])
    assert len(repr(model).splitlines()) == 4


def test_injection_table_counts_what_trains():
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 6), torch.nn.Linear(6, 4))
    report = inject(model, LoRA(rank=2), targets=["0", "1"], also_train=["2.bias"])
    shown = text(injection_table(report, 0.2, 4_000_000))
    trainable = 2 * (2 * 6 + 2 * 4) + 4
    total = 2 * (6 * 4 + 4) + 4 * 6 + 6 + trainable - 4
    assert f"{trainable} of {total} parameters ({trainable / total:.2%})" in shown
    assert "LoRA: 2 layers adapted" in shown
    assert "settings    rank=2, alpha=16.0" in shown
    assert "density     20 % of the factors' entries" in shown
    assert "4 MB weights" in shown
