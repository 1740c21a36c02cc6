"""Kernels of attention that a model can be given, asked of the model's own class before any weight is read."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import transformers
from torch import nn

from lora_lightning.errors import SettingsError

Attention = Literal["sdpa", "flash_attention_2", "flex_attention", "eager"]


def check_attention(skeleton: nn.Module, attention: Attention) -> None:
    """Raise `SettingsError` unless the model can compute attention this way, here.

    Args:
        skeleton: the model without values, made with transformers' own choice.
        attention: a kernel by transformers' name.
    """
    reason = _refused(skeleton, attention)
    if reason is None:
        return
    choices = [name for name in get_args(Attention) if _refused(skeleton, name) is None]
    raise SettingsError(
        f'model.attention is "{attention}", which {type(skeleton).__name__} cannot have here: {reason} It can have: '
        f"{', '.join(choices) or 'none of them; leave it null'}."
    )


def _refused(skeleton: nn.Module, attention: str) -> str | None:
    """What transformers says against it, of the model or one of its parts; None for nothing."""
    for part in skeleton.modules():
        if isinstance(part, transformers.PreTrainedModel):
            model: Any = part
            try:
                model.get_correct_attn_implementation(attention, is_init_check=True)
            except (ValueError, ImportError, RuntimeError) as error:
                return " ".join(str(error).split()).split(" Please request")[0].rstrip(".") + "."
    if attention == "flash_attention_2" and not torch.cuda.is_available():
        return "it needs a GPU."
    return None
