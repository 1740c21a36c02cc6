"""Conversations with images or sounds: a model that reads them learns the assistant's turns."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from torch.utils.data import DistributedSampler

from lora_lightning.data.chat import TOO_LONG, Chat, prompted
from lora_lightning.data.chats.rendering import Example, Renderer, Tools
from lora_lightning.data.chats.turns import Turn
from lora_lightning.data.identity import rows_digest
from lora_lightning.data.media.encoding import CollateMedia, Encode, writes_parts
from lora_lightning.data.media.parts import COLUMNS, Media, media_in, named, parts_of, with_media
from lora_lightning.data.media.processors import load_processor, marks, sampling_rate, templated_tokenizer
from lora_lightning.data.media.reading import media_identity, media_name, read_media
from lora_lightning.data.sources.faults import RowError
from lora_lightning.data.sources.stored import PLACE
from lora_lightning.data.table import Collation
from lora_lightning.data.tokens.causal import NO_LOSS
from lora_lightning.errors import DataError, SettingsError

PREPARED = "prepared"
"""Column of an example that tells which images and sounds of its row it holds, as JSON."""
FIXED = {
    "packing": "images of several examples cannot share a row. data.group_by_length keeps the padding small.",
    "streaming": "tokens of images are counted first. data.limit takes the first rows; images in files are read "
    "again for each batch, and need no memory.",
    "tokenizer": "the processor has its own. data.processor names another one.",
    "new_tokens": "the processor's tokenizer is taken as it is.",
    "cache": "what is prepared depends on the files of images, too, so that it is made anew for each run.",
}
"""Settings of other text data that this one has not, and why."""


class MediaChat(Chat):
    """Conversations with images or sounds, for a model with a processor of its own (Qwen2.5-VL, SmolVLM, Gemma 3, ...).

    Turns are those of Chat. An image stands where a text has <image>, a sound where it has <audio>: each takes the next
    one of the columns image and images (audio, audios). Or it stands as a part of content with its value,
    {"type": "image", "image": "cat.png"}. A value is a path relative to the data file, a data URL, bytes, or an image
    or a sound of `datasets`. Sounds must have the processor's sampling rate.

    Assistant turns are learned, tokens that stand for an image or a sound never. Images are read while the data are
    prepared, to know their tokens, and again for each batch.

    A conversation longer than max_length loses its first exchanges, with their images. One that is still longer is
    left out and counted, since an image cannot be cut.

    Batches: whatever the processor makes, and labels. To predict or measure texts: prompts, the same without answers.

    Args:
        messages: Column of the turns; null takes "messages" or "conversations".
        tools: Column of tool descriptions (a list, or its JSON text); null takes "tools" where there is one.
        chat_template: A file, or a Jinja text, that writes content in parts; null takes the processor's own.
        turns: Learn all assistant turns, or only the last one.
        chat_template_kwargs: Further variables of the template; a column of that name gives those of a row.
        processor: Path, hub id or pkg:IMPORT_NAME/FOLDER of the processor. The command line fills in model.pretrained
            for null.
        max_length: Most tokens of an example, with those of its images.
        common: Settings that all text data share.
    """

    task_kinds = ("image-text-to-text", "audio-text-to-text")
    fixed = FIXED
    media_columns = COLUMNS
    beside = {"text": "", "prompt_end": 0, PREPARED: "[]"}  # noqa: RUF012 - a fact of the class

    def __init__(
        self,
        messages: str | None = None,
        tools: str | None = None,
        chat_template: str | None = None,
        turns: Literal["all", "last"] = "all",
        chat_template_kwargs: dict[str, Any] | None = None,
        processor: str | None = None,
        max_length: int = 2048,
        **common: Any,
    ) -> None:
        for name in common:
            if name in self.fixed:
                raise SettingsError(f"{type(self).__name__} has no {name}: {self.fixed[name]}")
        super().__init__(
            messages=messages,
            tools=tools,
            chat_template=chat_template,
            turns=turns,
            chat_template_kwargs=chat_template_kwargs,
            max_length=max_length,
            tokenizer=None,
            new_tokens=(),
            packing=False,
            streaming=False,
            cache=False,
            **common,
        )
        self.processor = processor

    @cached_property
    def processor_object(self) -> Any:
        """The processor that `processor` names, with the chat template."""
        return load_processor(self.processor, "data.processor")

    def read_tokenizer(self) -> Any:
        """The processor's, which writes the processor's chat template."""
        return templated_tokenizer(self.processor_object)

    @cached_property
    def renderer(self) -> Renderer:
        """The template over the processor's expansion of images, which has the template from here on."""
        found = replace(super().renderer, encode=Encode(self.processor_object, self.read_one))
        if not self.tokenizer_object.is_fast:
            raise DataError(
                f"data.processor: {type(self.tokenizer_object).__name__} tells no characters of its tokens."
            )
        if not writes_parts(found):
            raise DataError(
                f"{self._name}.chat_template: the template {found.name} does not write content in parts, "
                '[{"type": "text", "text": ...}]. Leave it null for the processor\'s own.'
            )
        self.processor_object.chat_template = self.tokenizer_object.chat_template
        return found

    def read_one(self, media: Media) -> Any:
        """An image or a sound as the processor takes it; raises `RowError`."""
        return read_media(media, sampling_rate(self.processor_object))

    def content(self, given: Any, where: str) -> Any:
        """Content in parts; raises `RowError`."""
        return parts_of(given, where)

    def completed(self, turns: list[Turn], row: Mapping[str, Any], where: str) -> list[Turn]:
        """The turns with their images and sounds, in parts."""
        parts = [
            {**turn, "content": parts_of(turn["content"], where) or []} if isinstance(turn["content"], str) else turn
            for turn in turns
        ]
        folder = None if row.get(PLACE) is None else self.sources.faults.places.folder(int(row[PLACE]))
        return with_media(parts, row, folder, where)

    def within(self, example: Example, turns: list[Turn], whole: int) -> dict[str, Any]:
        """The example with its text and the numbers of its images, if it fits."""
        fits = len(example.ids) <= self.max_length
        found = fits and any(label != NO_LOSS for label in example.labels[1:])
        made = self._example(example.ids, example.labels, example, turns)
        return {**made, "truncated": len(example.ids) < whole, "lost": "" if found else TOO_LONG}

    def to_predict(self, renderer: Renderer, turns: list[Turn], tools: Tools, where: str) -> dict[str, Any]:
        """The prompt of the last answer with its images, and that answer where it fits."""
        asked, prompt, answered = prompted(renderer, self.max_length, turns, tools, where)
        if len(prompt) > self.max_length:
            raise RowError(
                "with a prompt that is longer than max_length",
                f"{where}: the prompt has {len(prompt)} tokens, more than data.max_length, which is {self.max_length}",
            )
        shorter = len(asked) + bool(answered) < len(turns)
        if answered is not None and len(answered.ids) <= self.max_length:
            made = self._example(answered.ids, answered.labels, answered, [*asked, turns[-1]])
            return {**made, "truncated": shorter, "lost": ""}
        text = renderer.text(asked, tools, where, prompt=True)
        example = Example(prompt, [NO_LOSS] * len(prompt), [], renderer.encoded(text, asked))
        made = self._example(example.ids, example.labels, example, asked)
        return {**made, "truncated": shorter or answered is not None, "lost": ""}

    def _example(self, ids: list[int], labels: list[int], example: Example, turns: Sequence[Turn]) -> dict[str, Any]:
        first = next((number for number, label in enumerate(labels) if label != NO_LOSS), None)
        text = example.encoded.text
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": labels,
            "text": text,
            "prompt_end": len(text) if first is None else example.encoded.offsets[first][0],
            PREPARED: json.dumps([one.number for one in media_in(turns)]),
        }

    def media_of(self, split: str, example: Mapping[str, Any]) -> list[Media]:
        """The images and sounds of an example, not read yet."""
        numbers = json.loads(example[PREPARED])
        if not numbers:
            return []
        row = self._placed(split)[example["index"]]
        every = list(media_in(self.turns_of(row, self._column(list(row), split))))
        return [every[number] for number in numbers]

    def collation(self, split: str, columns: Sequence[str], sampler: DistributedSampler[Any]) -> Collation:  # noqa: ARG002 - the same in any order
        """The processor's own, with prompts where texts are generated."""
        _ = self.renderer
        module = getattr(self.trainer, "lightning_module", None)
        measured = split != "train" and getattr(getattr(module, "task", None), "generate_batches", 0) > 0
        return CollateMedia(
            self.processor_object,
            lambda example: self.media_of(split, example),
            self.read_one,
            columns,
            prompts=measured or split == "predict",
            where=lambda example: f"{self._name}.{split}, {self._words(split, example)}",
        )

    def _words(self, split: str, example: Mapping[str, Any]) -> str:
        return self.places(self._placed(split).select([example["index"]]))[0]

    def training_identity(self) -> dict[str, Any]:
        """Also what files of images and sounds hold, and the token ids that the processor makes."""
        examples = self.examples("train")
        digest = hashlib.sha256()
        for example in examples:
            for media in self.media_of("train", example):
                digest.update(media_identity(media).encode())
        prepared = rows_digest(examples.select_columns(["input_ids", "labels"]))
        held = f"digest {digest.hexdigest()[:16]}"
        return {**super().training_identity(), "images and sounds": held, "prepared examples": prepared}

    def readable(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its turns as a list, and images and sounds by their names."""
        return {name: named(value) for name, value in super().readable(row).items()}

    def describe(self, example: Mapping[str, Any]) -> str:
        """The text, with the tokens of each image counted, and its images with their sizes."""
        text = super().describe(example)
        for token in self._repeated():
            runs = set(re.findall(f"(?:{re.escape(token)}){{2,}}", text))
            for run in sorted(runs, key=len, reverse=True):
                text = text.replace(run, _times(run, token))
        told = [self._line(media) for media in self.media_of("train", example)]
        return "\n".join([text, *told])

    def _repeated(self) -> set[str]:
        """Tokens that a processor may write many of for one image."""
        tokenizer = self.tokenizer_object
        ids = {getattr(self.processor_object, f"{kind}_token_id", None) for kind in marks(self.processor_object)}
        known = set(marks(self.processor_object).values()) | {getattr(tokenizer, "image_token", None)}
        return {token for token in known if token} | {
            tokenizer.decode([number]) for number in ids if number is not None
        }

    def _line(self, media: Media) -> str:
        value = self.read_one(media)
        size = f"{value.width} x {value.height}" if media.kind == "image" else f"{len(value)} samples"
        return f"{media.kind} {media_name(media)}: {size}"


def _times(found: str, token: str) -> str:
    return f"{token} x {len(found) // len(token)}"
