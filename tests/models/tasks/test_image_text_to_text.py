"""Answers about images: loss, metrics and generation, with models of transformers as the reference."""

from __future__ import annotations

import json

import pytest
import torch
from media_models import FAMILIES, PICTURED, picture

from lora_lightning.data import MediaChat
from lora_lightning.errors import DataError
from lora_lightning.models.tasks import all_tasks, find_task
from lora_lightning.models.tasks.base import PredictContext, metrics, update_text_metrics

TASK = find_task("image-text-to-text", {"generate_batches": 1})


@pytest.fixture
def prepared(tmp_path):
    """Two conversations with other images, as a data module, and their predict batch."""

    def make(family: str):
        FAMILIES[family].processor().save_pretrained(tmp_path / "processor")
        for number in range(3):
            picture(number, 16 + 8 * number, 16).save(tmp_path / f"{number}.png")
        ask = {"role": "user", "content": "<image>what?"}
        compare = {"role": "user", "content": "<image> or <image>, which one?"}
        answer = {"role": "assistant", "content": "a cat"}
        rows = [
            {"messages": [ask, answer], "image": "0.png"},
            {"messages": [compare, answer], "images": ["1.png", "2.png"]},
        ]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = str(tmp_path / "rows.jsonl")
        data = MediaChat(predict=source, processor=str(tmp_path / "processor"), validation_fraction=0.0)
        data.setup("predict")
        return data, next(iter(data.predict_dataloader()))

    return make


def test_tasks_that_derive_from_others_are_found():
    assert {"image-text-to-text", "audio-text-to-text", "causal-lm"} <= set(all_tasks())


@pytest.mark.parametrize("family", PICTURED)
def test_predictions_are_the_losses_and_answers_of_transformers(prepared, family):
    data, batch = prepared(family)
    model, tokenizer = FAMILIES[family].model(), data.tokenizer_object
    context = PredictContext(tokenizer=tokenizer, max_new_tokens=4, in_turns=True)
    with torch.no_grad():
        found = TASK.predict(model, batch, context)
    for number, row in enumerate(found):
        collate = data.collation("predict", ("labels", "index"), None)
        one = collate([data.examples("predict")[number]])
        inputs = {name: value for name, value in one.items() if name not in ("labels", "index", "prompts")}
        with torch.no_grad():
            theirs = model(**inputs, labels=one["labels"])
            answer = model.generate(**one["prompts"], max_new_tokens=4, do_sample=False)
        text = tokenizer.decode(answer[0, one["prompts"]["input_ids"].shape[1] :], skip_special_tokens=True)
        assert row["loss"] == pytest.approx(float(theirs.loss), rel=1e-4)
        assert row["prediction"] == text


def test_texts_are_measured_on_prompts_with_their_images(prepared):
    data, batch = prepared("gemma3")
    model = FAMILIES["gemma3"].model()
    context = PredictContext(tokenizer=data.tokenizer_object, max_new_tokens=2, in_turns=True)
    collection = metrics(TASK, model)
    update_text_metrics(TASK, collection, model, batch, context)
    assert float(collection["exact_match"].compute()) == 0  # of a random model
    without = {name: value for name, value in batch.items() if name != "prompts"}
    with pytest.raises(DataError, match=r"the data have no prompts to go on from.*MediaChat"):
        update_text_metrics(TASK, metrics(TASK, model), model, without, context)
