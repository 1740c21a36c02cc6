"""Models without pretrained weights, for trying things out: `random:MODEL_TYPE`.

Weights are a function of the configuration and a seed, so that the base of an adapter can be made again. A name states
all of it: `random:MODEL_TYPE:SEED:{"setting": value, ...}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lora_lightning.errors import ModelError, SettingsError, did_you_mean

PREFIX = "random:"


def is_random(name: str) -> bool:
    """Whether `name` means a model without pretrained weights."""
    return name.startswith(PREFIX)


def full_name(name: str, settings: Mapping[str, Any], seed: int) -> str:
    """`name` with settings and seed, where it does not state them already.

    Raises:
        ModelError: transformers has no such model type, with the nearest.
        SettingsError: the model type has no such setting, with the nearest.
    """
    kind, own_seed, own = _parts(name)
    merged = {**own, **settings}
    known = _settings(kind)
    for key in merged:
        if key not in known:
            raise SettingsError(f'model.random_config: {kind} has no "{key}".{did_you_mean(key, known)}')
    return f"{PREFIX}{kind}:{seed if own_seed is None else own_seed}:{json.dumps(merged, sort_keys=True)}"


def config_of(name: str, **options: Any) -> Any:
    """The configuration that a full name states, with further settings."""
    kind, _, settings = _parts(name)
    return _config(kind, {**settings, **options})


def build_random(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` builds, in eval mode, with the weights that a full name states; the run's random numbers stay."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_parts(name)[1] or 0)
        return make().eval()


def tokenizer_settings(name: str, tokenizer: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that follow from a tokenizer, where the model type has them and `given` does not.

    Texts start and end with the tokenizer's own marks; a decoder starts with the padding token, as T5's does.
    """
    kind = _parts(name)[0]
    known = _settings(kind)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    found = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": start}
    found |= {"eos_token_id": end, "decoder_start_token_id": tokenizer.pad_token_id}  # the latter of a decoder only
    if known.get("forced_eos_token_id") is not None:
        found["forced_eos_token_id"] = end
    return {key: value for key, value in found.items() if key in known and key not in given}


def _parts(name: str) -> tuple[str, int | None, dict[str, Any]]:
    kind, _, rest = name.removeprefix(PREFIX).partition(":")
    seed, _, settings = rest.partition(":")
    try:
        return kind, int(seed) if seed else None, json.loads(settings) if settings else {}
    except ValueError as error:
        raise ModelError(
            f'model.pretrained is "{name}"; after {PREFIX}{kind} there may stand a seed and settings as JSON only.'
        ) from error


def _settings(kind: str) -> dict[str, Any]:
    """Settings of a model type by name, as transformers has them."""
    config = _config(kind, {})
    start = {"decoder_start_token_id": None} if config.is_encoder_decoder else {}
    return {**start, **vars(config), **{name: getattr(config, own) for name, own in config.attribute_map.items()}}


def _config(kind: str, settings: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f'model.pretrained is "{PREFIX}{kind}"; transformers has no such model type.'
            f"{did_you_mean(kind, CONFIG_MAPPING.keys())}"
        )
    return AutoConfig.for_model(kind, **settings)
