from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from media_models import FAMILIES, PICTURED, picture

from lora_lightning.cli.answers.conversation import Conversation
from lora_lightning.cli.answers.sampling import Sampling
from lora_lightning.cli.answers.streaming import stream
from lora_lightning.cli.answers.terminal import COMMANDS, lines_of
from lora_lightning.cli.answers.voices import Voices

Talk = Callable[..., Any]


def test_a_conversation_goes_on_and_begins_anew(talk: Talk, base: Path) -> None:
    out, notes, chat = talk([base], "w5 w6", "w7", "/reset", "w8", "w9", "/exit", "w10")
    answers = out.splitlines()
    assert len(answers) == 4
    assert [turn["content"] for turn in chat.conversation.turns] == ["w8", answers[2], "w9", answers[3]]
    assert "[base answers]" in notes
    assert notes.count(" tokens/s]") == 4
    assert "[a new conversation]" in notes


def test_adapters_and_the_base_take_turns(talk: Talk, adapters: list[Path]) -> None:
    lines = ["w5", "/reset", "/adapter two", "w5", "/reset", "/base", "w5", "/adapter 1", "/adapter"]
    out, notes, _ = talk(adapters, *lines, temperature=0)
    assert len(set(out.splitlines())) == 3
    for said in ("[one, LoRA answers]", "[two, LoRA answers]", "[base answers]"):
        assert said in notes
    assert "[the conversation goes on; /reset begins anew]" in notes
    assert "* 1  one  " in notes
    assert f'  2  two  "{adapters[1]}" (LoRA, lora_lightning, sha256 ' in notes


def test_settings_help_and_what_is_wrong(talk: Talk, base: Path) -> None:
    lines = [
        "/settings",
        "/settings max_new_tokens 2",
        "w5",
        "/settings top_p 3",
        "/help",
        "/resett",
        "/image a.png",
        "/system w3",
    ]
    out, notes, chat = talk([base], *lines, "/adapter three")
    assert chat.sampling.max_new_tokens == 2
    assert "[2 tokens, " in notes
    assert "[temperature 9.0, top_p None, top_k None, max_new_tokens 6, seed 0, greedy False]" in notes
    assert "[error: top_p is 3.0; it must lie in (0, 1].]" in notes
    assert all(f"\n{name} " in notes for name in COMMANDS)
    assert '[error: there is no command "/resett". Did you mean "/reset"?' in notes
    assert "[error: a.png is of kind image, and base reads texts alone: " in notes
    assert "is a model of texts.]" in notes
    assert "[error: the chat template of base takes no system text: no system here]" in notes
    assert '[error: there is no adapter "three".' in notes
    assert len(out.splitlines()) == 1


def test_without_a_chat_template_texts_are_gone_on_with(talk: Talk, plain_base: Path) -> None:
    out, notes, chat = talk([plain_base], "w5 w6", "w5 w6")
    assert "it has no chat template, so it goes on with each text, and nothing is kept]" in notes
    assert out.splitlines()[0] == out.splitlines()[1]
    assert chat.conversation.turns == []


def test_ctrl_c_at_the_prompt_once_and_twice(talk: Talk, base: Path) -> None:
    class Lines:
        def __init__(self) -> None:
            self.given = iter([KeyboardInterrupt, "/help", KeyboardInterrupt, KeyboardInterrupt, "w5"])

        def __iter__(self) -> Iterator[str]:
            return self

        def __next__(self) -> str:
            line = next(self.given)
            if isinstance(line, str):
                return line
            raise line

    _, _, chat = talk([base])
    chat.notes, chat.out = io.StringIO(), io.StringIO()
    chat.run(Lines())
    assert chat.notes.getvalue().count("[Ctrl-C once more leaves, and so does /exit]") == 2
    assert chat.out.getvalue() == ""


def test_a_line_that_ends_in_a_backslash_goes_on() -> None:
    assert list(lines_of(io.StringIO("one \\\ntwo\nthree"))) == ["one \ntwo", "three"]


class Screen:
    """A program in a pseudo-terminal: what it shows is waited for."""

    def __init__(self, *words: str) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "lora_lightning", "chat", *words]
        environment = {**os.environ, "TERM": "dumb"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.shown = ""

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """What is shown up to the next `text`."""
        until = time.monotonic() + seconds
        while text not in self.shown:
            ready, _, _ = select.select([self.master], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"no {text!r} in {self.shown!r}"
            self.shown += os.read(self.master, 4096).decode(errors="replace").replace("\r\n", "\n")
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def interrupt_at_prompt(self, text: str) -> None:
        """Ctrl-C until `text` is shown: one between a prompt and readline's wait is seen only with the next."""
        for _ in range(12):
            self.interrupt()
            with suppress(AssertionError):
                self.wait_for(text, 10)
                return
        self.wait_for(text, 0)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(30)
        os.close(self.master)


@pytest.mark.slow
def test_a_whole_chat_in_a_pseudo_terminal(adapters: list[Path]) -> None:
    screen = Screen(
        *map(str, adapters), "--temperature", "9", "--seed", "0", "--max_new_tokens", "12", "--device", "cpu"
    )
    try:
        assert "measured just now" in screen.wait_for("[one, LoRA answers]")
        screen.wait_for("> ")
        screen.type("w5 w6\n")
        assert "w" in screen.wait_for(" tokens/s]")
        screen.wait_for("> ")
        screen.type("/base\n")
        screen.wait_for("[base answers]")
        screen.wait_for("> ")
        screen.type("/settings max_new_tokens 1000000\n")
        screen.wait_for("max_new_tokens 1000000")
        screen.wait_for("> ")
        screen.type("/reset\n")
        screen.wait_for("> ")
        screen.type("w5\n")
        screen.wait_for(" w")
        screen.interrupt()
        screen.wait_for("tokens/s, stopped]")
        screen.wait_for("> ")
        screen.interrupt_at_prompt("[Ctrl-C once more leaves, and so does /exit]")
        screen.wait_for("> ")
        screen.interrupt_at_prompt("\n")
        assert screen.process.wait(60) == 0
    finally:
        screen.close()


@pytest.mark.slow
@pytest.mark.parametrize("family", PICTURED)
def test_a_question_about_an_image_in_a_pseudo_terminal(family: str, tmp_path: Path) -> None:
    base = FAMILIES[family].save(tmp_path / "base")
    picture(0).save(tmp_path / "0.png")
    screen = Screen(base, "--greedy", "--max_new_tokens", "6", "--device", "cpu")
    try:
        screen.wait_for("[base answers]")
        screen.wait_for("> ")
        screen.type(f"/image {tmp_path / '0.png'}\n")
        screen.wait_for("[image 1 of the next question]")
        screen.wait_for("> ")
        screen.type("what?\n")
        screen.wait_for("what?\n")
        shown = screen.wait_for(" tokens/s]")
        conversation, voices = Conversation(print), Voices([base], device="cpu")
        conversation.attach("image", str(tmp_path / "0.png"), voices.current)
        prompt = conversation.prompt(voices.current, conversation.question("what?"), None)
        answer = stream(voices, prompt, Sampling(greedy=True, max_new_tokens=6), lambda _: None)
        assert shown.startswith(answer.text.replace("\r\n", "\n"))
        assert f"[{answer.tokens} tokens, " in shown
        screen.wait_for("> ")
        screen.type("/exit\n")
        assert screen.process.wait(60) == 0
    finally:
        screen.close()


@pytest.mark.slow
def test_in_a_pipe_only_answers_go_to_standard_output(base: Path) -> None:
    words = [sys.executable, "-m", "lora_lightning", "chat", str(base), "--greedy", "--max_new_tokens", "4"]
    done = subprocess.run(
        [*words, "--device", "cpu"], input="w5\n/help\nw6\n", capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert "/settings" in done.stderr
