"""Architectures of transformers as tiny random models: what they are built from, a batch with labels for each, and the
table of what is adapted in docs/models.md.

`python tests/architectures.py` prints the table, from architectures.yaml and the refusals as they come.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from small_methods import small_methods
from torch import Tensor

import lora_lightning as ll
from lora_lightning.errors import TargetError
from lora_lightning.injection.targets import select
from lora_lightning.models.anatomy import survey
from lora_lightning.models.scopes import PARTS, SCOPES, TOWERS
from lora_lightning.testing.toy_models import seeded

Batch = dict[str, Tensor]
VOCABULARY, LENGTH, WIDTH, SIZE = 32, 6, 16, 16
IMAGE_TOKEN, AUDIO_TOKEN = 31, 30
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, **LAYERS}
DECODER = {**TEXT, **TOKENS, "max_position_embeddings": 64}
GROUPED = {**DECODER, "num_key_value_heads": 1}
IMAGES = {"image_size": SIZE, "patch_size": 8, "hidden_size": WIDTH, "intermediate_size": 24, **LAYERS}


def token_ids(length: int = LENGTH) -> Tensor:
    """Two rows of ids without special tokens."""
    return torch.randint(4, VOCABULARY - 2, (2, length), generator=torch.Generator().manual_seed(1))


def pixels(*size: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(size, generator=torch.Generator().manual_seed(2))


def classified() -> Batch:
    """Token ids and one label a row."""
    return {"input_ids": token_ids(), "attention_mask": torch.ones(2, LENGTH), "labels": torch.tensor([0, 2])}


def causal() -> Batch:
    """Token ids that are their own labels."""
    return {"input_ids": token_ids(), "attention_mask": torch.ones(2, LENGTH), "labels": token_ids()}


def translated() -> Batch:
    """Source tokens, and a shorter target."""
    return {"input_ids": token_ids(), "labels": token_ids(4)}


def pictures() -> Batch:
    """Images and one label each."""
    return {"pixel_values": pixels(2, 3, SIZE, SIZE), "labels": torch.tensor([0, 2])}


def speech() -> Batch:
    """Log-mel frames, and a target text."""
    return {"input_features": pixels(2, 8, 32), "labels": token_ids(4)}


def pairs() -> Batch:
    """Images and their captions, which a contrastive loss brings together."""
    return {"input_ids": token_ids(), "pixel_values": pixels(2, 3, SIZE, SIZE), "return_loss": torch.tensor(True)}


def _about_images(image_tokens: int, **extra: Tensor) -> Batch:
    ids = torch.cat([torch.full((2, image_tokens), IMAGE_TOKEN), token_ids()], dim=1)
    labels = ids.masked_fill(ids == IMAGE_TOKEN, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **extra}


def described() -> Batch:
    """Text behind the four patches of an image."""
    return _about_images(4, pixel_values=pixels(2, 3, SIZE, SIZE))


def framed() -> Batch:
    """Text behind the one merged patch of an image, which is the first of several (SmolVLM)."""
    return _about_images(1, pixel_values=pixels(2, 1, 3, SIZE, SIZE))


def tiled() -> Batch:
    """Text behind the one merged patch of each image, whose patches lie flat in one tensor (Qwen-VL)."""
    grid = torch.tensor([[1, 2, 2], [1, 2, 2]])
    return _about_images(
        1, pixel_values=pixels(8, 3 * 2 * 8 * 8), image_grid_thw=grid, mm_token_type_ids=_image_positions(1)
    )


def _image_positions(image_tokens: int) -> Tensor:
    return torch.cat([torch.ones(2, image_tokens), torch.zeros(2, LENGTH)], dim=1).long()


def described_by_type() -> Batch:
    """Text behind an image, and which positions are the image's (Gemma 3)."""
    return _about_images(4, pixel_values=pixels(2, 3, SIZE, SIZE), token_type_ids=_image_positions(4))


def heard() -> Batch:
    """Text behind the four frames of a sound (Qwen2-Audio)."""
    return _about_images(4, input_features=pixels(2, 8, 16), feature_attention_mask=torch.ones(2, 16).long())


def seen_and_heard() -> Batch:
    """Text behind the four merged patches of an image and the four frames of a sound (Gemma 4)."""
    across, down = torch.arange(16) % 4, torch.arange(16) // 4
    ids = torch.cat([torch.full((2, 4), IMAGE_TOKEN), torch.full((2, 4), AUDIO_TOKEN), token_ids()], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(ids >= AUDIO_TOKEN, -100),
        "pixel_values": pixels(2, 16, 3 * 4 * 4),
        "image_position_ids": torch.stack([across, down], dim=-1).expand(2, 16, 2),
        "input_features": pixels(2, 16, 8),
        "input_features_mask": torch.ones(2, 16, dtype=torch.bool),
        "mm_token_type_ids": torch.cat([_image_positions(4), torch.zeros(2, 4, dtype=torch.long)], dim=1),
    }


@dataclass(frozen=True)
class Architecture:
    """How to build one model and what to feed it."""

    family: str
    model: str
    """Name of its class in transformers."""
    settings: Mapping[str, Any]
    batch: Callable[[], Batch]
    precise: bool = True
    """Whether it computes in float64 as well."""

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        """The model in evaluation mode, its weights the same each time."""
        import transformers

        cls = getattr(transformers, self.model)
        config = cls.config_class(**self.settings)
        with seeded(0):
            model = cls(config).eval().to(dtype)
            for parameter in model.parameters():
                if parameter.dim() == 2 and not parameter.any():  # as no pretrained matrix is
                    torch.nn.init.normal_(parameter, std=0.1)
        return model


def _encoder(model: str, **settings: Any) -> Architecture:
    known = {**TEXT, "max_position_embeddings": 32, "num_labels": 3, "pad_token_id": 0}
    return Architecture("encoder", model, {**known, **settings}, classified)


def _decoder(model: str, family: str = "decoder", **settings: Any) -> Architecture:
    return Architecture(family, model, settings, causal)


def _experts(model: str, **settings: Any) -> Architecture:
    return Architecture("experts", model, settings, causal)


def _vision(model: str, **settings: Any) -> Architecture:
    return Architecture("vision", model, {"num_labels": 3, **settings}, pictures)


ARCHITECTURES: dict[str, Architecture] = {
    "BERT": _encoder("BertForSequenceClassification", type_vocab_size=1),
    "RoBERTa": _encoder("RobertaForSequenceClassification", type_vocab_size=1),
    "DistilBERT": _encoder(
        "DistilBertForSequenceClassification", dim=WIDTH, hidden_dim=24, n_layers=2, n_heads=2, hidden_size=WIDTH
    ),
    "DeBERTa-v2": _encoder(
        "DebertaV2ForSequenceClassification",
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        share_att_key=False,
        pooler_hidden_size=WIDTH,
        norm_rel_ebd="layer_norm",
    ),
    "ELECTRA": _encoder("ElectraForSequenceClassification", embedding_size=8, type_vocab_size=1),
    "ALBERT": _encoder("AlbertForSequenceClassification", embedding_size=8, type_vocab_size=1),
    "ModernBERT": _encoder(
        "ModernBertForSequenceClassification",
        bos_token_id=1,
        cls_token_id=1,
        eos_token_id=2,
        sep_token_id=2,
        local_attention=4,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "BERT, masked LM": Architecture(
        "encoder", "BertForMaskedLM", {**TEXT, "type_vocab_size": 1, "max_position_embeddings": 32}, causal
    ),
    "GPT-2": _decoder("GPT2LMHeadModel", vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=2, n_head=2),
    "OPT": _decoder("OPTForCausalLM", **{**DECODER, "ffn_dim": 24, "word_embed_proj_dim": 8}),
    "BLOOM": _decoder("BloomForCausalLM", vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=2, **TOKENS),
    "GPT-NeoX": _decoder("GPTNeoXForCausalLM", **DECODER),
    "Falcon": _decoder("FalconForCausalLM", **DECODER),
    "Phi-3": _decoder("Phi3ForCausalLM", **GROUPED),
    "Llama": _decoder("LlamaForCausalLM", **GROUPED),
    "Mistral": _decoder("MistralForCausalLM", **GROUPED, sliding_window=4),
    "Qwen2": _decoder("Qwen2ForCausalLM", **GROUPED, tie_word_embeddings=True),
    "Qwen3": _decoder("Qwen3ForCausalLM", **GROUPED, head_dim=8),
    "Gemma 2": _decoder("Gemma2ForCausalLM", **GROUPED, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    "Gemma 3": _decoder("Gemma3ForCausalLM", **GROUPED, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    "OLMo": _decoder("OlmoForCausalLM", **GROUPED),
    "Mixtral": _experts("MixtralForCausalLM", **GROUPED, num_local_experts=4),
    "Qwen3-MoE": _experts(
        "Qwen3MoeForCausalLM",
        **GROUPED,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        mlp_only_layers=[0],
    ),
    "DeepSeek-V3": _experts(
        "DeepseekV3ForCausalLM",
        **DECODER,
        num_key_value_heads=2,
        moe_intermediate_size=8,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "gpt-oss": _experts("GptOssForCausalLM", **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "Mamba": _decoder(
        "MambaForCausalLM",
        "state-space",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        state_size=4,
        time_step_rank=2,
        num_hidden_layers=2,
        **TOKENS,
    ),
    "Mamba-2": _decoder(
        "Mamba2ForCausalLM",
        "state-space",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        state_size=4,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=8,
        n_groups=1,
        chunk_size=4,
        **TOKENS,
    ),
    "Jamba": Architecture(
        "state-space",
        "JambaForCausalLM",
        {
            **GROUPED,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        causal,
    ),
    "Falcon-H1": _decoder(
        "FalconH1ForCausalLM",
        "state-space",
        **GROUPED,
        head_dim=8,
        mamba_d_ssm=16,
        mamba_n_heads=2,
        mamba_d_head=8,
        mamba_d_state=4,
        mamba_chunk_size=4,
    ),
    "LFM2": _decoder(
        "Lfm2ForCausalLM",
        "state-space",
        **GROUPED,
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention"],
    ),
    "Qwen3-Next": Architecture(
        "state-space",
        "Qwen3NextForCausalLM",
        {
            **GROUPED,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
            "mlp_only_layers": [0],
        },
        causal,
    ),
    "T5": Architecture(
        "encoder-decoder",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "feed_forward_proj": "gated-gelu",
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
        translated,
    ),
    "BART": Architecture(
        "encoder-decoder",
        "BartForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
            **TOKENS,
        },
        translated,
    ),
    "Whisper": Architecture(
        "encoder-decoder",
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "num_mel_bins": 8,
            "d_model": WIDTH,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
            **TOKENS,
        },
        speech,
    ),
    "ViT": _vision("ViTForImageClassification", **IMAGES),
    "DINOv2": _vision("Dinov2ForImageClassification", **{**IMAGES, "mlp_ratio": 2}),
    "Swin": _vision(
        "SwinForImageClassification",
        image_size=SIZE,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
        window_size=4,
        mlp_ratio=2.0,
    ),
    "ConvNeXt": _vision(
        "ConvNextForImageClassification",
        image_size=SIZE,
        patch_size=2,
        num_stages=2,
        hidden_sizes=[8, WIDTH],
        depths=[1, 1],
    ),
    "CLIP": Architecture(
        "vision-language",
        "CLIPModel",
        {
            "text_config": {**DECODER, "projection_dim": 8},
            "vision_config": {**IMAGES, "projection_dim": 8},
            "projection_dim": 8,
        },
        pairs,
    ),
    "LLaVA": Architecture(
        "vision-language",
        "LlavaForConditionalGeneration",
        {
            "vision_config": {"model_type": "clip_vision_model", **IMAGES},
            "text_config": {"model_type": "llama", **GROUPED},
            "image_token_id": IMAGE_TOKEN,
            "image_seq_length": 4,
        },
        described,
    ),
    "Qwen2.5-VL": Architecture(
        "vision-language",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "vision_config": {
                "depth": 2,
                "hidden_size": WIDTH,
                "intermediate_size": 24,
                "num_heads": 2,
                "patch_size": 8,
                "out_hidden_size": WIDTH,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            "text_config": {**GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": 30,
            "vision_start_token_id": 3,
            "vision_end_token_id": 3,
        },
        tiled,
    ),
    "Gemma 3, vision": Architecture(
        "vision-language",
        "Gemma3ForConditionalGeneration",
        {
            "vision_config": {"model_type": "siglip_vision_model", **IMAGES, "vision_use_head": False},
            "text_config": {**GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_TOKEN,
        },
        described_by_type,
    ),
    "SmolVLM": Architecture(
        "vision-language",
        "SmolVLMForConditionalGeneration",
        {
            "vision_config": {"model_type": "smolvlm_vision", **IMAGES},
            "text_config": {"model_type": "llama", **GROUPED},
            "scale_factor": 2,
            "image_token_id": IMAGE_TOKEN,
            "pad_token_id": 0,
        },
        framed,
    ),
    "PaliGemma": Architecture(
        "vision-language",
        "PaliGemmaForConditionalGeneration",
        {
            "vision_config": {"model_type": "siglip_vision_model", **IMAGES, "vision_use_head": False},
            "text_config": {"model_type": "gemma", **GROUPED, "head_dim": 8},
            "image_token_index": IMAGE_TOKEN,
            "projection_dim": WIDTH,
        },
        described_by_type,
    ),
    "Gemma 4": Architecture(
        "vision-language",
        "Gemma4ForConditionalGeneration",
        {
            "vision_config": {
                **IMAGES,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "position_embedding_size": 4,
                "use_clipped_linears": True,
            },
            "audio_config": {
                "hidden_size": WIDTH,
                **LAYERS,
                "subsampling_conv_channels": [8, 4],
                "conv_kernel_size": 3,
                "attention_chunk_size": 2,
                "attention_context_left": 3,
                "output_proj_dims": WIDTH,
            },
            "text_config": {
                **GROUPED,
                "head_dim": 8,
                "global_head_dim": WIDTH,
                "sliding_window": 4,
                "layer_types": ["sliding_attention", "full_attention"],
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 4,
            },
            "image_token_id": IMAGE_TOKEN,
            "audio_token_id": AUDIO_TOKEN,
            "video_token_id": 29,
        },
        seen_and_heard,
        precise=False,  # attention to sounds casts to float32
    ),
    "Qwen2-Audio": Architecture(
        "audio-language",
        "Qwen2AudioForConditionalGeneration",
        {
            "audio_config": {
                "num_mel_bins": 8,
                "d_model": WIDTH,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 24,
                "max_source_positions": 8,
            },
            "text_config": {"model_type": "qwen2", **GROUPED},
            "audio_token_index": IMAGE_TOKEN,
        },
        heard,
    ),
}


def collapsed(paths: Iterable[str]) -> dict[str, list[str]]:
    """Layer names by the block they stand in, indices as `*`."""
    found: dict[str, list[str]] = {}
    for path in dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path) for path in paths):
        block, _, name = path.rpartition(".*.") if ".*." in path else path.rpartition(".")
        found.setdefault(f"{block}.*" if ".*." in path else block, []).append(name)
    return found


def matched(architecture: Architecture) -> dict[str, Any]:
    """What "all-linear" and each scope match, and what "all-linear" leaves out and why."""
    model = architecture.build()
    everything = select(survey(model))
    found: dict[str, Any] = {"layers": len(everything.layers)}
    rest = set(everything.layers)
    for scope in SCOPES:
        try:
            layers = select(survey(model), scope).layers
        except TargetError:
            continue
        found[scope] = len(layers) if scope == "language" else collapsed(layers)
        rest -= set(layers) if scope in PARTS else set()
    return found | {
        "other": collapsed(path for path in everything.layers if path in rest),
        "left out": everything.skipped,
    }


GOLDEN: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
"""What `matched` must give, by architecture, entries that hold nothing left out."""
ROUTED = next(method for method in small_methods().values() if not method.mergeable)
"""A method whose update depends on its input."""


def routed(architecture: Architecture) -> Any:
    """The model with routed adapters on everything but fused experts, which have no input of their own to route by."""
    model = architecture.build()
    scopes = survey(model).scopes
    exclude = ["experts"] if any(scopes.part(name) == "experts" for name, _ in model.named_parameters()) else []
    ll.inject(model, ROUTED, exclude=exclude)
    return model


@dataclass(frozen=True)
class Refusal:
    """Something that cannot work on some architectures, and is refused by name."""

    what: str
    on: tuple[str, ...]
    attempt: Callable[[Architecture], Any]

    def message(self, name: str) -> str:
        """What is said on one of them.

        Raises:
            AssertionError: it was not refused.
        """
        try:
            self.attempt(ARCHITECTURES[name])
        except TargetError as error:
            return str(error)
        raise AssertionError(f"{self.what} was not refused on {name}")


REFUSALS: tuple[Refusal, ...] = (
    Refusal("routed adapters", ("Mamba", "Jamba"), routed),
    Refusal("projector", ("Gemma 3, vision",), lambda architecture: select(survey(architecture.build()), "projector")),
)


def table() -> str:
    """Markdown: a row for all models of a family that look alike, with layer names a block and what stays frozen."""
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, architecture in ARCHITECTURES.items():
        alike[architecture.family, *_cells(GOLDEN[name])].append(name + _footnotes(name))
    lines = [
        ["family", "models", '"all-linear"', "more scopes", "left out"],
        ["---"] * 5,
    ]
    lines += [[family, "; ".join(names), *cells] for (family, *cells), names in alike.items()]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "\n".join(f"{number}. {r.what}: {r.message(r.on[0])}" for number, r in enumerate(REFUSALS, 1))
    return f"{rows}\n\n{notes}\n"


def _footnotes(name: str) -> str:
    numbers = [str(number) for number, refusal in enumerate(REFUSALS, 1) if name in refusal.on]
    return f" ({', '.join(numbers)})" if numbers else ""


def _cells(golden: Mapping[str, Any]) -> tuple[str, str, str]:
    """Layer names a block in "all-linear" and in towers beside it, and what is left out of both."""
    counts = {
        scope: sum(len(names) for names in golden[scope].values())
        for scope in (*PARTS, "other", "vision", "audio", "projector")
        if scope in golden
    }
    shown = {scope: f"{scope} {count}" for scope, count in counts.items()}
    towers = [shown.pop(tower) for tower in TOWERS if tower in shown]
    left = dict.fromkeys(_part_name(path, why) for path, why in golden["left out"].items() if "scope" not in why)
    return ", ".join(shown.values()), ", ".join(towers), ", ".join(f"`{name}`" for name in left)


def _part_name(path: str, why: str) -> str:
    """A head by its outermost name, a pooler or router by its own."""
    return path.split(".")[0] if why == "head" else path.removesuffix(".dense").rpartition(".")[2]


if __name__ == "__main__":
    print(table())
