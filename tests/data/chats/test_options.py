"""Variables that a chat template reads, by its text."""

from __future__ import annotations

import pytest

from lora_lightning.data.chats.options import check_options, variables
from lora_lightning.errors import DataError


@pytest.mark.parametrize(
    ("template", "read"),
    [
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", set()),
        ("{% if enable_thinking is defined and not enable_thinking %}{{ 1 }}{% endif %}", {"enable_thinking"}),
        ("{% if not day is defined %}{% set day = strftime_now('%d') %}{% endif %}{{ day }}", {"day"}),
        (
            "{% set z = 1 %}{% for m in messages %}{% if m.x %}{% set y = 1 %}{% endif %}{{ y }}{% endfor %}",
            set(),
        ),
        ("{% macro draw(x) %}{{ x }}{{ style }}{% endmacro %}{{ draw(1) }}", {"style"}),
        ("{% generation %}{{ tone }}{% endgeneration %}{% for m in messages %}{% break %}{% endfor %}", {"tone"}),
    ],
)
def test_what_a_template_reads(template, read):
    assert variables(template) == read


def test_a_template_that_cannot_be_parsed_is_told_by_whoever_renders_it():
    assert variables("{% for") is None
    check_options("{% for", {"tone": 1}, "x")


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token"])
def test_what_comes_with_the_data_is_not_given_otherwise(name):
    with pytest.raises(DataError, match=rf"^x\.{name} is 1; the data and the tokenizer give it to the template"):
        check_options(f"{{{{ {name} }}}}", {name: 1}, "x")


def test_the_nearest_one_is_named():
    with pytest.raises(DataError, match=r'it reads enable_thinking\. Did you mean "enable_thinking"\?'):
        check_options("{{ enable_thinking }}", {"enable_thinkin": False}, "x")
