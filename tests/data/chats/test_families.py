"""Templates of families of models: they write what trl and mistral-common do, and answers are learned."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lora_lightning.data.chats.fields import Fields
from lora_lightning.data.chats.rendering import Renderer
from lora_lightning.data.chats.templates import FAMILIES, NAMES, choose_template, family
from lora_lightning.data.tokens.tokenizers import load_tokenizer
from lora_lightning.errors import DataError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Which one"},
                    "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                    "place": {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}},
                    "any": {"type": ["string", "null"]},
                    "sure": {"type": "boolean", "nullable": True},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {"type": "object"}}},
]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": 'Bad "Ems"'}}}
    ],
}
RESULT = {"role": "tool", "content": "21", "name": "weather", "tool_call_id": "abcdefghi"}
SYSTEM = {"role": "system", "content": "Be kind."}
HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
MORE = [{"role": "user", "content": "tea?"}, {"role": "assistant", "content": "yes\nplease"}]
THOUGHT = {"reasoning_content": "well"}
TALKS = {
    "a question": (HI[:1], None),
    "an answer": (HI, None),
    "a system text": ([SYSTEM, *HI], None),
    "two exchanges": ([*HI, *MORE], None),
    "a third question": ([SYSTEM, *HI, *MORE, HI[0]], None),
    "tools": ([SYSTEM, *HI], TOOLS),
    "tools without a system text": (HI, TOOLS),
    "a call": ([SYSTEM, HI[0], CALL], TOOLS),
    "a call and its result": ([HI[0], CALL, RESULT, HI[1]], TOOLS),
    "a call, then more": ([SYSTEM, HI[0], CALL, RESULT, HI[1], *MORE], TOOLS),
    "a call behind an exchange": ([*HI, MORE[0], CALL, RESULT, MORE[1]], TOOLS),
    "two results": ([HI[0], CALL, RESULT, RESULT], TOOLS),
    "reasoning": ([HI[0], {**HI[1], **THOUGHT}], None),
    "reasoning twice": ([HI[0], {**HI[1], **THOUGHT}, MORE[0], {**MORE[1], **THOUGHT}], None),
    "reasoning in a text": ([HI[0], {**HI[1], "content": "<think>\nwell\n</think>\n\nhello"}], None),
    "reasoning before a call": ([HI[0], {**CALL, **THOUGHT}, RESULT, {**HI[1], **THOUGHT}], TOOLS),
    "reasoning before a last call": ([HI[0], {**CALL, **THOUGHT}], TOOLS),
}
THEIRS = {
    "deepseek-v3": "deepseekv3",
    "gemma-3": "gemma3",
    "harmony": "gptoss",
    "llama-3.1": "llama3_1",
    "phi-3": "phi3_5",
    "qwen-2.5": "qwen2_5",
    "qwen-3": "qwen3",
}


def render(template: str, turns, tools, prompt: bool, **options) -> str:
    text, _ = render_jinja_template(
        [turns], tools=tools, chat_template=template, add_generation_prompt=prompt, **SPECIAL, **options
    )
    return text[0]


def trl() -> Path | None:
    found = importlib.util.find_spec("trl")
    return Path(found.submodule_search_locations[0]) / "chat_templates" if found else None


def named(letters, name: str) -> str:
    tokenizer = load_tokenizer(letters())
    tokenizer.add_tokens([token for token in NAMES[name] if token not in tokenizer.get_vocab()], special_tokens=True)
    return choose_template(tokenizer, name)[0]


def with_text_arguments(turns):
    """Calls whose arguments are JSON text, as some programs want them."""
    turns = json.loads(json.dumps(turns))
    for call in (call for turn in turns for call in turn.get("tool_calls", ())):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return turns


def comparable(name: str, talk: str) -> bool:
    """Tools and reasoning only where the model's own template takes them."""
    tools = bool(re.search("tool|call|two results", talk))
    return not (tools and name in ("gemma-3", "phi-3")) and ("reasoning" not in talk or name in ("harmony", "qwen-3"))


PAIRS = [(name, talk) for name in THEIRS for talk in TALKS if comparable(name, talk)]


@pytest.mark.skipif(trl() is None, reason="trl carries the templates to compare with")
@pytest.mark.parametrize(("name", "talk"), PAIRS)
def test_it_is_what_the_models_own_template_writes(letters, name, talk):
    """But for the end of text behind Phi's turns, and in DeepSeek's prompt the thought of another model."""
    turns, tools = TALKS[talk]
    theirs, ours = (trl() / f"{THEIRS[name]}.jinja").read_text(), named(letters, name)
    answered, options = turns[-1]["role"] == "assistant", {}
    as_theirs = with_text_arguments(turns) if name == "deepseek-v3" else turns
    if name == "harmony":
        as_theirs = [{("thinking" if key == "reasoning_content" else key): t[key] for key in t} for t in turns]
        theirs, options = theirs.replace('strftime_now("%Y-%m-%d")', "'2026-01-02'"), {"current_date": "2026-01-02"}
    wanted = render(theirs, as_theirs, tools, not answered)
    wanted = re.sub(r"\n? {16,}", "", wanted) if name == "harmony" else wanted  # blanks of its source, within objects
    wanted = wanted.removesuffix("</s>") if name == "phi-3" else wanted
    wanted = wanted.removesuffix("<think>\n") if name == "deepseek-v3" else wanted
    assert render(ours, turns, tools, not answered, **options) == wanted


@pytest.mark.parametrize("talk", [talk for talk in TALKS if "reasoning" not in talk and talk != "two results"])
def test_mistrals_own_encoder_writes_the_same(talk, tmp_path):
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral", reason="mistral-common is the reference")
    request = pytest.importorskip("mistral_common.protocol.instruct.request")
    keep = pytest.importorskip("mistral_common.tokens.tokenizers.base").SpecialTokenPolicy.KEEP
    turns, tools = TALKS[talk]
    if turns[-1].get("tool_calls"):  # it encodes what is asked for an answer
        turns = [*turns, RESULT]
    elif turns[-1]["role"] == "assistant":
        turns = [*turns, HI[0]]
    stored = Path(importlib.util.find_spec("mistral_common").submodule_search_locations[0]) / "data"
    described = json.loads((stored / "tekken_240911.json").read_text())
    described["config"]["version"] = "v7"
    (tmp_path / "tekken.json").write_text(json.dumps(described))
    theirs = mistral.MistralTokenizer.from_file(str(tmp_path / "tekken.json"))
    asked = request.ChatCompletionRequest.from_openai(messages=with_text_arguments(turns), tools=tools)
    wanted = theirs.decode(theirs.encode_chat_completion(asked).tokens, special_token_policy=keep)
    assert render(family("mistral"), turns, tools, True) == wanted


REFUSED = {
    "deepseek-r1": "tool|call",
    "deepseek-v3": "tool|call|reasoning$|reasoning twice",
    "gemma-3": "tool|call|two results|reasoning$|reasoning twice",
    "harmony": "^$",  # "reasoning before a call" apart: the thought is in the prompt, and gone once the answer is there
    "llama-3.1": "reasoning$|reasoning twice|reasoning before",
    "mistral": "reasoning$|reasoning twice|reasoning before",
    "qwen-2.5": "reasoning$|reasoning twice|reasoning before",
    "qwen-3": "^$",
}
"""Conversations that a format cannot hold, by their names."""


def talks(name: str, refused: bool) -> list[str]:
    return [t for t in TALKS if t not in ("a question", "two results") and bool(re.search(REFUSED[name], t)) == refused]


LEARNED = [(name, talk) for name in FAMILIES for talk in talks(name, False)]
LEARNED.remove(("harmony", "reasoning before a call"))


@pytest.mark.parametrize(("name", "talk"), LEARNED)
def test_answers_are_learned_with_their_calls_reasoning_and_end(letters, name, talk):
    """Each answer once, by text, and nothing else; behind the prompt that asks for it."""
    turns, tools = TALKS[talk]
    tokenizer = load_tokenizer(letters(template=named(letters, name)))
    renderer = Renderer(tokenizer, name)
    Fields(renderer).check(turns, tools, "row 0")
    examples = renderer.examples(turns, tools, "row 0")
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    assert sorted(number for example in examples for number in example.turns) == answers
    for ids, labels, numbers, _ in examples:
        last = numbers[-1]
        prompt = renderer.prompt(turns[:last], tools, "row 0")
        assert ids[: len(prompt)] == prompt
        learned = [number for number, label in enumerate(labels) if label != -100]
        own = [number for number in learned if number >= len(prompt)]
        assert own == list(range(len(prompt), own[-1] + 1))
        text = tokenizer.decode([ids[number] for number in own])
        assert turns[last]["content"].split("\n")[-1] in text
        assert turns[last].get("reasoning_content", "") in text
        assert not turns[last].get("tool_calls") or "weather" in text
        assert not re.search("tea|21|Be kind", tokenizer.decode([ids[number] for number in learned]))


@pytest.mark.parametrize(("name", "talk"), [(name, talk) for name in FAMILIES for talk in talks(name, True)])
def test_what_a_format_cannot_hold_is_refused(letters, name, talk):
    turns, tools = TALKS[talk]
    renderer = Renderer(load_tokenizer(letters(template=named(letters, name))), name)
    with pytest.raises(DataError, match=r"leaves out|cannot render it"):
        Fields(renderer).check(turns, tools, "row 0")
