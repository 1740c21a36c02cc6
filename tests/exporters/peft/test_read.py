from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from model_classes import model_class
from peft_models import DoRA, Q, change_tensors, from_peft, llama

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning import plugins
from lora_lightning.errors import AdapterFileError, AdapterStateError, PluginError
from lora_lightning.exporters.peft import rules as peft_rules
from lora_lightning.testing import perturb

pytestmark = pytest.mark.filterwarnings(
    # peft 0.21.2 reads a name that transformers 5.23 has renamed
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # peft takes its own one-dimensional lora_B.bias for a sharded factor
    "ignore:Adapter 'default'. .*LoRA tensor.s. have invalid shape. .*lora_B.bias:peft.utils.warning.PeftWarning",
)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / peft_rules.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LOHA"}, 'peft_type \'LOHA\'; "LORA" and "ADALORA" are read'),
        ({"use_dora": True}, "q_proj: the file has no lora_magnitude_vector, while .* has use_dora=True; they belong"),
        ({"trainable_token_indices": [1]}, r"has trainable_token_indices \[1\], but no rows of the embedding"),
        (
            {"trainable_token_indices": {"lm_head": [1]}},
            r"has trainable_token_indices .*, but no rows of the embedding",
        ),
        ({"layer_replication": [[0, 1]]}, "uses layer_replication"),
        ({"use_qalora": True}, "uses use_qalora"),
        ({"alora_invocation_tokens": [5, 6]}, "uses alora_invocation_tokens"),
        ({"some_later_option": {"a": 1}}, "uses some_later_option"),
        ({"bias": "some"}, 'has bias=\'some\'; "none", "all" and "lora_only" are read'),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq', with which peft changes the base"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda', .* its start factors are not there. Convert it"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4', .* start factors are not there"),
        ({"r": 5}, r"do not fit rank 5"),
        ({"alpha_pattern": {"(": 1}}, "cannot be read"),
    ],
)
def test_refused_settings(saved: Path, values: dict[str, Any], message: str) -> None:
    change_config(saved, **values)
    model = llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterFileError, match=message):
        ll.import_peft(model, saved)
    assert before.keys() == model.state_dict().keys()


def test_a_target_without_tensors_is_reported(saved: Path) -> None:
    change_config(saved, target_modules=["q_proj", "v_proj", "k_porj"])
    report = ll.import_peft(llama(), saved)
    assert 'target_modules names "k_porj"' in str(report)


def test_a_head_without_tensors_is_refused(saved: Path) -> None:
    change_config(saved, modules_to_save=["lm_head"])
    with pytest.raises(AdapterFileError, match=r"modules_to_save names lm_head, but the file lacks lm_head\.weight"):
        ll.import_peft(llama(), saved)


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    from_peft(llama, tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(AdapterFileError, match=r"shares its weight with model\.embed_tokens\.weight"):
        ll.import_peft(llama(tie_word_embeddings=True), tmp_path)
    ll.import_peft(llama(), tmp_path)


def test_the_name_must_be_free(saved: Path) -> None:
    model = llama()
    ll.import_peft(model, saved)
    with pytest.raises(AdapterStateError, match='has an adapter "default" already'):
        ll.import_peft(model, saved)


def test_a_rank_above_a_layers_narrow_side_is_read_saved_and_loaded(tmp_path: Path) -> None:
    theirs = from_peft(llama, tmp_path / "wide", target_modules=["k_proj", "q_proj"], r=20)
    model, again = llama(), llama()
    ll.import_peft(model, tmp_path / "wide")
    ids = torch.arange(3, 10)[None]
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    ll.save_adapter(model, tmp_path / "own")
    ll.load_adapter(again, tmp_path / "own")
    assert torch.equal(again(ids).logits, model(ids).logits)
    trained = llama()
    report = ll.inject(trained, ll.method("LoRA")(rank=20), targets=["k_proj"])
    assert "rank 20 is taken as 8 on" in str(report)


def test_mica_is_read_as_a_plain_pair(saved: Path) -> None:
    change_config(saved, init_lora_weights="mica")
    assert ll.import_peft(llama(), saved).method == ll.method("LoRA")(rank=4, alpha=6.0)


def test_patterns_that_decide_nothing_are_noted(saved: Path) -> None:
    change_config(saved, alpha_pattern={"^q_proj": 100}, rank_pattern={"q_proj": 4, "layers.0.self_attn.q_proj": 4})
    notes = ll.import_peft(llama(), saved).notes
    assert [note.partition(",")[0] for note in notes] == [
        'rank_pattern has "layers.0.self_attn.q_proj"',
        'alpha_pattern has "^q_proj"',
    ]


def test_a_second_import_under_another_name(saved: Path) -> None:
    model = llama()
    ll.import_peft(model, saved, name="first")
    ll.import_peft(model, saved, name="second")
    ll.set_active(model, "first")
    assert all(layer.active == ("first",) for _, layer in ll.iter_adapters(model))


@pytest.mark.parametrize("size", [15, 17])
def test_a_magnitude_of_another_size_is_refused(size: int, tmp_path: Path) -> None:
    from_peft(llama, tmp_path, target_modules=["q_proj"], use_dora=True)
    change_tensors(tmp_path, lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(size)}))
    with pytest.raises(AdapterFileError, match=f"lora_magnitude_vector of .* has {size} numbers; the layer needs 16"):
        ll.import_peft(llama(), tmp_path)


def test_an_option_that_no_method_reads(tmp_path: Path) -> None:
    from_peft(llama, tmp_path, target_modules=["q_proj"], use_dora=True)
    model = llama()
    try:
        plugins.load(blocked=["ll_dora"])
        with pytest.raises(AdapterFileError, match="uses use_dora, which no installed method reads"):
            ll.import_peft(model, tmp_path)
    finally:
        plugins.load()
    assert not list(ll.iter_adapters(model))


def test_an_option_that_two_methods_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_peft(llama, tmp_path, target_modules=["q_proj"], use_dora=True)

    @dataclass(frozen=True, kw_only=True)
    class Another(DoRA):
        pass

    monkeypatch.setitem(plugins.registry().methods, "Another", Another)
    with pytest.raises(
        PluginError, match=r"2 installed methods read .* with use_dora=True: (DoRA, Another|Another, DoRA)"
    ):
        ll.import_peft(llama(), tmp_path)


def test_without_the_method_that_reads_the_format(saved: Path) -> None:
    model = llama()
    try:
        plugins.load(blocked=["ll_lora"])
        with pytest.raises(PluginError, match=r"0 installed methods read peft's LORA format"):
            ll.import_peft(model, saved)
    finally:
        plugins.load()
    assert not list(ll.iter_adapters(model))


def test_a_convolutional_classifier_without_an_embedding_is_read(tmp_path: Path) -> None:
    """transformers raises NotImplementedError where such a model is asked for its embedding."""
    found = model_class("ResNetForImageClassification")
    model, fresh = found.build(), found.build()
    ll.inject(model, LoRA(rank=2), targets=["convolution"], seed=0)
    for index, (_, layer) in enumerate(ll.iter_adapters(model)):
        perturb(layer.adapters, index)
    ll.export(model, tmp_path / "p", verify=False)
    ll.import_peft(fresh, tmp_path / "p")
    pixels = found.batch(model, torch.zeros(2, 1))
    torch.testing.assert_close(fresh(**pixels).logits, model(**pixels).logits, rtol=1e-5, atol=1e-6)
