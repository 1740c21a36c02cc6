"""The loss head over quantized output layers, in half precision, and where it is turned off."""

from __future__ import annotations

import copy

import pytest
import torch
from toy_quantized import RowScaledLinear
from toy_runs import completion_data, decoder_folder, trainer
from transformers import Gemma2Config, Gemma2ForCausalLM

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.models import loss_head as module
from lora_lightning.models.loss_head import (
    IGNORED,
    LossHead,
    choose,
    chunk_rows,
    next_tokens,
    set_loss_head,
    summed_loss,
    token_log_probs,
)
from lora_lightning.testing import tiny_decoder
from lora_lightning.training.module import AdapterModule

HALF = [torch.bfloat16, torch.float16]


def batch():
    ids = torch.randint(3, 32, (3, 10), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :6] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}, labels


def losses(net, way, autocast=None):
    """The loss of a batch and the gradients of what trains, by one way."""
    inputs, labels = batch()
    set_loss_head(net, LossHead(way))
    net.zero_grad()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        loss = summed_loss(net, inputs, next_tokens(labels))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def compare(found, expected, far):
    torch.testing.assert_close(found[0], expected[0], rtol=far, atol=0)
    assert found[1].keys() == expected[1].keys() != set()
    for name, gradient in expected[1].items():
        apart = torch.linalg.vector_norm(found[1][name].double() - gradient.double())
        assert apart <= 10 * far * torch.linalg.vector_norm(gradient.double()), name


# -- quantized output layers -------------------------------------------------------------------------------------------


class WithSizes(RowScaledLinear):
    """As those of bitsandbytes and torchao, it says how many outputs it has."""

    def __init__(self, layer):
        super().__init__(layer)
        self.out_features, self.in_features = layer.out_features, layer.in_features


def quantized(kind):
    net = tiny_decoder().float()
    net.lm_head = kind(net.lm_head)
    ll.inject(net, LoRA(rank=2), ["q_proj", "v_proj"], seed=0)
    return net.train()


@pytest.mark.parametrize(("kind", "way"), [(WithSizes, "chunks"), (RowScaledLinear, "labelled")])
def test_a_quantized_output_layer_gives_the_loss_of_the_plain_way(kind, way, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 3 * 32)
    net = quantized(kind)
    head = choose(net)
    assert head.way == way
    assert bool(head.reason) == (way == "labelled")
    compare(losses(net, head.way), losses(net, "plain"), 1e-6)
    weights = {name: value.clone() for name, value in net.lm_head.state_dict().items()}
    assert weights["weight"].dtype == torch.int8


@pytest.mark.parametrize("autocast", HALF, ids=str)
def test_a_quantized_output_layer_under_autocast(autocast):
    net = quantized(WithSizes)
    exact = losses(net, "plain")
    compare(losses(net, "chunks", autocast), losses(net, "plain", autocast), 1e-2)
    compare(losses(net, "chunks", autocast), exact, 2e-2)


# -- half precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["chunks", "labelled"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_the_plain_ways_up_to_rounding(dtype, way):
    """Under autocast, and with weights of half precision."""
    net = tiny_decoder().float()
    ll.inject(net, LoRA(rank=2), "all-linear", seed=0)
    compare(losses(net, way, dtype), losses(net, "plain", dtype), 1e-2)
    narrow = copy.deepcopy(net).to(dtype)
    assert choose(narrow).way == "chunks"
    found, expected = losses(narrow, way), losses(narrow, "plain")
    assert found[0].dtype == torch.float32
    compare(found, expected, 1e-2)


def test_a_sum_over_many_tokens_does_not_overflow_half_precision():
    """Its largest number is 65,504: a sum of losses is none of it, nor a chunk's."""
    net = tiny_decoder().half()
    with torch.no_grad():
        net.lm_head.weight.mul_(300)
    ids = torch.randint(3, 32, (64, 32), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    found = {}
    for way in ("chunks", "plain"):
        set_loss_head(net, LossHead(way))
        with torch.no_grad():
            found[way] = summed_loss(net, inputs, next_tokens(ids))
    assert found["plain"] > 65504
    torch.testing.assert_close(found["chunks"], found["plain"], rtol=1e-3, atol=0)


def capped(cap=2.0):
    config = Gemma2Config(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        final_logit_softcapping=cap,
        attn_implementation="eager",
        pad_token_id=0,
    )
    torch.manual_seed(0)
    net = Gemma2ForCausalLM(config)
    with torch.no_grad():
        net.lm_head.weight.mul_(20)  # so that the cap bites
    ll.inject(net, LoRA(rank=2), ["q_proj", "v_proj"], seed=0)
    return net.train()


@pytest.mark.parametrize("autocast", [None, *HALF], ids=str)
def test_a_soft_cap_is_that_of_the_plain_way_under_autocast(autocast):
    net = capped()
    with torch.no_grad():
        logits = net(**batch()[0]).logits
    assert logits.abs().max() > 1.9
    head = choose(net)
    assert str(head) == (
        "labelled tokens alone go through the output layer, all at once (it changes logits by more than a factor, as a "
        "soft cap does)"
    )
    compare(losses(net, head.way, autocast), losses(net, "plain", autocast), 1e-6 if autocast is None else 1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as in a fit of mixed precision
        assert choose(net) == head


def test_a_soft_capped_model_in_half_precision_has_the_plain_log_probabilities():
    net = capped().bfloat16()
    inputs, labels = batch()
    found = {}
    for way in (choose(net).way, "plain"):
        set_loss_head(net, LossHead(way))
        with torch.no_grad():
            found[way] = token_log_probs(net, inputs, next_tokens(labels))
    assert found.keys() == {"labelled", "plain"}
    torch.testing.assert_close(found["labelled"], found["plain"], rtol=2e-2, atol=2e-2)


# -- the setting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("plain", 'loss head: plain, logits of all tokens (model.loss_head is "plain")'),
        ("auto", "loss head: labelled tokens alone go through the output layer, in chunks"),
    ],
)
def test_the_setting_decides_and_the_header_says_so(setting, line, tmp_path, capsys, monkeypatch):
    ways, own = [], module._by
    monkeypatch.setattr(module, "_by", lambda way, *rest: (ways.append(way), own(way, *rest))[1])
    folder = decoder_folder(tmp_path / "decoder")
    net = AdapterModule(str(folder), LoRA(rank=2), task="causal-lm", linear_baseline=False, loss_head=setting)
    trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(net, datamodule=completion_data(folder, batch_size=4))
    assert line in capsys.readouterr().out.splitlines()
    assert set(ways[-2:]) == {"plain" if setting == "plain" else "chunks"}


def test_chunks_are_quarters_within_bounds(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 1000 * 100)
    monkeypatch.setattr(module, "FEWEST", 50)
    rows = {count: chunk_rows(count, 100) for count in (1, 100, 400, 4000, 40000)}
    assert rows == {1: 50, 100: 50, 400: 100, 4000: 1000, 40000: 1000}
    assert chunk_rows(10, 200_000) == 1
