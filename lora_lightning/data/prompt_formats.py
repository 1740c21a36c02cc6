"""Prompt formats of instruction tables, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from lora_lightning.errors import DataError, SettingsError, did_you_mean


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes a prompt."""

    template: str
    """Prompt with columns in braces."""
    completion: str
    """Column of the completion."""
    optional: str = ""
    """Column that may be empty or absent; `bare` is the prompt then."""
    bare: str = ""

    def fill(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row; a missing value counts as empty."""
        values = {name: "" if value is None else value for name, value in row.items()}
        bare = self.optional and not str(values.get(self.optional, "")).strip()
        return (self.bare if bare else self.template).format(**values)

    def of_text(self, text: str, where: str) -> str:
        """The prompt in which a text is the value of the one column that must exist; an optional one is empty.

        Args:
            text: What is asked.
            where: What to call it in messages.

        Raises:
            DataError: It takes several columns.
        """
        first, *others = self.required
        if others:
            names = " and ".join(self.required)
            raise DataError(
                f"{where} is a text, and the prompts of this run are built from {names}; give rows of these."
            )
        return self.fill({first: text, **({self.optional: ""} if self.optional else {})})

    @property
    def required(self) -> list[str]:
        """Columns that must exist."""
        return list(dict.fromkeys(name for name in fields(self.template) if name != self.optional))


_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
_BARE = f"{_TASK}. {_REQUEST}### Response:\n"
_CONTEXT = f"{_TASK}, paired with an input that provides further context. {_REQUEST}"

FORMATS = {
    "alpaca": PromptFormat(
        template=_CONTEXT + "### Input:\n{input}\n\n### Response:\n", completion="output", optional="input", bare=_BARE
    ),
    "dolly": PromptFormat(
        template=_CONTEXT + "### Input:\n{context}\n\n### Response:\n",
        completion="response",
        optional="context",
        bare=_BARE,
    ),
    "instruction": PromptFormat(
        template="{instruction}\n{input}\n", completion="output", optional="input", bare="{instruction}\n"
    ),
    "question": PromptFormat(template="Question: {question}\nAnswer:\n", completion="answer"),
}
"""alpaca: columns instruction, input, output. dolly: the same prompt from instruction, context, response. instruction:
the text of instruction and input, nothing else. question: columns question and answer."""


def find_format(name: str, setting: str) -> PromptFormat:
    """The format called `name`.

    Raises:
        SettingsError: there is none, with those that there are.
    """
    if name not in FORMATS:
        raise SettingsError(f'{setting} is "{name}".{did_you_mean(name, FORMATS)} Formats: {", ".join(FORMATS)}.')
    return FORMATS[name]


def layout_of(name: str | None, template: str | None, completion: str = "") -> PromptFormat | None:
    """The layout that the settings of Completions mean; None where prompts stand in a column as they are.

    Args:
        name: Of a format.
        template: With columns in braces.
        completion: Column of the completion beside a template.
    """
    if name:
        return find_format(name, "Completions.format")
    return PromptFormat(template, completion) if template else None


def fields(template: str) -> list[str]:
    """The columns that a template of Completions names.

    Raises:
        DataError: it is no template, or names none.
    """
    try:
        names = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise DataError(f"Completions.prompt_template is {template!r}; {error}. A literal brace is doubled.") from error
    if odd := next((name for name in names if any(mark in name for mark in "\"'\n{") or name != name.strip()), None):
        raise DataError(
            f"Completions.prompt_template is {template!r}; {{{odd} ...}} names no column. A literal brace is doubled: "
            "{{ and }}."
        )
    if not all(names):
        raise DataError(
            f"Completions.prompt_template is {template!r}; each {{}} must name a column. A literal brace is doubled."
        )
    if not names:
        raise DataError(f"Completions.prompt_template is {template!r}; it names no column in {{}}.")
    return names
