"""Which layers peft's own configuration selects, so that a file that lacks one of them is noticed.

Those of peft 0.21.2; tests/exporters/peft/test_selection.py compares them with its behaviour.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from lora_lightning.errors import did_you_mean
from lora_lightning.exporters.peft import rules
from lora_lightning.models.heads import output_embeddings

_ALL_LINEAR = "all-linear"


def expected_modules(config: Mapping[str, Any], model: nn.Module, modules: Mapping[str, nn.Module]) -> set[str] | None:
    """Modules that `target_modules` selects; None where the file does not say.

    Args:
        config: adapter_config.json.
        model: the plain model.
        modules: its modules by path, each under its first one.
    """
    targets = config.get("target_modules")
    if not targets:
        return set() if config.get("target_parameters") else None
    saved = [*(config.get("modules_to_save") or ()), *rules.task_heads(config.get("task_type"))]
    if isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
        targets = _all_linear(model, modules, config.get("task_type"))
    found = rules.selected(targets, saved, [path for path in modules if path])
    found -= rules.selected(config.get("exclude_modules") or (), (), found)
    indices = config.get("layers_to_transform")
    if isinstance(targets, str) or indices is None or indices == []:
        return found
    wanted = {indices} if isinstance(indices, int) else set(indices)
    listed = set(targets)  # a path that is named in full is selected in any layer
    return {path for path in found if path in listed or _index(path, config.get("layers_pattern")) in wanted}


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module], task: str | None) -> list[str]:
    head = output_embeddings(model)
    if head is None and task == "SEQ_CLS":
        head = next((modules[name] for name in rules.task_heads(task) if name in modules), None)
    linear = [path for path, module in modules.items() if rules.is_linear(module) and module is not head]
    return [path for path in linear if path]


def _index(path: str, patterns: str | Collection[str] | None) -> int | None:
    """Number of the block that a module is in, by its first number."""
    named = [patterns] if isinstance(patterns, str) else list(patterns or ())
    found = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path) for pattern in named if pattern]
    if not found:
        found = [re.match(r".*?\.[^.]*\.(\d+)\.", path)]
    return next((int(match[1]) for match in found if match), None)


def dead_settings(config: Mapping[str, Any], paths: Collection[str]) -> tuple[str, ...]:
    """Targets and patterns that no layer of the file belongs to; peft says nothing about them."""
    targets = config.get("target_modules") or ()
    dead = [] if isinstance(targets, str) else [t for t in targets if not rules.selected([t], (), paths)]
    notes = [
        f'target_modules names "{target}", which no tensor of the file belongs to.{did_you_mean(target, paths)}'
        for target in dead
    ]
    for setting in ("rank_pattern", "alpha_pattern"):
        unmatched = _unmatched(config.get(setting) or {}, paths)
        notes += [
            f'{setting} has "{pattern}", which decides nothing about any layer of the file' for pattern in unmatched
        ]
    return tuple(notes)


def _unmatched(patterns: Iterable[str], paths: Collection[str]) -> list[str]:
    """Patterns that are the first to match no path."""
    patterns = list(patterns)
    deciding = {next((p for p in patterns if rules.pattern_value({p: True}, path, False)), None) for path in paths}
    return [pattern for pattern in patterns if pattern not in deciding]
