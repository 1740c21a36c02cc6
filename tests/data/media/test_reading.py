"""Images and sounds from whatever holds them, and what is said of those that cannot be read."""

from __future__ import annotations

import base64
import io
import wave

import numpy as np
import pytest
from media_models import picture, sound
from PIL import Image

from lora_lightning.data.media.parts import Media
from lora_lightning.data.media.reading import media_identity, media_name, read_media
from lora_lightning.data.sources.faults import RowError


def png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def wav(samples, rate=16000, channels=1, width=2) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        numbers = (np.repeat(samples, channels) * 2 ** (8 * width - 1)).astype(f"<i{width}")
        out.writeframes(numbers.tobytes())
    return file.getvalue()


CAT = picture(0)
DATA = png(CAT)
URL = f"data:image/png;base64,{base64.b64encode(DATA).decode()}"


@pytest.mark.parametrize("value", [CAT, DATA, URL, {"bytes": DATA, "path": "x.png"}, "cat.png", {"path": "cat.png"}])
def test_an_image_is_the_same_from_anywhere(value, tmp_path):
    (tmp_path / "cat.png").write_bytes(DATA)
    media = Media("image", value, 0, tmp_path)
    assert np.array_equal(np.asarray(read_media(media, 0)), np.asarray(CAT))
    assert len(media_identity(media)) == 64


def test_a_turned_photograph_is_held_up(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    CAT.save(tmp_path / "turned.png", exif=exif)
    assert read_media(Media("image", "turned.png", 0, tmp_path), 0).size == (CAT.height, CAT.width)


@pytest.mark.parametrize("value", ["it.wav", {"array": sound(0), "sampling_rate": 16000}])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_sound_is_one_channel_of_numbers(value, channels, tmp_path):
    (tmp_path / "it.wav").write_bytes(wav(sound(0), channels=channels))
    found = read_media(Media("audio", value, 0, tmp_path), 16000)
    assert found.dtype == np.float32
    assert np.allclose(found, sound(0), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("image", "dog.png", 'an image "dog.png": no such file in '),
        ("image", "broken.png", 'an image "broken.png": it is no image that Pillow knows'),
        ("image", "https://x.org/a.png", "nothing is loaded from the net while training; download it"),
        ("image", "data:image/png,abc", "a data URL must go on with ;base64"),
        ("image", "data:image/png;base64,*", r'an image "data:image/png;base6\.\.\.": its base64 is broken'),
        ("image", 7, 'an image "image 3": it is int; give a path, bytes, a data URL, or an object of Pillow'),
        ("audio", "slow.wav", '"slow.wav" has 8000 samples a second, and the processor takes 16000'),
        ("audio", "deep.wav", r"only WAV files of 16 bits are read without soundfile: .*lora-lightning\[audio\]"),
        ("audio", "cut.wav", 'an audio "cut.wav": '),
    ],
)
def test_what_cannot_be_read_is_named_with_the_reason(kind, value, message, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)  # as where it is not installed
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "slow.wav").write_bytes(wav(sound(0), rate=8000))
    (tmp_path / "deep.wav").write_bytes(wav(sound(0), width=4))
    (tmp_path / "cut.wav").write_bytes(wav(sound(0))[:20])
    with pytest.raises(RowError, match=message):
        read_media(Media(kind, value, 3, tmp_path), 16000)


def test_a_picture_that_ends_early_is_refused(tmp_path):
    (tmp_path / "half.png").write_bytes(DATA[: len(DATA) // 2])
    with pytest.raises(RowError, match=r'an image "half\.png": '):
        read_media(Media("image", "half.png", 0, tmp_path), 0)


def test_names_and_identities():
    assert media_name(Media("image", CAT, 2)) == "image 2"
    assert media_name(Media("image", {"bytes": DATA, "path": "x.png"}, 2)) == "x.png"
    two = [Media("image", png(picture(number))) for number in (0, 1)]
    assert media_identity(two[0]) != media_identity(two[1])
    assert media_identity(two[0]) == media_identity(Media("image", {"bytes": DATA, "path": "elsewhere.png"}))
