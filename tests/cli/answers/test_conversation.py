from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lora_lightning.cli.answers.conversation import Conversation
from lora_lightning.cli.answers.voices import Voice
from lora_lightning.errors import SettingsError


@pytest.fixture
def voice(base: Path) -> Voice:
    return Voice("toy", AutoTokenizer.from_pretrained(base))


def asked(conversation: Conversation, voice: Voice, text: str, room: int | None = None) -> str:
    return str(voice.tokenizer.decode(conversation.prompt(voice, text, room).ids))


def test_turns_are_kept_as_the_template_writes_them(voice: Voice) -> None:
    said: list[str] = []
    conversation = Conversation(said.append)
    assert asked(conversation, voice, "w5") == "w1 w5 [EOS] w2"
    conversation.add("w5", "w6")
    assert asked(conversation, voice, "w7") == "w1 w5 [EOS] w2 w6 [EOS] w1 w7 [EOS] w2"
    conversation.add("w7", "  ")  # nothing was answered
    assert asked(conversation, voice, "w8") == "w1 w5 [EOS] w2 w6 [EOS] w1 w8 [EOS] w2"
    conversation.reset()
    assert asked(conversation, voice, "w9") == "w1 w9 [EOS] w2"
    assert said == []


def test_a_system_text_that_the_template_refuses_is_never_sent(voice: Voice, plain_base: Path) -> None:
    said: list[str] = []
    conversation = Conversation(said.append)
    with pytest.raises(SettingsError, match=r"the chat template of toy takes no system text: no system here"):
        conversation.set_system("w3", voice)
    conversation.system = "w3"  # as it was set for another adapter
    assert asked(conversation, voice, "w5") == "w1 w5 [EOS] w2"
    assert said == ["the chat template of toy refuses the conversation (no system here): the system text is left out"]
    with pytest.raises(SettingsError, match="bare has no chat template, so it takes no system text"):
        conversation.set_system("w3", Voice("bare", AutoTokenizer.from_pretrained(plain_base)))


def test_turns_that_the_template_refuses_are_forgotten_and_that_is_said(voice: Voice) -> None:
    said: list[str] = []
    conversation = Conversation(said.append)
    conversation.turns = [{"role": "user", "content": "w5"}]
    assert asked(conversation, voice, "w7") == "w1 w7 [EOS] w2"
    assert said == [
        "the chat template of toy refuses the conversation (roles must alternate): the conversation begins anew"
    ]
    assert conversation.turns == []


def test_the_first_exchanges_go_where_the_model_takes_no_more(voice: Voice) -> None:
    said: list[str] = []
    conversation = Conversation(said.append)
    conversation.add("w5", "w6")
    conversation.add("w7", "w8")
    assert asked(conversation, voice, "w9", room=10) == "w1 w7 [EOS] w2 w8 [EOS] w1 w9 [EOS] w2"
    assert said == ["the first 1 exchanges are left out from here on: the model takes no more tokens"]
    assert len(conversation.turns) == 2
    with pytest.raises(SettingsError, match="the question has 6 tokens; the model has room for 3 beside the answer"):
        conversation.prompt(voice, "w1 w2 w3", 3)


def test_without_a_template_a_text_is_gone_on_with(plain_base: Path) -> None:
    bare = Voice("bare", AutoTokenizer.from_pretrained(plain_base))
    conversation = Conversation(lambda _: None)
    assert asked(conversation, bare, "w5 w6") == "w5 w6"
    with pytest.raises(SettingsError, match="the text has 3 tokens; the model has room for 2"):
        conversation.prompt(bare, "w5 w6 w7", 2)
    with pytest.raises(SettingsError, match="the text has no tokens"):
        conversation.prompt(bare, "", None)
