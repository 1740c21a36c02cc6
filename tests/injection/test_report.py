from __future__ import annotations

import torch
from adapted_models import METHOD, tiny_moe
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.testing import perturb, tiny_decoder, tiny_encoder


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
