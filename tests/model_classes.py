"""Model classes of transformers by task, each built from its configuration alone, as small as that allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto as auto

TASKS: dict[str, Mapping[str, Any]] = {
    "sequence classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token classification": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "image classification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "audio classification": auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "masked LM": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "causal LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "sequence-to-sequence LM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
VOCABULARY = 71
"""A prime that no other size is."""
_WIDTH = 16
_WIDTHS = (
    "hidden_size d_model n_embd dim embed_dim emb_dim embedding_size dim_model attention_hidden_size rnn_hidden_size "
    "lru_width word_embed_proj_dim output_hidden_size pooler_hidden_size embedding_dim qformer_hidden_size"
)
_INNER = (
    "intermediate_size ffn_dim d_ff hidden_dim encoder_ffn_dim decoder_ffn_dim n_inner d_inner dim_ff ffn_hidden_size "
    "intermediate_size_mlp dense_intermediate_size"
)
_LAYERS = (
    "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers num_encoder_layers "
    "depth num_blocks num_block_records"
)
_HEADS = (
    "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_key_value_heads "
    "index_n_heads linear_num_key_heads"
)
_EXPERTS = "num_experts num_local_experts n_routed_experts moe_num_experts"
_SMALL: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "src_vocab_size", "tgt_vocab_size", "decoder_vocab_size"], VOCABULARY),
    "vocab_size_per_layer_input": VOCABULARY,
    **dict.fromkeys(_WIDTHS.split(), _WIDTH),
    **dict.fromkeys(_INNER.split(), 24),
    **dict.fromkeys(_LAYERS.split(), 2),
    **dict.fromkeys(_HEADS.split(), 2),
    **dict.fromkeys(_EXPERTS.split(), 4),
    **dict.fromkeys(["head_dim", "d_kv", "kv_channels", "d_head", "v_head_dim", "qk_head_dim", "index_head_dim"], 8),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "projection_dim"], 8),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "classifier_proj_size", "xvector_output_dim", "num_mel_bins"], 8),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim"], 4),
    **dict.fromkeys(
        ["mamba_d_state", "state_size", "ssm_state_size", "mamba_dt_rank", "mamba_n_heads", "rotary_dim"], 4
    ),
    **dict.fromkeys(["sliding_window", "attention_window", "local_attention", "mamba_chunk_size", "chunk_size"], 4),
    **dict.fromkeys(
        ["n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "n_groups", "mamba_n_groups"], 1
    ),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"], 64),
    **{"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "decoder_start_token_id": 1},
    **{"eos_token_id": 2, "sep_token_id": 2, "type_vocab_size": 2, "channel_shrink_ratio": 2, "index_topk": 4},
    **{"mamba_d_head": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "mamba_d_ssm": 32, "time_step_rank": 2},
    **{"linear_num_value_heads": 4, "hidden_size_per_layer_input": 4, "num_feat_extract_layers": 2},
    **{"image_size": 16, "patch_size": 8, "num_channels": 3, "default_language": "en_XX"},
    **{"conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_conv_pos_embeddings": 4},
    **{"num_conv_pos_embedding_groups": 2, "tdnn_dim": [8, 8], "tdnn_kernel": [2, 2], "tdnn_dilation": [1, 1]},
    **{"hidden_sizes": None, "num_latents": 4, "d_latents": 16, "entity_vocab_size": 8, "entity_emb_size": 8},
}
_LEVIT: dict[str, Any] = {
    **{"hidden_sizes": [8, 16, 16], "depths": [1, 1, 1], "num_attention_heads": [1, 2, 2], "key_dim": [4] * 3},
    **{"image_size": 64, "patch_size": 16},
}
_BY_TYPE: dict[str, dict[str, Any]] = {
    "bit": {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8, "num_groups": 2},
    "bros": {"hidden_size": 64},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
    "convnextv2": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
    "audio-spectrogram-transformer": {"max_length": 32, "frequency_stride": 4, "time_stride": 4, "patch_size": 4},
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hgnet_v2": {
        "hidden_sizes": [8, 8, 8, 16],
        "stem_channels": [3, 4, 8],
        "stage_in_channels": [8, 8, 8, 8],
        "stage_mid_channels": [4, 4, 4, 4],
        "stage_out_channels": [8, 8, 8, 16],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [1, 1, 1, 1],
        "stage_kernel_size": [3, 3, 3, 3],
    },
    "levit": _LEVIT,
    "t5_gemma_module": {"cross_attention_hidden_size": _WIDTH},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 2, "shape_size": 4, "visual_embed": False},
    "lilt": {"hidden_size": 24},
    "mimo_v2_flash": {"num_key_value_heads": 1},  # twice as many where a window slides
    "mpt": {"n_heads": 2, "d_model": 16},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "perceiver": {"num_latents": 4, "d_latents": 16, "num_self_attends_per_block": 1, "num_self_attention_heads": 2}
    | {"num_cross_attention_heads": 2, "d_model": 16, "qk_channels": 16, "v_channels": 16},
    "poolformer": {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]},
    "pvt": {"hidden_sizes": [8, 8, 8, 16], "depths": [1] * 4, "num_attention_heads": [1] * 4, "image_size": 32},
    "pvt_v2": {"hidden_sizes": [8, 8, 8, 16], "depths": [1] * 4, "num_attention_heads": [1] * 4},
    "regnet": {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "embedding_size": 8, "groups_width": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "resnet": {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "embedding_size": 8},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8, "pronunciation_embed_dim": 8}
    | {"shape_embed_dim": 8},
    "shieldgemma2": {"mm_tokens_per_image": 4, "image_token_index": 70, "yes_token_index": 5, "no_token_index": 6},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 4},
    "t5": {"decoder_start_token_id": 0},
    "xmod": {"default_language": "en_XX"},
    "mobilebert": {"embedding_size": 8, "hidden_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
}
_TWO_LAYERS = {"num_hidden_layers": 2}
_MADE_WITH: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _TWO_LAYERS),
    "bros": {"hidden_size": 64, "num_attention_heads": 2},  # sixteen numbers, two for each of a box's
    "levit": _LEVIT,
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 2},
    **{kind: {"text_config": _TWO_LAYERS} for kind in ("gemma4", "gemma4_unified")},
}
"""What settings that follow from others must be made with."""


class ModelClass(NamedTuple):
    """One class of a task."""

    task: str
    kind: str
    """`model_type` of its configuration."""
    name: str

    def config(self, **settings: Any) -> Any:
        """The configuration of its smallest model."""
        config = shrink(CONFIG_MAPPING[self.kind](**_MADE_WITH.get(self.kind, {})))
        for key, value in settings.items():
            setattr(config, key, value)
        return config

    def build(self, config: Any = None, device: str = "cpu") -> Any:
        """Its smallest model, always with the same weights."""
        config = self.config() if config is None else config
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(0)
            return getattr(transformers, self.name)(config).eval()

    def batch(self, model: nn.Module, ids: Tensor) -> dict[str, Any]:
        """Inputs of the model, made of `ids` (batch, length) where it reads text."""
        if self.kind in _INPUTS and not (self.kind == "whisper" and self.task == "causal LM"):
            return _INPUTS[self.kind](model.config, ids)
        if self.task == "image classification":
            shown = (
                model.config if hasattr(model.config, "image_size") else getattr(model.config, "vision_config", None)
            )
            size, channels = getattr(shown, "image_size", 32), getattr(model.config, "num_channels", 3)
            return {"pixel_values": _noise(len(ids), channels, *([size] * 2 if isinstance(size, int) else size))}
        if self.task == "audio classification":
            wave = _noise(len(ids), 400)
            return {model.main_input_name: wave}  # type: ignore[dict-item]
        return {"input_ids": ids} | ({"decoder_input_ids": ids} if self.task.startswith("sequence-to") else {})


def _boxes(config: Any, ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "bbox": torch.tensor([1, 2, 3, 4]).expand(*ids.shape, 4)}


def _scaled_boxes(config: Any, ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "bbox": torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(*ids.shape, 4)}


def _without_cache(config: Any, ids: Tensor) -> dict[str, Any]:
    return {"input_ids": ids, "use_cache": False}


def _image_in_text(config: Any, ids: Tensor) -> dict[str, Tensor]:
    """The text behind the places of an image."""
    places = torch.full((len(ids), config.mm_tokens_per_image), config.image_token_index)
    size = config.vision_config.image_size
    return {"input_ids": torch.cat([places, ids], 1), "pixel_values": _noise(len(ids), 3, size, size)}


def _sound_beside_text(config: Any, ids: Tensor) -> dict[str, Any]:
    """Of each token the frames of a sound that it comes from."""
    frames = 2 * config.downsample_factor * ids.shape[1]
    sound = _noise(len(ids), config.audio_config.num_mel_bins, frames)
    return {"input_ids": ids, "input_features": sound, "use_cache": False}


def _patches(config: Any, ids: Tensor) -> dict[str, Tensor]:
    vision = config.vision_config
    return {
        "pixel_values": _noise(len(ids), 4, vision.num_channels * vision.patch_size**2),
        "pixel_attention_mask": torch.ones(len(ids), 4, dtype=torch.long),
        "spatial_shapes": torch.tensor([[2, 2]] * len(ids)),
    }


_INPUTS: dict[str, Callable[[Any, Tensor], dict[str, Any]]] = {
    **dict.fromkeys(("hrm_text", "rwkv", "xlstm"), _without_cache),
    "shieldgemma2": _image_in_text,
    "voxtral_realtime": _sound_beside_text,
    **dict.fromkeys(("layoutlm", "layoutlmv2", "layoutlmv3", "lilt"), _boxes),
    "bros": _scaled_boxes,
    "siglip2": _patches,
    "imagegpt": lambda _, ids: {"input_ids": ids},
    "audio-spectrogram-transformer": lambda config, ids: {
        "input_values": _noise(len(ids), config.max_length, config.num_mel_bins)
    },
    "whisper": lambda config, ids: {
        "input_features": _noise(len(ids), config.num_mel_bins, 2 * config.max_source_positions)
    },
    "wav2vec2-bert": lambda config, ids: {"input_features": _noise(len(ids), 12, config.feature_projection_input_dim)},
}
"""What classes of a type read, where it is not what their task reads."""


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def model_classes(*tasks: str) -> Iterator[ModelClass]:
    """Every class of the tasks, of all where none is named, once."""
    seen = set()
    for task in tasks or TASKS:
        for kind, names in TASKS[task].items():
            for name in [names] if isinstance(names, str) else names:
                if kind in CONFIG_MAPPING and name not in seen:
                    seen.add(name)
                    yield ModelClass(task, kind, name)


def model_class(name: str) -> ModelClass:
    """The class of that name."""
    return next(found for found in model_classes() if found.name == name)


def shrink(config: Any) -> Any:
    """A configuration as small as sizes that most architectures share make it, in place."""
    own = dict(vars(config))
    for inner in own.values():
        if isinstance(inner, PreTrainedConfig):
            shrink(inner)
    names = {**{key: key for key in own}, **getattr(config, "attribute_map", {})}
    given = _BY_TYPE.get(config.model_type, {})
    for key, value in _SMALL.items():
        name = names.get(key)
        has = own.get(name)
        if name is None or value is None or (has is None and key not in ("pad_token_id", "eos_token_id")):
            continue
        if isinstance(value, list) == isinstance(has, list | tuple):
            setattr(config, name, value)
    if isinstance(own.get("layer_types"), list):
        kinds = list(dict.fromkeys(own["layer_types"]))
        config.layer_types = (kinds * 2)[: max(2, len(kinds))]
        if "num_hidden_layers" in own:
            config.num_hidden_layers = len(config.layer_types)
    layers = getattr(config, "num_hidden_layers", None)
    for key, value in own.items():
        if isinstance(value, list | tuple) and key != "layer_types" and key.endswith(("layer_types", "_per_layer")):
            setattr(config, key, list(value)[:layers])
    if "qk_rope_head_dim" in own and "head_dim" in own:
        config.head_dim = config.qk_rope_head_dim
    for key, value in given.items():
        setattr(config, key, value)
    if "stage_names" in own:
        count = len(getattr(config, "depths", ())) or config.num_hidden_layers
        config.stage_names = ["stem", *(f"stage{number}" for number in range(1, count + 1))]
        config._out_features, config._out_indices = [f"stage{count}"], [count]
    return config
