"""Token ids and loss masks of conversations, by marks and by prefixes."""

from __future__ import annotations

import pytest

from lora_lightning.data.chats.rendering import Renderer
from lora_lightning.data.chats.templates import TEMPLATES
from lora_lightning.data.tokens.marks import mark
from lora_lightning.data.tokens.tokenizers import load_tokenizer
from lora_lightning.errors import DataError

TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "tea?"},
    {"role": "assistant", "content": "yes\nplease"},
]
MARKED = TEMPLATES["chatml"].jinja(start="")
UNMARKED = MARKED.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


@pytest.fixture
def render(letters):
    def render(template: str, last_only: bool = False) -> Renderer:
        tokenizer = load_tokenizer(letters())
        tokenizer.chat_template = template
        return Renderer(tokenizer, "of the test", last_only)

    return render


@pytest.mark.parametrize("last_only", [False, True])
def test_marks_and_prefixes_say_the_same(render, last_only):
    by_marks, by_prefixes = (render(template, last_only) for template in (MARKED, UNMARKED))
    assert by_marks.examples(TURNS, None, "row 0") == by_prefixes.examples(TURNS, None, "row 0")


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_the_prompt_is_what_stands_before_the_answer(render, template):
    renderer = render(template, last_only=True)
    prompt = renderer.prompt(TURNS[:3], None, "row 0")
    [(ids, labels, turns, _)] = renderer.examples(TURNS, None, "row 0")
    assert turns == [3]
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [-100] * len(prompt)
    assert mark(ids, labels, renderer.tokenizer).endswith("assistant\n]]yes\nplease<|im_end|>[[\n]]")


def test_labels_are_the_tokens_themselves(render):
    [(ids, labels, turns, _)] = render(MARKED).examples(TURNS, None, "row 0")
    assert turns == [1, 3]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def test_what_a_template_writes(render):
    tools = [{"name": "weather"}]
    calls = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "weather"}]}]
    deaf = render(MARKED)
    assert not deaf.writes("tools", TURNS, tools, "row 0")
    assert not deaf.writes("tool_calls", calls, None, "row 0")
    hearing = render("{{ tools }}{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}")
    assert hearing.writes("tools", calls, tools, "row 0")
    assert hearing.writes("tool_calls", calls, tools, "row 0")


def test_templates_that_refuse_or_begin_answers_otherwise(render):
    with pytest.raises(
        DataError, match=r"^row 3: the chat template of the test cannot render it: roles must alternate"
    ):
        render("{{ raise_exception('roles must alternate') }}").examples(TURNS, None, "row 3")
    unlike = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %}model:{% endif %}"
    )
    with pytest.raises(DataError, match=r"^row 3, turn 3: the chat template of the test begins an answer otherwise"):
        render(unlike).examples(TURNS, None, "row 3")
