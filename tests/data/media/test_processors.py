"""Processors of models: loaded without torchvision, saved whole, and refused with a reason."""

from __future__ import annotations

import json
import sys

import pytest
import transformers
from media_models import FAMILIES, byte_tokenizer

from lora_lightning.data.media.processors import WithoutVideos, load_processor, marks, sampling_rate
from lora_lightning.errors import DataError, ModelError


@pytest.mark.parametrize("name", FAMILIES)
def test_a_processor_is_loaded_and_saved_whole(name, tmp_path):
    made = FAMILIES[name].processor()
    made.save_pretrained(tmp_path / "one")
    found = load_processor(str(tmp_path / "one"), "data.processor")
    assert type(found).__name__ == type(made).__name__
    assert found.chat_template == made.chat_template
    assert list(marks(found)) == [FAMILIES[name].kind]
    assert sampling_rate(found) == (16000 if FAMILIES[name].kind == "audio" else 0)
    found.save_pretrained(tmp_path / "two")
    one, two = (json.loads((tmp_path / folder / "processor_config.json").read_text()) for folder in ("one", "two"))
    assert one == two
    assert one.get("video_processor") == (made.video_processor.to_dict() if hasattr(made, "video_processor") else None)


def test_images_are_prepared_by_pillow(tmp_path):
    FAMILIES["qwen2.5-vl"].processor().save_pretrained(tmp_path)
    found = load_processor(str(tmp_path), "data.processor")
    assert type(found.image_processor) is transformers.Qwen2VLImageProcessorPil


def test_videos_are_refused():
    with pytest.raises(DataError, match="videos are not read; give their frames as images"):
        WithoutVideos({})(videos=[])


def test_no_processor_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"^data\.processor is null; set it to the path or hub id of a processor"):
        load_processor(None, "data.processor")
    with pytest.raises(ModelError, match=r'data\.processor is "\./none"; no such folder'):
        load_processor("./none", "data.processor")
    byte_tokenizer([]).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no processor can be read there"):
        load_processor(str(tmp_path), "data.processor")


def test_a_package_that_a_processor_needs_is_named(tmp_path, monkeypatch):
    FAMILIES["smolvlm"].processor().save_pretrained(tmp_path)
    monkeypatch.setattr(sys.modules["transformers.models.smolvlm.processing_smolvlm"], "num2words", None)
    with pytest.raises(DataError, match=r'Package `num2words` is required .* pip install "lora-lightning\[vision\]"'):
        load_processor(str(tmp_path), "data.processor")
