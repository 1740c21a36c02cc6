"""Configs of LLaMA-Factory, with the descriptions of data sets in dataset_info.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_lightning.cli.imports import training
from lora_lightning.cli.imports.translation import Translation
from lora_lightning.errors import SettingsError

TOOL = "LLaMA-Factory"
STAGES = {"sft": "causal-lm", "pt": "causal-lm", "dpo": "preference", "kto": "preference", "rm": "reward"}
LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
TAGS = {("from", "value"), ("role", "content")}


def is_mine(given: Mapping[str, Any]) -> bool:
    """Whether a config is one of LLaMA-Factory."""
    return "model_name_or_path" in given and bool({"stage", "finetuning_type", "template", "dataset"} & set(given))


def translate(given: Mapping[str, Any], folder: Path) -> Translation:
    """The config in our words.

    Args:
        given: its settings.
        folder: where it lies; the folder of data sets is looked for from there, and from the working directory.

    Raises:
        SettingsError: it trains something else than an adapter.
    """
    t = Translation(TOOL, given)
    stage, kind = str(t.get("stage", default="sft")), str(t.get("finetuning_type", default="lora"))
    if stage not in STAGES:
        raise SettingsError(f'stage is "{stage}", for which there is no task here. Stages: {", ".join(STAGES)}.')
    if kind != "lora":
        raise SettingsError(f'finetuning_type is "{kind}"; adapters are trained here. The one that is read is lora.')
    t.put("model.pretrained", t.get("model_name_or_path"))
    t.put("model.task", STAGES[stage])
    if start := t.get("adapter_name_or_path"):
        _start(t, start)
    training.adapter(t, alpha_of_rank=2)
    target = t.get("lora_target", default="all")
    t.put("model.targets", "all-linear" if target == "all" else training.listed(target))
    _preference(t, stage)
    training.optimizer(t, rate=5e-5)
    training.schedule(t, decay="linear")
    _data(t, stage, folder)
    training.length(t, epochs=3.0, batch=8)
    training.precision(t)
    _quantization(t)
    t.put("model.gradient_checkpointing", not t.get("disable_gradient_checkpointing", default=False))
    training.logging(t)
    t.finish()
    return t


def _start(t: Translation, start: Any) -> None:
    folders = training.listed(start)
    if t.get("create_new_adapter", default=False):
        t.put("model.adapter", folders)
    else:
        t.put("model.adapter", folders[-1])
        if len(folders) > 1:
            t.lose("adapter_name_or_path", "the earlier ones are merged there; merge them into a base (export) first")


def _preference(t: Translation, stage: str) -> None:
    """The loss of preferences."""
    beta, loss = t.number("pref_beta", default=0.1), str(t.get("pref_loss", default="sigmoid"))
    gamma, smoothing = t.number("simpo_gamma", default=0.5), t.number("dpo_label_smoothing", default=0.0)
    weights = {
        "desirable_weight": t.number("kto_chosen_weight", default=1.0),
        "undesirable_weight": t.number("kto_rejected_weight", default=1.0),
    }
    if STAGES[stage] != "preference":
        return
    settings: dict[str, Any] = {"loss_type": "kto" if stage == "kto" else LOSSES.get(loss, "dpo"), "beta": float(beta)}
    if stage == "kto":
        settings |= {name: float(value) for name, value in weights.items() if value != 1.0}
    elif loss not in LOSSES:
        t.lose("pref_loss", f"the losses here are {', '.join(LOSSES.values())} and kto; dpo stands in its place")
    elif loss == "simpo":
        settings["gamma"] = float(gamma)
    if smoothing and settings["loss_type"] in ("dpo", "simpo"):
        settings["label_smoothing"] = float(smoothing)
    t.put("model.task_settings", settings)


def _quantization(t: Translation) -> None:
    bits, double = t.number("quantization_bit"), t.get("double_quantization", default=True)
    how, kind = t.get("quantization_method", default="bnb"), t.get("quantization_type", default="nf4")
    if bits is None:
        return
    if how not in ("bnb", "bitsandbytes"):
        t.lose("quantization_method", "bitsandbytes quantizes here")
    if bits == 4:
        t.put("model.quantization", "nf4-double" if double else "nf4")
        if kind != "nf4":
            t.lose("quantization_type", "nf4 stands in its place")
    elif bits == 8:
        t.put("model.quantization", "int8")
    else:
        t.lose("quantization_bit", "the base has 4 (nf4) or 8 bits (int8)")


def _data(t: Translation, stage: str, folder: Path) -> None:
    """Data sets, by the file that describes them."""
    t.put("data.max_length", t.number("cutoff_len", default=2048))
    names = training.listed(t.get("dataset", default=[]))
    validation = training.listed(t.get("eval_dataset", default=[]))
    place = t.get("dataset_dir", default="data")
    known, root = _described(str(place), folder)
    if known is None:
        t.notes.append(f'dataset_info.json was not found in "{place}": data.train has the names of the data sets')
    made = [_one(t, name, (known or {}).get(name, {}), root, stage) for name in names]
    kept = [one for one in made if one[:2] == made[0][:2]]
    if len(kept) < len(made):
        others = [name for name, one in zip(names, made, strict=True) if one not in kept]
        t.lose("dataset", f"one run reads rows of one layout; left out: {', '.join(others)}")
    if not kept:
        kept = [_one(t, "", {}, root, stage)]
        t.lose("dataset", "name the training data in data.train")
    kind, settings, _ = kept[0]
    t.put("data", kind)
    for name, value in settings.items():
        t.put(f"data.{name}", value)
    sources = [source for _, _, source in kept if source]
    if sources:
        t.put("data.train", sources[0] if len(sources) == 1 else sources)
    held = [_one(t, name, (known or {}).get(name, {}), root, stage)[2] for name in validation]
    if held:
        t.put("data.validation", held[0] if len(held) == 1 else held)
    _shares(t, bool(held))
    if kind in ("Chat", "Preferences"):
        _template(t, kind)
    elif (name := t.get("template")) and name not in ("default", "empty"):
        t.lose("template", f"{kind} learns texts as they are; turn the rows into messages for Chat to use a template")
    if t.get("packing", "neat_packing", default=False):
        t.put("data.packing", True) if kind != "Preferences" else t.lose("packing", "pairs are not packed")
        if kind == "PlainText":
            t.put("data.block", False)
    if t.get("mask_history", default=False):
        t.put("data.turns", "last") if kind == "Chat" else t.lose("mask_history", "only Chat has turns")


def _shares(t: Translation, validated: bool) -> None:
    """How much is held out, and how much of the rest is used."""
    share = t.number("val_size", default=0.0)
    if share >= 1:
        t.lose("val_size", "data.validation_fraction is a fraction; a tenth stands in its place")
        share = 0.1
    if not validated:
        t.put("data.validation_fraction", float(share))
    if most := t.number("max_samples"):
        t.put("data.limit", most)
        t.notes.append("max_samples: data.limit counts the rows of all sources together")


def _template(t: Translation, kind: str) -> None:
    training.template(t, t.get("template"))
    thinking = t.get("enable_thinking")
    if thinking is not None and t.config.get("data.chat_template") == "qwen-3":
        t.put("data.chat_template_kwargs", {"enable_thinking": bool(thinking)})
    elif thinking is not None and thinking is not True:
        t.lose("enable_thinking", f"a variable of a template: data.chat_template_kwargs of {kind}")


def _described(place: str, folder: Path) -> tuple[dict[str, Any] | None, Path]:
    """dataset_info.json and its folder, from the working directory or from where the config lies upward."""
    for root in (Path(), folder, *folder.absolute().parents):
        file = root / place / "dataset_info.json"
        if file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise SettingsError(f"{file} is not valid JSON: {error}.") from error
            return dict(found), root / place
    return None, Path(place)


def _one(
    t: Translation, name: str, told: Mapping[str, Any], root: Path, stage: str
) -> tuple[str, dict[str, Any], str | None]:
    """Kind of data, its settings, and the source, of one data set."""
    source = _source(name, told, root)
    if told.get("ms_hub_url") and not told.get("hf_hub_url"):
        t.notes.append(f"{name}: it lies on ModelScope; data.train needs a file, a folder or a name on the hub")
    columns = dict(told.get("columns") or {})
    chats = told.get("formatting", "alpaca" if told else "sharegpt") in ("sharegpt", "openai")
    if stage == "pt":
        return "PlainText", {"text": columns.get("prompt", "text")}, source
    if chats:
        tags = dict(told.get("tags") or {})
        keys = (tags.get("role_tag", "from"), tags.get("content_tag", "value"))
        if keys not in TAGS:
            t.notes.append(
                f"{name}: turns have the keys {keys[0]} and {keys[1]}; Chat reads role, content and from, value"
            )
    if stage in ("dpo", "rm", "kto"):
        return "Preferences", _compared(columns, chats, stage), source
    if chats:
        found = {"messages": columns.get("messages", "conversations") if told else None, "tools": columns.get("tools")}
        return "Chat", {key: value for key, value in found.items() if value is not None}, source
    if name and told and ({"history", "system", "tools"} & set(columns)):
        t.notes.append(f"{name}: Completions reads no history, system or tools; Chat does, from a column of messages")
    asks, more = columns.get("prompt", "instruction"), columns.get("query", "input")
    answer = columns.get("response", "output")
    if (asks, more, answer) == ("instruction", "input", "output"):
        return "Completions", {"format": "instruction"}, source
    asked = f"{{{asks}}}\n" + (f"{{{more}}}\n" if "query" in columns else "")
    return "Completions", {"prompt_template": asked, "completion": answer}, source


def _compared(columns: Mapping[str, Any], chats: bool, stage: str) -> dict[str, Any]:
    prompt = columns.get("messages", "conversations") if chats else columns.get("prompt", "instruction")
    if stage == "kto":
        label = columns.get("kto_tag", "kto_tag")
        return {"prompt": prompt, "completion": columns.get("response", "output"), "label": label}
    return {
        "prompt": prompt,
        "chosen": columns.get("chosen", "chosen"),
        "rejected": columns.get("rejected", "rejected"),
    }


def _source(name: str, told: Mapping[str, Any], root: Path) -> str | None:
    if hub := told.get("hf_hub_url"):
        subset, split = told.get("subset") or "", told.get("split") or ""
        return f"{hub}{f':{subset}' if subset or split else ''}{f':{split}' if split else ''}"
    if file := told.get("file_name"):
        return str(root / file)
    return name or None
