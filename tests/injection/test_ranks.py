"""A rank above a layer's narrow side: as wide as the side in training, as it stands in files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lightning as ll
from lora_lightning import plugins
from lora_lightning.injection.records import records
from lora_lightning.testing import perturb

CELoRA, DoRA, LoRA, LoRASC, MoELoRA, RoseLoRA = (
    plugins.method(name) for name in ("CELoRA", "DoRA", "LoRA", "LoRASC", "MoELoRA", "RoseLoRA")
)


def narrow() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 2))


@pytest.mark.parametrize(
    ("method", "alpha"),
    [
        (LoRA(rank=8, alpha=16), 4.0),
        (LoRA(rank=8, alpha=16, scaling_rule="alpha/sqrt(r)"), 8.0),
        (DoRA(rank=8, alpha=16), 4.0),
        (RoseLoRA(rank=8, alpha=16), 4.0),
    ],
)
def test_a_new_adapter_takes_the_narrow_side_and_keeps_its_scaling(method, alpha):
    model = narrow()
    report = ll.inject(model, method, ["0", "1"], also_train=())
    wide, cut = (layer.adapter("default") for _, layer in ll.iter_adapters(model))
    assert wide.lora_A.shape == (8, 12)
    assert (cut.lora_A.shape, cut.lora_B.shape) == ((2, 10), (2, 2))
    assert cut.scaling == wide.scaling == method.scaling
    assert [n for n in report.notes if "rank" in n] == [
        "rank 8 is taken as 2 on 1 layer no wider than that, such as 1; the scaling stays as it is."
    ]
    assert records(model)["default"].layers["1"].alpha == alpha


def test_a_method_inside_another_and_a_rank_of_another_name():
    model = narrow()
    ll.inject(model, LoRASC(inner=LoRA(rank=8)), ["1"], also_train=())
    assert model[1].adapter("default").lora_A.shape == (2, 10)
    model = narrow()
    report = ll.inject(model, CELoRA(rank=8, svd_rank=7), ["1"], also_train=())
    assert model[1].adapter("default").svd_rank == 2
    assert sum("svd_rank 7 is taken as 2" in note for note in report.notes) == 1
    model = narrow()
    ll.inject(model, MoELoRA(experts=2, top_k=2, rank=8), ["1"], also_train=())
    assert model[1].adapter("default").lora_B.shape[-2:] == (2, 2)


@pytest.mark.parametrize("method", [CELoRA(), DoRA(), LoRA(), LoRASC(inner=LoRA()), MoELoRA(), RoseLoRA()], ids=repr)
def test_the_default_rank_of_a_method_fits_small_layers_at_the_first_attempt(method):
    """Layers with fewer outputs, or inputs, than the rank need no `exclude` or `overrides`, one after the other."""
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3), nn.Linear(3, 2), nn.Linear(2, 20), nn.Linear(20, 1))
    report = ll.inject(model, method, also_train=())
    assert list(report.layers) == ["0", "1", "2", "3", "4"]
    told = " ".join(report.notes)
    assert all(f"is taken as {narrow} on" in told for narrow in (1, 2, 3))


def test_an_override_is_cut_as_well_and_no_other_layer():
    model = narrow()
    report = ll.inject(model, LoRA(rank=2), ["0", "1"], also_train=(), overrides={"1": {"rank": 4, "alpha": 12}})
    first, second = (layer.adapter("default") for _, layer in ll.iter_adapters(model))
    assert first.rank == 2
    assert (second.rank, second.scaling) == (2, 3.0)
    assert "rank 4 is taken as 2" in str(report)


def test_what_was_cut_is_saved_loaded_and_merged(tmp_path):
    model = narrow().double()
    ll.inject(model, LoRA(rank=8), ["0", "1"], also_train=())
    for _, layer in ll.iter_adapters(model):
        perturb(layer.adapter("default"), size=0.1)
    ll.save_adapter(model, tmp_path)
    other = narrow().double()
    ll.load_adapter(other, tmp_path)
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = model(x)
    assert torch.equal(other(x), expected)
    ll.merge(other)
    torch.testing.assert_close(other(x), expected, rtol=0, atol=1e-12)


def test_a_narrow_update_of_full_rank_can_be_any_matrix():
    """Rank 2 on two outputs is as much as rank 8: the least squares solution is reached exactly."""
    model = nn.Sequential(nn.Linear(10, 2)).double()
    ll.inject(model, LoRA(rank=8, alpha=8), ["0"], also_train=())
    target = torch.randn(2, 10, dtype=torch.float64)
    adapter = model[0].adapter("default")
    with torch.no_grad():
        adapter.lora_B.copy_(target @ torch.linalg.pinv(adapter.lora_A.double()))
        adapter.lora_A.copy_(torch.linalg.pinv(adapter.lora_B.double()) @ target)
    torch.testing.assert_close((adapter.lora_B @ adapter.lora_A).double(), target, rtol=0, atol=1e-5)
