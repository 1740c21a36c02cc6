"""A table of numbered rows in four files, for tests that stream it."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "good", "bad"]
SIZES = (13, 7, 10, 11)
COUNT = sum(SIZES)


def row(number: int) -> dict[str, str]:
    prompt = " ".join(WORDS[int(digit)] for digit in f"{number:03d}")
    return {"prompt": prompt, "completion": "yes it is the answer"[: 3 + 3 * (number % 5)]}


def write_files(folder: Path) -> Path:
    """Four files of unequal length."""
    folder.mkdir()
    number = 0
    for file, size in enumerate(SIZES):
        lines = [json.dumps(row(n)) for n in range(number, number + size)]
        (folder / f"train-{file}.jsonl").write_text("\n".join(lines) + "\n")
        number += size
    return folder


def numbers(batch) -> list[int]:
    """The rows of a batch, from the three words that tell their number."""
    return [int("".join(str(token - 6) for token in ids[1:4])) for ids in batch["input_ids"].tolist()]


def plain(batches) -> list[dict]:
    return [{name: value.tolist() for name, value in batch.items()} for batch in batches]
