"""Small pictures of one bright shape each, on a dark and noisy ground: image, label. Drawn from a fixed seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from io import BytesIO

import datasets
from PIL import Image, ImageDraw

ROWS, SIDE = 2000, 32
Draw = Callable[[ImageDraw.ImageDraw, tuple[int, int, int, int], tuple[int, int, int]], None]


def table() -> datasets.Dataset:
    """Every shape as often as the others, in any colour, place and size."""
    draw = random.Random(0)
    names = list(SHAPES)
    labels = [row % len(names) for row in range(ROWS)]
    images = [{"bytes": picture(names[label], draw), "path": f"{row:04d}.png"} for row, label in enumerate(labels)]
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def picture(shape: str, draw: random.Random) -> bytes:
    """A PNG file of one shape."""
    ground = tuple(draw.randrange(90) for _ in range(3))
    colour = tuple(draw.randrange(140, 256) for _ in range(3))
    image = Image.new("RGB", (SIDE, SIDE), ground)
    size = draw.randrange(SIDE // 3, SIDE - 4)
    left, top = (draw.randrange(1, SIDE - size) for _ in range(2))
    SHAPES[shape](ImageDraw.Draw(image), (left, top, left + size, top + size), (colour[0], colour[1], colour[2]))
    noise = Image.frombytes("RGB", image.size, draw.randbytes(SIDE * SIDE * 3))
    file = BytesIO()
    Image.blend(image, noise, 0.15).save(file, format="PNG")
    return file.getvalue()


def _triangle(on: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    on.polygon([((left + right) // 2, top), (right, bottom), (left, bottom)], fill=colour)


def _cross(on: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    third = (right - left) // 3
    on.rectangle((left + third, top, right - third, bottom), fill=colour)
    on.rectangle((left, top + third, right, bottom - third), fill=colour)


def _ring(on: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: tuple[int, int, int]) -> None:
    on.ellipse(box, outline=colour, width=max(2, (box[2] - box[0]) // 5))


SHAPES: dict[str, Draw] = {
    "circle": lambda on, box, colour: on.ellipse(box, fill=colour),
    "cross": _cross,
    "ring": _ring,
    "square": lambda on, box, colour: on.rectangle(box, fill=colour),
    "triangle": _triangle,
}
