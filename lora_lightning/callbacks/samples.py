"""Samples: what the model answers to the same prompts, again and again while it trains."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lora_lightning.callbacks.meters import Meters
from lora_lightning.callbacks.step_counting import JUDGES, StepCallback, outside_step
from lora_lightning.data.chats.rendering import Renderer
from lora_lightning.data.chats.turns import conversation, json_value, last_answer, plain
from lora_lightning.data.media.parts import column_with_media, marked, named, with_media
from lora_lightning.data.media.prompts import Prompt, model_inputs, rendered_prompt
from lora_lightning.data.prompt_formats import PromptFormat
from lora_lightning.data.sources.splits import undecoded_table
from lora_lightning.data.sources.stored import PLACE
from lora_lightning.data.sources.tables import UNREADABLE, read_table
from lora_lightning.data.sources.texts import as_text
from lora_lightning.data.tokens.causal import start_ids
from lora_lightning.distributed import from_first, reshard
from lora_lightning.errors import DataError, SettingsError, check
from lora_lightning.injection.records import injected_root
from lora_lightning.models.generation import continued_batch, end_text
from lora_lightning.storage.atomic import write_atomically

COLUMNS = ("messages", "conversations", "prompt", "text", "question", "instruction", "source")
"""Columns of a file that may hold the prompts; the first that is there does."""
_ASKED = "__asked__"
"""Key of a row for what is asked, beside its images and sounds."""


class Samples(StepCallback):
    """Generates answers to fixed prompts while training: before the first step, and then at validations or steps.

    They go to a JSON lines file of the run folder (step, number, prompt, answer), and into the text panels of
    TensorBoard, W&B, MLflow and Comet. Random numbers of the training stay as they were. A resumed run writes the file
    that it would have written without a stop.

    Every process generates, because a sharded model needs all of them; the first one writes. Works in any Lightning
    project with a model that generates and a datamodule that has its tokenizer as `tokenizer_object`.

    Args:
        prompts: texts, or conversations as lists of turns; or a file of them (.jsonl, .csv, .txt, ...), whose column is
            messages, conversations, prompt, text, question, instruction or source. Where the data are conversations, a
            text is what the user says. An assistant's turn at the end is left out, and answered anew. Where the data
            build prompts from columns (Completions.format, prompt_template), a prompt is a row with these, or the text
            of the only one that must exist. TextToText.prefix stands before each text. Of MediaChat, rows
            have their images and sounds as its own do; a text without a mark has them in front.
        every_n_steps: optimizer steps from one time to the next; null generates at each validation.
        max_new_tokens: most tokens of an answer.
        temperature: divides the logits; 0 takes the most likely token.
        seed: of the draws, where there are any; each time begins with it.
        file: name of the file in the run folder.
    """

    phase: ClassVar[int] = JUDGES

    def __init__(
        self,
        prompts: str | list[Any],
        every_n_steps: int | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        file: str = "samples.jsonl",
    ) -> None:
        super().__init__()
        self.prompts, self.every_n_steps, self.max_new_tokens = prompts, every_n_steps, max_new_tokens
        self.temperature, self.seed, self.file = temperature, seed, file
        check(bool(prompts), self, "prompts", "name a file, or give at least one prompt.")
        check(every_n_steps is None or every_n_steps >= 1, self, "every_n_steps", "it must be at least 1, or null.")
        check(max_new_tokens >= 1, self, "max_new_tokens", "it must be at least 1.")
        check(temperature >= 0, self, "temperature", "it must be at least 0, which takes the most likely token.")
        self._asked: list[tuple[Any, Prompt]] = []
        self._last = ""
        self._written: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the prompts, and answer them before the first step.

        Raises:
            SettingsError: the model generates nothing, or there is no tokenizer.
            DataError: prompts that cannot be read.
        """
        super().on_train_start(trainer, pl_module)
        tokenizer = self._tokenizer(trainer)
        if not hasattr(injected_root(pl_module), "generate"):
            raise SettingsError(
                f"Samples: {type(injected_root(pl_module)).__name__} does not generate texts; the callback is for "
                "tasks of language models. Leave it out of trainer.callbacks."
            )
        said, folder = from_first(lambda: self._read(trainer))
        self._asked = [(prompt, self._prompt(prompt, trainer, pl_module, n, folder)) for n, prompt in enumerate(said)]
        self._last = end_text(tokenizer) if _in_turns(trainer) else ""
        self._written = None
        if trainer.global_step == 0:
            self._generate(trainer, pl_module)

    def after_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Generate where the step is one of `every_n_steps`."""
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            self._generate(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate, unless steps say when."""
        if self.every_n_steps is None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._generate(trainer, pl_module)

    def _tokenizer(self, trainer: Trainer) -> Any:
        tokenizer = getattr(_data(trainer), "tokenizer_object", None)
        if tokenizer is None:
            raise SettingsError(
                "Samples needs data with a tokenizer: a datamodule that has it as tokenizer_object, such as Chat or "
                "Completions."
            )
        return tokenizer

    def _read(self, trainer: Trainer) -> tuple[list[Any], Path | None]:
        """The prompts: texts, lists of turns, and rows with columns; and what paths in them are relative to."""
        if isinstance(self.prompts, list):
            return self.prompts, None
        path = Path(self.prompts).expanduser()
        return self._rows(
            self.prompts, _layout(trainer), _reads_media(trainer)
        ), path.parent if path.is_file() else None

    @staticmethod
    def _rows(source: str, layout: PromptFormat | None, media: bool) -> list[Any]:
        """The prompts of a file; rows where images or sounds may stand in their other columns."""
        table = undecoded_table(read_table(source, "test", field="Samples.prompts"))
        rows = [{k: v for k, v in row.items() if k not in (PLACE, UNREADABLE)} for row in table]
        there = list(rows[0]) if rows else []
        if layout is not None and set(layout.required) <= set(there):
            return rows
        column = next((name for name in COLUMNS if name in there), there[0] if len(there) == 1 else None)
        if column is None:
            raise DataError(
                f'Samples.prompts is "{source}", with the columns {", ".join(there) or "of no row"}; one of them '
                f"must be called {', '.join(COLUMNS)}."
            )
        return [{**row, _ASKED: row[column]} if media and column_with_media(row) else row[column] for row in rows]

    def _prompt(
        self, prompt: Any, trainer: Trainer, module: LightningModule, number: int, folder: Path | None
    ) -> Prompt:
        """What the model goes on from."""
        where = f"Samples.prompts: number {number}"
        if not _reads_media(trainer):
            return Prompt(self._ids(prompt, trainer, module, where))
        data, row = _data(trainer), prompt if isinstance(prompt, Mapping) else {}
        value = row.get(_ASKED, "") if row else prompt
        text = "" if isinstance(value, list) else as_text(value) or ""
        turns = json_value(value, where) if isinstance(value, list) or text.startswith("[{") else None
        asked = turns or [{"role": "user", "content": marked(text, row)}]
        said = conversation(asked, where, data.content)
        said = plain(with_media(said, row, folder, where))
        said = said[:-1] if last_answer(said) == len(said) - 1 else said
        return rendered_prompt(data.renderer, said, where)

    def _ids(self, prompt: Any, trainer: Trainer, module: LightningModule, where: str) -> list[int]:
        """Token ids of a prompt without images or sounds."""
        tokenizer, data = self._tokenizer(trainer), _data(trainer)
        layout = _layout(trainer)
        if isinstance(prompt, Mapping):
            text = _filled(layout, prompt, where)
        else:
            text = "" if isinstance(prompt, list) else as_text(prompt) or ""
        turns = json_value(prompt, where) if isinstance(prompt, list) or text.startswith("[{") else None
        if turns is None and not _in_turns(trainer):
            ids: list[int]
            if layout is not None and text.strip() and not isinstance(prompt, Mapping):
                text = layout.of_text(text, where)
            if getattr(injected_root(module).config, "is_encoder_decoder", False):
                ids = tokenizer(f"{getattr(data, 'prefix', None) or ''}{text}")["input_ids"]
            else:
                ids = [*start_ids(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]
            if not text.strip():
                raise DataError(f"{where} is empty, so there is nothing to go on from.")
            return ids
        if not tokenizer.chat_template:
            raise DataError(f"{where} holds turns; the data are no conversations, and the tokenizer has no template.")
        said = plain(conversation(turns or [{"role": "user", "content": text}], where))
        said = said[:-1] if last_answer(said) == len(said) - 1 else said
        renderer = data.renderer if _in_turns(trainer) else Renderer(tokenizer, "of the tokenizer")
        found: list[int] = renderer.prompt(said, None, where)
        return found

    def _generate(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step
        if self._written == step:
            return
        began = time.monotonic()
        root = injected_root(module)
        options: dict[str, Any] = {"do_sample": self.temperature > 0, "max_new_tokens": self.max_new_tokens}
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_k": 0}
        data, asked = _data(trainer), [prompt for _, prompt in self._asked]
        processor, read = getattr(data, "processor_object", None), getattr(data, "read_one", None)
        inputs = model_inputs(asked, self._tokenizer(trainer), processor, read, root)  # type: ignore[arg-type]
        with _aside(root, trainer.strategy.root_device, self.seed), trainer.precision_plugin.forward_context():
            answers = outside_step(
                trainer, lambda: continued_batch(root, self._tokenizer(trainer), inputs, self._last, **options)
            )
        reshard(root)
        self._written = step
        rows = [
            {"step": step, "number": number, "prompt": _shown(prompt), "answer": answer.strip()}
            for number, ((prompt, _), answer) in enumerate(zip(self._asked, answers, strict=True))
        ]
        if trainer.is_global_zero:
            self._write(Path(trainer.default_root_dir) / self.file, rows, step)
            for logger in trainer.loggers:
                show(logger, rows, step)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Meters) and not trainer.validating:
                callback.leave_out(time.monotonic() - began)

    @staticmethod
    def _write(path: Path, rows: Sequence[dict[str, Any]], step: int) -> None:
        """Add the rows behind those of earlier steps; what a run had written before it was resumed earlier goes."""
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in lines if line.strip() and json.loads(line)["step"] < step]
        text = "\n".join([*kept, *(json.dumps(row, ensure_ascii=False) for row in rows)]) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))


def _data(trainer: Trainer) -> Any:
    """The data module, where there is one."""
    return getattr(trainer, "datamodule", None)


def _layout(trainer: Trainer) -> PromptFormat | None:
    """The layout of the data's prompts, where they are built from columns."""
    found = getattr(_data(trainer), "layout", None)
    return found if isinstance(found, PromptFormat) else None


def _reads_media(trainer: Trainer) -> bool:
    """Whether the data are conversations with images or sounds."""
    return bool(getattr(type(_data(trainer)), "media_columns", ()))


def _shown(prompt: Any) -> Any:
    """A prompt as it is written, with images and sounds by name."""
    return named({k: v for k, v in prompt.items() if k != _ASKED} if isinstance(prompt, Mapping) else prompt)


def _filled(layout: PromptFormat | None, row: Mapping[str, Any], where: str) -> str:
    """The prompt of a row."""
    if layout is None:
        raise DataError(f"{where} is a row with {', '.join(row)}; the data build no prompts from columns. Give a text.")
    if missing := [name for name in layout.required if name not in row]:
        needed = ", ".join(layout.required)
        raise DataError(f"{where} lacks {', '.join(missing)}; its prompt is built from {needed}.")
    return layout.fill(row)


def _in_turns(trainer: Trainer) -> bool:
    """Whether the data are conversations, so that a text is what a user says."""
    data = _data(trainer)
    return hasattr(type(data), "renderer") and bool(data.tokenizer_object.chat_template)


@contextmanager
def _aside(root: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Eval mode with random numbers of its own; modes and random numbers come back."""
    modes = {module: module.training for module in root.modules()}
    root.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def show(logger: Any, rows: Sequence[dict[str, Any]], step: int) -> None:
    """Put answers into a logger's text panel, where it has one."""
    text = "\n\n".join(f"**{_readable(row['prompt'])}**\n\n{row['answer']}" for row in rows)
    kind = {cls.__name__ for cls in type(logger).__mro__}
    if "WandbLogger" in kind:
        columns = ["step", "prompt", "answer"]
        data = [[row["step"], _readable(row["prompt"]), row["answer"]] for row in rows]
        logger.log_text(key="samples", columns=columns, data=data, step=step)
    elif "TensorBoardLogger" in kind:
        logger.experiment.add_text("samples", text, step)
    elif "MLFlowLogger" in kind:
        logger.experiment.log_text(logger.run_id, text, f"samples/step_{step:08d}.md")
    elif "CometLogger" in kind:
        logger.experiment.log_text(text, step=step)


def _readable(prompt: Any) -> str:
    """A prompt in one text; of a conversation the last turn, of a row its values."""
    if isinstance(prompt, Mapping):
        return ", ".join(f"{name}: {value}" for name, value in prompt.items())
    if not isinstance(prompt, list):
        return str(prompt)
    last = prompt[-1] if prompt else {}
    return str(last.get("content", last.get("value", last))) if isinstance(last, dict) else str(last)
