"""One answer, word by word, that can be stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from lora_lightning.cli.answers.asking import inputs_of
from lora_lightning.cli.answers.sampling import Sampling
from lora_lightning.cli.answers.voices import Voices
from lora_lightning.data.media.prompts import Prompt
from lora_lightning.models.generation import end_text


@dataclass(frozen=True)
class Answer:
    """What was written."""

    text: str
    tokens: int
    seconds: float
    stopped: bool
    """Whether it was stopped before its end."""

    @property
    def speed(self) -> str:
        """For people."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return f"{self.tokens} tokens, {rate:.1f} tokens/s{', stopped' if self.stopped else ''}"


class _Stop(StoppingCriteria):  # type: ignore[misc]  # transformers has no types for it
    """Ends generation at an event, and counts tokens."""

    def __init__(self, event: threading.Event) -> None:
        self.event, self.tokens = event, 0

    def __call__(self, input_ids: Any, *_: Any, **__: Any) -> Any:
        self.tokens += 1
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def stream(voices: Voices, prompt: Prompt, sampling: Sampling, write: Callable[[str], object]) -> Answer:
    """Generate an answer, and write it as it comes; Ctrl-C stops it, and what was written stays.

    Args:
        voices: the voice that speaks answers.
        prompt: what is answered.
        sampling: how tokens are chosen.
        write: is given text as it comes.

    Raises:
        KeyboardInterrupt: a second Ctrl-C.
    """
    model, voice, stop = voices.model, voices.current, threading.Event()
    counted = _Stop(stop)
    seq2seq = voices.is_seq2seq
    streamer = TextIteratorStreamer(voice.tokenizer, skip_prompt=not seq2seq, skip_special_tokens=True)
    last = end_text(voice.tokenizer) if voice.in_turns else ""
    failed: list[BaseException] = []
    options: dict[str, Any] = {
        **inputs_of(voice, [prompt], model),
        "generation_config": sampling.config(model, voice.tokenizer, last),
        "tokenizer": voice.tokenizer,
        "stopping_criteria": StoppingCriteriaList([counted]),
        "streamer": streamer,
    }

    def generate() -> None:
        try:
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            with torch.no_grad():
                model.generate(**options)
        except BaseException as error:  # told in the thread that waits
            failed.append(error)
            streamer.end()

    began = time.perf_counter()
    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    shown = Shown(write, last)
    interrupted = False
    pieces = iter(streamer)
    while True:
        try:
            shown.add(next(pieces))
        except StopIteration:
            break
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            stop.set()
    thread.join()
    shown.close()
    if failed:
        raise failed[0]
    return Answer(shown.text, counted.tokens, time.perf_counter() - began, interrupted)


class Shown:
    """Text that is written as it comes, but for what may be the end of the answer.

    Args:
        write: is given text to show.
        last: text that ends the answer; empty for none.
    """

    def __init__(self, write: Callable[[str], object], last: str) -> None:
        self.write, self.last = write, last
        self.text, self._held, self._over = "", "", False

    def add(self, piece: str) -> None:
        """Show what of a piece cannot be the end."""
        if self._over:
            return
        self._held += piece
        if self.last and self.last in self._held:
            self._held, self._over = self._held.partition(self.last)[0], True
        keep = 0 if self._over else self._may_end()
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += ready
        self.write(ready)

    def close(self) -> None:
        """Show what is held back: no end has come."""
        self.text += self._held
        self.write(self._held)
        self._held = ""

    def _may_end(self) -> int:
        """Characters at the end that may begin what ends the answer."""
        longest = min(len(self.last) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self.last.startswith(self._held[-n:])), 0)
