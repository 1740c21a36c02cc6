"""What an injection tells of itself, in terminals and notebooks."""

from __future__ import annotations

import io

import torch
from adapted_models import METHOD, tiny_moe
from rich.console import Console
from torch import Tensor, nn

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning import inject, merge, unmerge
from lora_lightning.injection.report import injection_table
from lora_lightning.testing import perturb, tiny_decoder, tiny_encoder


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
    assert "settings       rank=2, alpha=16.0" in shown
    assert "density        20.0% of the factors' entries" in shown
    assert "4 MB weights" in shown


def test_the_report_says_how_many_expert_tensors_are_adapted() -> None:
    assert "2 of 2 expert tensors adapted" in str(ll.inject(tiny_moe(), METHOD))
    assert "1 of 2 expert tensors adapted" in str(ll.inject(tiny_moe(), METHOD, targets=["experts.down_proj"]))
    assert "0 of 2 expert tensors adapted" in str(ll.inject(tiny_moe(), METHOD, targets="attention"))
    assert "expert tensors" not in str(ll.inject(tiny_encoder(), METHOD))


class Gated(nn.Linear):
    """A linear layer of its own kind, which no base layer serves."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def test_linear_layers_out_of_reach_are_reported() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Gated(4, 4))
    report = ll.inject(model, METHOD)
    assert report.skipped == {"1": "Gated takes no adapter"}
    assert "left out: 1 (Gated takes no adapter)" in str(report)


def test_one_side_of_a_tie_is_adapted_and_that_is_said() -> None:
    model = tiny_decoder(tied=True)
    tokens = torch.tensor([[1, 2, 3]])
    before = model(tokens).logits
    report = ll.inject(model, METHOD, ["lm_head"])
    assert report.tied == {"lm_head": ("model.embed_tokens",)}
    assert "tied: lm_head shares its weight with model.embed_tokens" in str(report)
    assert torch.equal(model(tokens).logits, before)
    perturb(model.lm_head.adapters)
    hidden = model.model(tokens).last_hidden_state
    expected = (
        hidden
        @ (
            model.model.embed_tokens.weight
            + 2 * model.lm_head.adapters.default.lora_B @ model.lm_head.adapters.default.lora_A
        ).T
    )
    torch.testing.assert_close(model(tokens).logits, expected)
