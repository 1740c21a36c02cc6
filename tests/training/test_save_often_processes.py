"""Two processes that are asked to stop agree on the step, keep a checkpoint, and resume from it exactly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_processes import free_port, logged_losses, on_two, run, write_config

pytestmark = [pytest.mark.multi, pytest.mark.timeout(300)]

SENDER = """
import os

from lightning.pytorch.callbacks import Callback


class SendAt(Callback):
    def __init__(self, number: int, rank: int) -> None:
        self.number, self.rank = number, rank

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3 and trainer.global_rank == self.rank and trainer.fit_loop.total_batch_idx % 2:
            os.kill(os.getpid(), self.number)
"""
LORA = """
  method: {class_path: LoRA, init_args: {rank: 2, dropout: 0.1}}
"""
SETTINGS = ("--trainer.accumulate_grad_batches", "2", "--trainer.log_every_n_steps", "3", "--trainer.max_steps", "8")


@pytest.mark.parametrize(
    ("strategy", "number", "rank", "why"),
    [("ddp", 15, 1, "SIGTERM"), ("ddp", 2, 0, "Ctrl-C"), ("fsdp2", 15, 0, "SIGTERM")],
)
def test_one_of_two_processes_is_asked_to_stop(tmp_path: Path, strategy: str, number: int, rank: int, why: str) -> None:
    write_config(tmp_path, batch=2, method=LORA)
    (tmp_path / "send.py").write_text(SENDER)
    words = ("fit", "--config", "small.yaml", *on_two(strategy), *SETTINGS)
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    run(tmp_path, *words)
    sender = (
        "--trainer.callbacks+=send.SendAt",
        f"--trainer.callbacks.number={number}",
        f"--trainer.callbacks.rank={rank}",
    )
    stopped = subprocess.run(
        [sys.executable, "-m", "lora_lightning", *words, *sender],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port()), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert stopped.returncode not in (0, None), stopped.stdout
    line = f"error: the run was stopped by {why} before its end; it goes on with fit --resume runs/small/002"
    assert stopped.stderr.count(line) == 1, stopped.stderr[-3000:]
    assert "Traceback" not in stopped.stderr
    run(tmp_path, "fit", "--resume", "runs/small/002", PYTHONPATH=path)
    whole, resumed = (load_file(tmp_path / f"runs/small/{n}/adapter/adapter.safetensors") for n in ("001", "002"))
    assert whole.keys() == resumed.keys()
    assert all(whole[key].equal(resumed[key]) for key in whole)
    assert logged_losses(tmp_path / "runs/small/001") == logged_losses(tmp_path / "runs/small/002")
