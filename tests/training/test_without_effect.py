"""Settings that would do nothing beside the others: one line each, before anything is loaded."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from toy_runs import classification, completion_data, decoder_folder, encoder_folder, labelled_data, trainer

from ll_lora import LoRA
from lora_lightning.callbacks.best import KeepBest
from lora_lightning.errors import SettingsError
from lora_lightning.optim.warmup import WarmUp
from lora_lightning.training.module import AdapterModule
from lora_lightning.training.without_effect import check_validation_comes, unscheduled, without_effect


@pytest.fixture
def decoder(tmp_path):
    return decoder_folder(tmp_path / "model")


@pytest.fixture
def encoder(tmp_path):
    return encoder_folder(tmp_path / "model", dropout=0.0)


def told(module, run=None, data=None) -> list[str]:
    return [str(error) for error in without_effect(module, run, data)]


def test_a_fit_is_refused_before_the_model_is_loaded(tmp_path, decoder):
    module = AdapterModule(str(tmp_path / "gone"), LoRA(), task="causal-lm", num_labels=3)
    with pytest.raises(SettingsError, match=r'^model\.num_labels is 3, but the task "causal-lm" has no head of'):
        trainer(tmp_path).fit(module, completion_data(decoder))


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("causal-lm", {"num_labels": 2}, "model.num_labels is 2"),
        ("masked-lm", {"num_labels": 2, "max_new_tokens": 3}, "model.num_labels is 2|model.max_new_tokens is 3"),
        ("regression", {"loss_head": "plain"}, 'model.loss_head is "plain"'),
        ("preference", {"max_new_tokens": 3}, "model.max_new_tokens is 3"),
        ("causal-lm", {"max_new_tokens": 3, "loss_head": "plain"}, ""),
        ("seq2seq-lm", {"max_new_tokens": 3}, ""),
        ("sequence-classification", {"num_labels": 3}, ""),
        ("causal-lm", {"half_adapters": True, "quantization": "nf4"}, ""),
    ],
)
def test_settings_of_other_tasks(task, settings, message):
    found = told(AdapterModule("nowhere", LoRA(), task=task, **settings))
    assert [text.partition(",")[0] for text in found] == [part for part in message.split("|") if part]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit_train_batches": 0}, r"^trainer\.limit_train_batches is 0, so that nothing would be trained; null"),
        ({"check_val_every_n_epoch": 0}, r"^trainer\.check_val_every_n_epoch is 0; it must be at least 1, or null"),
        ({"check_val_every_n_epoch": -2}, r"^trainer\.check_val_every_n_epoch is -2; it must be at least 1"),
        ({"gradient_clip_algorithm": "norm"}, r'algorithm is "norm", but trainer\.gradient_clip_val is None'),
        ({"gradient_clip_algorithm": "value", "gradient_clip_val": 0}, r"clip_val is 0, so that nothing is clipped"),
        ({"gradient_clip_val": -0.5}, r"clip_val is -0\.5, which would spoil gradients or turn them round; it must be"),
        (
            {"gradient_clip_val": math.nan},
            r"clip_val is nan, which would spoil gradients or turn them round; it must be",
        ),
    ],
)
def test_clipping(tmp_path, encoder, settings, message):
    with pytest.raises(SettingsError, match=message):
        trainer(tmp_path, **settings).fit(classification(encoder, LoRA(rank=2)), labelled_data(encoder))


def test_adapters_of_float32_beside_weights_of_float32(tmp_path):
    module = AdapterModule("nowhere", LoRA(), half_adapters=True)
    module.trainer = trainer(tmp_path)
    assert "model.half_adapters is True, but frozen weights are float32" in told(module)[0]
    module.trainer = trainer(tmp_path, precision="bf16-true")
    assert told(module) == []


@pytest.mark.parametrize("name", ["shuffle_block", "held_out_rows"])
def test_settings_of_streams_without_a_stream(decoder, name):
    module = AdapterModule("nowhere", LoRA(), task="causal-lm")
    assert (
        f"Completions.{name} is 7, but streaming is False"
        in told(module, None, completion_data(decoder, **{name: 7}))[0]
    )
    assert told(module, None, completion_data(decoder, streaming=True, **{name: 7})) == []
    assert told(module, None, completion_data(decoder)) == []


def test_a_schedule_of_a_run_without_a_length(tmp_path, encoder, capsys):
    module = classification(encoder, LoRA(rank=2), lr_scheduler=WarmUp(decay="cosine"))
    with pytest.raises(SettingsError, match=r'decay is "cosine" with warmup_fraction 0\.06, but neither .*max_steps'):
        trainer(tmp_path, max_steps=-1, max_epochs=-1, max_time="00:00:00:01").fit(module, labelled_data(encoder))
    assert "the rate stays as it is" in unscheduled(WarmUp())


def test_a_run_that_ends_before_it_validates(tmp_path, encoder, capsys):
    options = {"max_steps": 2, "max_epochs": -1, "check_val_every_n_epoch": 9, "limit_val_batches": 1.0}
    trainer(tmp_path, **options).fit(classification(encoder, LoRA(rank=2)), labelled_data(encoder))
    said = "trainer.check_val_every_n_epoch is 9, and the run ends after 2 batches, before it validates"
    assert said in capsys.readouterr().out
    with pytest.raises(SettingsError, match=r'before it validates, but KeepBest waits for "val_loss". Give a smaller'):
        trainer(tmp_path, callbacks=[KeepBest("val_loss")], **options).fit(
            classification(encoder, LoRA(rank=2)), labelled_data(encoder)
        )


@pytest.mark.parametrize(
    ("batch", "every", "epochs", "steps", "comes"),
    [
        (10, 1, 1, -1, True),
        (10, 3, 2, -1, False),
        (10, 3, 3, -1, True),
        (25, None, 2, -1, False),
        (25, None, 3, -1, True),
        (4, 1, None, 3, False),
        (4, 1, None, 4, True),
        (math.inf, 1, None, 3, False),
    ],
)
def test_when_the_first_validation_comes(batch, every, epochs, steps, comes):
    run = SimpleNamespace(
        val_check_batch=batch,
        check_val_every_n_epoch=every,
        num_training_batches=10,
        max_epochs=epochs,
        max_steps=steps,
        accumulate_grad_batches=1,
        enable_validation=True,
        val_check_interval=batch,
        callbacks=[],
    )
    assert (check_validation_comes(run) == "") is comes
