"""Prompts with their completions: a causal language model learns the completion alone."""

from __future__ import annotations

from string import Formatter
from typing import Any

import datasets

from lora_lightning.data.causal import completion_example, end_id, plain_ids, start_ids
from lora_lightning.data.causal_text import CausalText
from lora_lightning.data.encoding import tokenised
from lora_lightning.errors import DataError


class Completions(CausalText):
    r"""Prompts and completions for a causal language model, with the loss on the completion only.

    Prompt and completion are tokenised apart, as at inference, where the prompt is all there is; an end-of-text token
    follows the completion. What does not fit into max_length is cut from the left of the prompt, behind its start
    token, and only then from the right of the completion. An example whose completion is empty is dropped; rows to
    predict need none, and where they have one its loss is told beside the prediction.

    Args:
        prompt: Column of the prompt; not used where prompt_template is given.
        completion: Column of the completion.
        prompt_template: Prompt built from columns, such as "{instruction}\n{input}\n"; a missing value counts as empty.
        common: Settings that all text data share.
    """

    def __init__(
        self, prompt: str = "prompt", completion: str = "completion", prompt_template: str | None = None, **common: Any
    ) -> None:
        super().__init__(**common)
        self.prompt = prompt
        self.completion = completion
        self.prompt_template = prompt_template

    def read(self, split: str) -> datasets.Dataset | None:
        """Rows with the columns of prompt and, but for predict, completion."""
        if self.prompt_template is None:
            prompts, texts = {"Completions.prompt": self.prompt}, [self.prompt]
        else:
            fields, texts = _fields(self.prompt_template), []
            prompts = {f"Completions.prompt_template: field {n}": field for n, field in enumerate(fields, 1)}
        learned = {} if split == "predict" else {"Completions.completion": self.completion}
        columns, texts = {**prompts, **learned}, [*texts, *learned.values()]
        return self.sources.read(split, columns, texts=texts, hold_out_by=list(prompts.values()))

    def encode(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:
        """Token ids and loss mask of each row to predict, or that has a completion; `dropped` counts the others."""
        start, end = start_ids(self.tokenizer_object), end_id(self.tokenizer_object)

        def encode(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
            prompts = plain_ids(self.tokenizer_object, self._prompts(batch))
            texts = [str(text or "") for text in batch.get(self.completion, [""] * len(numbers))]
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

        encoded = tokenised(rows, encode)
        self.count_dropped(split, rows, encoded, "completion")
        return encoded

    def _prompts(self, batch: dict[str, list[Any]]) -> list[str]:
        if self.prompt_template is None:
            return [str(text) for text in batch[self.prompt]]
        filled = ({name: "" if value is None else value for name, value in row.items()} for row in _rows(batch))
        return [self.prompt_template.format(**row) for row in filled]


def _rows(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _fields(template: str) -> list[str]:
    """The columns that a template names."""
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise DataError(f"Completions.prompt_template is {template!r}; {error}. A literal brace is doubled.") from error
    if not all(fields):
        raise DataError(f"Completions.prompt_template is {template!r}; each {{}} must name a column.")
    if not fields:
        raise DataError(f"Completions.prompt_template is {template!r}; it names no column in {{}}.")
    return fields
