"""Spans of expanded texts as spans of rendered ones, and batches that processors cannot make."""

from __future__ import annotations

import pytest
from media_models import FAMILIES, picture

from lora_lightning.data.media.encoding import CollateMedia, Encode
from lora_lightning.data.media.parts import Media
from lora_lightning.data.sources.faults import RowError
from lora_lightning.errors import DataError


@pytest.mark.parametrize("family", ["qwen2.5-vl", "smolvlm", "gemma3"])
def test_every_token_keeps_the_characters_that_it_had_before_images_were_put_in(family):
    """A token outside of an image decodes to the characters of the rendered text that its span names."""
    processor = FAMILIES[family].processor()
    media = [Media("image", picture(number, 20 + 16 * number, 24), number) for number in range(2)]
    parts = [{"type": "image", "image": one} for one in media]
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, parts[0], {"type": "text", "text": "bc"}, parts[1]]}
    ]
    turns.append({"role": "assistant", "content": [{"type": "text", "text": "so it is"}]})
    text = processor.tokenizer.apply_chat_template(turns, chat_template=processor.chat_template, tokenize=False)
    found = Encode(processor, lambda one: one.value)(text, turns)
    assert found.text == text
    rest = [number for number in range(len(found.ids)) if number not in found.fixed]
    assert 0 < len(rest) < len(found.ids)
    for number in rest:
        assert processor.tokenizer.decode([found.ids[number]]) == text[slice(*found.offsets[number])]
    covered = {text[slice(*found.offsets[number])] for number in found.fixed}
    assert covered == {processor.image_token}


def test_a_template_that_leaves_images_out_is_told():
    processor = FAMILIES["qwen2.5-vl"].processor()
    turns = [{"role": "user", "content": [{"type": "image", "image": Media("image", picture(0), 0)}]}]
    with pytest.raises(RowError, match=r'has "<\|image_pad\|>" 0 times, and there are 1 of kind image'):
        Encode(processor, lambda one: one.value)("no image", turns)


def test_what_is_no_tensor_is_refused_not_left_out():
    class Ragged:
        image_token = "<image>"
        feature_extractor = None

        def __call__(self, **given):
            return {"pixel_values": [[1], [2, 3]]}

    collate = CollateMedia(Ragged(), lambda _: [], lambda one: one.value, (), prompts=False, where=str)
    with pytest.raises(DataError, match=r"Ragged makes no tensor of pixel_values for 1 examples.*data.batch_size to 1"):
        collate([{"text": "a"}])
