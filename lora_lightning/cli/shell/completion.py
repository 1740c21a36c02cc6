"""What can stand at the end of a command line, for shells.

Imports neither torch nor Lightning, but for the settings of an optimizer, a callback, a data module or a strategy: then
the module of that class.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from lora_lightning.cli import configs
from lora_lightning.cli.cards import fields_of
from lora_lightning.cli.classes import parameters_of
from lora_lightning.cli.configs import find_config
from lora_lightning.errors import LoraLightningError
from lora_lightning.plugins import registry
from lora_lightning.registry import LIGHT_VERBS, SETTINGS, TRAINING_VERBS, Component

_OWN = {"fit": ("--resume",), "validate": ("--run",), "test": ("--run",), "predict": ("--run", "--output")}
_OF_CONFIGS = ("targets", "inspect-data", "estimate", "doctor", "compare", "cite")
_OF_ADAPTERS = ("chat", "generate", "export")
_MODEL = (
    "pretrained method task targets exclude overrides also_train train_tokens untie optimizer head_lr_ratio "
    "lr_scheduler num_labels dtype half_adapters gradient_checkpointing linear_baseline max_new_tokens seed "
    "task_settings random_config quantization adapter loss_head attention compile"
)
_TRAINER = (
    "accelerator strategy devices num_nodes precision logger callbacks fast_dev_run max_epochs min_epochs "
    "max_steps min_steps max_time limit_train_batches limit_val_batches limit_test_batches limit_predict_batches "
    "overfit_batches val_check_interval check_val_every_n_epoch num_sanity_val_steps log_every_n_steps "
    "enable_checkpointing enable_progress_bar enable_model_summary accumulate_grad_batches gradient_clip_val "
    "gradient_clip_algorithm deterministic benchmark inference_mode use_distributed_sampler profiler "
    "detect_anomaly barebones plugins sync_batchnorm reload_dataloaders_every_n_epochs default_root_dir "
    "enable_autolog_hparams model_registry"
)
"""What --model.SETTING and --trainer.SETTING set; tests compare it with the signatures."""
_CHOSEN = {setting: kind for kind, setting in SETTINGS.items()}
"""Kind of the classes that a setting names."""
_STRATEGIES = ("auto", "ddp")
"""Values of trainer.strategy that are no class."""


def candidates(words: Sequence[str]) -> list[str]:
    """Words that can stand in place of the last one, which may be empty.

    Args:
        words: those after `python -m lora_lightning`, as far as they are typed.
    """
    *before, current = words or [""]
    last = before[-1] if before else ""
    verb = next((word for word in before if word in (*TRAINING_VERBS, *LIGHT_VERBS)), None)
    return sorted({word for word in _all(before, last, verb, current) if word.startswith(current)})


def _all(before: Sequence[str], last: str, verb: str | None, current: str) -> Iterable[str]:
    known = registry()
    if last in ("--config", "-c"):
        return configs.config_names()
    if last == "-p":
        return [f"no:{name}" for name, _ in known.manager.list_name_plugin()]
    if last in ("--run", "--resume"):
        return [str(path.parent) for path in Path("runs").glob("*/*/config.yaml")]
    if last == "--model.method":
        return known.methods
    if (key := last.removeprefix("--").removesuffix("+")) in _CHOSEN and last.startswith("--"):
        return [*known.component_names(_CHOSEN[key]), *(_STRATEGIES if key == "trainer.strategy" else ())]
    if verb is None:
        return [*TRAINING_VERBS, *LIGHT_VERBS, *known.commands]
    if verb == "show":
        return [*known.methods, *known.components]
    flags = ["--config", "-p"]
    if verb in TRAINING_VERBS:
        return [*flags, *_OWN[verb], *_settings(before, current)]
    if verb in _OF_ADAPTERS and not current.startswith("-"):
        return [str(path.parent.parent) for path in Path("runs").glob("*/*/adapter/adapter.safetensors")]
    if verb not in _OF_CONFIGS:
        return [*_flags(verb), "-p"]
    return [*_flags(verb), *configs.config_names(), *flags, *_settings(before, current)]


def _flags(verb: str) -> list[str]:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"lora_lightning.cli.verbs.{verb.replace('-', '_')}").add_arguments(parser)
    return [flag for action in parser._actions for flag in action.option_strings]


def _settings(words: Sequence[str], current: str) -> Iterator[str]:
    """Flags of settings: of model and trainer, of the method, and of the class whose settings `current` begins."""
    yield from ("--data", "--seed_everything")
    yield from (f"--model.{name}" for name in _MODEL.split())
    yield from (f"--trainer.{name}" for name in _TRAINER.split())
    method = registry().methods.get(_named(words, "model.method").rpartition(".")[2])
    if method is not None:
        yield from (f"--model.method.{card.name}" for card in fields_of(method))
    for key in _CHOSEN:
        if current.startswith(f"--{key}."):
            yield from (f"--{key}.{setting}" for setting in _settings_of(_named(words, key)))


def _settings_of(class_path: str) -> list[str]:
    """What a class takes that a setting names by its short name or its path; nothing where it cannot be imported."""
    module, _, name = class_path.rpartition(".")
    component = Component(name, "", f"{module}:{name}") if module else registry().component(name)
    try:
        return parameters_of(component.load()) if component is not None else []
    except Exception:
        return []


def _named(words: Sequence[str], key: str) -> str:
    """The class path that a setting has: what the line says last, or a config that it names."""
    found = ""
    for flag, value in pairwise(words):
        if flag.rstrip("+") == f"--{key}":
            found = value
        elif flag in ("--config", "-c"):
            found = _configured(value, key) or found
    return found


def _configured(config: str, key: str) -> str:
    """The class path that a config gives a setting; empty where it gives none, or cannot be read."""
    try:
        node: Any = yaml.safe_load(Path(find_config(config)).read_text(encoding="utf-8"))
        for part in key.split("."):
            node = node[part]
    except (LoraLightningError, OSError, yaml.YAMLError, KeyError, TypeError):
        return ""
    return str(node.get("class_path", "")) if isinstance(node, dict) else node if isinstance(node, str) else ""
