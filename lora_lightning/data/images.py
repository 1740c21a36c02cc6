"""Images with a class each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DistributedSampler

from lora_lightning.data.labelled_rows import LabelledRows
from lora_lightning.data.sources.faults import RowError
from lora_lightning.data.table import Collation
from lora_lightning.errors import DataError, check
from lora_lightning.models.pretrained import resolve


@dataclass(frozen=True)
class CollateImages:
    """Images read, and prepared as the model's own processor does."""

    processor: Any
    folder: Path | None
    """What paths are relative to."""
    where: str
    """Setting and split, for messages."""
    columns: Sequence[str]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """pixel_values (float32), and numbers as int64."""
        images = [open_image(row["image"], self.folder, f"{self.where}, row {row['index']}") for row in rows]
        batch: dict[str, Tensor] = {"pixel_values": self.processor(images, return_tensors="pt")["pixel_values"]}
        for name in ("labels", "index"):
            if name in rows[0] and name in self.columns:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch


def open_image(value: Any, folder: Path | None, where: str) -> Image.Image:
    """An image of three colours from a path, or from what `datasets` holds of one.

    Raises:
        DataError: it is missing or no image, naming it.
    """
    content = value.get("bytes") if isinstance(value, Mapping) else None
    path = image_name(value)
    try:
        with Image.open(BytesIO(content) if content else Path(folder or "", path).expanduser()) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise DataError(f'{where} (counted from 0): "{path}" cannot be read as an image: {error}.') from error


def image_name(value: Any) -> str:
    """The path of an image; empty where it has none."""
    return str((value.get("path") if isinstance(value, Mapping) else value) or "")


class LabelledImages(LabelledRows):
    """Images with a class each: a folder with a folder of images for each class, or a table with a column of them.

    Images are read when a batch is made, turned into three colours, and prepared by the model's own image processor
    (Pillow's, so that every machine prepares them alike). A column of images holds paths, relative to the
    table where it is one file, or whole images as Parquet and hub data have them.

    Batches: pixel_values, labels (not in predict).

    Args:
        image: Column of the images; that of a folder is "image".
        label: Column of the classes: names, or numbers from 0; that of a folder is "label".
        labels: Names of the classes in the order of their numbers; null takes those of the data.
        processor: Path, hub id or pkg:IMPORT_NAME/FOLDER of the image processor. The command line fills in
            model.pretrained for null; a model that starts at random has none and takes `size` alone.
        size: Height and width that images are brought to, in pixels; null takes the processor's own.
        common: Settings that all data share.
    """

    task_kinds = ("image-classification",)
    inputs_are_texts = False

    def __init__(
        self,
        image: str = "image",
        label: str = "label",
        labels: list[str] | None = None,
        processor: str | None = None,
        size: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.image = image
        self.label = label
        self.labels = labels
        self.processor = processor
        self.size = size
        check(size is None or size >= 1, self, "size", "it must be at least 1 pixel, or null.")

    @property
    def input_columns(self) -> dict[str, str]:
        """The images."""
        return {"image": self.image}

    def encode(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:
        """The images as the table holds them, and the number of each class."""
        columns = {"image": rows[self.image][:], "index": list(range(len(rows)))}
        features = {"image": rows.features[self.image], "index": datasets.Value("int64")}
        if split != "predict":
            columns["labels"] = self.classes.encode(rows[self.label][:], self.where)
            features["labels"] = datasets.Value("int64")
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

    def collation(self, split: str, columns: Sequence[str], sampler: DistributedSampler[Any]) -> Collation:  # noqa: ARG002 - the same in any order
        """Images read and prepared."""
        where = f"LabelledImages.image: {split}"
        return CollateImages(self.image_processor, self.sources.folder(split), where, columns)

    def describe(self, example: Mapping[str, Any]) -> str:
        """Class, file and size."""
        image = open_image(example["image"], self.sources.folder("train"), f"train, row {example['index']}")
        shape = tuple(self.image_processor([image], return_tensors="pt")["pixel_values"].shape[1:])
        name = image_name(example["image"])
        return (
            f"label {self.label_names[example['labels']]}\n{name}: {image.width} x {image.height}, prepared as {shape}"
        )

    def figures(self, split: str) -> str:
        """Examples of each class of a split."""
        counts = Counter(self.examples(split)["labels"])
        every = ", ".join(f"{name} {counts[number]}" for number, name in enumerate(self.label_names))
        return f"{split:<12}{sum(counts.values()):>9}  {every}"

    def readable(self, row: dict[str, Any]) -> dict[str, Any]:
        """The image by its name."""
        return {**row, self.image: image_name(row[self.image])}

    @cached_property
    def image_processor(self) -> Any:
        """As `load_image_processor`, by the settings."""
        return load_image_processor(self.processor, self.size)

    def check_input(self, row: Mapping[str, Any], split: str) -> None:
        """Raise `RowError` for a row without an image, and a path where no file is."""
        value = row[self.image]
        if value is None:
            raise RowError("without an image", f'"{self.image}" is missing')
        folder = self.sources.folder(split) or Path()
        if isinstance(value, str) and not Path(folder, value).expanduser().is_file():
            raise RowError("without an image", f'LabelledImages.image: no file "{value}" in {folder}')


def load_image_processor(name: str | None, size: int | None) -> Any:
    """The image processor that `name` means, or a plain one that scales to `size` and to values from -1 to 1.

    Raises:
        DataError: neither a name nor a size, or no processor there.
    """
    from transformers import AutoImageProcessor, ViTImageProcessorPil

    sizes = {} if size is None else {"size": {"height": size, "width": size}}
    if name is None:
        if not sizes:
            raise DataError(
                "LabelledImages.processor is null, and so is size. Name the model that prepares images, or, for a "
                "model that starts at random, the size in pixels that it takes."
            )
        return ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3, **sizes)
    folder = resolve(name, "data.processor", needs=None)
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False, **sizes)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f'data.processor is "{name}"; no image processor can be read there: {reason}') from error
