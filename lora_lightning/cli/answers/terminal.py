"""The loop of `chat`: lines in, answers out; the same in a terminal and in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TextIO

from lora_lightning.cli.answers.conversation import Conversation
from lora_lightning.cli.answers.sampling import Sampling
from lora_lightning.cli.answers.streaming import stream
from lora_lightning.cli.answers.voices import BASE, Voice, Voices
from lora_lightning.errors import LoraLightningError, SettingsError, did_you_mean

COMMANDS = {
    "/adapter": "[NAME|NUMBER]  let another adapter answer; alone, list them",
    "/base": "let the base model answer",
    "/reset": "forget the conversation",
    "/system": "[TEXT]  begin anew with this system text, or without one",
    "/image": "[PATH]  attach an image to the next question; alone, take back what is attached",
    "/audio": "[PATH]  attach a sound; alone, take back what is attached",
    "/settings": "[NAME VALUE]  show or change how tokens are chosen; null takes the model's own",
    "/help": "this list",
    "/exit": "leave; so do /quit, Ctrl-D and Ctrl-C twice",
}


class Chat:
    """A chat in a terminal or a pipe. In a pipe only answers go to standard output.

    Args:
        voices: who can answer.
        sampling: how tokens are chosen.
        out: where answers go.
        notes: where everything else goes.
    """

    def __init__(self, voices: Voices, sampling: Sampling, out: TextIO, notes: TextIO) -> None:
        self.voices, self.sampling, self.out, self.notes = voices, sampling, out, notes
        self.conversation = Conversation(self.say)
        self._commands: dict[str, Callable[[str], None]] = {
            "/adapter": self._adapter,
            "/base": lambda _: self._use(BASE),
            "/reset": self._reset,
            "/system": self._system,
            "/settings": self._settings,
            "/help": self._help,
            "/image": lambda path: self._attach("image", path),
            "/audio": lambda path: self._attach("audio", path),
        }

    def say(self, text: str) -> None:
        """Tell the user something that is no answer."""
        print(f"[{text}]", file=self.notes, flush=True)

    def run(self, lines: Iterator[str]) -> None:
        """Answer line after line until they end, or one says so."""
        self._tell_voice()
        interrupted = False
        while True:
            try:
                line = next(lines, None)
                if line is None:
                    return
                if line.strip() in ("/exit", "/quit"):
                    return
                if line.strip():
                    self.line(line)
                interrupted = False
            except KeyboardInterrupt:
                print(file=self.notes)
                if interrupted:
                    return
                interrupted = True
                self.say("Ctrl-C once more leaves, and so does /exit")

    def line(self, line: str) -> None:
        """Do what a command says, or answer."""
        word, _, rest = line.strip().partition(" ")
        try:
            if not word.startswith("/"):
                self.answer(line)
            elif word in self._commands:
                self._commands[word](rest.strip())
            else:
                near = did_you_mean(word, COMMANDS)
                raise SettingsError(f'there is no command "{word}".{near} Commands: {", ".join(COMMANDS)}.')
        except LoraLightningError as error:
            self.say(f"error: {error}")

    def answer(self, question: str) -> None:
        """Answer a question, and keep both."""
        voice = self.voices.current
        room = self.voices.room(self.sampling.max_new_tokens)
        content = self.conversation.question(question)
        prompt = self.conversation.prompt(voice, content, room, self.voices.is_seq2seq)
        answer = stream(self.voices, prompt, self.sampling, self._write)
        print(file=self.out, flush=True)
        self.say(answer.speed)
        if voice.in_turns:
            self.conversation.add(content, answer.text)
        if answer.text.strip():
            self.conversation.attached = {}

    def _write(self, text: str) -> None:
        print(text, end="", file=self.out, flush=True)

    def _use(self, name: str) -> None:
        self.voices.use(name)
        self._tell_voice()
        if self.conversation.turns and self.voices.current.in_turns:
            self.say("the conversation goes on; /reset begins anew")

    def _tell_voice(self) -> None:
        voice = self.voices.current
        what = "" if voice.in_turns else f": {_unkept(voice)}, and nothing is kept"
        kind = f", {type(voice.adapter.method).__name__}" if voice.adapter else ""
        self.say(f"{voice.label}{kind} answers{what}")

    def _adapter(self, name: str) -> None:
        if name:
            self._use(name)
            return
        for number, (label, voice) in enumerate(self.voices.voices.items()):
            mark = "*" if voice is self.voices.current else " "
            print(f"{mark} {number}  {label}  {voice.adapter or self.voices.base}", file=self.notes, flush=True)

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self.say("a new conversation")

    def _system(self, text: str) -> None:
        self.conversation.set_system(text, self.voices.current)
        self.say(f"a new conversation{', with this system text' if text else ', without a system text'}")

    def _settings(self, words: str) -> None:
        if words:
            name, _, value = words.replace("=", " ").partition(" ")
            self.sampling = self.sampling.replaced(name, value.strip())
        self.say(str(self.sampling))

    def _attach(self, kind: str, path: str) -> None:
        if not path:
            self.conversation.attached = {}
            self.say("nothing is attached")
            return
        bare = path[1:-1] if len(path) > 1 and path[0] == path[-1] and path[0] in "\"'" else path
        count = self.conversation.attach(kind, bare, self.voices.current)
        self.say(f"{kind} {count} of the next question")

    def _help(self, _: str) -> None:
        width = max(map(len, COMMANDS))
        for name, text in COMMANDS.items():
            print(f"{name:<{width}}  {text}", file=self.notes, flush=True)


def _unkept(voice: Voice) -> str:
    """How a voice that keeps no conversation is asked, and why."""
    if voice.data.layout is not None:
        return "each text is filled into the prompt that it was trained with"
    why = "it was trained on plain texts" if voice.tokenizer.chat_template else "it has no chat template"
    return f"{why}, so it goes on with each text"


def lines_of(source: TextIO, prompt: str = "> ") -> Iterator[str]:
    r"""Lines of a terminal, with a prompt and editing, or of a pipe; one that ends in a backslash goes on in the next.

    Ctrl-C is raised, and the next line can be asked for again.
    """
    return _Lines(source, prompt)


class _Lines:
    def __init__(self, source: TextIO, prompt: str) -> None:
        self.source, self.prompt = source, prompt
        self.terminal = source is sys.stdin and source.isatty() and sys.stdout.isatty()
        if self.terminal:
            with suppress(ImportError):
                import readline  # noqa: F401 - editing and earlier lines for `input`

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._one(self.prompt)
        while line.endswith("\\"):
            line = f"{line[:-1]}\n{self._one('  ')}"
        return line

    def _one(self, prompt: str) -> str:
        if self.terminal:
            try:
                return input(prompt)
            except EOFError:
                raise StopIteration from None
        line = self.source.readline()
        if not line:
            raise StopIteration
        return line.rstrip("\n")
