"""A conversation: what has been said, and the tokens that a model is asked with. The template refuses none of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lora_lightning.cli.answers.asking import as_read, prompt_of, reads_none
from lora_lightning.cli.answers.voices import Voice, plain_prompt
from lora_lightning.data.chats.turns import Turn, without_first_exchange
from lora_lightning.data.media.parts import Media, marked, parts_of, with_media
from lora_lightning.data.media.processors import sampling_rate
from lora_lightning.data.media.prompts import Prompt
from lora_lightning.data.sources.faults import RowError
from lora_lightning.errors import SettingsError

Say = Callable[[str], None]
WHERE = "the conversation"
"""What it is called in messages."""


class Conversation:
    """Turns so far, for voices with a chat template; others go on with one text at a time.

    Args:
        say: is given what a user should know.
    """

    def __init__(self, say: Say) -> None:
        self.say = say
        self.system = ""
        self.turns: list[Turn] = []
        self.attached: dict[str, list[Any]] = {}
        """Images and sounds of the next question, opened, by kind."""

    def reset(self) -> None:
        """Forget the turns, and what is attached to the next question; the system text stays."""
        self.turns, self.attached = [], {}

    def attach(self, kind: str, given: str, voice: Voice) -> int:
        """Open an image or a sound for the next question.

        Args:
            kind: "image" or "audio".
            given: its path, or a data URL.
            voice: who is to be asked.

        Returns:
            How many of the kind are attached now.

        Raises:
            RowError: it cannot be read, or the voice reads none.
        """
        if voice.processor is None:
            raise reads_none(voice, f"{given} is of kind {kind}")
        opened = voice.read(Media(kind, given))
        rate = sampling_rate(voice.processor)
        self.attached.setdefault(kind, []).append(
            opened if kind == "image" else {"array": opened, "sampling_rate": rate}
        )
        return len(self.attached[kind])

    def question(self, text: str) -> Any:
        """Content of the next question: the text, or, where something is attached, parts.

        Marks in the text take what is attached in its order; a text without marks has it in front.

        Raises:
            RowError: the text has another number of marks.
        """
        if not self.attached:
            return text
        row = {f"{kind}s": values for kind, values in self.attached.items()}
        where = "the question"
        turns = [{"role": "user", "content": parts_of(marked(text, row), where)}]
        return with_media(turns, row, None, where)[0]["content"]

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

    def prompt(self, voice: Voice, question: Any, room: int | None, seq2seq: bool = False) -> Prompt:
        """What asks for an answer to `question`; what the template or the length refuses is left out, and said.

        Args:
            voice: who is to answer.
            question: content of what was asked, see `question`.
            room: most tokens of the prompt; None where nothing bounds it.
            seq2seq: whether the model reads the text whole.

        Raises:
            SettingsError: the template refuses the question by itself, or it is too long by itself.
        """
        asked = {"role": "user", "content": question}
        if not isinstance(question, str):
            as_read(voice, [asked], "the question")
        if not voice.in_turns:
            ids = plain_prompt(voice.tokenizer, voice.data.asked(question, "the line"), seq2seq)
            if room is not None and len(ids) > room:
                raise SettingsError(f"the text has {len(ids)} tokens; the model has room for {room} beside the answer.")
            if not ids:
                raise SettingsError("the text has no tokens.")
            return Prompt(ids)
        turns = [*self._front(), *self.turns, asked]
        if reason := _refused(voice, turns):
            turns = self._accepted(voice, asked, reason)
        found = prompt_of(voice, turns, WHERE)
        left_out = 0
        while room is not None and len(found.ids) > room and (shorter := without_first_exchange(turns)):
            turns, left_out = shorter, left_out + 1
            found = prompt_of(voice, turns, WHERE)
        if room is not None and len(found.ids) > room:
            raise SettingsError(
                f"the question has {len(found.ids)} tokens; the model has room for {room} beside the answer."
            )
        if left_out:
            self.say(f"the first {left_out} exchanges are left out from here on: the model takes no more tokens")
            self.turns = turns[len(self._front()) : -1]
        return found

    def add(self, question: Any, answer: str) -> None:
        """Keep an exchange; one without an answer is not kept.

        Args:
            question: content of what was asked.
            answer: its answer.
        """
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
        voice.renderer.text(as_read(voice, turns, WHERE), None, WHERE, prompt=True)
    except RowError as error:
        return str(error).rpartition("cannot render it: ")[2].rstrip(".")
    return ""
