"""A tiny decoder with and without a chat template, and adapters on it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from random_adapters import two_random_adapters
from toy_runs import decoder_folder
from transformers import AutoTokenizer

from lora_lightning.cli.answers.sampling import Sampling
from lora_lightning.cli.answers.terminal import Chat
from lora_lightning.cli.answers.voices import Voices

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ ('w1 ' if m.role == 'user' else 'w2 ') + m.content + ' [EOS] ' }}{% endfor %}"
    "{% if add_generation_prompt %}w2 {% endif %}"
)
"""Turns of words of the vocabulary; it takes no system text, and no two turns of one role."""


@pytest.fixture(scope="session")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_folder(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = decoder_folder(tmp_path_factory.mktemp("turns"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters with random updates, large enough for other answers than the base model's."""
    return two_random_adapters(base, tmp_path_factory)


@pytest.fixture
def talk(base: Path) -> Callable[..., tuple[str, str, Chat]]:
    """A function that says lines to voices, and gives the answers, the notes and the chat."""

    def say(sources: list[Any], *lines: str, **options: Any) -> tuple[str, str, Chat]:
        out, notes = io.StringIO(), io.StringIO()
        settings = {"temperature": 9.0, "seed": 0, "max_new_tokens": 6, **options}
        chat = Chat(Voices([str(source) for source in sources]), Sampling(**settings), out, notes)
        chat.run(iter(lines))
        return out.getvalue(), notes.getvalue(), chat

    return say
