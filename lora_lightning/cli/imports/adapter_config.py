"""peft's adapter_config.json: the model and the method; data and trainer are not in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_lightning.cli.imports.translation import Translation, method_of
from lora_lightning.errors import SettingsError

TOOL = "peft"
TASKS = {"CAUSAL_LM": "causal-lm", "SEQ_2_SEQ_LM": "seq2seq-lm", "SEQ_CLS": "sequence-classification",
         "TOKEN_CLS": "token-classification"}  # fmt: skip
DEFAULT_RANK = DEFAULT_ALPHA = 8


def is_mine(given: Mapping[str, Any]) -> bool:
    """Whether it is a configuration of peft."""
    return "peft_type" in given


def translate(given: Mapping[str, Any], folder: Path) -> Translation:
    """The configuration in our words.

    Raises:
        SettingsError: it is not of a LoRA.
    """
    t = Translation(TOOL, given)
    kind, task = t.get("peft_type"), t.get("task_type")
    if kind != "LORA":
        raise SettingsError(f'peft_type is "{kind}"; LORA is read, as which peft also keeps DoRA and rsLoRA.')
    if (base := t.get("base_model_name_or_path")) is not None:
        t.put("model.pretrained", base)
    else:
        t.lose("base_model_name_or_path", "name the base in model.pretrained")
    if task in TASKS:
        t.put("model.task", TASKS[task])
    elif task is not None:
        t.lose("task_type", f"choose model.task; those that are known from peft are {', '.join(TASKS)}")
    t.put("model.method", method_of({"use_dora": True} if t.get("use_dora", default=False) else {}))
    t.put("model.method.rank", t.number("r", default=DEFAULT_RANK))
    t.put("model.method.alpha", float(t.number("lora_alpha", default=DEFAULT_ALPHA)))
    t.put("model.method.dropout", float(t.number("lora_dropout", default=0.0)))
    if t.get("use_rslora", default=False):
        t.put("model.method.scaling_rule", "alpha/sqrt(r)")
    _layers(t)
    if (start := t.get("init_lora_weights", default=True)) not in (True, "true", "True"):
        ours = {"gaussian": "gaussian"}.get(str(start).lower())
        if ours and not given.get("use_dora"):
            t.put("model.method.start", ours)
        else:
            t.lose("init_lora_weights", "PiSSA and other starts cannot be trained here; export reads a folder of them")
    if (bias := t.get("bias", default="none")) != "none":
        t.lose("bias", f"{bias}: name the biases in model.also_train")
    if not given.get("use_qalora"):
        t.get("qalora_group_size")
    for name in [name for name, value in given.items() if value in (False, [], {}, "")]:
        t.get(name)  # it is off
    t.notes.append(f"these are settings alone; to go on from the trained weights, set model.adapter: {folder}")
    t.notes.append("data and trainer are not in the file: add the sections, or give another --config")
    t.finish()
    return t


def _layers(t: Translation) -> None:
    """Which layers, and those with settings of their own."""
    if (targets := t.get("target_modules")) is not None:
        t.put("model.targets", sorted(targets) if isinstance(targets, list) else targets)
    if left := t.get("exclude_modules"):
        t.put("model.exclude", [left] if isinstance(left, str) else list(left))
    if saved := t.get("modules_to_save"):
        t.put("model.also_train", list(saved))
    if tokens := t.get("trainable_token_indices"):
        t.put("model.train_tokens", tokens)
    overrides: dict[str, dict[str, Any]] = {}
    for name, field in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
        for pattern, value in (t.get(name) or {}).items():
            overrides.setdefault(pattern, {})[field] = value if field == "rank" else float(value)
    if overrides:
        t.put("model.overrides", overrides)
