"""What `estimate` counts without values beside what the CUDA allocator hands out in a real step."""

from __future__ import annotations

import pytest
import torch
from on_gpu import DEVICE
from transformers import LlamaConfig, LlamaForCausalLM

from ll_lora import LoRA
from lora_lightning.cli.preflight.memory import Parts, estimate
from lora_lightning.cli.preflight.trace import trace_step, units, without_values
from lora_lightning.injection.inject import inject
from lora_lightning.models.tasks import find_task
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.training.assembly import enable_checkpointing

pytestmark = pytest.mark.gpu

CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
)
"""134 million weights."""
TASK = find_task("causal-lm")


def ready(dtype, checkpointing, device):
    with torch.device(device):
        net = LlamaForCausalLM._from_config(CONFIG, dtype=dtype).train()
    inject(net, LoRA(rank=8, dropout=0.05), seed=0)
    if checkpointing:
        enable_checkpointing(net)
    batch = {name: tensor.to(device) for name, tensor in TASK.example(net.config, 4, 512).items()}

    def loss():
        made = TASK.loss(TASK.logits(net, batch), batch)
        return made.total / made.count

    return net, batch, loss


def counted(dtype, checkpointing):
    with without_values() as meter:
        net, _, loss = ready(dtype, checkpointing, "cpu")
        inside, rest = units(net)
        step = trace_step(meter, net, loss, lambda: build_optimizer(net, None), torch.bfloat16)
    return estimate(Parts(inside, rest, step.optimizer, step.kept, step.activations), "ddp", 1).total


def measured(dtype, checkpointing):
    """Peak of the second step; the first has made optimizer state, gradients and the workspace of cuBLAS."""
    net, batch, loss = ready(dtype, checkpointing, DEVICE)
    batch["attention_mask"][0, -50:] = 0
    optimizer = build_optimizer(net, None)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            value = loss()
        value.backward()
        del value
        peak = torch.cuda.max_memory_allocated()
        optimizer.step()
    return peak


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32 base", "bf16 base"])
def test_the_estimate_is_within_15_percent_of_the_measured_peak(dtype, checkpointing):
    before = torch.cuda.memory_allocated()
    most, total = measured(dtype, checkpointing) - before, counted(dtype, checkpointing)
    print(f"estimated {total / 2**20:.0f} MiB, measured {most / 2**20:.0f} MiB, ratio {total / most:.3f}")
    assert total == pytest.approx(most, rel=0.15)
