"""A low-rank update with weights of its rank components: the equation, what removal leaves, groups, an exact export."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from exported_models import bert, logits, randomise
from one_layer import base_of, linear
from safetensors.torch import load_file
from torch import Tensor

import lora_lightning as ll
from lora_lightning.adapters.weighted import (
    Components,
    WeightedAdapter,
    gate_at_zero,
    kept_ranks,
    weighted_groups,
    write_normal,
)
from lora_lightning.injection.records import adapters_named
from lora_lightning.testing import perturb
from lora_lightning.testing.toy_models import BASE_KINDS


def weighted(kind: str = "Linear", **options: object) -> tuple[WeightedAdapter, Tensor]:
    base, x = base_of(kind)
    adapter = WeightedAdapter(base, rank=3, scaling=0.5, **options)  # type: ignore[arg-type]
    adapter.reset(torch.Generator().manual_seed(0))
    perturb(adapter)
    return adapter, x


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_output_and_weight_are_those_of_the_equation(kind: str) -> None:
    base, x = base_of(kind)
    adapter = WeightedAdapter(base, rank=3, scaling=0.5, components=Components(weights=torch.exp))
    perturb(adapter)
    w = adapter.gate.detach().exp()
    update = 0.5 * torch.einsum("...or,...r,...ri->...oi", adapter.lora_B, w, adapter.lora_A)
    weight = base.weight() + update
    torch.testing.assert_close(adapter.merged_weight(base.weight()), weight, atol=1e-12, rtol=0)
    torch.testing.assert_close(adapter(x, base), base.apply(x, weight, base.bias), atol=1e-12, rtol=0)


def test_gradients_are_those_of_the_dense_weight() -> None:
    base, x = base_of("Linear")
    adapter = WeightedAdapter(base, rank=3, scaling=0.5)
    perturb(adapter)
    adapter(x, base).square().sum().backward()
    A, B, w = (p.detach() for p in (adapter.lora_A, adapter.lora_B, adapter.gate))
    y = base.apply(x, base.weight() + 0.5 * (B * w) @ A, base.bias)
    dW = 0.5 * (2 * y).flatten(0, -2).T @ x.flatten(0, -2)
    torch.testing.assert_close(adapter.lora_A.grad, w[:, None] * (B.T @ dW), atol=1e-12, rtol=0)
    torch.testing.assert_close(adapter.lora_B.grad, dW @ A.T * w, atol=1e-12, rtol=0)
    torch.testing.assert_close(adapter.gate.grad, torch.einsum("or,oi,ri->r", B, dW, A), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["Linear", "Embedding", "Experts"])
def test_a_component_without_weight_is_in_no_closed_form(kind: str) -> None:
    adapter, _ = weighted(kind)
    with torch.no_grad():
        adapter.gate[..., 1] = 0
    assert adapter.kept().tolist() == [True, False, True]
    A, B = adapter.low_rank()
    assert (A.shape[-2], B.shape[-1]) == (2, 2)
    assert (A.requires_grad, B.requires_grad) == (False, False)
    full = adapter.merged_weight(torch.zeros(*B.shape[:-1], A.shape[-1], dtype=torch.float64)).detach()
    torch.testing.assert_close(B @ A, full, atol=1e-12, rtol=0)


def test_experts_keep_a_component_that_one_of_them_uses() -> None:
    adapter, _ = weighted("Experts")
    with torch.no_grad():
        adapter.gate[:2, 0] = 0
    assert adapter.kept().all()


def test_the_stated_pair_has_the_scaling_of_the_adapter_and_the_weights_in_b() -> None:
    adapter, _ = weighted()
    pair = adapter.stated_pair()
    assert pair.scaling == 0.5
    assert torch.equal(pair.lora_A, adapter.lora_A)
    assert torch.equal(pair.lora_B, adapter.lora_B * adapter.gate)
    assert adapter.factor_pairs() == ()


def test_the_gate_starts_after_the_pair_as_it_is_told() -> None:
    components = Components(begin=lambda adapter, drawn: write_normal(adapter.gate, 2.0, drawn))
    adapter = WeightedAdapter(linear(), rank=3, scaling=1.0, components=components)
    adapter.reset(torch.Generator().manual_seed(0))
    drawn = torch.Generator().manual_seed(0)
    torch.rand(3, 12, generator=drawn)
    assert torch.equal(adapter.gate, 2.0 * torch.randn(3, generator=drawn).double())
    assert not adapter.lora_B.any()
    gate_at_zero(adapter, drawn)
    assert not adapter.gate.any()


def test_groups_hold_each_side_and_gates_without_decay() -> None:
    first, second = weighted()[0], weighted("Conv2d")[0]
    groups = weighted_groups({"a": first, "b": second}, gate_ratio=3.0)
    assert list(groups) == ["A", "B", "gate"]
    assert [p is q for p, q in zip(groups["A"].params, (first.lora_A, second.lora_A), strict=True)] == [True, True]
    assert (groups["gate"].lr_ratio, groups["gate"].weight_decay) == (3.0, 0.0)
    assert weighted_groups({"a": first}, gate_decay=None)["gate"].weight_decay is None


def test_kept_components_are_counted_in_total_and_by_layer() -> None:
    first, second = weighted()[0], weighted()[0]
    with torch.no_grad():
        first.gate[:2] = 0
    facts = kept_ranks({"a": first, "b": second})
    assert facts == {"kept_components": 4, "components": 6, "ranks": {"a": 1, "b": 3}}


def test_an_export_has_the_ranks_that_are_left_their_scaling_and_fewer_bytes(tmp_path) -> None:
    model = bert()
    ll.inject(model, ll.method("SoRA")(rank=4, alpha=8), ["query", "value"])
    randomise(model)
    ll.export(model, tmp_path / "full")
    adapters = list(adapters_named(model, "default").values())
    with torch.no_grad():
        adapters[0].gate[1:] = 0
        adapters[1].gate[:2] = 0
        adapters[2].gate.zero_()
    before = logits(model)
    written = ll.export(model, tmp_path / "pruned")
    assert written.kind == "exact LoRA"
    config = json.loads((tmp_path / "pruned" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "pruned" / "adapter_model.safetensors")
    assert sorted(t.shape[0] for name, t in tensors.items() if "lora_A" in name) == [1, 1, 2, 4]
    assert {config["r"], *config["rank_pattern"].values()} == {1, 2, 4}
    ranks = dict(config["rank_pattern"])
    assert all(alpha == 2.0 * ranks.get(path, config["r"]) for path, alpha in config["alpha_pattern"].items())
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("full", "pruned")]
    assert sizes[0] - sizes[1] >= (3 + 2 + 3) * 32 * 4
    fresh = bert()
    ll.import_peft(fresh, tmp_path / "pruned")
    torch.testing.assert_close(logits(fresh), before, atol=1e-5, rtol=0)


def test_a_copy_has_gates_of_its_own() -> None:
    adapter, x = weighted()
    base = base_of("Linear")[0]
    twin = copy.deepcopy(adapter)
    before = adapter(x, base)
    perturb(twin, seed=4)
    assert torch.equal(adapter(x, base), before)
