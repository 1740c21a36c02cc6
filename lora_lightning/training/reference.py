"""ReferenceValues: what the base model makes of the data that a preference loss compares with, computed once.

    on_fit_start         training and validation rows; on_*_start the rows of validate, test and predict
    disable_adapters     the reference is the model itself with its adapters off, and the heads that it came with
    from_first           values kept by an earlier run, read by the first process and sent to all
    gather_objects       else each process computes its share of the rows, and all get all: 4 bytes a completion

Values are kept on the disk beside tokenised data, under a hash of all that they depend on: the base's weights, the
token ids and labels of the rows (so the data, the tokenizer, the template, max_length), the precision and the task.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from lora_lightning.callbacks.step_counting import outside_step
from lora_lightning.data.preferences import Preferences, longest
from lora_lightning.data.sources.token_cache import LIMIT, drop_oldest
from lora_lightning.distributed import from_first, full_tensor, gather_objects, local, reshard
from lora_lightning.injection.records import injected_root, records
from lora_lightning.injection.switches import disable_adapters
from lora_lightning.models.anatomy import survey
from lora_lightning.models.tasks.base import Batch
from lora_lightning.models.tasks.completion_lengths import completion_lengths
from lora_lightning.storage.atomic import write_atomically
from lora_lightning.storage.fingerprint import fingerprint

log = logging.getLogger(__name__)

FEW = 4
"""Rows by which it is told whether training starts at the reference."""
NOTICED = 1e-3
"""Nats a token; rounding is below it."""


class ReferenceValues(Callback):
    """Computes the reference's values of the data module's rows before they are needed, or finds them on the disk.

    Does nothing for a task that compares with nothing, and for a data module that cannot keep values.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training rows and, where there is a validation, its rows."""
        data = _data(trainer)
        validates = trainer.enable_validation and data is not None and "validation" in data.ready
        self._prepare(trainer, pl_module, ["train", *(["validation"] if validates else [])])
        if trainer.ckpt_path is None:
            self._tell_start(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rows of a validation outside a fit."""
        if trainer.state.fn == "validate":
            self._prepare(trainer, pl_module, ["validation"])

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test rows."""
        self._prepare(trainer, pl_module, ["test"])

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rows to predict."""
        self._prepare(trainer, pl_module, ["predict"])

    def _prepare(self, trainer: Trainer, module: Any, splits: Sequence[str]) -> None:
        data = _data(trainer)
        if data is None or not getattr(getattr(module, "task", None), "needs_reference", False):
            return
        missing = [split for split in splits if not data.has_reference(split)]
        if not missing:
            return
        root, began = injected_root(module), time.monotonic()
        found: dict[str, str] = {}
        with disable_adapters(root):
            base = base_digest(root)
            for split in missing:
                key = _key(base, str(trainer.precision), module.task.name, data.examples(split))
                values = from_first(lambda key=key: read(key))  # type: ignore[misc]
                found[split] = "kept from an earlier run" if values is not None else ""
                if values is None:
                    values = self._compute(trainer, module, split)
                    if trainer.is_global_zero:
                        keep(key, values)
                data.keep_reference(split, values)
        reshard(root)
        if trainer.is_global_zero:
            rows = ", ".join(
                f"{len(data.examples(split)):,} {split} rows{f' ({why})' if why else ''}"
                for split, why in found.items()
            )
            print(f"reference   the base model, its adapters off: {rows}; {time.monotonic() - began:.0f} s", flush=True)

    def _compute(self, trainer: Trainer, module: Any, split: str) -> Tensor:
        """The values of all rows, (rows, completions of each), float32: each process computes those of its share."""
        data: Any = _data(trainer)
        lengths = longest(data.examples(split))
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        share = order[trainer.global_rank :: trainer.world_size]
        most = -(-len(order) // trainer.world_size)  # a sharded model needs all processes in each batch
        share = list(itertools.islice(itertools.cycle(share or order[:1]), most))
        made = [
            logits_values
            for _, logits_values in self._values(trainer, module, split, share, data.validation_batch_size)
        ]
        mine = torch.cat(made)
        values = torch.full((len(order), mine.shape[1]), float("nan"))
        for rows, part in gather_objects((share, mine)):
            values[rows] = part
        return values

    def _values(
        self, trainer: Trainer, module: Any, split: str, rows: Sequence[int], size: int
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Batches of some rows, and what the model as it is now makes of them, on the CPU."""
        root: Any = injected_root(module)
        data: Any = _data(trainer)
        modes = {part: part.training for part in root.modules()}
        root.eval()
        try:
            for batch in data.batches(split, rows, size):
                moved: Any = trainer.strategy.batch_to_device(batch)

                def answer(moved: Any = moved) -> Tensor:
                    with torch.no_grad(), trainer.precision_plugin.forward_context():
                        return module.task.reference(module.task.logits(root, moved)).float().cpu()  # type: ignore[no-any-return]

                yield batch, outside_step(trainer, answer)
        finally:
            for part, mode in modes.items():
                part.training = mode
            reshard(root)

    def _tell_start(self, trainer: Trainer, module: Any) -> None:
        """Say where training starts away from the reference: some methods do, and adapters that are gone on with."""
        data = _data(trainer)
        if data is None or not data.has_reference("train"):
            return
        rows = range(min(FEW, len(data.examples("train"))))
        with disable_adapters(injected_root(module)):
            ((batch, base),) = self._values(trainer, module, "train", rows, FEW)
        ((_, start),) = self._values(trainer, module, "train", rows, FEW)
        lengths = completion_lengths(batch["labels"]).reshape(base.shape[::-1]).T
        distance = float(((start - base) / lengths).abs().max())
        if distance > NOTICED and trainer.is_global_zero:
            print(f"reference   the adapter starts away from it, by up to {distance:.3g} nats a token", flush=True)


def base_digest(root: nn.Module) -> str:
    """A hash of a model whose adapters are off: its weights, its data types, and the values of its heads.

    Of a quantized base it is that of the bytes that each process holds. All processes take part.
    """
    found = fingerprint(survey(root))
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode())
    if found["content"] is None:
        digest.update("".join(gather_objects(_held(root))).encode())
    for name in sorted({name for record in records(root).values() for name in record.trained}):
        digest.update(_bytes(full_tensor(root.get_parameter(name))))
    return digest.hexdigest()


def _held(root: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        if ".adapters." not in f".{name}":
            digest.update(name.encode() + _bytes(local(tensor)))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _key(base: str, precision: str, task: str, examples: datasets.Dataset) -> str:
    digest = hashlib.sha256(json.dumps([base, precision, task]).encode())
    columns = examples.with_format(None).select_columns(["input_ids", "labels"])
    for batch in columns.iter(batch_size=1000):
        digest.update(json.dumps([batch["input_ids"], batch["labels"]]).encode())
    return digest.hexdigest()


def read(key: str) -> Tensor | None:
    """Values that an earlier run has kept; None where there are none."""
    folder = _folder() / key
    try:
        os.utime(folder)  # it was used just now
        return load((folder / "values.safetensors").read_bytes())["values"]
    except (OSError, SafetensorError, KeyError):
        return None


def keep(key: str, values: Tensor) -> None:
    """Keep values for later runs, within the limit of tokenised data; a disk that is full is no error."""
    folder = _folder() / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = save({"values": values.contiguous()})
        write_atomically(folder / "values.safetensors", lambda file: file.write(content))
        drop_oldest(_folder(), int(float(os.environ.get(LIMIT, "10")) * 1e9), keep=folder)
    except OSError as error:
        log.warning("the reference's values are not kept in %s: %s", folder.parent, error)


def _folder() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "lora_lightning" / "reference"


def _data(trainer: Trainer) -> Preferences | None:
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, Preferences) else None
