"""Grouped convolutions through peft's format, compared with peft's own layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_models import DoRA
from torch import Tensor, nn

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import AdapterFileError, ExportError
from lora_lightning.exporters.peft.grouped import block_diagonal, per_group
from lora_lightning.testing import perturb
from lora_lightning.testing.toy_models import seeded

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
PLACES = [(1, 2, 8), (2, 2, 8), (3, 2, 8), (2, 4, 12), (1, 8, 8)]
"""Dimensions, groups and outputs of a convolution of 8 inputs; the last is depthwise."""
pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")


class Convolved(nn.Module):
    def __init__(self, dims: int, groups: int, outputs: int) -> None:
        super().__init__()
        with seeded(1):
            self.conv = KINDS[dims](8, outputs, 3, stride=2, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def inputs(dims: int) -> Tensor:
    return torch.randn(2, 8, *[5] * dims, generator=torch.Generator().manual_seed(2))


def trained_in_peft(model: nn.Module, folder: Path, zeros: bool, **options: Any) -> Any:
    """A peft model with random factors; where `zeros`, no group sees the channels of another."""
    theirs: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules=["conv"], **options))
    layer = theirs.base_model.model.conv
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad(), seeded(3):
        A.normal_()
        B.normal_()
        if zeros:
            groups = layer.base_layer.groups
            blocks = A.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
            own = torch.stack([blocks[group, :, group] for group in range(groups)])
            A.copy_(block_diagonal(own))
    theirs.eval().save_pretrained(folder)
    return theirs


@pytest.mark.parametrize(("dims", "groups", "outputs"), PLACES)
def test_peft_computes_what_was_trained_here_and_it_is_read_again(
    dims: int, groups: int, outputs: int, tmp_path: Path
) -> None:
    model, x = Convolved(dims, groups, outputs), inputs(dims)
    base = model(x)
    ll.inject(model, LoRA(rank=2, alpha=3.0), ["conv"], also_train=())
    perturb(model.conv.adapter("default"))
    report = ll.export(model, tmp_path / "p")
    assert report.verified_by
    expected = model(x)
    assert not torch.allclose(expected, base, atol=1e-2)
    theirs: Any = peft.PeftModel.from_pretrained(Convolved(dims, groups, outputs), tmp_path / "p")
    assert theirs.base_model.model.conv.r["default"] == 2 * groups
    torch.testing.assert_close(theirs(x), expected, rtol=1e-5, atol=1e-5)
    fresh = Convolved(dims, groups, outputs)
    ll.import_peft(fresh, tmp_path / "p")
    own, again = (one.conv.adapter("default") for one in (model, fresh))
    assert torch.equal(own.lora_A, again.lora_A)
    assert torch.equal(own.lora_B, again.lora_B)
    torch.testing.assert_close(fresh(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("dims", "groups", "outputs"), PLACES)
def test_rows_of_their_own_for_each_group_are_read_computed_alike_and_written_again(
    dims: int, groups: int, outputs: int, rslora: bool, tmp_path: Path
) -> None:
    x = inputs(dims)
    theirs = trained_in_peft(
        Convolved(dims, groups, outputs), tmp_path / "p", zeros=True, r=2 * groups, lora_alpha=5, use_rslora=rslora
    )
    model = Convolved(dims, groups, outputs)
    ll.import_peft(model, tmp_path / "p")
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
    ll.export(model, tmp_path / "again")
    opened = peft.PeftModel.from_pretrained(Convolved(dims, groups, outputs), tmp_path / "again")
    torch.testing.assert_close(opened(x), theirs(x), rtol=1e-5, atol=1e-5)
    ll.merge(model)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_a_group_that_sees_the_channels_of_another_is_refused_and_peft_cannot_merge_it(tmp_path: Path) -> None:
    theirs = trained_in_peft(Convolved(2, 2, 8), tmp_path, zeros=False, r=4)
    with pytest.raises(
        AdapterFileError, match=r"conv is a convolution of 2 groups, .* channels of others.*train it here"
    ):
        ll.import_peft(Convolved(2, 2, 8), tmp_path)
    with pytest.raises(NotImplementedError, match="Merging is not supported"):
        theirs.merge_and_unload()


def test_dora_on_groups_is_refused_since_peft_takes_lengths_of_other_rows_than_it_adds(tmp_path: Path) -> None:
    theirs = trained_in_peft(Convolved(2, 2, 8), tmp_path / "theirs", zeros=True, r=4, use_dora=True)
    layer, x = theirs.base_model.model.conv, inputs(2)
    A, B, scaling = (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"])
    found = per_group(A, B)
    assert found is not None
    weight = layer.base_layer.weight + scaling * (found[1].flatten(1) @ found[0].flatten(1)).view(8, 4, 3, 3)
    m = layer.lora_magnitude_vector["default"].weight.view(-1, 1, 1, 1)
    meant = m * weight / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    y = nn.functional.conv2d(x, meant, layer.base_layer.bias, 2, 1, groups=2)
    assert float((theirs(x) - y).detach().abs().max()) > 0.1 * float(
        y.detach().abs().max()
    )  # what peft's formula says, and what it does
    with pytest.raises(AdapterFileError, match="conv is a convolution of 2 groups with use_dora, of which peft takes"):
        ll.import_peft(Convolved(2, 2, 8), tmp_path / "theirs")
    model, x = Convolved(2, 2, 8), inputs(2)
    ll.inject(model, DoRA(rank=2), ["conv"], also_train=())
    perturb(model.conv.adapter("default"))
    with pytest.raises(
        ExportError, match=r"use_dora takes the lengths of other rows on a convolution of several groups. Give rank=N"
    ):
        ll.export(model, tmp_path / "p")
    ll.export(model, tmp_path / "q", rank=8)  # the way out: all of its rank, which loses nothing here
    opened = peft.PeftModel.from_pretrained(Convolved(2, 2, 8), tmp_path / "q")
    torch.testing.assert_close(opened(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_two_forms_have_one_product() -> None:
    """The block diagonal, written out in float64."""
    with seeded(4):
        own, B = torch.randn(3, 2, 4, 5).double(), torch.randn(6, 2, 1).double()
    A = block_diagonal(own)
    assert A.shape == (6, 12, 5)
    found = per_group(A, B)
    assert found is not None
    assert found[0].shape == (6, 4, 5)
    for group in range(3):
        rows = slice(2 * group, 2 * group + 2)
        expected = B[rows, :, 0] @ own[group].flatten(1)
        torch.testing.assert_close(found[1][rows, :, 0] @ found[0].flatten(1), expected)
    A[0, -1, -1] = 1.0
    assert per_group(A, B) is None
