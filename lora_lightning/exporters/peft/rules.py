"""How peft reads its own configuration: which modules a list, a pattern or a task selects.

Those of peft 0.21.2; tests/exporters/peft/test_rules.py compares them with its behaviour. An export is checked against
them, because a name that selects one module too many would load without a word and compute another model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from lora_lightning.adapters.layers.kinds import ExpertStack
from lora_lightning.errors import ExportError
from lora_lightning.exporters.peft import experts as peft_experts
from lora_lightning.models.paths import join
from lora_lightning.models.weight_readers import reads

TYPE = "LORA"
CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE_SAVED = ("embed_tokens", "lm_head")
"""Layers whose base weight travels along when they are adapted, because their vocabulary may have been resized."""
DEFAULT_RANK = 8
DEFAULT_ALPHA = 8

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_RENAMING_FAMILIES = ("mixtral", "qwen2_moe")
_STATE_SPACE = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_REFUSED_THERE = ("out_proj", "conv1d")
_EXPERT_NAMES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def task_type(model: nn.Module) -> str | None:
    """The task, in peft's words, of a Hugging Face model class, where the class name tells."""
    name = type(model).__name__
    if name.endswith("ForConditionalGeneration"):
        encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        # the class of peft for that task calls the model with token ids only
        return "SEQ_2_SEQ_LM" if encoder_decoder and getattr(model, "main_input_name", None) == "input_ids" else None
    if not hasattr(model, "base_model_prefix"):
        return None
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)


def task_heads(task: str | None) -> tuple[str, ...]:
    """Names that peft adds to `modules_to_save` for a task."""
    return _TASK_HEADS.get(task or "", ())


def renames_experts(model: nn.Module, fused: Collection[str]) -> bool:
    """Whether peft takes names of linear layers in this model for fused experts, as before transformers 5.

    It asks the type of the model alone, which need not have any experts.

    Args:
        model: the whole model.
        fused: its experts, for a transformers that does not say.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        return False
    from transformers import conversion_mapping

    families = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", None)  # private; without it, be careful
    if families is None:
        return bool(fused)
    return families.get(kind, kind if kind == "mixtral" else None) in _RENAMING_FAMILIES


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The layer whose rows peft means where no layer is named; None where the model does not say."""
    try:
        found: nn.Module = model.get_input_embeddings()  # type: ignore[operator]  # of transformers' models
    except (AttributeError, NotImplementedError):
        return None
    return found


def following_rows(model: nn.Module, sharing: Collection[str]) -> list[str]:
    """Layers to which peft gives the rows of the input's embedding without being asked, by path.

    It asks the configuration and the class of the whole model, no model inside it, whether and what they tie. A layer
    that only holds the matrix, for the embedding as well, counts as one of them.

    Args:
        model: the whole model.
        sharing: layers that share the embedding's matrix, with the embedding itself.
    """
    stated = getattr(model, "_tied_weights_keys", None)
    config = getattr(model, "config", None)
    if not isinstance(stated, Mapping) or config is None or not config.to_dict().get("tie_word_embeddings"):
        return []
    tied = dict(stated)
    for path, module in model.named_modules():
        inner = getattr(module, "_tied_weights_keys", None)
        if path and isinstance(inner, Mapping):
            tied |= {join(path, name): join(path, source) for name, source in inner.items()}
    pairs = {(name.rpartition(".")[0], source.rpartition(".")[0]) for name, source in tied.items()}
    embedding = input_embedding(model)
    own = next((path for path in sharing if model.get_submodule(path) is embedding), "")
    owners = [path for path, source in pairs if path and source in sharing]
    holders = [source for path, source in pairs if path == own]
    return [path for path in sharing if path != own and (path in holders or path.endswith(tuple(owners)))]


def looks_up_plainly(layer: nn.Module) -> bool:
    """Whether an embedding gives rows of its matrix, times a scale, and nothing else, as peft does in its place."""
    if not isinstance(layer, nn.Embedding) or type(layer).forward is nn.Embedding.forward:
        return True
    return hasattr(layer, "embed_scale") and list(layer._parameters) == ["weight"] and not layer._modules


def selected(targets: str | Collection[str], saved: Collection[str], names: Iterable[str]) -> set[str]:
    """Modules that `target_modules` selects; those at or below `modules_to_save` never are."""
    if isinstance(targets, str):
        hits = [name for name in names if re.fullmatch(targets, name)]
    else:
        hits = [name for name in names if name in targets or any(name.endswith(f".{target}") for target in targets)]
    return {name for name in hits if not any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved)}


def wrapped(saved: Collection[str], names: Iterable[str]) -> list[str]:
    """Modules that `modules_to_save` replaces by a copy from the file; the ending need not be a whole name."""
    return [name for name in names if any(f"{PREFIX}{name}".endswith(module) for module in saved)]


@lru_cache(maxsize=8192)
def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """What `rank_pattern` or `alpha_pattern` says about a module; the first pattern that matches its ending counts."""
    for pattern, value in patterns.items():
        if _ending(pattern).match(path):
            return value
    return default


def patterns_for(values: Mapping[str, float], default: float) -> dict[str, float]:
    """`rank_pattern` or `alpha_pattern` that gives every path its own value.

    Paths are written plainly; where one path is the ending of another, anchored.
    """
    differing = {path: value for path, value in values.items() if value != default}
    if all(pattern_value(differing, path, default) == value for path, value in values.items()):
        return differing
    return {f"^{re.escape(path)}": value for path, value in differing.items()}


def as_parameters(
    paths: Collection[str], modules: Mapping[str, nn.Module], experts: bool, layers: Iterable[str] = ()
) -> list[str]:
    """Those of `paths` whose name peft takes for the fused experts, and which `target_parameters` selects all the same.

    Args:
        paths: adapted layers.
        modules: every module of the plain model by path.
        experts: what `renames_experts` says of the model.
        layers: layers with something beside their factors, which peft has no place for in a parameter.
    """
    taken = [path for path in paths if experts and path.rpartition(".")[2] in _EXPERT_NAMES]
    return [path for path in taken if isinstance(modules.get(path), nn.Linear) and path not in set(layers)]


def targets_for(
    paths: Collection[str], saved: Collection[str], modules: Collection[str], experts: bool
) -> str | list[str]:
    """`target_modules` that selects exactly `paths`: last names if that is exact, else whole paths, else a pattern.

    Args:
        paths: adapted layers.
        saved: `modules_to_save`, the task's heads included.
        modules: every module path of the plain model.
        experts: what `renames_experts` says of the model.

    Raises:
        ExportError: no such selection exists.
    """
    renamed = [path for path in paths if experts and path.rpartition(".")[2] in _EXPERT_NAMES]
    if renamed:
        raise ExportError(
            f"{renamed[0]}: in this model peft takes the name for the fused experts, so only target_parameters selects "
            "the layer, which has a place for factors alone: no DoRA, no bias. Train it without these, "
            'exclude it, or use format="merged".'
        )
    last_names = sorted({path.rpartition(".")[2] for path in paths})
    candidates: list[str | list[str]] = [last_names, sorted(paths)]
    if not experts:  # peft reduces a pattern to last names there
        candidates.append("|".join(re.escape(path) for path in sorted(paths)))
    for candidate in candidates:
        if selected(candidate, saved, modules) == set(paths):
            return candidate
    missed = sorted(set(paths) - selected(candidates[-1], saved, modules))
    raise ExportError(
        f"no target_modules of peft selects exactly the adapted layers: {missed[0] if missed else sorted(paths)[0]} "
        f"lies inside a module that is saved whole ({', '.join(saved) or 'none'}), or its path ends like another's. "
        'Use format="merged".'
    )


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means the module."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def unlike(path: str, modules: Mapping[str, nn.Module], layer: nn.Module) -> str | None:
    """Why peft's layer at `path` computes something else with the same factors; None where it does not.

    Args:
        path: an adapted layer.
        modules: every module of the plain model by path, under each of its paths.
        layer: what is adapted there.
    """
    parent = modules[path.rpartition(".")[0]]
    if isinstance(layer, ExpertStack) and "." not in path:
        return "it is a parameter of the model itself, around which peft puts nothing"
    if isinstance(layer, ExpertStack):
        return peft_experts.unlike(parent, layer)
    again = next((other for other, module in modules.items() if module is layer and other != path), None)
    if again:
        return f"it stands at {again} too, where peft puts no factors"
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and (reason := _unlike_conv(layer)):
        return reason
    if not looks_up_plainly(layer):
        return f"{type(layer).__name__} has a look-up of its own, while peft looks its factors up plainly"
    owner: Any = type(parent)
    if reads(owner, path.rpartition(".")[2]):
        return f"{owner.__name__} reads the weight without calling the layer, so that peft's factors have no effect"
    kind = getattr(getattr(modules[""], "config", None), "model_type", None)
    if kind in _STATE_SPACE and path.rpartition(".")[2] in _REFUSED_THERE:
        return f"peft refuses {' and '.join(_REFUSED_THERE)} in models of type {kind}"
    return None


def _unlike_conv(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str | None:
    if set(layer.dilation) != {1}:
        return f"dilation={layer.dilation}, which peft drops for its factors"
    if layer.padding_mode != "zeros":
        return f'padding_mode="{layer.padding_mode}", while peft pads with zeros'
    return None
