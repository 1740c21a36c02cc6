"""Images and sounds read from files, bytes, data URLs, and what `datasets` holds of them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib
import io
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lora_lightning.data.media.parts import Media
from lora_lightning.data.sources.faults import RowError


def read_media(media: Media, rate: int) -> Any:
    """An image in three colours as its camera held it up, or a sound as float32 numbers (samples,) from -1 to 1.

    Args:
        media: The image or sound.
        rate: Samples a second that a sound must have.

    Raises:
        RowError: it is missing, broken, or no such thing; or a sound of another rate.
    """
    if isinstance(media.value, Image.Image):
        return ImageOps.exif_transpose(media.value).convert("RGB")
    name = media_name(media)
    try:
        if media.kind == "image":
            with Image.open(io.BytesIO(_content(media))) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        samples, found = _samples(media)
    except (OSError, ValueError, EOFError, wave.Error) as error:
        unknown = isinstance(error, UnidentifiedImageError)  # its text names a buffer's address
        reason = "it is no image that Pillow knows" if unknown else str(error)
        raise RowError(
            f"with {_article(media)} that cannot be read", f'{_article(media)} "{name}": {reason}'
        ) from error
    if found != rate:
        raise RowError(
            "with a sound of another rate",
            f'an audio "{name}" has {found} samples a second, and the processor takes {rate}; convert the files',
        )
    return samples


def media_name(media: Media) -> str:
    """What to call it in messages."""
    value = media.value
    path = value.get("path") if isinstance(value, Mapping) else value if isinstance(value, str) else None
    if not path:
        return f"{media.kind} {media.number}"
    return f"{path[:20]}..." if path.startswith("data:") else str(path)


def media_identity(media: Media) -> str:
    """A hash of what it holds, wherever it lies."""
    if isinstance(media.value, Image.Image):
        content = media.value.tobytes()
    elif isinstance(media.value, Mapping) and "array" in media.value:
        content = np.asarray(media.value["array"], dtype=np.float32).tobytes()
    else:
        content = _content(media)
    return hashlib.sha256(content).hexdigest()


def _article(media: Media) -> str:
    return f"an {media.kind}"


def _content(media: Media) -> bytes:
    """The bytes of its file."""
    value = media.value
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if not isinstance(value, str):
        raise ValueError(f"it is {type(value).__name__}; give a path, bytes, a data URL, or an object of Pillow")
    if value.startswith("data:"):
        head, comma, data = value.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ValueError("a data URL must go on with ;base64, and the data")
        try:
            return base64.b64decode(data, validate=True)
        except binascii.Error as error:
            raise ValueError(f"its base64 is broken: {error}") from error
    if "://" in value and not value.startswith("file://"):
        raise ValueError("nothing is loaded from the net while training; download it, and give the path")
    path = Path(media.folder or "", value.removeprefix("file://")).expanduser()
    if not path.is_file():
        raise ValueError(f"no such file in {path.parent}")
    return path.read_bytes()


def _samples(media: Media) -> tuple[np.ndarray[Any, Any], int]:
    """Samples of one channel, and how many are a second's."""
    value = media.value
    if isinstance(value, Mapping) and value.get("array") is not None:
        return np.asarray(value["array"], dtype=np.float32), int(value["sampling_rate"])
    content = _content(media)
    if content[:4] == b"RIFF":
        with wave.open(io.BytesIO(content)) as file:
            if file.getsampwidth() == 2:
                numbers = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32) / 2**15
                return numbers.reshape(-1, file.getnchannels()).mean(1), file.getframerate()
    try:
        soundfile = importlib.import_module("soundfile")
    except ImportError as error:
        raise ValueError(
            'only WAV files of 16 bits are read without soundfile: pip install "lora-lightning[audio]"'
        ) from error
    try:
        numbers, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except RuntimeError as error:  # soundfile's own errors derive from it
        raise ValueError(str(error)) from error
    return numbers.mean(1), int(rate)
