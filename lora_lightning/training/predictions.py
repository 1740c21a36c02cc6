"""WritePredictions: inputs and predictions as CSV or JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lora_lightning.distributed import gather_objects
from lora_lightning.errors import RunFolderError, SettingsError
from lora_lightning.storage.atomic import write_atomically


class WritePredictions(Callback):
    """Joins what `predict_step` returns with the rows it was made from, and writes one file.

    Args:
        output: a .csv or .jsonl file.

    Raises:
        SettingsError: another kind of file.
        RunFolderError: it cannot be written.
    """

    def __init__(self, output: str | Path = "predictions.csv") -> None:
        self.output = Path(output)
        if self.output.suffix not in (".csv", ".jsonl"):
            raise SettingsError(f'--output is "{output}"; it must end in .csv or .jsonl.')
        self._rows: list[dict[str, Any]] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's predictions."""
        self._rows += outputs

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, once for all processes; rows that padding repeated stand there once."""
        every = [row for rows in gather_objects(self._rows) for row in rows]
        if not trainer.is_global_zero:
            return
        datamodule: Any = getattr(trainer, "datamodule", None)
        inputs = datamodule.inputs("predict") if hasattr(datamodule, "inputs") else None
        rows = [row for _, row in sorted({row["index"]: row for row in every}.items())]
        joined = [{**(inputs[row["index"]] if inputs is not None else {}), **row} for row in rows]
        names = getattr(datamodule, "label_names", ())
        for row in joined:
            if names and isinstance(row.get("label"), int):  # predictions are names, so the truth beside them is one
                row["label"] = names[row["label"]]
        if hasattr(datamodule, "readable"):
            joined = [datamodule.readable(row) for row in joined]
        write_rows(self.output, joined)
        print(f"predictions: {self.output} ({len(joined)} rows)")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write dictionaries as CSV or JSON lines, by the file's ending; a list in a CSV's cell is JSON.

    Raises:
        RunFolderError: the file cannot be written.
    """
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
        text = buffer.getvalue()
    try:
        write_atomically(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise RunFolderError(f'cannot write "{path}": {error.strerror or error}.') from error


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
