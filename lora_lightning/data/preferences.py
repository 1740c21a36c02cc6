"""Prompts with completions of which one is preferred, or each is said to be good or not."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
from torch import Tensor
from torch.utils.data import DistributedSampler

from lora_lightning.data.batches.collate import MODEL_INPUTS
from lora_lightning.data.batches.grouping import LengthGroupedSampler
from lora_lightning.data.batches.loader import Batch
from lora_lightning.data.chats import options
from lora_lightning.data.chats.compared import Texts, Turns, compared, desirable
from lora_lightning.data.chats.fields import MEDIA, RENDERED, SYSTEM, Rendering, refuse_columns, with_system
from lora_lightning.data.chats.rendering import Example, Renderer
from lora_lightning.data.chats.templates import choose_template
from lora_lightning.data.chats.turns import LEARNED, json_value, learned, plain, tool_list, without_first_exchange
from lora_lightning.data.pairs import SIDES, CollateSides
from lora_lightning.data.sources.faults import RowError
from lora_lightning.data.sources.stored import PLACE
from lora_lightning.data.sources.unread import kind_of
from lora_lightning.data.table import Collation
from lora_lightning.data.text import TextData
from lora_lightning.data.tokens.causal import NO_LOSS, end_ids, plain_ids, start_ids
from lora_lightning.data.tokens.encoding import tokenised
from lora_lightning.data.tokens.marks import mark
from lora_lightning.errors import DataError, check

log = logging.getLogger(__name__)

EACH = (*SIDES, "labels")
"""Columns with one list for each completion of a row."""
KEPT = ("input_ids", "attention_mask", "labels", "index", "truncated", "example")
LOST = "that max_length leaves nothing to learn in"
NEAR = 16
"""Rows before one among which another prompt is looked for."""


@dataclass(frozen=True)
class Text:
    """Token ids of a prompt, of a completion, and the completion's labels."""

    prompt: list[int]
    completion: list[int]
    labels: list[int]

    def cut(self, length: int) -> tuple[list[int], list[int]]:
        """Token ids and labels, cut on the right."""
        ids, labels = [*self.prompt, *self.completion], [NO_LOSS] * len(self.prompt) + self.labels
        return ids[:length], labels[:length]


class Preferences(TextData):
    """Pairs of completions of which one is preferred, or completions that are each good or not.

    Prompts and completions are texts, or lists of turns as in Chat. Texts are tokenised apart and end with an
    end-of-text token, as in Completions. Turns are rendered by the chat template; of the completion's turns the
    assistant's count. Without a prompt, what the two completions begin with alike is the prompt.

    Both completions of a pair see the same prompt: where the longer one does not fit into max_length behind it, the
    prompt loses its first tokens (a conversation its first exchanges), and only then completions their last.

    Batches: input_ids, attention_mask and labels (-100 but on completions) of all chosen texts, then of all rejected
    ones; sides (2); window_tokens (pairs of an optimizer step); reference (float32, (pairs, 2)) where it was computed.
    With `label` or `unpair`: of each completion behind its prompt, then behind the prompt of another row, which tells
    how far the model has moved; and desirable (1 or 0).

    Args:
        prompt: Column of the prompt; null takes "prompt" where there is one.
        chosen: Column of the completion that is preferred.
        rejected: Column of the other one.
        completion: Column of the completion where each row has one with a label.
        label: Column that says whether the completion is good (true or false, 1 or 0); null where rows are pairs.
        unpair: Make two rows of each pair, a good and a bad completion, for losses that take labels.
        tools: Column of tool descriptions for the chat template; null takes "tools" where there is one.
        chat_template: A name as of Chat, a file, or a Jinja text; null takes the tokenizer's own.
        chat_template_kwargs: Further variables of the template; a column of that name gives those of a row.
        common: Settings that all text data share.
    """

    def __init__(
        self,
        prompt: str | None = None,
        chosen: str = "chosen",
        rejected: str = "rejected",
        completion: str = "completion",
        label: str | None = None,
        unpair: bool = False,
        tools: str | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.prompt, self.chosen, self.rejected = prompt, chosen, rejected
        self.completion, self.label, self.unpair = completion, label, unpair
        self.tools, self.chat_template = tools, chat_template
        self.chat_template_kwargs = chat_template_kwargs
        check(not (unpair and label), self, "unpair", "rows with a label are no pairs; set one of them to null.")
        self.judged = unpair or label is not None
        """Whether examples are completions with a label."""
        self.task_kinds = ("preference",) if self.judged else ("preference", "reward")
        self.measures_rows = not self.judged  # the estimate of how far a model has moved is of a batch
        self.count = count_rows
        self._reference: dict[str, Tensor] = {}
        self._named: set[str] = set()

    # -- rows ----------------------------------------------------------------------------------------------------------

    def read(self, split: str) -> datasets.Dataset | None:
        """Rows with the columns of their form; those to predict may have single completions without a label."""
        there = self.sources.column_names(split)
        if there is None:
            return None
        completions, prompt = self._completions(there, split), self._prompt(there)
        required = {f"Preferences.{setting}": column for setting, column in completions.items()}
        if self.prompt is not None or (prompt is None and len(completions) == 1):
            required["Preferences.prompt"] = prompt or "prompt"
        if self.tools is not None:
            required["Preferences.tools"] = self.tools
        labelled = self.label is not None and split != "predict"
        if labelled:
            required["Preferences.label"] = str(self.label)
        self._tell_unused([*required.values(), *([prompt] if prompt else [])], there)
        texts = [*completions.values(), *([prompt] if prompt else [])]

        def judge(row: Mapping[str, Any]) -> None:
            self._parsed(row, list(completions.values()), prompt)
            if labelled:
                self._desirable(row)

        return self.sources.read(
            split,
            required,
            texts=texts,
            hold_out_by=[prompt] if prompt else list(completions.values()),
            judge=judge,
            judged=list(dict.fromkeys([*texts, *([str(self.label)] if labelled else []), *_carried(there)])),
        )

    def _completions(self, there: Sequence[str], split: str) -> dict[str, str]:
        """Columns of completions by the setting that names them."""
        pair = {"chosen": self.chosen, "rejected": self.rejected}
        single = split == "predict" and self.completion in there and not set(pair.values()) <= set(there)
        return {"completion": self.completion} if self.label is not None or single else pair

    def _prompt(self, there: Sequence[str]) -> str | None:
        return self.prompt or ("prompt" if "prompt" in there else None)

    def _tell_unused(self, used: Sequence[str], there: Sequence[str]) -> None:
        known = {*used, "tools", options.NAME, *SYSTEM, *MEDIA, *RENDERED}
        other = [name for name in there if name not in known | self._named and not kind_of(name)]
        self._named |= set(other)
        if other:
            log.warning("Preferences: columns that it does not know are not used: %s", ", ".join(other))

    def _parsed(self, row: Mapping[str, Any], columns: Sequence[str], prompt: str | None) -> Texts | Turns:
        where = f"Preferences.{' and '.join(columns)}"
        refuse_columns(row, where)
        found = compared(row[prompt] if prompt else None, [row[column] for column in columns], where)
        if isinstance(found, Turns):
            return Turns(with_system(found.prompt, row, where), found.completions)
        if system := next((name for name in SYSTEM if row.get(name)), None):
            raise RowError(
                f'with a value in "{system}"',
                f'{where} has a value in the column "{system}", which texts have no place for; write it into the '
                "prompt, give prompts and completions as turns, or remove the column",
            )
        return found

    def _desirable(self, row: Mapping[str, Any]) -> int:
        return desirable(row[str(self.label)], f'Preferences.label, column "{self.label}"')

    def readable(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its turns as lists."""
        columns = (self._prompt(list(row)) or "", self.chosen, self.rejected, self.completion)
        turns = [name for name in columns if str(row.get(name)).lstrip().startswith("[{")]
        return {**row, **{name: json_value(row[name], name) for name in turns}}

    # -- examples ------------------------------------------------------------------------------------------------------

    def encode(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:
        """Token ids and labels of the completions of each row that has something to learn; `dropped` counts others."""
        columns, prompt = self._completions(rows.column_names, split), self._prompt(rows.column_names)
        names, lost = list(columns.values()), Counter[str]()
        labelled = self.label is not None and split != "predict"

        def encode(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
            made: list[dict[str, Any]] = []
            for place, number in enumerate(numbers):
                row = {name: values[place] for name, values in batch.items()}
                try:
                    texts, cut = self._tokens(self._parsed(row, names, prompt), row)
                except RowError as fault:
                    self.sources.fault(split, row.get(PLACE), fault)
                    continue
                example = self._example(texts, cut, number)
                if not all(any(label != NO_LOSS for label in labels[1:]) for labels in example["labels"]):
                    lost[LOST] += 1
                elif self.unpair and split != "predict":
                    made += [_side(example, n) | {"desirable": 1 - n} for n in range(2)]
                else:
                    made.append(example | ({"desirable": self._desirable(row)} if labelled else {}))
            kept = (*KEPT[:-1], *(("desirable",) if self.judged and split != "predict" else ()))
            return {name: [example[name] for example in made] for name in kept}

        encoded = tokenised(rows, encode)
        self.dropped[split] = lost.total()
        if "rendering" in self.__dict__:
            self.rendering.tell(f"Preferences: {split}")
        if not len(encoded):
            faults = self.sources.told(split)
            reasons = "; ".join(
                [*(f"{count} {reason}" for reason, count in lost.items()), *([faults] if faults else [])]
            )
            raise DataError(f"Preferences.{split}: nothing is left of {len(rows)} rows: {reasons}.")
        if lost:
            log.warning("Preferences: left %d of %d %s rows out: %s", lost.total(), len(rows), split, LOST)
        if self.judged and split != "predict":
            encoded = self._with_mismatched(encoded)
        return encoded.add_column("example", list(range(len(encoded))))

    def _tokens(self, row: Texts | Turns, columns: Mapping[str, Any]) -> tuple[list[Text], bool]:
        """Prompt and completions, with as much of the prompt as max_length has room for; and whether it was cut."""
        return self._of_turns(row, columns) if isinstance(row, Turns) else self._of_texts(row)

    def _of_texts(self, row: Texts) -> tuple[list[Text], bool]:
        tokenizer = self.tokenizer_object
        prompt, *completions = plain_ids(tokenizer, [row.prompt, *row.completions])
        start, end = start_ids(tokenizer), end_ids(tokenizer)
        whole = [[*ids, *end] for ids in completions]
        room = max(self.max_length - len(start) - max(map(len, whole)), 0 if start else 1)
        kept = [*start, *prompt[max(0, len(prompt) - room) :]]
        return [Text(kept, ids, ids) for ids in whole], len(prompt) > room

    def _of_turns(self, row: Turns, columns: Mapping[str, Any]) -> tuple[list[Text], bool]:
        where = "Preferences"
        tools = tool_list(columns.get(self.tools or "tools"), f"{where}: tools")
        prompt, cut = [{**turn, LEARNED: False} for turn in row.prompt], False
        fields = self.rendering.of(columns, where)
        for side in row.completions:
            fields.check(plain([*prompt, *side]), tools, where)
        while True:
            sides = [[*prompt, *side] for side in row.completions]
            made = [
                _one(fields.renderer.examples(plain(turns), tools, where, learned(turns)), where) for turns in sides
            ]
            shorter = without_first_exchange(prompt)
            if max(len(example.ids) for example in made) <= self.max_length or shorter is None:
                return [_split(example.ids, example.labels) for example in made], cut
            prompt, cut = shorter, True

    def _example(self, texts: Sequence[Text], cut: bool, number: int) -> dict[str, Any]:
        parts = [text.cut(self.max_length) for text in texts]
        ids = [part[0] for part in parts]
        whole = [len(text.prompt) + len(text.completion) for text in texts]
        return {
            "input_ids": ids,
            "attention_mask": [[1] * len(side) for side in ids],
            "labels": [part[1] for part in parts],
            "index": number,
            "truncated": cut or any(n > self.max_length for n in whole),
        }

    def _with_mismatched(self, examples: datasets.Dataset) -> datasets.Dataset:
        """Each row's completion behind its prompt, and behind that of the next row before it that has another one.

        The second tells how far a model has moved from the reference: KTO's estimate, which its authors take of other
        pairs of a batch. Here it is the same pair in every epoch, so that the reference's value is computed once.
        """
        texts = [
            _split(ids[0], labels[0]) for ids, labels in zip(examples["input_ids"], examples["labels"], strict=True)
        ]
        made: dict[str, list[Any]] = {name: [] for name in EACH if name in examples.column_names}
        for number, text in enumerate(texts):
            before = (texts[number - back] for back in range(1, min(NEAR, len(texts))))
            other = next((one for one in before if one.prompt != text.prompt), texts[number - 1])
            room = max(self.max_length - len(other.completion), 1)
            mixed = Text(text.prompt[max(0, len(text.prompt) - room) :], other.completion, other.labels)
            for name, values in zip(
                made, _columns([text.cut(self.max_length), mixed.cut(self.max_length)]), strict=True
            ):
                made[name].append(values)
        rest = examples.select_columns([name for name in examples.column_names if name not in made])
        both = datasets.Dataset.from_dict(made)
        return datasets.concatenate_datasets([both, rest], axis=1)

    @cached_property
    def rendering(self) -> Rendering:
        """The template with the variables of each row."""
        return Rendering(self.renderer)

    @cached_property
    def renderer(self) -> Renderer:
        """The tokenizer with the template, which is its own from here on, so that whoever saves it saves that too."""
        template, name = choose_template(self.tokenizer_object, self.chat_template, "Preferences")
        if template is not None:
            self.tokenizer_object.chat_template = template
        given = self.chat_template_kwargs or {}
        options.check_options(self.tokenizer_object.get_chat_template(), given, f"Preferences.{options.NAME}")
        return Renderer(self.tokenizer_object, name, options=given)

    def settle(self, split: str) -> None:  # noqa: ARG002 - the same for every split
        """A template that is given becomes the tokenizer's own."""
        if self.chat_template is not None:
            _ = self.renderer

    # -- batches -------------------------------------------------------------------------------------------------------

    def collation(self, split: str, columns: Sequence[str], sampler: Any) -> Collation:  # noqa: ARG002 - any order
        """Texts side after side, with the reference's values from when they are kept."""
        sides = CollateSides(self.padding((*columns, "desirable")), EACH)
        return CollateWithReference(sides, self._reference, split)

    def sampler(self, examples: datasets.Dataset, batch_size: int, **options: Any) -> DistributedSampler[Any]:
        """Any order, or one that groups texts of similar length."""
        if not self.group_by_length:
            return DistributedSampler(examples, **options)
        return LengthGroupedSampler(longest(examples), batch_size, **options)

    def batches(self, split: str, examples: Sequence[int], batch_size: int) -> Iterator[Batch]:
        """Batches of certain examples of a split, in that order."""
        rows, collate = self.examples(split), self.collation(split, MODEL_INPUTS, None)
        for first in range(0, len(examples), batch_size):
            yield collate([rows[number] for number in examples[first : first + batch_size]])

    def keep_reference(self, split: str, values: Tensor) -> None:
        """From here on each batch carries the reference's values.

        Args:
            split: "train", "validation", "test" or "predict".
            values: (examples, completions of each), float32, on the CPU.
        """
        self._reference[split] = values

    def has_reference(self, split: str) -> bool:
        """Whether batches of a split carry the reference's values."""
        return split in self._reference

    def describe(self, example: Mapping[str, Any]) -> str:
        """Each text of the row on a line, its prompt in double brackets."""
        pair = not self.judged
        names = ("chosen", "rejected") if pair else ("good" if example.get("desirable") else "bad", "mismatched")
        texts = zip(names, example["input_ids"], example["labels"], strict=False)
        marked = [f"{name:<10} {mark(ids, labels, self.tokenizer_object)}" for name, ids, labels in texts]
        return "\n".join([f"{' and '.join(str(len(ids)) for ids in example['input_ids'])} tokens", *marked])


@dataclass(frozen=True)
class CollateWithReference:
    """Collation that adds the reference's values of its rows, once they are there."""

    inner: CollateSides
    tables: Mapping[str, Tensor]
    split: str

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """One tensor per column."""
        batch = self.inner(rows)
        values = self.tables.get(self.split)
        return batch if values is None else {**batch, "reference": values[[row["example"] for row in rows]]}


def count_rows(batch: Batch) -> int:
    """Rows of a batch that holds several texts of each."""
    return len(batch["input_ids"]) // int(batch["sides"])


def longest(examples: datasets.Dataset) -> list[int]:
    """Tokens of the longest text of each example."""
    return [max(map(len, sides)) for sides in examples.with_format(None)["input_ids"]]


def _carried(there: Sequence[str]) -> list[str]:
    """Columns beside the texts that a row is judged by."""
    return [name for name in (*SYSTEM, *MEDIA, *RENDERED, options.NAME) if name in there]


def _columns(parts: Sequence[tuple[list[int], list[int]]]) -> list[list[list[int]]]:
    """Token ids, masks and labels of several texts."""
    return [[ids for ids, _ in parts], [[1] * len(ids) for ids, _ in parts], [labels for _, labels in parts]]


def _one(examples: Sequence[Example], where: str) -> Example:
    """The only example of a conversation."""
    if len(examples) > 1:
        raise RowError(
            "with several answers that the template rewrites",
            f"{where} has a completion of several answers, of which the chat template writes one otherwise once turns "
            "follow it. Give the last answer as the completion, and the turns before it as the prompt",
        )
    return examples[0]


def _split(ids: Sequence[int], labels: Sequence[int]) -> Text:
    """A text at its first label; what stands behind the last one is left out."""
    marked = [n for n, label in enumerate(labels) if label != NO_LOSS] or [len(ids)]
    first, end = marked[0], marked[-1] + 1
    return Text(list(ids[:first]), list(ids[first:end]), list(labels[first:end]))


def _side(example: Mapping[str, Any], number: int) -> dict[str, Any]:
    """An example with one of its texts."""
    return {name: [value[number]] if name in EACH else value for name, value in example.items()}
