"""Pictures of one shape with questions and short answers about it, as conversations. Drawn from a fixed seed."""

from __future__ import annotations

import random
from io import BytesIO
from typing import Any

import datasets
from PIL import Image, ImageDraw

from ll_demo.shapes import SHAPES, SIDE

ROWS = 3000
COLOURS = {"red": (230, 60, 60), "green": (60, 220, 60), "blue": (80, 90, 250), "yellow": (230, 230, 60)}
QUESTIONS = {"shape": "Which shape is it?", "colour": "Which colour has it?", "side": "On which side is it?"}


def table() -> datasets.Dataset:
    """Two of three questions about each picture; the first is of every kind as often as of the others."""
    draw = random.Random(0)
    rows = [_row(number, draw) for number in range(ROWS)]
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        }
    )
    return datasets.Dataset.from_list(rows, features=features)


def _row(number: int, draw: random.Random) -> dict[str, Any]:
    shape, colour, side = draw.choice(list(SHAPES)), draw.choice(list(COLOURS)), draw.choice(["left", "right"])
    answers = {"shape": shape, "colour": colour, "side": side}
    first = list(QUESTIONS)[number % len(QUESTIONS)]
    second = draw.choice([kind for kind in QUESTIONS if kind != first])
    turns = []
    for kind in (first, second):
        mark = "<image>" if kind == first else ""
        turns += [
            {"role": "user", "content": f"{mark}{QUESTIONS[kind]}"},
            {"role": "assistant", "content": answers[kind]},
        ]
    image = {"bytes": _picture(shape, COLOURS[colour], side, draw), "path": f"{number:04d}.png"}
    return {"image": image, "messages": turns}


def _picture(shape: str, colour: tuple[int, int, int], side: str, draw: random.Random) -> bytes:
    """A PNG file of one shape in a half of it."""
    ground = tuple(draw.randrange(60) for _ in range(3))
    image = Image.new("RGB", (SIDE, SIDE), ground)
    size = draw.randrange(SIDE // 3, SIDE // 2)
    left = draw.randrange(0, SIDE // 2 - size + 1) + (SIDE // 2 if side == "right" else 0)
    top = draw.randrange(0, SIDE - size)
    SHAPES[shape](ImageDraw.Draw(image), (left, top, left + size - 1, top + size - 1), colour)
    noise = Image.frombytes("RGB", image.size, draw.randbytes(SIDE * SIDE * 3))
    file = BytesIO()
    Image.blend(image, noise, 0.1).save(file, format="PNG")
    return file.getvalue()
