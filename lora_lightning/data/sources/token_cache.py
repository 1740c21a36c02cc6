"""Tokenised rows on the disk, found again by everything that they depend on.

The fingerprint of `Dataset.map` depends on less and on more: on the name of a function, not on what it calls, and on
the path of a file, not only on what it holds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets

from lora_lightning.data.sources.silence_warnings import silence_warnings

log = logging.getLogger(__name__)

LIMIT = "LORA_LIGHTNING_CACHE_GB"
"""Environment variable: gigabytes that the folder may hold."""
LIBRARIES = ("transformers", "tokenizers", "datasets")


def cache_key(rows: datasets.Dataset, tokenizer: Any, settings: Mapping[str, Any]) -> str:
    """A hash of what the rows hold, the tokenizer with its chat template, the settings, and the code."""
    digest = hashlib.sha256(json.dumps([settings, _code(), _tokenizer(tokenizer)], sort_keys=True).encode())
    digest.update(repr(sorted(rows.features.items())).encode())
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def load(key: str) -> tuple[datasets.Dataset, int] | None:
    """The tokenised rows of that key and how many were dropped, if they are there. Read from the disk when used."""
    folder = _folder() / key
    try:
        os.utime(folder)  # it was used just now
        with silence_warnings():
            return datasets.load_from_disk(str(folder)), int((folder / "dropped").read_text())
    except OSError:  # not there, or another process has just dropped it
        return None


def store(key: str, examples: datasets.Dataset, dropped: int) -> None:
    """Keep tokenised rows; a folder is complete or not there. The first process to be ready wins."""
    folder = _folder() / key
    mine = folder.with_name(f"{key}.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with silence_warnings():
            examples.save_to_disk(str(mine))
        (mine / "dropped").write_text(str(dropped))
        if not folder.exists():
            mine.rename(folder)
        drop_oldest(_folder(), int(float(os.environ.get(LIMIT, "10")) * 1e9), keep=folder)
    except OSError as error:  # no room on the disk, or another process was faster
        log.warning("tokenised data are not kept in %s: %s", folder.parent, error)
    finally:
        shutil.rmtree(mine, ignore_errors=True)


def drop_oldest(parent: Path, most: int, keep: Path) -> None:
    """Remove folders in `parent` that were not used for longest until they hold at most `most` bytes; never `keep`."""
    folders = [path for path in parent.iterdir() if path.is_dir() and "." not in path.name]  # others are being written
    sizes = {folder: sum(file.stat().st_size for file in folder.rglob("*")) for folder in folders}
    for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime):
        if sum(sizes.values()) <= most:
            return
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
            del sizes[folder]


def _folder() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "lora_lightning" / "tokens"


@cache
def _code() -> str:
    """The sources of `lora_lightning.data`, and the versions of what it calls."""
    digest = hashlib.sha256(repr([version(name) for name in LIBRARIES]).encode())
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _tokenizer(tokenizer: Any) -> str:
    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary = {name: part for name, part in parts.items() if name not in ("truncation", "padding")}
    else:
        vocabulary = tokenizer.get_vocab()
    facts = [type(tokenizer).__name__, vocabulary, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
