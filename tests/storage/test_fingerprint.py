from __future__ import annotations

from pathlib import Path

import torch
from adapter_files import TOKENS, X, adapted
from torch import nn

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.models.anatomy import survey
from lora_lightning.storage.fingerprint import fingerprint
from lora_lightning.testing import TinyMLP, tiny_decoder


def test_adapters_do_not_count_even_merged(tmp_path: Path) -> None:
    bare = fingerprint(survey(TinyMLP()))
    model = adapted(method=LoRA(rank=2, bias=True))
    assert fingerprint(survey(model)) == bare
    ll.merge(model)
    assert fingerprint(survey(model)) == bare
    ll.save_adapter(model, tmp_path)
    ll.unmerge(model)
    fresh = TinyMLP()
    ll.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(X), model(X))
    ll.eject(model)
    assert fingerprint(survey(model)) == bare


def test_a_bias_that_a_merge_made_does_not_count() -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    bare = fingerprint(survey(model))
    adapted(model, LoRA(rank=2, bias=True))
    ll.merge(model)
    assert fingerprint(survey(model)) == bare


def test_tied_weights_count_once(tmp_path: Path) -> None:
    bare = fingerprint(survey(tiny_decoder(tied=True)))
    for target in ("lm_head", "embed_tokens"):
        model = adapted(tiny_decoder(tied=True), targets=[target])
        assert fingerprint(survey(model)) == bare
        ll.save_adapter(model, tmp_path / target)
        fresh = tiny_decoder(tied=True)
        ll.load_adapter(fresh, tmp_path / target)
        assert torch.equal(fresh(TOKENS).logits, model(TOKENS).logits)


def test_a_base_in_half_precision_is_recognised(folder: Path) -> None:
    half = TinyMLP().to(torch.bfloat16)
    assert fingerprint(survey(half)) == fingerprint(survey(TinyMLP()))
    ll.load_adapter(half, folder)
    torch.testing.assert_close(half(X.bfloat16()).float(), adapted()(X), rtol=0.1, atol=0.1)


def test_large_weights_are_sampled_within_their_bounds() -> None:
    """Beyond 2^24 entries positions are not exact in float32: the last one, 2^24 + 3, would round past the end."""
    model = nn.Sequential(nn.Embedding.from_pretrained(torch.zeros(2**24 + 4, 1, dtype=torch.bfloat16)))
    before = fingerprint(survey(model))
    with torch.no_grad():
        model[0].weight[-1] = 1
    assert fingerprint(survey(model))["weights"] != before["weights"]


def test_packed_weights_leave_the_hash_out() -> None:
    model = TinyMLP()
    model.third = nn.Linear(2, 2)
    model.third.weight = nn.Parameter(torch.zeros(2, 1, dtype=torch.uint8), requires_grad=False)
    assert fingerprint(survey(model))["weights"] is None
    model.third = nn.Module()
    model.third.empty = nn.Parameter(torch.zeros(0, 3))
    assert fingerprint(survey(model))["weights"] is not None
