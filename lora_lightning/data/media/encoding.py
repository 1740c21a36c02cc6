"""Rendered conversations with images and sounds to token ids and batches, by the model's own processor.

The processor puts as many tokens in the place of an image as its size asks for. Which they are it tells itself, as
spans of characters; all others keep their place in the text that the template has written, so that what is learned is
found there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lightning.data.chats.rendering import PROBE, Encoded, Renderer, Span
from lora_lightning.data.chats.turns import Turn
from lora_lightning.data.media.parts import Media, media_in
from lora_lightning.data.media.processors import marks, sampling_rate
from lora_lightning.data.sources.faults import RowError
from lora_lightning.errors import DataError
from lora_lightning.models.tasks.image_text_to_text import PROMPTS

Read = Callable[[Media], Any]
_PLAIN: dict[str, Any] = {"add_special_tokens": False}
"""Of texts: the template has written all special tokens."""


@dataclass(frozen=True)
class Encode:
    """Token ids of a rendered text with its images and sounds.

    Args:
        processor: The model's own.
        read: What opens an image or a sound.
    """

    processor: Any
    read: Read

    def __call__(self, text: str, turns: Sequence[Turn]) -> Encoded:
        """The ids; offsets are those of the text as it was rendered.

        Raises:
            RowError: an image that cannot be read, or one that the template leaves out.
        """
        media = list(media_in(turns))
        self._check_marks(text, media)
        made = self.processor(
            text=[text],
            **_by_kind([media], self.read, sampling_rate(self.processor)),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            **_PLAIN,
        )
        if media and "text_replacement_offsets" not in made:
            raise DataError(
                f"{type(self.processor).__name__} does not tell which tokens stand for images, and is refused."
            )
        replaced = (made.get("text_replacement_offsets") or [[]])[0]
        ids = list(map(int, made["input_ids"][0]))
        spans = [(int(first), int(end)) for first, end in made["offset_mapping"][0]]
        offsets, fixed = _as_rendered(spans, replaced)
        return Encoded(ids, offsets, fixed, text)

    def _check_marks(self, text: str, media: Sequence[Media]) -> None:
        known = marks(self.processor)
        for kind in {*known, *(one.kind for one in media)}:
            count = sum(one.kind == kind for one in media)
            if kind not in known:
                raise RowError(
                    f"with {kind} content that the model does not read",
                    f"it has {count} of kind {kind}, which {type(self.processor).__name__} does not read",
                )
            if text.count(known[kind]) != count:
                raise RowError(
                    f"with {known[kind]} in its texts, or a template that leaves {kind} parts out",
                    f'the rendered text has "{known[kind]}" {text.count(known[kind])} times, and there are {count} of '
                    f"kind {kind}. Take a chat_template that writes them, and texts without that token",
                )


def _as_rendered(spans: Sequence[Span], replaced: Sequence[Mapping[str, Any]]) -> tuple[list[Span], frozenset[int]]:
    """Spans of the expanded text as spans of the rendered one, and the tokens that stand for an image or a sound."""
    inner: list[tuple[int, int, int, int]] = [
        (one["new_span"][0], one["new_span"][1], one["span"][0], one["span"][1]) for one in replaced
    ]
    starts = [first for first, *_ in inner]

    def back(place: int, end: bool) -> int:
        at = bisect_right(starts, place - end) - 1
        if at < 0:
            return place
        _, stop, first, last = inner[at]
        inside = place < stop or (end and place <= stop)
        return (last if end else first) if inside else place - stop + last

    fixed = [
        number
        for number, (first, end) in enumerate(spans)
        if any(first < stop and end > start for start, stop, *_ in inner)
    ]
    return [(back(first, False), back(end, True)) for first, end in spans], frozenset(fixed)


def _by_kind(media: Sequence[Sequence[Media]], read: Read, rate: int) -> dict[str, Any]:
    """Arguments of a processor: images by row, sounds one after another."""
    found: dict[str, Any] = {}
    images = [[read(one) for one in row if one.kind == "image"] for row in media]
    sounds = [read(one) for row in media for one in row if one.kind == "audio"]
    if any(images):
        found["images"] = images
    if sounds:
        found |= {"audio": sounds, "sampling_rate": rate}
    return found


def processed(processor: Any, texts: Sequence[str], opened: Sequence[Sequence[Media]], side: str) -> dict[str, Any]:
    """What a processor makes of rendered texts with their images and sounds.

    Args:
        processor: The model's own.
        texts: Rendered texts.
        opened: Images and sounds of each, whose values are what the processor takes.
        side: Where shorter rows are padded: "left" or "right".

    Returns:
        Tensors by the names that the processor gives them, token ids (b, l) among them; lists in place of a tensor
        where it makes none of rows that differ.
    """
    media = _by_kind(opened, lambda one: one.value, sampling_rate(processor))
    return dict(processor(text=list(texts), **media, padding=True, padding_side=side, return_tensors="pt", **_PLAIN))


def writes_parts(renderer: Renderer) -> bool:
    """Whether a template writes content in parts, [{"type": "text", "text": ...}], as texts."""
    turns = [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]
    try:
        text = renderer.text(turns, None, "a text", prompt=True)
    except RowError:
        return False
    return PROBE in text and f"'{PROBE}'" not in text


@dataclass(frozen=True)
class CollateMedia:
    """Examples to what the processor makes of their texts, images and sounds, padded on the right, with labels.

    Args:
        processor: The model's own.
        media: The images and sounds of an example, opened by `read`.
        read: What opens one; raises `RowError`.
        columns: Of "labels" and "index", those that are wanted.
        prompts: Whether a batch carries what is answered, under `PROMPTS`.
        where: What to call an example in messages.
    """

    processor: Any
    media: Callable[[Mapping[str, Any]], list[Media]]
    read: Read
    columns: Sequence[str]
    prompts: bool
    where: Callable[[Mapping[str, Any]], str]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Tensors by the names that the processor gives them, labels (b, l) as int64, and prompts.

        Raises:
            DataError: an image cannot be read any more, or is another than when the data were prepared.
        """
        opened = self._opened(rows)
        batch = self._made([row["text"] for row in rows], opened, "right")
        length = batch["input_ids"].shape[1]
        for row, ids in zip(rows, batch["input_ids"].tolist(), strict=True):
            if ids[: len(row["input_ids"])] != row["input_ids"]:
                raise DataError(
                    f"{self.where(row)}: its tokens are others than when the data were prepared: a file of it has "
                    "changed. Start again."
                )
        batch["labels"] = torch.tensor([[*row["labels"], *[-100] * (length - len(row["labels"]))] for row in rows])
        if "index" in self.columns:
            batch["index"] = torch.tensor([row["index"] for row in rows])
        if self.prompts:
            texts = [row["text"][: row["prompt_end"]] for row in rows]
            tokens = marks(self.processor)
            before = [
                [
                    one
                    for kind, token in tokens.items()
                    for one in [one for one in media if one.kind == kind][: text.count(token)]
                ]
                for text, media in zip(texts, opened, strict=True)
            ]
            batch[PROMPTS] = self._made(texts, before, "left")
        return batch

    def _opened(self, rows: Sequence[Mapping[str, Any]]) -> list[list[Media]]:
        """Images and sounds of each row, read."""
        found = []
        for row in rows:
            try:
                found.append([Media(one.kind, self.read(one)) for one in self.media(row)])
            except RowError as error:
                raise DataError(f"{self.where(row)}: {error}") from error
        return found

    def _made(self, texts: Sequence[str], opened: Sequence[Sequence[Media]], side: str) -> dict[str, Any]:
        made = processed(self.processor, texts, opened, side)
        other = [name for name, value in made.items() if not isinstance(value, Tensor)]
        if other:
            raise DataError(
                f"{type(self.processor).__name__} makes no tensor of {', '.join(other)} for {len(texts)} examples, "
                "whose images differ in size. Set data.batch_size to 1, or bring the images to one size."
            )
        return made
