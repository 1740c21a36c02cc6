"""Inputs on which two models of one class are compared: few and short, but every new token is among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
LENGTH = 8


def sample_inputs(model: nn.Module, ids: Sequence[int] = ()) -> Inputs | None:
    """Inputs for one Hugging Face model, on its device; None where its kind of input is not known.

    Args:
        model: the model.
        ids: token ids that must be among them.
    """
    name = getattr(model, "main_input_name", None)
    make = _MAKERS.get(name) if isinstance(name, str) and hasattr(model, "config") else None
    if make is None:
        return None
    drawn = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    inputs = make(model.config, drawn, ids)
    return {key: value.to(device, dtype if value.is_floating_point() else value.dtype) for key, value in inputs.items()}


def _tokens(config: Any, drawn: torch.Generator, ids: Sequence[int]) -> Inputs:
    text = config.get_text_config()
    known = int(getattr(text, "vocab_size", 0) or 0)
    special = {text_id for text_id in _specials(config) if text_id < known}
    choice = [i for i in range(min(known, 4096)) if i not in special] or [0]
    picked = torch.randint(len(choice), (LENGTH,), generator=drawn).tolist()
    end = getattr(config, "eos_token_id", None)
    row = [*[choice[i] for i in picked], *ids, *([end] if isinstance(end, int) and end < known else [])]
    whole = torch.tensor([row])
    found = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = whole.flip(1) if end is None else whole
    return found


def _specials(config: Any) -> set[int]:
    """Ids that mean something to a model: images, sounds, padding."""
    found: set[int] = set()
    for part in (config, config.get_text_config()):
        for key, value in vars(part).items():
            if key.endswith(("_token_id", "_token_index")) and isinstance(value, int):
                found.add(value)
    return found


def _image(config: Any, drawn: torch.Generator, _ids: Sequence[int]) -> Inputs:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.randn(1, getattr(vision, "num_channels", 3), height, width, generator=drawn)}


def _waves(_config: Any, drawn: torch.Generator, _ids: Sequence[int]) -> Inputs:
    return {"input_values": torch.randn(1, 4000, generator=drawn)}


def _features(config: Any, drawn: torch.Generator, ids: Sequence[int]) -> Inputs:
    frames = 2 * int(getattr(config, "max_source_positions", 50))
    found = {"input_features": torch.randn(1, getattr(config, "num_mel_bins", 80), frames, generator=drawn)}
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = _tokens(config, drawn, ids)["input_ids"]
    return found


_MAKERS: Mapping[str, Callable[[Any, torch.Generator, Sequence[int]], Inputs]] = {
    "input_ids": _tokens,
    "pixel_values": _image,
    "input_values": _waves,
    "input_features": _features,
}
