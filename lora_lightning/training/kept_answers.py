"""Plans and start values on the disk, found again by everything that they depend on.

    method     class, settings and the source of its package
    model      the fingerprint of its weights, and the layers that were matched
    data       the bytes of the batches, and the task that gives their loss
    machine    version of torch, and kind of device

An answer that took less than `LEAST` seconds is not kept: it is as soon computed as found.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lora_lightning.data.sources.token_cache import LIMIT, drop_oldest
from lora_lightning.injection.answers import Answer
from lora_lightning.injection.plan import start_of
from lora_lightning.injection.probe import Probe
from lora_lightning.methods import Method, WrapperMethod, plain_settings
from lora_lightning.models.anatomy import survey
from lora_lightning.models.tasks.base import Task
from lora_lightning.storage.atomic import write_atomically
from lora_lightning.storage.fingerprint import fingerprint
from lora_lightning.version import __version__

log = logging.getLogger(__name__)

FILE = "answer.safetensors"
LEAST = 3.0
"""Seconds of work that are worth a file."""


class KeptAnswers:
    """Finds and keeps the answers of one method in one run; a `Remember`.

    Args:
        method: whom the questions are for.
        task: gives the loss.
        device: where the model goes for a pass; None where it is.
    """

    def __init__(self, method: Method, task: Task, device: torch.device | None = None) -> None:
        self.method, self.task, self.device = method, task, device
        self._run: str | None = None

    def __call__(
        self, probe: Probe, question: str, make: Callable[[], Answer], before: Mapping[str, Tensor], /
    ) -> Answer:
        """The answer of an earlier run where there is one; else a new one, which is kept if it took long."""
        folder = _folder() / self._key(probe, question, before)
        found = _read(folder / FILE)
        if found is not None:
            os.utime(folder)  # it was used just now
            print(f"{type(self.method).__name__}: {question} of an earlier run on the same model and data ({folder})")
            return found
        start = time.monotonic()
        answer = make()
        if time.monotonic() - start >= LEAST:
            _write(folder, answer)
        return answer

    def _key(self, probe: Probe, question: str, before: Mapping[str, Tensor]) -> str:
        """A hash of all that the answer depends on."""
        if self._run is None:
            facts = [
                *(__version__, torch.__version__, str(self.device and self.device.type), _sources(self.method)),
                *(type(self.method).__qualname__, plain_settings(self.method)),
                *(type(self.task).__qualname__, vars(self.task), list(probe.layers)),
                fingerprint(survey(probe.model)),
            ]
            digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
            _add(digest, probe.batches)
            self._run = digest.hexdigest()
        digest = hashlib.sha256(f"{self._run} {question}".encode())
        _add(digest, before)
        return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Nested containers, tensors by dtype, shape and bytes."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous()
        digest.update(f"{flat.dtype} {tuple(flat.shape)};".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key, inside in value.items():
            digest.update(f"{key}:".encode())
            _add(digest, inside)
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        digest.update(b"[")
        for inside in value:
            _add(digest, inside)
        digest.update(b"]")
    else:
        digest.update(f"{value!r};".encode())


def _sources(method: Method) -> str:
    """Of the packages that the method, the one inside it, and the start that it is given come from."""
    settings: list[object] = [method, start_of(method)]
    while isinstance(method, WrapperMethod):
        method = method.inner
        settings.append(method)
    digest = hashlib.sha256()
    for one in settings:
        package = importlib.import_module(type(one).__module__.partition(".")[0])
        if package.__name__ not in ("__main__", "builtins", "lora_lightning"):  # core goes by its version
            file = Path(str(package.__file__))
            for source in sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]:
                digest.update(source.read_bytes())
    return digest.hexdigest()


def _read(file: Path) -> Answer | None:
    try:
        with safe_open(file, "pt") as opened:
            plain = json.loads((opened.metadata() or {})["plain"])
            return Answer(plain, {key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118 - not a mapping
    except OSError:  # not there, or another process has just dropped it
        return None


def _write(folder: Path, answer: Answer) -> None:
    """Keep an answer, whole or not at all, and drop those that were not used for longest."""
    tensors = {key: tensor.contiguous().clone() for key, tensor in answer.tensors.items()}
    content = save(tensors, {"plain": json.dumps(answer.plain)})
    try:
        write_atomically(folder / FILE, lambda file: file.write(content))
        drop_oldest(folder.parent, int(float(os.environ.get(LIMIT, "10")) * 1e9), keep=folder)
    except OSError as error:  # no room on the disk, or another process has dropped the same
        log.warning("the answer is not kept in %s: %s", folder, error)


def _folder() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "lora_lightning" / "answers"
