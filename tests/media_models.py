"""Tiny models of images or sounds with processors of their own: random weights, a tokenizer of bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from architectures import ARCHITECTURES
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lora_lightning.data.media.processors import WithoutVideos, without_videos

RATE = 16000
"""Samples a second of sounds."""
IM = ["<|im_start|>", "<|im_end|>"]
CHATML_PARTS = (
    "{%% for m in messages %%}<|im_start|>{{ m.role }}\n{%% if m.content is string %%}{{ m.content }}{%% else %%}"
    "{%% for p in m.content %%}{%% if p.type == 'image' %%}%s{%% elif p.type == 'audio' %%}%s{%% else %%}{{ p.text }}"
    "{%% endif %%}{%% endfor %%}{%% endif %%}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)
QWEN_TEMPLATE = CHATML_PARTS % ("<|vision_start|><|image_pad|><|vision_end|>", "")
AUDIO_TEMPLATE = CHATML_PARTS % ("", "<|audio_bos|><|AUDIO|><|audio_eos|>")
SMOL_TEMPLATE = (  # as of the released models: it takes lists alone
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<start_of_image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def byte_tokenizer(specials: list[str], **special: Any) -> Any:
    """A token for each byte, and the special ones behind <pad>, <bos> and <eos>."""
    names = ["<pad>", "<bos>", "<eos>", *specials]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*names, *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(names)
    marks = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **marks, **special)


def _qwen() -> Any:
    tokenizer = byte_tokenizer([*IM, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    )
    videos = WithoutVideos({"merge_size": 2, "patch_size": 8, "video_processor_type": "Qwen2VLVideoProcessor"})
    return without_videos(transformers.Qwen2_5_VLProcessor)(images, tokenizer, videos, chat_template=QWEN_TEMPLATE)


def _smol() -> Any:
    marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|im_start|>"]
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    images = transformers.SmolVLMImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=True
    )
    videos = WithoutVideos({"num_frames": 4, "fps": 1, "video_processor_type": "SmolVLMVideoProcessor"})
    tokenizer = byte_tokenizer([*marks, *tiles])
    return without_videos(transformers.SmolVLMProcessor)(
        images, tokenizer, videos, image_seq_len=1, chat_template=SMOL_TEMPLATE
    )


def _gemma() -> Any:
    marks = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    extra = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = byte_tokenizer(marks, extra_special_tokens=extra, padding_side="left")
    images = transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=GEMMA_TEMPLATE)


def _qwen_audio() -> Any:
    tokenizer = byte_tokenizer([*IM, "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"])
    sounds = transformers.WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, hop_length=1000, chunk_length=1)
    return transformers.Qwen2AudioProcessor(sounds, tokenizer, chat_template=AUDIO_TEMPLATE)


@dataclass(frozen=True)
class Family:
    """How to build a model and its processor."""

    architecture: str
    processor: Callable[[], Any]
    image_token: str
    """What stands for a part of an image or a sound in the model's ids."""
    end: str
    """What ends a turn."""
    kind: str = "image"

    def model(self) -> Any:
        """The model, with a row for each token of the processor."""
        tokenizer = self.processor().tokenizer
        known = ARCHITECTURES[self.architecture]
        ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in IDS[self.architecture].items()}
        text = {**known.settings["text_config"], "vocab_size": len(tokenizer), "max_position_embeddings": 2048}
        text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        settings = {**known.settings, **ids, "text_config": text, **EXTRA.get(self.architecture, {})}
        model = replace(known, settings=settings).build()
        model.generation_config.eos_token_id = 2
        model.generation_config.pad_token_id = 0
        return model

    def save(self, folder: Path) -> str:
        """Model and processor in a folder."""
        self.model().save_pretrained(folder)
        self.processor().save_pretrained(folder)
        return str(folder)


IDS = {
    "Qwen2.5-VL": {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    "SmolVLM": {"image_token_id": "<image>"},
    "Gemma 3, vision": {
        "image_token_index": "<image_soft_token>",
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
    },
    "Qwen2-Audio": {"audio_token_index": "<|AUDIO|>"},
}
EXTRA: dict[str, dict[str, Any]] = {}
FAMILIES = {
    "qwen2.5-vl": Family("Qwen2.5-VL", _qwen, "<|image_pad|>", "<|im_end|>"),
    "smolvlm": Family("SmolVLM", _smol, "<image>", "<end_of_utterance>"),
    "gemma3": Family("Gemma 3, vision", _gemma, "<image_soft_token>", "<end_of_turn>"),
    "qwen2-audio": Family("Qwen2-Audio", _qwen_audio, "<|AUDIO|>", "<|im_end|>", "audio"),
}
PICTURED = [name for name, family in FAMILIES.items() if family.kind == "image"]


def picture(number: int, width: int = 20, height: int = 16) -> Image.Image:
    """Noise in three colours."""
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3))
    return Image.fromarray(pixels.astype("uint8"))


def sound(number: int, samples: int = 8000) -> np.ndarray:
    """Noise."""
    return np.random.default_rng(number).uniform(-0.5, 0.5, samples).astype("float32")
