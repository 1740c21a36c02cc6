"""Two processes train what one does on the joint batch, and resume exactly: one launch for each strategy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sharded_cases import CASES, folder_of, take
from test_processes import free_port

from lora_lightning.checkpoint import save_adapter

pytestmark = [pytest.mark.multi, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for case in CASES.values():
        folder_of(folder, case)
    for name, case in CASES.items():  # the files of data are written here, before any process reads them
        save_adapter(take(case, folder / case.model, 4, []), folder / "one" / name)
    return folder


@pytest.fixture(scope="module", params=["ddp", "fsdp2", "fsdp"])
def launched(request, base):
    """The strategy's name, once it has taken all cases."""
    script = Path(__file__).with_name("sharded_cases.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*launcher, str(script), request.param, str(base)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return request.param


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_a_case(base, launched, name):
    one, straight = adapter(base / "one" / name), adapter(base / launched / name / "straight")
    resumed = adapter(base / launched / name / "resumed")
    assert one.keys() == straight.keys() == resumed.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(
            straight[key], tensor, rtol=0, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
        )
        assert torch.equal(resumed[key], straight[key]), key
