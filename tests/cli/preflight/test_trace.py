"""What is counted without values is what a real step of the same model holds, as torch's profiler sees it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torch.profiler import ProfilerActivity, profile

import lora_lightning as ll
from lora_lightning import plugins
from lora_lightning.cli.preflight.trace import (
    GpuKernels,
    Meter,
    largest_linear,
    size,
    trace_step,
    units,
    without_values,
)
from lora_lightning.models import loss_head
from lora_lightning.models.loss_head import LossHead, set_loss_head
from lora_lightning.models.tasks import find_task
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.testing import tiny_decoder, tiny_encoder
from lora_lightning.training.assembly import enable_checkpointing

TINY = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 24}
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
EXPERTS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
EXPERTS |= {"intermediate_size": 96, "num_local_experts": 4}


def model(kind):
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
    )

    made = {
        "tiny encoder": tiny_encoder,
        "tiny decoder": tiny_decoder,
        "encoder": lambda: BertForSequenceClassification(BertConfig(vocab_size=500, **SMALL)),
        "decoder": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=500, **SMALL)),
        "decoder of experts": lambda: MixtralForCausalLM(MixtralConfig(vocab_size=32, **EXPERTS)),
        "wide decoder": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=4000, **WIDE)),
        "five-block encoder": lambda: BertForSequenceClassification(BertConfig(vocab_size=32, **TINY)),
        "five-block decoder": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=32, **TINY)),
    }
    return made[kind]()


def ready(kind, method, checkpointing, way="chunks"):
    """A model with adapters in train mode, its loss, and the batch of it."""
    net = model(kind).train()
    ll.inject(net, plugins.method(method)(rank=4), seed=0)
    if checkpointing:
        enable_checkpointing(net)
    task = find_task("causal-lm" if "decoder" in kind else "sequence-classification")
    batch = task.example(net.config, 1 if "wide" in kind else 4, 64 if "wide" in kind else 16)
    if task.by_loss_head:
        set_loss_head(net, LossHead(way))

    def loss():
        made = task.loss_of(net, batch)
        return made.total / made.count.clamp_min(1)

    return net, loss, batch


def counted(kind, method, checkpointing, autocast=None, whole=False, way="chunks"):
    with without_values(gpu=False) as meter:
        net, loss, _ = ready(kind, method, checkpointing, way)
        return trace_step(meter, net, loss, lambda: build_optimizer(net, None), autocast, whole)


def measured(kind, method, checkpointing, autocast=None, way="chunks"):
    """(activations, optimizer state) of the second step of a real run: bytes from the CPU allocator's events."""
    net, loss, batch = ready(kind, method, checkpointing, way)
    optimizer = build_optimizer(net, None)
    batch["attention_mask"][0, -3:] = 0

    def forward_backward():
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            value = loss()
        value.backward()

    forward_backward()
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        forward_backward()  # gradients stay, as in a window
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    tensors = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
    return most, sum(t.numel() * t.element_size() for t in tensors)


def check(kind, method, checkpointing, autocast=None, way="chunks"):
    step, (most, state) = (
        counted(kind, method, checkpointing, autocast, way=way),
        measured(kind, method, checkpointing, autocast, way=way),
    )
    # beside the tensors, kernels for bfloat16 take room to work in, and a recomputed block keeps 5 kB of random state
    print(f"counted {step.activations}, measured {most}, ratio {step.activations / most:.4f}")
    bfloat16 = 0.12 if torch.cpu._is_amx_tile_supported() else 0.05  # tiles pack what they multiply
    assert step.activations == pytest.approx(
        most, rel=bfloat16 if autocast else 0.03, abs=25_000 if checkpointing else 0
    )
    assert step.optimizer == state


@pytest.mark.parametrize("kind", ["tiny encoder", "tiny decoder", "decoder of experts"])
def test_a_step_holds_what_was_counted(kind):
    check(kind, "LoRA", checkpointing=False)


WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16-mixed"])
@pytest.mark.parametrize("way", ["chunks", "labelled", "plain"])
def test_a_step_with_a_large_vocabulary_holds_what_was_counted(way, autocast, monkeypatch):
    monkeypatch.setattr(loss_head, "CHUNK", 8 * 4000)
    check("wide decoder", "LoRA", checkpointing=False, autocast=autocast, way=way)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16-mixed"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["LoRA", "DoRA", "RoseLoRA", "CELoRA", "MoELoRA"])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_step_of_a_middling_model_holds_what_was_counted(kind, method, checkpointing, autocast):
    check(kind, method, checkpointing, autocast)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        pytest.param("five-block decoder", True, marks=SLOW),
        pytest.param("five-block decoder", False, marks=SLOW),
        pytest.param("five-block encoder", True, marks=SLOW),
        pytest.param("five-block encoder", False, marks=SLOW),
    ],
)
def test_two_and_three_equal_blocks_say_what_five_hold(kind, checkpointing):
    assert counted(kind, "DoRA", checkpointing) == counted(kind, "DoRA", checkpointing, whole=True)


def test_a_storage_counts_once_and_until_it_is_freed():
    with Meter() as meter:
        x = torch.zeros(1000)
        y = x.view(10, 100)[2:]
        assert meter.live == 4000
        z = x + 1
        assert meter.live == 8000
        del z
        assert meter.live == 4000
        del x
        assert meter.live == 4000
        del y
    assert (meter.live, meter.peak) == (0, 8000)


def test_a_mask_selects_everything_and_a_value_is_one():
    with without_values() as meter:
        x = torch.rand(3, 4)
        assert x[x > 0.5].shape == (12,)
        assert x[:, x[0] > 0.5].shape == (3, 4)
        assert (x > 0.5).nonzero().shape == (12, 2)
        assert x.masked_select(x > 0.5).shape == (12,)
        assert x.sum().item() == 1.0
        assert bool((x > 2).any())
        meter.answer = False
        assert not bool((x > 2).any())


def test_an_optimizer_that_stops_at_its_checks_gets_the_other_answer():
    class Strict(torch.optim.SGD):
        def step(self, closure=None):
            if not bool((self.param_groups[0]["params"][0].grad != 0).any()):
                raise ValueError("no gradient")
            return super().step(closure)

    with without_values() as meter:
        layer = nn.Linear(5, 4, bias=False)
        x = torch.zeros(3, 5)

        def strict():
            return Strict(layer.parameters(), lr=0.1, momentum=0.9)

        assert trace_step(meter, layer, lambda: layer(x).sum(), strict).optimizer == 80


def test_on_a_gpu_attention_keeps_no_dropped_weights_and_dropout_a_byte_an_entry():
    def held(gpu):
        with without_values(gpu=gpu) as meter:
            q = torch.zeros(1, 1, 128, 16, requires_grad=True)
            before = meter.live
            outputs = F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
            attention = meter.live - before
            before, x = meter.live, torch.zeros(1000, requires_grad=True)
            dropped = F.dropout(x, 0.1)
            assert outputs.requires_grad
            assert dropped.requires_grad
            return attention, meter.live - before

    (attention, dropout), (attention_cpu, dropout_cpu) = held(gpu=True), held(gpu=False)
    assert attention < 128 * 128 * 4 <= attention_cpu
    assert (dropout, dropout_cpu) == (4000 + 4000 + 1000, 4000 + 4000 + 4000)
    with GpuKernels():
        assert F.dropout(torch.ones(4), 0.5, training=False).tolist() == [1.0] * 4


def test_blocks_and_what_lies_outside_add_up():
    net = tiny_decoder(tied=True)
    ll.inject(net, plugins.method("LoRA")(rank=2), seed=0)
    inside, rest = units(net)
    assert inside[0] == inside[1]
    assert rest.trained == 0
    assert rest.frozen == 4 * (32 * 16 + 16)  # embedding and last norm; the output layer shares the embedding's weight
    assert rest.frozen + sum(u.frozen + u.trained for u in inside) == size(list(net.parameters()))
    quantized, same = units(net, "int8")
    assert same == rest
    weights = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24  # query and output, key and value, MLP
    assert quantized[0].frozen == 4 * 2 * 16 + weights + 4 * (16 + 16 + 8 + 8 + 24 + 24 + 16)  # norms, weights, scales
    assert largest_linear(net) == 4 * 16 * 24
