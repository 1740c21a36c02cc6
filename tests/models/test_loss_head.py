"""Losses without all logits are the model's own, gradients too, whatever a model does with its logits."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from model_classes import model_class, model_classes
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.cli.preflight.trace import without_values
from lora_lightning.models import loss_head as module
from lora_lightning.models.loss_head import (
    IGNORED,
    LossHead,
    UnsuitedError,
    choose,
    choose_without_values,
    decoder_inputs,
    loss_head,
    next_tokens,
    set_loss_head,
    summed_loss,
    token_log_probs,
)
from lora_lightning.models.new_tokens import Vocabulary, add_rows
from lora_lightning.testing import tiny_decoder

WAYS = ("chunks", "labelled", "plain")
SMALL = {"vocab_size": 71, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def batch(rows=3, length=10, seed=0):
    ids = torch.randint(3, 32, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : length - 4] = IGNORED
    labels[-1] = IGNORED  # a row that teaches nothing
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}, labels


def adapted(method=None, targets="all-linear", **options):
    net = tiny_decoder()
    ll.inject(net, method or LoRA(rank=2), targets, seed=0, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if ".adapters." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.1)
    return net


def with_new_tokens():
    net = tiny_decoder()
    add_rows(net, Vocabulary(("<a>", "<b>"), 32), seed=0)
    ll.inject(net, LoRA(rank=2), seed=0)
    return net


def biased():
    net = tiny_decoder()
    net.lm_head = nn.Linear(net.lm_head.in_features, net.lm_head.out_features)
    ll.inject(net, LoRA(rank=2), seed=0, also_train=["lm_head.bias"])
    return net


MODELS = {
    "adapters in the blocks": adapted,
    "an adapter on the output layer": lambda: adapted(targets=["q_proj", "lm_head"]),
    "an output layer that trains in full": lambda: adapted(also_train=["lm_head"]),
    "new tokens": with_new_tokens,
    "an output layer with a bias that trains": biased,
}


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def reference(net, inputs, labels):
    """Transformers' own loss, as a sum; it computes in float32, so in float64 the same by hand."""
    wanted = labels[:, 1:]
    if next(net.parameters()).dtype == torch.float32:
        return net(**inputs, labels=labels).loss * (wanted != IGNORED).sum()
    values = net(**inputs).logits[:, :-1].log_softmax(-1).gather(-1, wanted.clamp_min(0)[..., None])[..., 0]
    return -(values * (wanted != IGNORED)).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_a_loss_is_the_models_own(name, way, dtype, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 3 * 32)  # several chunks
    net = MODELS[name]().to(dtype).train()
    inputs, labels = batch()
    assert choose(net).way == "chunks"
    set_loss_head(net, LossHead(way))
    own = reference(net, inputs, labels)
    expected = gradients(net, own)
    found = summed_loss(net, inputs, next_tokens(labels))
    far = 1e-12 if dtype == torch.float64 else 1e-6
    assert float(found.detach()) == pytest.approx(float(own.detach()), rel=far)
    for key, value in gradients(net, found).items():
        near = torch.linalg.vector_norm(value - expected[key]) / torch.linalg.vector_norm(expected[key]).clamp_min(1e-6)
        assert near <= 10 * far, key
    assert expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_a_loss_in_half_precision_differs_by_rounding(name, way):
    net = MODELS[name]().float().train()
    inputs, labels = batch()
    set_loss_head(net, LossHead(way))
    exact = float(reference(net, inputs, labels).detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = summed_loss(net, inputs, next_tokens(labels))
    assert mixed.dtype == torch.float32
    assert float(mixed.detach()) == pytest.approx(exact, rel=1e-2)
    narrow = copy.deepcopy(net).to(torch.bfloat16)
    assert float(summed_loss(narrow, inputs, next_tokens(labels)).detach()) == pytest.approx(exact, rel=1e-2)
    assert choose(narrow).way == "chunks"


@pytest.mark.parametrize("way", WAYS)
def test_log_probabilities_of_tokens(way, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 64)
    net = adapted(targets=["q_proj", "lm_head"]).double()
    inputs, labels = batch()
    set_loss_head(net, LossHead(way))
    targets = next_tokens(labels)
    weights = torch.randn(targets.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits = net(**inputs).logits
    expected = logits.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0] * (targets != IGNORED)
    found = token_log_probs(net, inputs, targets)
    torch.testing.assert_close(found, expected)
    own, others = gradients(net, (found * weights).sum()), gradients(net, (expected * weights).sum())
    assert own.keys() == others.keys()
    for key, value in own.items():
        torch.testing.assert_close(value, others[key])


@pytest.mark.parametrize("way", WAYS)
def test_two_forwards_before_one_backward(way):
    net = adapted(targets=["q_proj", "lm_head"]).double()
    set_loss_head(net, LossHead(way))
    (one, first), (two, second) = batch(), batch(seed=5)
    chosen, rejected = (token_log_probs(net, i, next_tokens(t)).sum() for i, t in ((one, first), (two, second)))
    found = gradients(net, F.logsigmoid(chosen - rejected))
    own = F.logsigmoid(reference(net, two, second) - reference(net, one, first))
    for key, value in gradients(net, own).items():
        torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_without_a_label_has_gradients_of_zero(way):
    net = adapted().double()
    inputs, labels = batch()
    set_loss_head(net, LossHead(way))
    targets = torch.full_like(labels, IGNORED)
    loss = summed_loss(net, inputs, targets)
    assert loss == 0
    assert all(not grad.any() for grad in gradients(net, loss).values())
    assert not token_log_probs(net, inputs, targets).any()


def test_packed_examples():
    net = adapted().double()
    inputs, labels = batch(rows=2)
    packed = {
        "input_ids": inputs["input_ids"].view(1, -1),
        "position_ids": torch.arange(10).repeat(2)[None],
        "use_cache": False,
    }
    labels[1, -4:] = inputs["input_ids"][1, -4:]
    alone = summed_loss(net, inputs, next_tokens(labels))
    together = summed_loss(net, packed, next_tokens(labels.view(1, -1)))
    torch.testing.assert_close(together, alone)
    assert loss_head(net).way == "chunks"


class Counting(nn.Linear):
    most = 0

    def forward(self, x):
        self.most = max(self.most, x.shape[:-1].numel())
        return super().forward(x)


def test_no_more_than_a_chunk_goes_through_the_output_layer(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2 * 32)
    net = tiny_decoder().double()
    layer = net.lm_head
    net.lm_head = Counting(layer.in_features, layer.out_features, bias=False).double()
    inputs, labels = batch()
    for way, most in (("chunks", 2), ("labelled", 8), ("plain", 30)):
        set_loss_head(net, LossHead(way))
        net.lm_head.most = 0
        summed_loss(net, inputs, next_tokens(labels)).backward()
        assert net.lm_head.most == most, way


class Unusual(nn.Module):
    """A decoder whose logits go through `change`; `loss_head` knows nothing of it."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = tiny_decoder().double(), change
        self.config, self.forward_calls = self.net.config, 0

    def get_output_embeddings(self):
        return self.net.lm_head

    def get_input_embeddings(self):
        return self.net.get_input_embeddings()

    def forward(self, use_cache=False, **inputs):
        output = self.net(use_cache=use_cache, **inputs)
        output.logits = self.change(self.net, output.logits)
        return output


CHANGES = {
    "none": (lambda net, x: x, "chunks"),
    "a scale": (lambda net, x: x / 7, "chunks"),
    "a negative scale in float32": (lambda net, x: (x * -0.3).float(), "chunks"),
    "a soft cap far above these logits": (lambda net, x: 500 * torch.tanh(x / 500), "labelled"),
    "a masked token": (lambda net, x: torch.cat([x[..., :-1], x[..., -1:] - 1e9], -1), "labelled"),
    "a bound": (lambda net, x: x.clamp(-1000, 1000), "labelled"),
    "a bias": (lambda net, x: x + torch.arange(x.shape[-1]), "labelled"),
    "a mean over the text": (lambda net, x: x - x.mean(1, keepdim=True), "plain"),
    "a second use of the output layer": (lambda net, x: x + net.lm_head(net.model.embed_tokens.weight[:1]), "plain"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_model_does_with_its_logits_decides(name):
    change, way = CHANGES[name]
    net = Unusual(change)
    inputs, labels = batch()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.train()
    with torch.no_grad():
        logits = net(**inputs).logits.double()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(
        summed_loss(net, inputs, next_tokens(labels)).double(), expected, rtol=1e-6, atol=0, check_dtype=False
    )
    head = loss_head(net)
    assert head.way == way, head
    assert bool(head.reason) == (way != "chunks"), head
    assert net.training
    assert net.net.lm_head.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert "forward" not in vars(net.net.lm_head)


def test_a_hook_on_the_output_layer_is_heeded():
    net = tiny_decoder().double()
    net.lm_head.register_forward_hook(lambda layer, args, out: out * 2)
    inputs, labels = batch()
    torch.testing.assert_close(summed_loss(net, inputs, next_tokens(labels)), reference(net, inputs, labels))
    assert str(loss_head(net)).endswith("all at once (its output layer has hooks)")


def test_a_model_without_an_output_layer_is_told_of():
    from transformers import LlamaConfig, LlamaModel

    head = choose(LlamaModel(LlamaConfig(**SMALL)))
    assert str(head) == "plain, logits of all tokens (LlamaModel does not say which its output layer is)"
    assert head.way == "plain"


def test_a_decoder_that_shifts_labels_inside_its_forward_only():
    with pytest.raises(UnsuitedError, match="LlamaForCausalLM shifts labels inside its forward only"):
        decoder_inputs(tiny_decoder(), torch.ones(1, 3, dtype=torch.long))


KNOWN = {
    "LlamaForCausalLM": "chunks",
    "CohereForCausalLM": "chunks",
    "GraniteForCausalLM": "chunks",
    "GPT2LMHeadModel": "chunks",
    "PhiForCausalLM": "chunks",  # with a bias
    "Gemma2ForCausalLM": "labelled",
    "T5ForConditionalGeneration": "chunks",
    "BartForConditionalGeneration": "labelled",
    "M2M100ForConditionalGeneration": "chunks",  # labels are shifted by a function of its file
    "BlenderbotSmallForConditionalGeneration": "labelled",
    "ProphetNetForConditionalGeneration": "plain",  # several tokens are predicted at each place
    "BertForMaskedLM": "chunks",
}


def check_class(found):
    """The way, after the loss has been compared with that of the logits; None where the model itself cannot run."""
    net = found.build()
    if net.config.is_encoder_decoder:
        net.config.decoder_start_token_id = 1  # which the configuration of T5 leaves to its files
    ids = torch.randint(3, 40, (2, 8), generator=torch.Generator().manual_seed(3))
    inputs, labels = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids.flip(0).clone()
    labels[:, :3] = IGNORED
    if "use_cache" in inspect.signature(net.forward).parameters:
        inputs["use_cache"] = False
    head = choose(net)
    set_loss_head(net, head)
    whole = inputs | {"labels": labels} if net.config.is_encoder_decoder else inputs
    try:
        with torch.no_grad():
            logits = net(**whole).logits
    except Exception:  # as small as this, some models of the list do not run
        assert head.way == "plain", head
        return None
    if logits.shape[:2] != labels.shape:  # of Perceiver's outputs there are more than tokens
        assert head.way == "plain", head
        return None
    if net.config.is_encoder_decoder and head.way != "plain":
        whole = inputs | decoder_inputs(net, labels)
    expected = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="sum")
    with torch.no_grad():
        loss = summed_loss(net, whole, labels)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    return head.way


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_a_class_of_transformers(name):
    found = model_class(name)
    assert check_class(found) == KNOWN[name]
    with without_values() as meter:
        meter.answer = False
        skeleton = found.build()
        meter.answer = True
        if skeleton.config.is_encoder_decoder:
            skeleton.config.decoder_start_token_id = 1
        assert choose_without_values(skeleton).way == KNOWN[name]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal LM", "sequence-to-sequence LM", "masked LM"])
def test_every_class_of_transformers(task):
    ways = []
    for found in model_classes(task):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found.build()
            except Exception:  # which other tests list
                continue
            ways.append((found.name, check_class(found)))
    short = [name for name, way in ways if way in ("chunks", "labelled")]
    # those that fall out of the sequence-to-sequence ones: FSMT (its output layer is an embedding), ProphetNet (several
    # tokens at each place), VoxtralRealtime (reads no text without sound)
    assert len(short) > 0.8 * len(ways), ways
