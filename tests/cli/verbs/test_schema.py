from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # a schema takes jsonargparse 7 s and more


def printed(*words):
    """What the verb prints, in a process of its own: runs make Lightning make classes that no schema can name."""
    line = [sys.executable, "-m", "lora_lightning", "schema", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_verb_leaves_blocked_plugins_out():
    text = printed("-p", "no:ll_rose")
    assert '"DoRA"' in text
    assert '"RoseLoRA"' not in text
    assert set(json.loads(text)["properties"]) >= {"model", "data", "trainer", "seed_everything"}
