"""Architectures of transformers: what each scope matches, and that adapters train, save, merge and generate on each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, GOLDEN, REFUSALS, Architecture, Batch, Refusal, matched, routed, table
from pages import DOCS, section
from torch import Tensor, nn

import lora_lightning as ll
from ll_dora import DoRA
from ll_lora import LoRA
from ll_rose import RoseLoRA
from lora_lightning.errors import ExportError
from lora_lightning.models.scopes import TOWERS
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.testing import perturb

METHODS: dict[str, Any] = {"LoRA": LoRA(rank=2), "DoRA": DoRA(rank=2), "RoseLoRA": RoseLoRA(rank=2)}
CELLS = [(name, method) for name in ARCHITECTURES for method in METHODS]
FAST = {(name, list(METHODS)[index % len(METHODS)]) for index, name in enumerate(list(ARCHITECTURES)[::2])}
STEPS = 3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_each_scope_matches(name: str) -> None:
    found = matched(ARCHITECTURES[name])
    assert {key: value for key, value in found.items() if value != {}} == GOLDEN[name]


def targets(name: str) -> Any:
    """Every tower of a vision-language model, else "all-linear"."""
    return [tower for tower in TOWERS if tower in GOLDEN[name]] or "all-linear"


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        found = model(**batch)
    return found.logits if hasattr(found, "logits") else found.logits_per_image


def double(batch: Batch) -> Batch:
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def generated(model: Any, batch: Batch) -> Tensor:
    """Six greedy tokens a row, whatever the model would rather stop at."""
    given = {key: value for key, value in batch.items() if key != "labels"}
    return model.generate(**given, max_new_tokens=6, min_new_tokens=6, do_sample=False)


def train(model: Any, batch: Batch) -> None:
    """`STEPS` steps; every tensor that trains gets a gradient and moves."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start, reached = {name: p.detach().clone() for name, p in trainable.items()}, set()
    optimizer = build_optimizer(model, None)
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        reached |= {name for name, p in trainable.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
    model.eval()
    assert reached == set(trainable)
    assert [name for name, p in trainable.items() if torch.equal(p, start[name])] == []


def cycle(architecture: Architecture, method: Any, what: Any, folder: Path) -> None:
    """Inject, train, save, load, merge, generate and unmerge; each as it must be."""
    model, batch = architecture.build().requires_grad_(False), architecture.batch()  # whether it is can change rounding
    base = outputs(model, batch)
    ll.inject(model, method, what, seed=0)
    assert torch.equal(outputs(model, batch), base)

    train(model, batch)
    for index, (_, layer) in enumerate(ll.iter_adapters(model)):
        perturb(layer.adapters, index)
    adapted = outputs(model, batch)
    assert (adapted - base).abs().max() > 1e-3

    ll.save_adapter(model, folder)
    fresh = architecture.build()
    ll.load_adapter(fresh, folder)
    state = fresh.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(outputs(fresh, batch), adapted)

    tolerance = 1e-4
    if architecture.precise:
        model, batch, tolerance = model.double(), double(batch), 1e-6
    model.set_experts_implementation("eager")  # the grouped product of torch takes no float64
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapted = outputs(model, batch)
    tokens = generated(model, batch) if model.can_generate() else None
    ll.merge(model)
    torch.testing.assert_close(outputs(model, batch), adapted, rtol=tolerance, atol=tolerance)
    if tokens is not None:
        assert torch.equal(generated(model, batch), tokens)
    ll.unmerge(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(*cell, marks=() if cell in FAST else pytest.mark.slow, id="-".join(cell).replace(" ", "-"))
        for cell in CELLS
    ],
)
def test_adapters_train_save_merge_and_generate(name: str, method: str, tmp_path: Path) -> None:
    cycle(ARCHITECTURES[name], METHODS[method], targets(name), tmp_path)


def half(batch: Batch) -> Batch:
    """Pictures and sounds in bfloat16; attention masks stay what they are."""
    return {k: v.bfloat16() if v.is_floating_point() and k != "attention_mask" else v for k, v in batch.items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_starts_at_the_base_and_trains(name: str, method: str) -> None:
    model, batch = ARCHITECTURES[name].build(torch.bfloat16), half(ARCHITECTURES[name].batch())
    base = outputs(model.requires_grad_(False), batch)
    ll.inject(model, METHODS[method], targets(name), seed=0)
    assert torch.equal(outputs(model, batch), base)
    model.train()(**batch).loss.backward()
    trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert [key for key, p in trainable.items() if p.grad is None or not torch.isfinite(p.grad).all()] == []
    assert any(p.grad.any() for p in trainable.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_a_model_keeps_in_float32(method: str) -> None:
    """T5 casts to the dtype of `wo` before it calls it, and keeps that in float32 in half precision."""
    model, batch = ARCHITECTURES["T5"].build(torch.bfloat16), ARCHITECTURES["T5"].batch()
    kept = [module for path, module in model.named_modules() if path.endswith(".wo")]
    for module in kept:
        module.float()
    base = outputs(model, batch)
    ll.inject(model, METHODS[method], seed=0)
    assert torch.equal(outputs(model, batch), base)
    for index, (_, layer) in enumerate(ll.iter_adapters(model)):
        perturb(layer.adapters, index, size=0.1)
    adapted = outputs(model, batch)
    assert {module.weight.dtype for module in kept} == {torch.float32}
    assert adapted.dtype == base.dtype
    assert not torch.equal(adapted, base)
    model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


# -- what is refused, and what docs/models.md says ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refusal", "name", "message"),
    [
        (REFUSALS[0], "Mamba", r"mixer.dt_proj is read by MambaMixer instead of called.* MoELoRA has none, .*exclude="),
        (REFUSALS[0], "Jamba", r"mamba.dt_proj is read by JambaMambaMixer instead of called.* exclude=\[\"dt_proj\"\]"),
        (
            REFUSALS[1],
            "Gemma 3, vision",
            r"mm_input_projection_weight is a bare parameter, not a layer; also_train can",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(refusal: Refusal, name: str, message: str) -> None:
    assert name in refusal.on
    assert re.search(message, refusal.message(name))


def test_each_refusal_is_tested_on_each_of_its_models() -> None:
    assert [name for refusal in REFUSALS for name in refusal.on] == ["Mamba", "Jamba", "Gemma 3, vision"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in REFUSALS[0].on])
def test_routed_adapters_work_on_all_others(name: str) -> None:
    model = routed(ARCHITECTURES[name])
    for index, (_, layer) in enumerate(ll.iter_adapters(model)):
        perturb(layer.adapters, index)  # a router's first gradients are below float32 in models as flat as these
    train(model, ARCHITECTURES[name].batch())


NOT_FOR_PEFT = {
    "Mamba": "MambaMixer reads the weight without calling the layer, so that peft's factors have no effect",
    "Mamba-2": "peft refuses out_proj and conv1d in models of type mamba2",
    "Jamba": "JambaMambaMixer reads the weight without calling the layer, so that peft's factors have no effect",
    "Falcon-H1": "peft refuses out_proj and conv1d in models of type falcon_h1",
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("Mamba", "Mamba-2", "LLaVA", "Whisper") else pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_peft_computes_the_same_or_the_export_is_refused(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model, batch = ARCHITECTURES[name].build(), ARCHITECTURES[name].batch()
    ll.inject(model, METHODS["LoRA"], targets(name), seed=0)
    for index, (_, layer) in enumerate(ll.iter_adapters(model)):
        perturb(layer.adapters, index)
    if name in NOT_FOR_PEFT:
        with pytest.raises(ExportError, match=NOT_FOR_PEFT[name]):
            ll.export(model, tmp_path / "peft")
        return
    ll.export(model, tmp_path / "peft")
    theirs = PeftModel.from_pretrained(ARCHITECTURES[name].build(), tmp_path / "peft")
    torch.testing.assert_close(outputs(theirs, batch), outputs(model, batch), rtol=1e-4, atol=1e-4)


def test_the_table_of_the_page_is_fresh() -> None:
    """Else print it anew: `python tests/architectures.py`."""
    told = section(DOCS / "models.md", "architectures")
    assert told == table()
