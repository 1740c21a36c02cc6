"""Injection of 1,000 layers, and start-up of the light verbs as whole processes. No timed asserts."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch import nn

from ll_lora import LoRA
from lora_lightning import inject

pytestmark = pytest.mark.slow


def test_inject_1000_layers(benchmark):
    def fresh():
        return (nn.Sequential(*[nn.Linear(32, 32) for _ in range(1000)]), LoRA(rank=4)), {"seed": 0}

    report = benchmark.pedantic(inject, setup=fresh, rounds=5)
    assert len(report.layers) == 1000


@pytest.mark.parametrize("verb", ["--help", "methods"])
def test_light_verb(benchmark, verb):
    command = [sys.executable, "-m", "lora_lightning", verb]
    done = benchmark.pedantic(subprocess.run, (command,), {"capture_output": True, "check": True}, rounds=5)
    assert b"lora" in done.stdout.lower()
