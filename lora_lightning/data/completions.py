"""Prompts with their completions: a causal language model learns the completion alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import datasets

from lora_lightning.data.batches.streaming import Encoder
from lora_lightning.data.causal_text import CausalText
from lora_lightning.data.prompt_formats import PromptFormat, fields, find_format, layout_of
from lora_lightning.data.sources.faults import RowError
from lora_lightning.data.sources.texts import as_text
from lora_lightning.data.sources.unread import COMPARED, Changing
from lora_lightning.data.tokens.causal import completion_example, end_id, plain_ids, start_ids
from lora_lightning.data.tokens.encoding import tokenised
from lora_lightning.errors import check

OTHERS = ("system", "system_prompt", "history", "tools", "image", "images", "video", "videos", "audio", "audios")
"""Columns that other tools learn from."""
CHANGING = dict.fromkeys(OTHERS, Changing("value", "Write it into the prompt with prompt_template"))


class Completions(CausalText):
    r"""Prompts and completions for a causal language model, with the loss on the completion only.

    Prompt and completion are tokenised apart, as at inference, where the prompt is all there is; an end-of-text token
    follows the completion. What does not fit into max_length is cut from the left of the prompt, behind its start
    token, and only then from the right of the completion. An example whose completion is empty is dropped; rows to
    predict need none, and where they have one its loss is told beside the prediction.

    Args:
        prompt: Column of the prompt; not used where format or prompt_template is given.
        completion: Column of the completion; null takes the format's, else "completion".
        prompt_template: Prompt built from columns, such as "{instruction}\n{input}\n"; a missing value counts as empty.
        format: Prompt of a known layout: alpaca (columns instruction, input, output), dolly (the same from instruction,
            context, response), instruction (instruction and input as they are, output) or question (question, answer).
            An input or context may be empty or absent.
        common: Settings that all text data share.
    """

    def __init__(
        self,
        prompt: str = "prompt",
        completion: str | None = None,
        prompt_template: str | None = None,
        format: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.prompt = prompt
        self.prompt_template = prompt_template
        self.format = format
        check(format is None or prompt_template is None, self, "format", "prompt_template must be null beside it.")
        self._layout = find_format(format, "Completions.format") if format is not None else None
        self._compared = COMPARED if completion is None else {}  # whoever names "chosen" knows the other one
        self.completion = completion or (self._layout.completion if self._layout else "completion")

    def read(self, split: str) -> datasets.Dataset | None:
        """Rows with the columns of prompt and, but for predict, completion."""
        texts: list[str] = []
        if self._layout is not None:
            prompts = {f'Completions.format "{self.format}": column {name}': name for name in self._layout.required}
        elif self.prompt_template is None:
            prompts, texts = {"Completions.prompt": self.prompt}, [self.prompt]
        else:
            names = fields(self.prompt_template)
            prompts = {
                f"Completions.prompt_template (a literal brace is doubled): field {n}": name
                for n, name in enumerate(names, 1)
            }
        learned = {} if split == "predict" else {"Completions.completion": self.completion}
        columns, texts = {**prompts, **learned}, [*texts, *learned.values()]
        judged = list(columns.values())
        changing = {} if self.prompt_template is not None else CHANGING
        return self.sources.read(
            split,
            columns,
            texts=texts,
            hold_out_by=list(prompts.values()),
            judge=refuse_turns,
            judged=judged,
            changing={**changing, **self._compared},
        )

    def encode(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:
        """Token ids and loss mask of each row to predict, or that has a completion; `dropped` counts the others."""
        encoded = tokenised(rows, self.encoder(split))
        self.count_dropped(split, rows, encoded, "completion")
        return encoded

    def encoder(self, split: str) -> Encoder:
        """Token ids and loss mask of rows with a completion."""
        start, end = start_ids(self.tokenizer_object), end_id(self.tokenizer_object)

        def encode(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
            prompts = plain_ids(self.tokenizer_object, self._prompts(batch))
            texts = [as_text(text) or "" for text in batch.get(self.completion, [""] * len(numbers))]
            examples = []
            for index, prompt, completion in zip(
                numbers, prompts, plain_ids(self.tokenizer_object, texts), strict=True
            ):
                if completion or split == "predict":
                    whole = [*completion, end] if completion else []
                    example = completion_example(start, prompt, whole, self.max_length)
                    truncated = len(example["input_ids"]) < len(start) + len(prompt) + len(whole)
                    examples.append({**example, "index": index, "truncated": truncated})
            names = ("input_ids", "attention_mask", "labels", "index", "truncated")
            return {name: [example[name] for example in examples] for name in names}

        return encode

    @property
    def layout(self) -> PromptFormat | None:
        """The layout of prompts that are built from columns; None where they stand in one as they are."""
        return self._layout or layout_of(None, self.prompt_template, self.completion)

    def _prompts(self, batch: dict[str, list[Any]]) -> list[str]:
        layout = self.layout
        if layout is None:
            return [as_text(text) or "" for text in batch[self.prompt]]
        return [layout.fill(row) for row in _rows(batch)]


def refuse_turns(row: Mapping[str, Any]) -> None:
    """Raise `RowError` for a conversation in place of a text."""
    for name, value in row.items():
        text = as_text(value) or ""
        if text.lstrip().startswith("[{") and any(f'"{key}"' in text for key in ("role", "from")):
            try:
                turns = json.loads(text)
            except ValueError:
                continue
            if all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns):
                raise RowError(
                    "with turns in place of a text",
                    f'"{name}" is a list of turns; Chat learns those (data: Chat), and takes the columns prompt and '
                    "completion as one conversation",
                )


def _rows(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
