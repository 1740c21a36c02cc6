"""What is here needs a CUDA device and is skipped with the reason without one: `python -m pytest -m gpu tests/gpu`."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # sums in one order, before cuBLAS starts

import pytest
import torch
from on_gpu import reason_to_skip


@pytest.fixture(autouse=True)
def _on_device() -> Iterator[None]:
    """Skip without a device; float32 products in full float32, sums in one order, no process group left behind."""
    reason = reason_to_skip()
    if reason:
        pytest.skip(reason)
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
