"""Inputs for models of any kind: the model runs on them, and new tokens are among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft_models import llama, seeded
from torch import nn

from lora_lightning.exporters.peft.sample_inputs import sample_inputs

SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
MODELS = {
    "decoder": llama,
    "decoder with classes": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(vocab_size=40, num_labels=2, **SMALL)
    ),
    "encoder and decoder": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    ),
    "encoder and decoder with classes": lambda: transformers.BartForSequenceClassification(
        transformers.BartConfig(
            vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24,
            encoder_attention_heads=2, decoder_attention_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            decoder_start_token_id=2,
        )
    ),
    "image": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=4, **SMALL)
    ),
    "sound": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24,
            encoder_attention_heads=2, decoder_attention_heads=2, num_mel_bins=8, max_source_positions=20,
            max_target_positions=20, bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=1,
        )
    ),
    "wave": lambda: transformers.Wav2Vec2ForSequenceClassification(
        transformers.Wav2Vec2Config(
            vocab_size=40, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, **SMALL,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_model_runs_on_them(build: Any) -> None:
    model = seeded(build)
    inputs = sample_inputs(model)
    assert inputs is not None
    again = sample_inputs(model)
    assert all(torch.equal(inputs[key], again[key]) for key in inputs)
    with torch.no_grad():
        assert torch.isfinite(model(**inputs)[0]).all()


def test_new_tokens_are_among_them() -> None:
    assert {38, 39} <= set(sample_inputs(llama(), [38, 39])["input_ids"].flatten().tolist())


def test_of_other_models_nothing_is_known() -> None:
    assert sample_inputs(nn.Linear(2, 2)) is None
