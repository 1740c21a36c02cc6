"""What every test stands on: no network, fixed seeds, one thread a process, and where the shared test data lies."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest

# torch and numpy are imported inside: the process that hands out the tests needs neither


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not walk through it again and again."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a class lists in `repeated` is shown by another class of the same adapter, and waits for the slow tests."""
    for item in items:
        if getattr(item, "originalname", item.name) in getattr(getattr(item, "cls", None), "repeated", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests run in two processes, on as little as two cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _sources_read_once() -> Iterator[None]:
    """A command line takes the documentation of its settings from the sources of Trainer, nn.Module and many more.

    That is the same for every line, and a third of the time that one takes.
    """
    from docstring_parser.attrdoc import AttributeDocstrings

    read, known = AttributeDocstrings.get_attr_docs, WeakKeyDictionary[Any, Any]()

    def get_attr_docs(self: AttributeDocstrings, component: Any) -> Any:
        if component not in known:
            known[component] = read(self, component)
        return known[component]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttributeDocstrings, "get_attr_docs", get_attr_docs)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers in each test, whatever ran before it."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder LORA_LIGHTNING_TEST_DATA, by default `../shared` beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("LORA_LIGHTNING_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set LORA_LIGHTNING_TEST_DATA")
    return folder
