"""The data module draws what it says; the format holds what a merged model computes with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ll_other_parts.data import FewShotText
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import DataError, SettingsError
from lora_lightning.injection.records import adapters_named
from lora_lightning.testing import perturb


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "train.csv"
    lines = [f"text {row},{'ab'[row % 2]}" for row in range(20)]
    file.write_text("\n".join(["text,label", *lines]) + "\n")
    return str(file)


def test_so_many_of_each_class_are_drawn_from_the_seed(table):
    drawn = [FewShotText(shots=3, train=table, validation=table, seed=seed) for seed in (0, 0, 1)]
    rows = [data.read("train") for data in drawn]
    assert [sorted(each["label"][:]) for each in rows] == [["a"] * 3 + ["b"] * 3] * 3
    assert rows[0]["text"][:] == rows[1]["text"][:] != rows[2]["text"][:]
    assert len(drawn[0].read("validation")) == 20


def test_what_it_refuses(table):
    with pytest.raises(SettingsError, match=r"FewShotText\.shots is 0; it must be at least 1"):
        FewShotText(shots=0, train=table)
    with pytest.raises(SettingsError, match=r"FewShotText\.regression is True; numbers have no classes"):
        FewShotText(regression=True, train=table)
    with pytest.raises(DataError, match=r'FewShotText\.shots is 11; class "a" has 10 training rows'):
        FewShotText(shots=11, train=table, validation=table).read("train")


def test_the_format_holds_merged_weights_and_what_trained_in_full(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    ll.inject(model, ll.method("LoRA")(rank=2, alpha=4.0, bias=True), ["0"], also_train=["1"], seed=0)
    perturb(adapters_named(model, "default")["0"])
    report = ll.export(model, tmp_path / "out", "npz")
    assert (report.layers, report.difference) == (1, 0.0)
    x = torch.randn(3, 6)
    with np.load(tmp_path / "out" / "merged.npz") as found:
        hidden = x.numpy() @ found["0.weight"].T + found["0.bias"]
        output = hidden @ found["1.weight"].T + found["1.bias"]
    np.testing.assert_allclose(output, model(x).detach().numpy(), rtol=1e-5, atol=1e-6)
