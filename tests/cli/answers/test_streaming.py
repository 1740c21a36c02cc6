from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_lightning.cli.answers.sampling import Sampling
from lora_lightning.cli.answers.streaming import Shown, stream
from lora_lightning.cli.answers.voices import Voices
from lora_lightning.data.media.prompts import Prompt
from lora_lightning.models.generation import end_ids

IDS = [5, 9, 12]
PROMPT = Prompt(IDS)


def test_what_is_streamed_is_what_transformers_generates(base: Path) -> None:
    voices = Voices([str(base)], device="cpu")
    pieces: list[str] = []
    answer = stream(voices, PROMPT, Sampling(greedy=True, max_new_tokens=9), pieces.append)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    ends = end_ids(model, voices.current.tokenizer)
    ids = model.generate(torch.tensor([IDS]), max_new_tokens=9, do_sample=False, eos_token_id=ends, pad_token_id=0)[0]
    assert answer.text == "".join(pieces) == voices.current.tokenizer.decode(ids[3:], skip_special_tokens=True)
    assert answer.tokens == len(ids) - 3
    assert not answer.stopped
    assert f"{answer.tokens} tokens, " in answer.speed
    assert len([piece for piece in pieces if piece]) > 1


def test_a_seed_draws_the_same_again(base: Path) -> None:
    voices = Voices([str(base)], device="cpu")
    settings = Sampling(temperature=5.0, max_new_tokens=12, seed=3)
    one, again = (stream(voices, PROMPT, settings, lambda _: None).text for _ in range(2))
    assert one == again
    assert one != stream(voices, PROMPT, settings.replaced("seed", "4"), lambda _: None).text


@pytest.mark.parametrize(
    "pieces", [["Yes", ".</", "end", "> more"], ["Yes.", "</end>"], list("Yes.</end>x"), ["Yes.</end>"]]
)
def test_text_that_ends_a_turn_is_not_shown(pieces: list[str]) -> None:
    found: list[str] = []
    shown = Shown(found.append, "</end>")
    for piece in pieces:
        shown.add(piece)
    shown.close()
    assert "".join(found) == shown.text == "Yes."


def test_what_only_begins_like_the_end_is_shown() -> None:
    found: list[str] = []
    shown = Shown(found.append, "</end>")
    for piece in ("a </", "b> ", "</e"):
        shown.add(piece)
    assert "".join(found) == "a </b> "
    shown.close()
    assert "".join(found) == shown.text == "a </b> </e"


def test_ctrl_c_stops_an_answer_and_keeps_what_was_written(base: Path) -> None:
    voices = Voices([str(base)], device="cpu")
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt  # as it reaches the thread that waits

    answer = stream(voices, PROMPT, Sampling(temperature=9.0, seed=0, max_new_tokens=100_000), write)
    assert answer.stopped
    assert answer.text == "".join(pieces)
    assert "stopped" in answer.speed
    assert answer.tokens < 100_000


def test_a_second_ctrl_c_leaves(base: Path) -> None:
    def write(_: str) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(Voices([str(base)], device="cpu"), PROMPT, Sampling(greedy=True, max_new_tokens=20), write)


def test_an_error_of_the_model_is_raised_where_it_is_waited_for(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    voices = Voices([str(base)], device="cpu")

    def generate(**_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(voices.model, "generate", generate)
    with pytest.raises(RuntimeError, match="no memory"):
        stream(voices, PROMPT, Sampling(), lambda _: None)
