"""What every test stands on: no network, fixed seeds, one thread a process, and where the shared test data lies."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # tests run in two processes, on as little as two cores


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers in each test, whatever ran before it."""
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
