"""Answers about sounds: the class that loads the model, and generation beside transformers' own."""

from __future__ import annotations

import json

import pytest
import torch
from media_models import FAMILIES, RATE, sound

from lora_lightning.data.media.encoding import CollateMedia, Encode
from lora_lightning.data.media.parts import Media
from lora_lightning.models.loading import load_model
from lora_lightning.models.tasks import find_task
from lora_lightning.models.tasks.base import PredictContext

FAMILY = FAMILIES["qwen2-audio"]
TASK = find_task("audio-text-to-text")


def test_the_model_is_loaded_by_its_own_class(tmp_path):
    FAMILY.save(tmp_path)
    assert type(load_model(str(tmp_path), TASK)).__name__ == "Qwen2AudioForConditionalGeneration"


def test_an_answer_about_a_sound_is_that_of_transformers():
    processor, model = FAMILY.processor(), FAMILY.model()
    media = [Media("audio", sound(0, 9000), 0)]
    turns = [
        {"role": "user", "content": [{"type": "audio", "audio": media[0]}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a bell"}]},
    ]
    text = processor.tokenizer.apply_chat_template(turns, chat_template=processor.chat_template, tokenize=False)
    ids = Encode(processor, lambda one: one.value)(text, turns).ids
    end = text.index("a bell")
    row = {"text": text, "prompt_end": end, "input_ids": ids, "labels": [-100] * 20 + ids[20:]}
    collate = CollateMedia(processor, lambda _: media, lambda one: one.value, ("labels",), prompts=True, where=str)
    batch = collate([row])
    context = PredictContext(tokenizer=processor.tokenizer, max_new_tokens=4)
    with torch.no_grad():
        [found] = TASK.predict(model, batch, context)
    theirs = processor(
        text=[text[:end]], audio=[media[0].value], sampling_rate=RATE, add_special_tokens=False, return_tensors="pt"
    )
    with torch.no_grad():
        answer = model.generate(**theirs, max_new_tokens=4, do_sample=False)
        whole = model(**{k: v for k, v in batch.items() if k not in ("labels", "prompts")}, labels=batch["labels"])
    assert found["prediction"] == processor.tokenizer.decode(
        answer[0, theirs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert found["loss"] == pytest.approx(float(whole.loss), rel=1e-4)
    assert json.dumps(found)
