"""Compiled blocks train every method as plain ones do, without graph breaks, under names that stay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters

import lora_lightning as ll
from lora_lightning import plugins
from lora_lightning.errors import SettingsError
from lora_lightning.injection.probe import Probe
from lora_lightning.models.tasks import find_task
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.testing import tiny_decoder, tiny_encoder
from lora_lightning.training.compilation import compiled
from lora_lightning.training.module import AdapterModule

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, of parts that it imports to compile
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # likewise
]
MOST_GRAPHS = 6
"""A block is compiled for inputs with a gradient (all blocks but the first) and without one, for the first length and
for any: four. A decoder's is once more, without gradients, where its loss head is chosen; an encoder has one kind of
block more, its embeddings, for two kinds of lengths. TORCH_LOGS=recompiles names each."""
METHODS = sorted(plugins.registry().methods)
ENCODED = ("CELoRA", "DoRA", "LoRA", "LoRASC", "MoELoRA")
"""On an encoder as well; what torch traces of a layer is the same in both."""


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def steps(net, task, count=5):
    """Losses of optimizer steps on batches of two lengths."""
    optimizer, losses = build_optimizer(net, None), []
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(3, 32, (2, 8 + 4 * (step % 2)), generator=generator)
        labels = ids if task.per_token else ids[:, 0] % 2
        loss = task.loss_of(net, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.total.detach()))
    return losses


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "decoder") for name in METHODS), *((name, "encoder") for name in ENCODED)]
)
def test_a_method(name, kind):
    make, task = {
        "decoder": (tiny_decoder, find_task("causal-lm")),
        "encoder": (tiny_encoder, find_task("sequence-classification")),
    }[kind]
    net = make().train()
    generator = torch.Generator().manual_seed(9)
    rows = [torch.randint(3, 32, (24, 8), generator=generator) for _ in range(4)]  # for ranks that follow data
    batches = [{"input_ids": ids, "labels": ids if task.per_token else ids[:, 0] % 2} for ids in rows]
    ll.inject(net, made(name), seed=0, probe=Probe(batches))
    if any(getattr(module, "reads_context", False) for module in net.modules()):
        with pytest.raises(SettingsError, match="values that cross blocks, which torch cannot trace"), compiled(net):
            pass
        return
    check(net, task, name)


def check(net, task, name, backend="aot_eager"):
    plain = copy.deepcopy(net)
    torch.manual_seed(0)
    expected = steps(plain, task)
    torch.manual_seed(0)
    names = list(net.state_dict())
    with compiled(net, backend) as blocks:
        found = steps(net, task)
        assert list(net.state_dict()) == names
    assert blocks
    assert found == pytest.approx(expected, rel=1e-4)
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert 0 < counters["stats"]["unique_graphs"] <= MOST_GRAPHS, counters["stats"]
    assert all(module._compiled_call_impl is None for module in net.modules())


def made(name):
    method = plugins.method(name)
    return method(inner=plugins.method("LoRA")()) if "inner" in method.__dataclass_fields__ else method()


def test_recomputed_activations_are_refused():
    with pytest.raises(SettingsError, match=r'compile is "blocks" and model.gradient_checkpointing is true; .*Set one'):
        AdapterModule("x", plugins.method("LoRA")(), compile="blocks", gradient_checkpointing=True)


def test_with_inductor():
    net = tiny_decoder().train()
    ll.inject(net, plugins.method("LoRA")(), seed=0)
    check(net, find_task("causal-lm"), "LoRA", "inductor")


def test_keys_and_values_are_kept_again_afterwards():
    net = tiny_decoder()
    assert net.config.use_cache
    with compiled(net, "aot_eager"):
        assert not net.config.use_cache
    assert net.config.use_cache
