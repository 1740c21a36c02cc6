"""Chat templates by name, from files, as texts, and of the tokenizer."""

from __future__ import annotations

import pytest

from lora_lightning.data.chats.templates import TEMPLATES, choose_template
from lora_lightning.data.tokens.tokenizers import load_tokenizer
from lora_lightning.errors import DataError

TURNS = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
ANSWER = {"role": "assistant", "content": "hello"}


@pytest.fixture
def tokenizer(letters):
    return load_tokenizer(letters())


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_follows_its_prompt_and_ends(tokenizer, name):
    """What is rendered up to an answer begins what is rendered with it; the answer's end comes at once behind it."""
    tokenizer.add_tokens([token for token in TEMPLATES[name].tokens if token not in tokenizer.get_vocab()])
    template, called = choose_template(tokenizer, name)
    assert called == f'"{name}"'
    tokenizer.chat_template = template
    prompt = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*TURNS, ANSWER], tokenize=False)
    assert whole.startswith(f"{prompt}hello")
    ends = {"chatml": "<|im_end|>\n", "llama-3": "<|eot_id|>", "phi-3": "<|end|>\n", "phi-4": "<|im_end|>"}
    end = ends.get(name, "</s>\n")
    assert whole == f"{prompt}hello{end}"
    assert "be kind" in prompt


def test_a_start_token_comes_once_before_everything(letters):
    tokenizer = load_tokenizer(letters(start=True))
    tokenizer.chat_template, _ = choose_template(tokenizer, "zephyr")
    text = tokenizer.apply_chat_template([*TURNS, ANSWER], tokenize=False)
    assert text.startswith("<s><|system|>")
    assert text.count("<s>") == 1


def test_text_file_and_the_tokenizers_own(tokenizer, tmp_path):
    assert choose_template(tokenizer, "{{ messages }}") == ("{{ messages }}", "that was given")
    (tmp_path / "mine.jinja").write_text("{{ 1 }}")
    assert choose_template(tokenizer, str(tmp_path / "mine.jinja")) == ("{{ 1 }}", "in mine.jinja")
    tokenizer.chat_template = "{{ 2 }}"
    assert choose_template(tokenizer, None) == (None, f"of {tokenizer.name_or_path}")


def test_templates_that_are_not_there(tokenizer, letters):
    choices = r"Choose one of chatml, .*qwen-3, or give a file or a Jinja text\.$"
    null = r"^Chat\.chat_template is null, and the tokenizer .* has no template\. Choose one that fits its tokens"
    with pytest.raises(DataError, match=rf"{null}: .*zephyr, plain.*; or give a file or a Jinja text\."):
        choose_template(tokenizer, None)
    few = r"zephyr, plain; or give a file or a Jinja text\. With data\.new_tokens: chatml, llama-3, .*qwen-3\.$"
    with pytest.raises(DataError, match=rf"{null}: {few}"):
        choose_template(load_tokenizer(letters(markers=False)), None)
    with pytest.raises(DataError, match=rf'is "chatlm"; no such file\. Did you mean "chatml"\? {choices}'):
        choose_template(tokenizer, "chatlm")
    way = r"data\.new_tokens: \['<\|im_start\|>', '<\|im_end\|>'\] makes it fit"
    with pytest.raises(DataError, match=rf"has no token <\|im_start\|>.* {way}.* fit as it is: zephyr, plain\.$"):
        choose_template(load_tokenizer(letters(markers=False)), "chatml")
