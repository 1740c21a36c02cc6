"""What conversations carry beside texts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

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
    [("refusal", "no"), ("rejected", "no"), ("chosen", "yes"), ("function_call", {"name": "f"})],
)
def test_keys_that_would_change_what_is_learned(fields, key, value):
    """OpenAI's refusal and function_call, answers that are compared."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=rf"^X has {key}, which the chat template of the test leaves out"):
        fields(template).check([HI[0], {**HI[1], key: value}], None, "X")
    fields(template).check([HI[0], {**HI[1], key: None}], None, "X")
    writing = template.replace("m.content", f"m.content, m.{key}")
    fields(writing).check([HI[0], {**HI[1], key: value}], None, "X")


@pytest.mark.parametrize("key", ["prefix", "partial"])
def test_an_answer_without_an_end(fields, key):
    """A template that ends it would teach an end that is not there; one that leaves it open is asked for."""
    ends = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    open_turn = [HI[0], {**HI[1], key: True}]
    with pytest.raises(DataError, match=rf"^X has {key}, which marks an answer without an end.*Give the whole answer"):
        fields(ends).check(open_turn, None, "X")
    for value in (False, None):
        fields(ends).check([HI[0], {**HI[1], key: value}], None, "X")
    of_its_own = fields(ends.replace("</s>", f"{{% if not m.{key} %}}</s>{{% endif %}}"))
    of_its_own.check(open_turn, None, "X")
    [(_, labels, *_)] = of_its_own.renderer.examples(open_turn, None, "X")
    learned = of_its_own.renderer.tokenizer.decode([label for label in labels if label != -100])
    assert learned == HI[1]["content"]


def test_mistrals_prefix_is_an_answer_without_an_end():
    """In mistral-common: no end token behind it, at the end of a request alone, and never in fine-tuning."""
    messages = pytest.importorskip(
        "mistral_common.protocol.instruct.messages", reason="mistral-common is the reference"
    )
    errors = pytest.importorskip("mistral_common.exceptions")
    request = pytest.importorskip("mistral_common.protocol.instruct.request").ChatCompletionRequest
    validator = pytest.importorskip("mistral_common.protocol.instruct.validator")
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral").MistralTokenizer
    stored = Path(importlib.util.find_spec("mistral_common").submodule_search_locations[0]) / "data"
    question = messages.UserMessage(content="hi")
    whole, unfinished = (messages.AssistantMessage(content="hello", prefix=prefix) for prefix in (False, True))
    validation, tokenizer = (
        validator.ValidationMode,
        mistral.from_file(str(stored / "tekken_240911.json")).instruct_tokenizer,
    )
    end = tokenizer.tokenizer.eos_id
    assert tokenizer.encode_assistant_message(whole, False) == [
        *tokenizer.encode_assistant_message(unfinished, False),
        end,
    ]
    finetuning = validator.MistralRequestValidatorV3(validation.finetuning)
    finetuning.validate_request(request(messages=[question, whole]))
    with pytest.raises(errors.InvalidMessageStructureException, match="Cannot continue final message in finetuning"):
        finetuning.validate_request(request(messages=[question, unfinished]))
    asked = validator.MistralRequestValidatorV3(validation.test)
    asked.validate_request(request(messages=[question, unfinished]))
    with pytest.raises(errors.InvalidAssistantMessageException, match="prefix True must be last"):
        asked.validate_request(request(messages=[question, unfinished, question]))


def test_other_keys_are_counted(fields, caplog):
    rendering = Rendering(fields("{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}").renderer)
    for _ in range(2):
        rendering.of({}, "X").check([{**HI[0], "name": "Ann", "id": 1}, {**HI[1], "mood": ""}], None, "X")
    rendering.tell("Chat: train")
    assert caplog.text.endswith("Chat: train: the chat template of the test does not write id (2 turns)\n")


def test_texts_that_spell_special_tokens_are_counted(fields, caplog):
    """As of data that a template was applied to already, or that somebody has planted."""
    rendering = Rendering(fields("{% for m in messages %}{{ m.content }}{% endfor %}").renderer)
    for text in ("one</s>two</s>", "x", "y</s>", "< /s>"):
        rendering.of({}, "X").check([HI[0], {**HI[1], "content": text}], None, "X")
    rendering.tell("Chat: train")
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith("Chat: train: texts of turns spell special tokens and are read as them: </s> (2 turns). ")


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
