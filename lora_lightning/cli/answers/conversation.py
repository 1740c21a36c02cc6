"""A conversation: what has been said, and the tokens that a model is asked with. The template refuses none of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lora_lightning.cli.answers.voices import Voice, plain_prompt
from lora_lightning.data.chats.rendering import Renderer
from lora_lightning.data.chats.turns import Turn, without_first_exchange
from lora_lightning.data.sources.faults import RowError
from lora_lightning.errors import SettingsError

Say = Callable[[str], None]


class Conversation:
    """Turns so far, for voices with a chat template; others go on with one text at a time.

    Args:
        say: is given what a user should know.
    """

    def __init__(self, say: Say) -> None:
        self.say = say
        self.system = ""
        self.turns: list[Turn] = []

    def reset(self) -> None:
        """Forget the turns; the system text stays."""
        self.turns = []

    def set_system(self, text: str, voice: Voice) -> None:
        """Begin anew with another system text, or none.

        Raises:
            SettingsError: the voice's template takes none.
        """
        if text:
            turns = [{"role": "system", "content": text}, {"role": "user", "content": "hello"}]
            if not voice.in_turns:
                raise SettingsError(f"{voice.label} has no chat template, so it takes no system text.")
            reason = _refused(voice, turns)
            if reason:
                raise SettingsError(f"the chat template of {voice.label} takes no system text: {reason}")
        self.system = text
        self.reset()

    def prompt(self, voice: Voice, text: str, room: int | None, seq2seq: bool = False) -> list[int]:
        """Token ids that ask for an answer to `text`; what the template or the length refuses is left out, and said.

        Args:
            voice: who is to answer.
            text: what was asked.
            room: most tokens of the prompt; None where nothing bounds it.
            seq2seq: whether the model reads the text whole.

        Raises:
            SettingsError: the template refuses the question by itself, or it is too long by itself.
        """
        asked = {"role": "user", "content": text}
        if not voice.in_turns:
            ids = plain_prompt(voice.tokenizer, voice.data.asked(text, "the line"), seq2seq)
            if room is not None and len(ids) > room:
                raise SettingsError(f"the text has {len(ids)} tokens; the model has room for {room} beside the answer.")
            if not ids:
                raise SettingsError("the text has no tokens.")
            return ids
        turns = [*self._front(), *self.turns, asked]
        if reason := _refused(voice, turns):
            turns = self._accepted(voice, asked, reason)
        ids = _ids(voice, turns)
        left_out = 0
        while room is not None and len(ids) > room and (shorter := without_first_exchange(turns)):
            turns, left_out = shorter, left_out + 1
            ids = _ids(voice, turns)
        if room is not None and len(ids) > room:
            raise SettingsError(f"the question has {len(ids)} tokens; the model has room for {room} beside the answer.")
        if left_out:
            self.say(f"the first {left_out} exchanges are left out from here on: the model takes no more tokens")
            self.turns = turns[len(self._front()) : -1]
        return ids

    def add(self, question: str, answer: str) -> None:
        """Keep an exchange; one without an answer is not kept."""
        if answer.strip():
            self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def _front(self) -> list[Turn]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _accepted(self, voice: Voice, asked: Turn, reason: str) -> list[Turn]:
        """The question behind as much as the template takes: all but the system text, or nothing."""
        for front, kept, what in (
            ([], self.turns, "the system text is left out"),
            (self._front(), [], "the conversation begins anew"),
            ([], [], "the conversation begins anew, without the system text"),
        ):
            turns = [*front, *kept, asked]
            if not _refused(voice, turns):
                self.say(f"the chat template of {voice.label} refuses the conversation ({reason}): {what}")
                self.turns, self.system = list(kept), self.system if front else ""
                return turns
        raise SettingsError(f"the chat template of {voice.label} refuses the question: {reason}")


def _refused(voice: Voice, turns: Sequence[Turn]) -> str:
    """Why a template does not render these turns; empty where it does."""
    try:
        _ids(voice, turns)
    except RowError as error:
        return str(error).rpartition("cannot render it: ")[2].rstrip(".")
    return ""


def _ids(voice: Voice, turns: Sequence[Turn], tools: Any = None) -> list[int]:
    return Renderer(voice.tokenizer, f"of {voice.label}").prompt(turns, tools, "the conversation")
