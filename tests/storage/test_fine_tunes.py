"""What adapters and models have changed, against the weights themselves."""

from __future__ import annotations

import pytest
import torch

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import ModelError, SettingsError
from lora_lightning.injection.records import adapters_named
from lora_lightning.models.anatomy import survey
from lora_lightning.storage.fine_tunes import FineTunes
from lora_lightning.testing import TinyMLP, perturb, tiny_encoder

QUERY, VALUE = (f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "value"))


def adapter_folder(folder, seed, targets):
    model = tiny_encoder()
    ll.inject(model, LoRA(rank=2, alpha=6.0), targets, also_train=(), seed=seed)
    for number, adapter in enumerate(adapters_named(model, "default").values()):
        perturb(adapter, seed + number)
    ll.save_adapter(model, folder)
    return {path: a.merged_weight(torch.zeros(16, 16)).detach() for path, a in adapters_named(model, "default").items()}


def test_a_folder_of_adapters_gives_the_factors_of_each(tmp_path):
    one = adapter_folder(tmp_path / "many" / "one", 1, ["query"])
    two = adapter_folder(tmp_path / "many" / "two", 5, ["query", "value"])
    model = tiny_encoder()
    tunes = FineTunes([str(tmp_path / "many")], model, survey(model).reachable, "here")
    found = [B @ A for A, B in tunes.factors(QUERY)]
    for update, expected in zip(found, (one[QUERY], two[QUERY]), strict=True):
        torch.testing.assert_close(update, expected.double(), atol=1e-6, rtol=0)
    assert len(tunes.factors(VALUE)) == 1
    assert tunes.differences(QUERY) == []


def test_models_give_their_differences(tmp_path):
    base, tuned = tiny_encoder(), tiny_encoder()
    with torch.no_grad():
        tuned.get_submodule(QUERY).weight.add_(torch.eye(16))
    tuned.save_pretrained(tmp_path / "tuned")
    tunes = FineTunes([str(tmp_path / "tuned")], base, survey(base).reachable, "here")
    (difference,) = tunes.differences(QUERY)
    torch.testing.assert_close(difference, torch.eye(16, dtype=torch.float64), atol=1e-6, rtol=0)
    assert not tunes.differences(VALUE)[0].any()
    assert tunes.factors(QUERY) == []


def test_what_belongs_to_another_model_is_refused(tmp_path):
    adapter_folder(tmp_path / "one", 1, ["query"])
    model = TinyMLP()
    layers = {QUERY: survey(model).reachable["first"]}
    tunes = FineTunes([str(tmp_path / "one")], model, layers, "here")
    with pytest.raises(SettingsError, match=r"here: .*query has size \(16, 16\) in .*one and \(8, 6\) here"):
        tunes.factors(QUERY)
    with pytest.raises(SettingsError, match=r"here names the model a/b, and TinyMLP is no Hugging Face model"):
        FineTunes(["a/b"], model, layers, "here")
    with pytest.raises(ModelError, match=r'here is "\./none"'):
        FineTunes(["./none"], tiny_encoder(), {}, "here")
