"""What conversations carry beside texts."""

from __future__ import annotations

import pytest

from lora_lightning.data.chats.fields import Fields, Rendering, refuse_columns, with_system
from lora_lightning.data.chats.rendering import Renderer
from lora_lightning.data.tokens.tokenizers import load_tokenizer
from lora_lightning.errors import DataError

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture
def fields(letters):
    def fields(template: str) -> Fields:
        tokenizer = load_tokenizer(letters())
        tokenizer.chat_template = template
        return Fields(Renderer(tokenizer, "of the test"))

    return fields


def test_columns_that_would_change_what_is_learned():
    refuse_columns({"messages": HI, "images": [], "documents": None, "id": 1}, "X")
    with pytest.raises(DataError, match=r'^X has a value in the column "audio", which Chat does not read'):
        refuse_columns({"messages": HI, "audio": "a.wav"}, "X")


def test_system_texts():
    assert with_system(HI, {"system": "be kind"}, "X") == [{"role": "system", "content": "be kind"}, *HI]
    assert with_system(HI, {"system": None, "system_prompt": ""}, "X") == HI
    with pytest.raises(DataError, match="has a system turn and another text"):
        with_system([{"role": "system", "content": "a"}, *HI], {"system": "b"}, "X")


def test_reasoning_of_earlier_turns_may_be_left_out(fields):
    """As templates do that drop what was thought before; it is tried where the turn is the last."""
    template = "{% for m in messages %}{% if loop.last %}{{ m.reasoning or '' }}{% endif %}{{ m.content }}{% endfor %}"
    turns = [HI[0], {**HI[1], "reasoning": "well"}, *HI]
    fields(template).check(turns, None, "X")
    with pytest.raises(DataError, match=r"^X has reasoning, which the chat template of the test leaves out"):
        fields("{% for m in messages %}{{ m.content }}{% endfor %}").check(turns, None, "X")


@pytest.mark.parametrize(
    ("key", "value"),
    [("refusal", "no"), ("prefix", True), ("rejected", "no"), ("chosen", "yes"), ("function_call", {"name": "f"})],
)
def test_keys_that_would_change_what_is_learned(fields, key, value):
    """OpenAI's refusal and function_call, an answer of Mistral's that goes on, answers that are compared."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=rf"^X has {key}, which the chat template of the test leaves out"):
        fields(template).check([HI[0], {**HI[1], key: value}], None, "X")
    fields(template).check([HI[0], {**HI[1], key: None}], None, "X")
    writing = template.replace("m.content", f"m.content, m.{key}")
    fields(writing).check([HI[0], {**HI[1], key: value}], None, "X")


def test_other_keys_are_counted(fields, caplog):
    rendering = Rendering(fields("{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}").renderer)
    for _ in range(2):
        rendering.of({}, "X").check([{**HI[0], "name": "Ann", "id": 1}, {**HI[1], "mood": ""}], None, "X")
    rendering.tell("Chat: train")
    assert caplog.text.endswith("Chat: train: the chat template of the test does not write id (2 turns)\n")


def test_a_template_that_leaves_texts_out(fields):
    """As those of models for images, which take content as a list of parts, or those that know no system turn."""
    parts = "{% for m in messages %}{{ m.role }}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    with pytest.raises(
        DataError, match=r"^X has text in turns of the role user, which the chat template .* leaves out"
    ):
        fields(parts).check(HI, None, "X")
    deaf = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    fields(deaf).check(HI, None, "X")
    with pytest.raises(DataError, match=r"^X has text in turns of the role system, which"):
        fields(deaf).check([{"role": "system", "content": "be kind"}, *HI], None, "X")
