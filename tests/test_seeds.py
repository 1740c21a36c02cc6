from __future__ import annotations

import subprocess
import sys

import torch

from lora_lightning.seeds import generator


def draw(*key: object) -> float:
    return float(torch.rand((), generator=generator(*key)))  # type: ignore[arg-type]


def test_a_draw_depends_on_each_argument_and_nothing_else() -> None:
    key = (1, "init", 0, "layers.0.q_proj")
    first = draw(*key)
    torch.rand(5)
    assert draw(*key) == first
    others = [(2, *key[1:]), (1, "noise", *key[2:]), (1, "init", 1, key[3]), (*key[:3], "layers.0.k_proj")]
    assert len({first, *(draw(*other) for other in others)}) == 5
    assert draw(1, "init", 1, "1") != draw(1, "init", 11, "")


def test_a_draw_is_the_same_in_another_process() -> None:
    code = (
        "import torch; from lora_lightning.seeds import generator as g; "
        "print(float(torch.rand((), generator=g(3, 'init', 0, 'a.b'))))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(process.stdout) == draw(3, "init", 0, "a.b")
