"""From settings to a model with adapters: what is refused, before and while it is loaded."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from torch import nn
from toy_runs import (
    classification,
    decoder_folder,
    encoder_folder,
    labelled_data,
    trainer,
)
from transformers import AutoModel, BertConfig, BertModel

from ll_lora import LoRA
from lora_lightning.errors import DataError, ModelError, SettingsError, TargetError
from lora_lightning.models.loading import load_model, load_without_values
from lora_lightning.models.tasks import find_task
from lora_lightning.training.module import AdapterModule


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return decoder_folder(tmp_path_factory.mktemp("decoder"))


def load(source, task="sequence-classification", **options):
    return load_model(str(source), find_task(task), 3, **options)


def test_a_missing_model_folder(tmp_path):
    with pytest.raises(ModelError, match=r'model.pretrained is ".*modle"'):
        load(tmp_path / "modle")


def test_a_folder_without_weights(encoder, tmp_path):
    AutoModel.from_pretrained(encoder).config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r'model.pretrained is ".*": .*(no file|safetensors)'):
        load(tmp_path)


def test_weights_that_lack_a_part_of_the_backbone(tmp_path):
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    model = BertModel(config)
    state = {name: value for name, value in model.state_dict().items() if "layer.0.output.dense" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(
        ModelError, match=r"lacks 2 weights of BertForSequenceClassification, such as bert.*would stay random"
    ):
        load(tmp_path)


def test_a_task_the_model_has_no_class_for(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    CLIPVisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r'model.task is "causal-lm", but ".*" has no AutoModelForCausalLM'):
        load(tmp_path, "causal-lm")


def test_an_unknown_task():
    with pytest.raises(
        SettingsError, match=r'model.task is "sequence-clasification". Did you mean "sequence-classification"'
    ):
        find_task("sequence-clasification")


def test_data_of_another_task(decoder, encoder, tmp_path):
    causal = AdapterModule(str(decoder), LoRA(rank=2), task="causal-lm")
    with pytest.raises(
        DataError, match=r'model.task is "causal-lm", but the data \(LabelledText\) serve sequence-class'
    ):
        trainer(tmp_path).fit(causal, datamodule=labelled_data(encoder))


def test_an_unknown_number_of_labels(encoder):
    with pytest.raises(SettingsError, match=r"model.num_labels is null, and the data module does not say"):
        classification(encoder, LoRA()).configure_model()


def test_a_setting_that_a_layer_cannot_have_names_the_layer(encoder):
    with pytest.raises(SettingsError, match=r"LoRA on bert.embeddings.word_embeddings: dropout is 0.1; an embedding"):
        classification(encoder, LoRA(rank=2, dropout=0.1), targets=["word_embeddings"], num_labels=3).configure_model()


def test_a_target_that_matches_nothing(encoder):
    with pytest.raises(TargetError, match=r'targets=\["qury"\] matched none of the .* Nearest: "query"'):
        classification(encoder, LoRA(rank=2), targets=["qury"], num_labels=3).configure_model()


def test_gradient_checkpointing_of_a_model_without_it(encoder):
    from lora_lightning.training.assembly import enable_checkpointing

    with pytest.raises(ModelError, match=r"model.gradient_checkpointing is True; Linear does not support it"):
        enable_checkpointing(nn.Linear(2, 2))


def test_every_refusal_is_found_before_anything_is_loaded(tmp_path):
    module = AdapterModule("random:bert", LoRA(), quantization="nf4", num_labels=None)
    module.trainer = trainer(tmp_path, accumulate_grad_batches=0)
    found = [str(error) for error in module.refusals()]
    assert len(found) == 3
    for text in ("no weights to quantize", "accumulate_grad_batches is 0", "model.num_labels is null"):
        assert any(text in message for message in found)


def test_the_assembly_is_what_the_module_says_now(encoder):
    module = AdapterModule(str(encoder), LoRA(), seed=3)
    with pytest.raises(SettingsError, match=r"model\.num_labels is null"):
        module.assembly().labels()
    module.num_labels = 4
    assert module.assembly().labels() == 4
    assert module.assembly().source(3) == str(encoder)


def test_the_first_process_reads_for_all_where_a_strategy_says_so(encoder):
    assembly = AdapterModule(str(encoder), LoRA()).assembly()
    assert assembly.loader() is load_model
    for reads_on_first, rank, loader in ((True, 0, load_model), (True, 1, load_without_values), (False, 1, load_model)):
        run = SimpleNamespace(strategy=SimpleNamespace(reads_on_first_rank=reads_on_first), global_rank=rank)
        assert dataclasses.replace(assembly, trainer=run).loader() is loader
