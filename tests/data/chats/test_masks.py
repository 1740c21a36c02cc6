"""What is learned of a conversation, for every shape of template: the assistant's text and its end of turn, no more.

Templates are made of parts, and the text with its learned characters is written by a few lines of Python beside them.
Every letter is a token, so that spans of characters and of tokens are the same.
"""

from __future__ import annotations

import importlib.util
import re
from itertools import product
from pathlib import Path

import pytest

from lora_lightning.data.chats.fields import Fields
from lora_lightning.data.chats.rendering import MARKS as MARKS_OF
from lora_lightning.data.chats.rendering import Renderer
from lora_lightning.data.chats.templates import TEMPLATES, choose_template
from lora_lightning.data.sources.faults import RowError
from lora_lightning.data.tokens.tokenizers import load_tokenizer

TALKS = {
    "two": [("user", "hi"), ("assistant", "hello"), ("user", "tea?"), ("assistant", "yes\nplease")],
    "words of the template": [
        ("user", "assistant"),
        ("assistant", "assistant"),
        ("user", "x"),
        ("assistant", "user\nhi"),
    ],
    "a system turn": [("system", "user\n"), ("user", "hi"), ("assistant", "hello")],
    "blanks and signs": [("user", " a "), ("assistant", "\u00e9 {} \u4e2d"), ("user", "b"), ("assistant", "c")],
    "answer first": [("assistant", "hello"), ("user", "hi"), ("assistant", "hello")],
    "answers in a row": [("user", "hi"), ("assistant", "a"), ("assistant", "b")],
    "a tool's turn": [("user", "hi"), ("assistant", "call"), ("tool", "5"), ("assistant", "five")],
}
HEADS = {
    "chatml": ("<|im_start|>", "\n"),
    "header": ("<|start_header_id|>", "<|end_header_id|>\n\n"),
    "words": ("", ": "),
}
ENDS = ["<|im_end|>", "<|eot_id|>", "</s>"]
GAPS = ["", "\n", "\n\n", " ", "\n<s>"]
MARKS = ["none", "none, without a prompt", "text", "text and end", "text, end and gap"]


def jinja(head: tuple[str, str], end: str, gap: str, marks: str, start: str) -> str:
    opened, closed = ("{%- generation -%}", "{%- endgeneration -%}") if not marks.startswith("none") else ("", "")
    parts = [opened, "{{- m.content -}}", f"{{{{- {end!r} -}}}}", f"{{{{- {gap!r} -}}}}"]
    parts.insert({"text": 2, "text and end": 3}.get(marks, 4), closed)
    plain = f"{{{{- m.content + {end + gap!r} -}}}}"
    opening = f"{{{{- {head[0]!r} + role + {head[1]!r} -}}}}"
    prompt = f"{{%- if add_generation_prompt -%}}{{%- set role = 'assistant' -%}}{opening}{{%- endif -%}}"
    return (
        f"{{{{- {start!r} -}}}}{{%- for m in messages -%}}{{%- set role = m.role -%}}{opening}"
        f"{{%- if m.role == 'assistant' -%}}{''.join(parts)}{{%- else -%}}{plain}{{%- endif -%}}{{%- endfor -%}}"
        f"{'' if 'without' in marks else prompt}"
    )


def expected(talk: list[tuple[str, str]], head, end: str, gap: str, marks: str, start: str) -> tuple[str, str]:
    """The text, and of its characters those that are learned; the others are dots."""
    text, learned = start, "." * len(start)
    for role, content in talk:
        opening, own = f"{head[0]}{role}{head[1]}", content + end
        behind = gap if marks == "text, end and gap" else "." * len(gap)
        text += opening + own + gap
        learned += "." * len(opening) + (own + behind if role == "assistant" else "." * len(own + gap))
    return text, learned


@pytest.fixture
def tokenizer(letters):
    return load_tokenizer(letters())


def ids_of(tokenizer, text: str, learned: str) -> list[tuple[int, bool]]:
    """Tokens of the text by the tokenizer alone, each with whether its characters are learned."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [
        (token, learned[first:last] == text[first:last] and text[first:last] != ".") for token, (first, last) in spans
    ]


def rendered(tokenizer, template: str, talk: list[tuple[str, str]], **options) -> list[tuple[int, bool]]:
    tokenizer.chat_template = template
    turns = [{"role": role, "content": content} for role, content in talk]
    [(ids, labels, *_)] = Renderer(tokenizer, "of the test").examples(turns, None, "row 0", **options)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return list(zip(ids, (label != -100 for label in labels), strict=True))


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("marks", MARKS)
def test_learned_is_the_answer_with_its_end(tokenizer, marks, talk):
    for (name, head), end, gap, start in product(HEADS.items(), ENDS, GAPS, ("", "<s>")):
        if gap.endswith("<s>") and marks.startswith("none"):
            continue  # without marks nobody can tell the token that opens the next turn from one that ends this one
        shape = (head, end, gap, marks, start)
        wanted = ids_of(tokenizer, *expected(TALKS[talk], *shape))
        assert rendered(tokenizer, jinja(*shape), TALKS[talk]) == wanted, (name, end, gap, start)


@pytest.mark.parametrize("marks", MARKS)
def test_turns_that_are_not_learned_are_only_read(tokenizer, marks):
    talk = TALKS["two"]
    for head, gap in product(HEADS.values(), GAPS[:3]):
        shape = (head, "<|im_end|>", gap, marks, "<s>")
        text, learned = expected(talk, *shape)
        first = text.index("hello")
        behind = text.index("tea?")
        learned = learned[:first] + "." * (behind - first) + learned[behind:]
        found = rendered(tokenizer, jinja(*shape), talk, learned=[True, False, True, True])
        assert found == ids_of(tokenizer, text, learned)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", [*TEMPLATES, *(f"{head}, {marks}" for head in HEADS for marks in MARKS[3:])])
def test_it_is_the_mask_of_transformers(tokenizer, name, talk):
    if name in TEMPLATES:
        tokenizer.add_tokens([token for token in TEMPLATES[name].tokens if token not in tokenizer.get_vocab()])
        templates = [choose_template(tokenizer, name)[0]]
    else:
        head, _, marks = name.partition(", ")
        templates = [jinja(HEADS[head], end, gap, marks, "<s>") for end, gap in product(ENDS, GAPS)]
    for template in templates:
        found = rendered(tokenizer, template, TALKS[talk])
        turns = [{"role": role, "content": content} for role, content in TALKS[talk]]
        theirs = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        assert found == list(zip(theirs["input_ids"], map(bool, theirs["assistant_masks"]), strict=True))


TWO_SPANS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% if m.reasoning %}"
    "{% generation %}({{ m.reasoning }}){% endgeneration %}|{% endif %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)


def test_a_template_that_marks_several_spans_of_a_turn(tokenizer):
    tokenizer.chat_template = TWO_SPANS
    talk = [{"role": role, "content": content} for role, content in TALKS["two"]]
    talk[1]["reasoning"] = "hm"
    for learned, wanted in (
        (None, "(hm)hello<|im_end|>yes\nplease<|im_end|>"),
        ([True, False, True, True], "yes\nplease<|im_end|>"),
        ([True, True, True, False], "(hm)hello<|im_end|>"),
    ):
        [(_, labels, *_)] = Renderer(tokenizer, "x").examples(talk, None, "row 0", learned)
        assert tokenizer.decode([label for label in labels if label != -100]) == wanted
    [(_, labels, *_)] = Renderer(tokenizer, "x", last_only=True).examples(talk, None, "row 0")
    assert tokenizer.decode([label for label in labels if label != -100]) == "yes\nplease<|im_end|>"


@pytest.mark.parametrize("marks", MARKS)
def test_tokens_of_several_letters(shared, marks):
    """Of a real tokenizer the learned tokens are the answers' words with the token that ends them."""
    tokenizer = load_tokenizer(str(shared / "models/stories260k"))
    for head, gap in product([("<|", "|>\n"), ("", ":\n"), ("### ", "\n\n")], ["", "\n", "\n\n"]):
        found = rendered(tokenizer, jinja(head, "</s>", gap, marks, "<s>"), TALKS["two"])
        learned = tokenizer.decode([token for token, own in found if own])
        words = "hello</s>yes\nplease</s>" if marks != "text, end and gap" else f"hello</s>{gap}yes\nplease</s>{gap}"
        assert learned.replace("</s> ", "</s>").strip(" ") == words, (head, gap)


def stored_templates() -> list[Path]:
    """The chat templates that trl carries, where it is installed."""
    found = importlib.util.find_spec("trl")
    folders = [Path(place) / "chat_templates" for place in (found.submodule_search_locations or [])] if found else []
    return [file for folder in folders for file in sorted(folder.glob("*.jinja"))]


@pytest.mark.parametrize("file", stored_templates() or [pytest.param(None, marks=pytest.mark.skip("no trl"))], ids=str)
def test_templates_of_trl(tokenizer, file):
    """Where they mark generation: their mask. Elsewhere the answers and nothing of the questions, or a refusal."""
    tokenizer.chat_template = file.read_text(encoding="utf-8")
    turns = [{"role": role, "content": content} for role, content in TALKS["two"]]
    renderer = Renderer(tokenizer, "x")
    try:
        Fields(renderer).check(turns, None, "row 0")
        examples = renderer.examples(turns, None, "row 0")
    except RowError as error:
        refused = error.kind
    else:
        refused = ""
    if refused:
        assert refused.split()[-1] in ("prompt", "render", "out")  # begins answers otherwise, cannot render, leaves out
        return
    if MARKS_OF.search(tokenizer.chat_template) and len(examples) == 1:
        theirs = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        assert examples[0].ids == theirs["input_ids"]
        assert [int(label != -100) for label in examples[0].labels] == theirs["assistant_masks"]
        return
    for ids, labels, numbers in examples:
        prefix = tokenizer.apply_chat_template(turns[: numbers[-1] + 1], return_dict=False)
        assert ids == prefix[: len(ids)]
        learned = tokenizer.decode([label for label in labels if label != -100])
        assert re.search(".*".join(turns[number]["content"] for number in numbers), learned, re.DOTALL)
        assert not re.search("tea|hi<", learned)
    assert sorted(number for example in examples for number in example.turns) == [1, 3]
