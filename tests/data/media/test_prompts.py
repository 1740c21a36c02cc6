"""Prompts with images: what the model gets is in its own type, and what cannot be made is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from media_models import FAMILIES, PICTURED, picture

from lora_lightning.data.chats.rendering import Renderer
from lora_lightning.data.media.encoding import Encode
from lora_lightning.data.media.parts import Media
from lora_lightning.data.media.processors import templated_tokenizer
from lora_lightning.data.media.prompts import Prompt, model_inputs, rendered_prompt
from lora_lightning.data.sources.faults import RowError
from lora_lightning.errors import DataError

HALF = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)


def turns(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return [{"role": "user", "content": content}]


def renderer(processor, read=lambda media: media.value):
    return Renderer(templated_tokenizer(processor), "of a model", encode=Encode(processor, read))


@pytest.mark.parametrize("family", PICTURED)
def test_prompts_of_several_lengths_are_padded_on_the_left_and_images_have_the_models_type(family):
    processor = FAMILIES[family].processor()
    asked = [
        turns(Media("image", picture(0, 16, 16)), "what is it?"),
        turns("or"),
        turns("a", Media("image", picture(1))),
    ]
    prompts = [rendered_prompt(renderer(processor), one, "a row") for one in asked]
    found = model_inputs(prompts, processor.tokenizer, processor, lambda media: media.value, HALF)
    width = max(len(one.ids) for one in prompts)
    for row, one in enumerate(prompts):
        assert found["input_ids"][row, width - len(one.ids) :].tolist() == one.ids
        assert found["attention_mask"][row].tolist() == [0] * (width - len(one.ids)) + [1] * len(one.ids)
    assert found["pixel_values"].dtype == torch.bfloat16
    assert [len(one.media) for one in prompts] == [1, 0, 1]


def test_texts_alone_need_no_processor():
    tokenizer = FAMILIES["gemma3"].processor().tokenizer
    found = model_inputs([Prompt([5, 6]), Prompt([7])], tokenizer, None, None, HALF)
    assert found["input_ids"].tolist() == [[5, 6], [tokenizer.pad_token_id, 7]]
    assert list(found) == ["input_ids", "attention_mask"]


def test_an_image_that_cannot_be_read_is_told_with_its_row():
    def read(media):
        raise RowError("with an image", "an image is broken")

    with pytest.raises(RowError, match=r"^row 3: an image is broken"):
        rendered_prompt(renderer(FAMILIES["gemma3"].processor(), read), turns(Media("image", 1)), "row 3")


def test_what_a_processor_makes_no_tensor_of_is_refused():
    class Ragged:
        feature_extractor = None

        def __call__(self, **given):
            return {"pixel_values": [[1], [2, 3]]}

    prompts = [Prompt([1], "a", (Media("image", picture(0)),))] * 2
    with pytest.raises(
        DataError, match=r"Ragged makes no tensor of pixel_values for 2 prompts at once.*--batch_size 1"
    ):
        model_inputs(prompts, SimpleNamespace(pad_token_id=0), Ragged(), lambda media: media.value, HALF)
