"""Configs of axolotl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_lightning.cli.imports import training
from lora_lightning.cli.imports.translation import Translation
from lora_lightning.errors import SettingsError

TOOL = "axolotl"
LOSSES = ("dpo", "ipo", "orpo", "simpo", "kto")
COMPARED = {
    "intel": {"prompt": "question"},
    "prompt_pairs": {"prompt": "prompt"},
    "ultra": {"prompt": "prompt"},
    "icr": {"prompt": "input"},
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "argilla_chat": {},
}
"""Columns of pairs, by the last word of a type such as chatml.intel."""


def is_mine(given: Mapping[str, Any]) -> bool:
    """Whether a config is one of axolotl."""
    return "base_model" in given


def translate(given: Mapping[str, Any], folder: Path) -> Translation:  # noqa: ARG001 - the signature of all tools
    """The config in our words.

    Raises:
        SettingsError: it trains something else than an adapter.
    """
    t = Translation(TOOL, given)
    adapter, loss = t.get("adapter"), t.get("rl")
    if adapter not in ("lora", "qlora"):
        raise SettingsError(
            f'adapter is "{adapter or "null"}", which trains the model in full; adapters are trained here. Those that '
            "are read are lora and qlora."
        )
    reward = bool(t.get("reward_model", default=False))
    if loss is not None and loss not in LOSSES:
        raise SettingsError(f'rl is "{loss}", for which there is no task here. Losses: {", ".join(LOSSES)}.')
    t.put("model.pretrained", t.get("base_model"))
    t.put("model.task", "reward" if reward else "preference" if loss else "causal-lm")
    if start := t.get("lora_model_dir"):
        t.put("model.adapter", start)
    training.adapter(t, alpha_of_rank=None)
    _targets(t)
    _quantization(t, adapter)
    _preference(t, loss)
    training.optimizer(t, rate=None)
    training.schedule(t, decay="cosine")
    _data(t, bool(loss) or reward, loss == "kto")
    training.length(t, epochs=1.0, batch=1)
    training.precision(t)
    if t.get("gradient_checkpointing", default=False):
        t.put("model.gradient_checkpointing", True)
    training.logging(t)
    t.finish()
    return t


def _targets(t: Translation) -> None:
    names, linear = t.get("lora_target_modules"), t.get("lora_target_linear", default=False)
    if linear and names:
        t.notes.append("lora_target_linear: all linear layers of the backbone, lora_target_modules among them")
    if linear or not names:
        t.put("model.targets", "all-linear")
    else:
        t.put("model.targets", names)


def _quantization(t: Translation, adapter: str) -> None:
    four, eight = t.get("load_in_4bit", default=adapter == "qlora"), t.get("load_in_8bit", default=False)
    if four:
        t.put("model.quantization", "nf4-double")
        t.notes.append("load_in_4bit: nf4 whose scales are quantized too, as there (model.quantization nf4-double)")
    elif eight:
        t.put("model.quantization", "int8")


def _preference(t: Translation, loss: str | None) -> None:
    beta = t.number("rl_beta", "dpo_beta")
    weights = (t.number("kto_desirable_weight"), t.number("kto_undesirable_weight"))
    part, gamma = t.number("orpo_alpha"), t.number("simpo_gamma")
    smoothing = t.number("dpo_label_smoothing")
    if loss is None:
        return
    settings: dict[str, Any] = {"loss_type": loss}
    strength = part if loss == "orpo" and part is not None else beta
    if strength is not None:
        settings["beta"] = float(strength)
    if loss == "kto":
        names = ("desirable_weight", "undesirable_weight")
        settings |= {name: float(value) for name, value in zip(names, weights, strict=True) if value is not None}
    if loss == "simpo" and gamma is not None:
        settings["gamma"] = float(gamma)
    if smoothing and loss in ("dpo", "simpo"):
        settings["label_smoothing"] = float(smoothing)
    t.put("model.task_settings", settings)


def _data(t: Translation, compared: bool, labelled: bool) -> None:
    t.put("data.max_length", t.number("sequence_len", default=512))
    rows = [one if isinstance(one, dict) else {"path": str(one)} for one in t.get("datasets", default=[])]
    made = [_one(t, one, number, compared, labelled) for number, one in enumerate(rows)]
    usable = [one for one in made if one is not None]
    kept = [one for one in usable if one[:2] == usable[0][:2]]
    if len(kept) < len(made):
        t.lose(
            "datasets",
            f"{len(made) - len(kept)} of {len(made)} are of another layout than data: {kept[0][0]}"
            if kept
            else "none has a layout that is read here",
        )
    kind, settings = (kept[0][0], kept[0][1]) if kept else ("Preferences" if compared else "Chat", {})
    t.put("data", kind)
    for name, value in settings.items():
        t.put(f"data.{name}", value)
    sources = [source for _, _, source in kept]
    if sources:
        t.put("data.train", sources[0] if len(sources) == 1 else sources)
    else:
        t.lose("datasets", "name the training data in data.train")
    tests = [one if isinstance(one, dict) else {"path": str(one)} for one in t.get("test_datasets", default=[])]
    held = [_source(one) for one in tests]
    if held:
        t.put("data.validation", held[0] if len(held) == 1 else held)
    _shares(t, bool(held))
    jinja, name = t.get("chat_template_jinja"), t.get("chat_template")
    if kind in ("Chat", "Preferences"):
        t.put("data.chat_template", jinja) if jinja else training.template(t, name)
    elif name:
        t.lose("chat_template", f"{kind} learns texts as they are")
    if t.get("sample_packing", default=False):
        t.put("data.packing", True) if not compared else t.lose("sample_packing", "pairs are not packed")
        if kind == "PlainText":
            t.put("data.block", False)
    if tokens := t.get("tokens"):
        t.put("data.new_tokens", list(tokens))


def _shares(t: Translation, validated: bool) -> None:
    share = t.number("val_set_size", default=0.0)
    if share >= 1:
        t.lose("val_set_size", "data.validation_fraction is a fraction; a tenth stands in its place")
        share = 0.1
    if not validated:
        t.put("data.validation_fraction", float(share))


def _source(one: Mapping[str, Any]) -> str:
    """The source of a data set, with its configuration and split."""
    files = one.get("data_files")
    if files and not isinstance(files, dict):
        return str(files[0] if isinstance(files, list) else files)
    path, name, split = str(one.get("path")), one.get("name") or "", one.get("split") or ""
    local = Path(path).suffix in (".json", ".jsonl", ".csv", ".parquet", ".txt") or Path(path).exists()
    if Path(path).suffix and local:
        return path
    return f"{path}{f':{name}' if name or split else ''}{f':{split}' if split else ''}"


def _one(
    t: Translation, one: Mapping[str, Any], number: int, compared: bool, labelled: bool
) -> tuple[str, dict[str, Any], str] | None:
    """Kind of data, its settings, and the source, of one data set; None where it is read by nothing here."""
    kind, source = one.get("type"), _source(one)
    known = {"path", "type", "name", "split", "ds_type", "data_files", *_FIELDS}
    for key in one:
        if key not in known:
            t.lost[f"datasets[{number}].{key}"] = "nothing here stands for it"
    word = kind.partition(":")[0] if isinstance(kind, str) else kind
    if compared:
        return _pairs(t, one, word, labelled, source)
    if isinstance(kind, dict):
        return _own_format(kind, source)
    if word in ("chat_template", "sharegpt") or str(word).startswith("chat_template."):
        field = one.get("field_messages") or ("conversations" if word == "sharegpt" else "messages")
        found = {"messages": field, **({"tools": one["field_tools"]} if one.get("field_tools") else {})}
        keys = one.get("message_property_mappings") or {}
        role = keys.get("role") or one.get("message_field_role") or "role"
        content = keys.get("content") or one.get("message_field_content") or "content"
        if (role, content) not in {("role", "content"), ("from", "value")}:
            t.lost[f"datasets[{number}].message_property_mappings"] = "Chat reads role, content and from, value"
        learned = one.get("roles_to_train")
        if learned is not None and set(learned) != {"assistant"} and set(learned) != {"gpt"}:
            t.lost[f"datasets[{number}].roles_to_train"] = "Chat learns what the assistant says"
        return "Chat", found, source
    if word == "completion":
        return "PlainText", {"text": one.get("field") or "text"}, source
    if word == "alpaca":
        return "Completions", {"format": "alpaca"}, source
    t.lost[f"datasets[{number}].type"] = f"{kind}: rows of Chat, Completions or PlainText are read; reshape them"
    return None


_FIELDS = ("field", "field_messages", "field_tools", "message_property_mappings", "message_field_role",
           "message_field_content", "roles_to_train", "field_prompt", "field_chosen", "field_rejected")  # fmt: skip


def _own_format(kind: Mapping[str, Any], source: str) -> tuple[str, dict[str, Any], str]:
    """A prompt that is written out."""
    columns = {
        "instruction": kind.get("field_instruction") or "instruction",
        "input": kind.get("field_input") or "input",
    }
    system = str(kind.get("system_prompt") or "").replace("{", "{{").replace("}", "}}")
    layout = str(kind.get("format") or kind.get("no_input_format") or "{instruction}\n")
    for name, column in columns.items():
        layout = layout.replace(f"{{{name}}}", f"{{{column}}}")
    layout = layout.replace("{system}", system) if "{system}" in layout else f"{system}{layout}"
    return "Completions", {"prompt_template": layout, "completion": kind.get("field_output") or "output"}, source


def _pairs(
    t: Translation, one: Mapping[str, Any], word: Any, labelled: bool, source: str
) -> tuple[str, dict[str, Any], str]:
    own = word if isinstance(word, dict) else {}
    last = str(word).rpartition(".")[2]
    columns: dict[str, Any] = dict(COMPARED.get(last, {}))
    if str(word).startswith("chat_template"):
        columns = {"prompt": one.get("field_messages") or "messages"}
    for ours in ("prompt", "chosen", "rejected", "completion", "label"):
        named = own.get(f"field_{ours}") or one.get(f"field_{ours}")
        if named:
            columns[ours] = named
    if labelled:
        columns = {"label": "label", **{k: v for k, v in columns.items() if k not in ("chosen", "rejected")}}
    if not own and last not in COMPARED and not str(word).startswith("chat_template"):
        t.notes.append(f"datasets: type {word}: look at data.prompt, data.chosen and data.rejected with inspect-data")
    return "Preferences", columns, source
