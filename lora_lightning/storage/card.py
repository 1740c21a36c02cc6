"""The model card of an adapter, README.md: the hub's metadata, what was measured, and how to load it.

It is written from the adapter's description, and is no part of it: the same description gives the same card, and an
edited or a missing one changes nothing about the adapter. The last line holds the digest of what stands above it. A
card without that line, or with another digest, is a person's, and is left as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.errors import AdapterFileError
from lora_lightning.models.published import hub_id, license_of, pipeline_tag, shown_name
from lora_lightning.plugins import registry
from lora_lightning.storage.atomic import read_regular, write_all
from lora_lightning.storage.run_start import from_start
from lora_lightning.storage.sealed import digest
from lora_lightning.storage.stored import CARD, DESCRIPTION

OWN_LIBRARY = "lora_lightning"
_SEAL = "<!-- sha256 of the lines above, which lora_lightning wrote; a card that was edited is kept: "
_END = " -->\n"


@dataclass(frozen=True)
class Loading:
    """How a folder is loaded.

    Attributes:
        library: the hub's `library_name`.
        what: what the folder holds, such as "a LoRA adapter in peft's format".
        ways: (title, lines of code) each.
    """

    library: str
    what: str
    ways: tuple[tuple[str, str], ...] = ()


def card(description: Mapping[str, Any], loading: Loading, measured: Mapping[str, Any] | None = None) -> str:
    """The text of a card.

    Args:
        description: of the adapter, as `describe_adapter` gives it.
        loading: how the folder is loaded.
        measured: the summary of the run that trained it; None states no values.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base, method = description["base"], description["method"]
    known, task = hub_id(base), pipeline_tag(description["fingerprint"]["architecture"])
    datasets = list((measured or {}).get("datasets") or ())
    title = f"{method} on {shown_name(base)}"
    data = ModelCardData(
        base_model=known,
        library_name=loading.library,
        license=license_of(base),
        tags=[*([f"base_model:adapter:{known}"] if known else []), method.lower(), OWN_LIBRARY],
        datasets=datasets or None,
        pipeline_tag=task,
        model_name=title,
        eval_results=_results(measured, task, datasets) or None,
    )
    parts = [f"# {title}", f"This folder holds {loading.what}.", _facts(description), *_values(measured)]
    for name, code in loading.ways:
        language = "sh" if code.startswith("python ") else "python"
        parts.append(f"## {name}\n\n```{language}\n{code}\n```")
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def sealed_card(text: str) -> bytes:
    """A card as it is written: its text, and the line that tells it from one that was edited."""
    return f"{text}\n{_SEAL}{digest(text.encode())}{_END}".encode()


def is_edited(content: bytes) -> bool:
    """Whether a person has written a card, or has changed one of ours."""
    text, found, seal = content.decode("utf-8", "replace").rpartition(f"\n{_SEAL}")
    return not found or seal != f"{digest(text.encode())}{_END}"


def edited_card(folder: Path) -> bytes | None:
    """A card in a folder that is a person's; None for one of ours, or where there is none."""
    try:
        content = read_regular(folder / CARD)
    except FileNotFoundError:
        return None
    return content if is_edited(content) else None


def new_card(
    folder: Path, description: Mapping[str, Any], measured: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """The card of an adapter folder of this library by its name; none where a person's is there, which is said.

    Args:
        folder: the folder that it is for.
        description: what the adapter states.
        measured: the summary of the run that trained it.
    """
    path = folder / CARD
    if path.is_symlink() or edited_card(folder) is not None:
        print(f'note: "{path}" was edited, and is left as it is')
        return {}
    if base := description["base"]:  # a run may go on from another directory than it was begun in
        description = {**description, "base": from_start(base, folder)}
    return {CARD: sealed_card(card(description, own_loading(description), measured))}


def add_measured(folder: Path, measured: Mapping[str, Any]) -> None:
    """Write the card of an adapter folder of this library again, with what was measured.

    Raises:
        AdapterFileError: it cannot be written; the adapter is whole without it.
    """
    try:
        description = json.loads(read_regular(folder / DESCRIPTION))
        write_all({folder / name: content for name, content in new_card(folder, description, measured).items()})
    except OSError as error:
        raise AdapterFileError(
            f'cannot write "{folder / CARD}": {error.strerror or error}. The adapter is whole without it.'
        ) from error


def own_loading(description: Mapping[str, Any]) -> Loading:
    """How a folder of this library is loaded, here and, where the method can travel, elsewhere."""
    method = registry().methods.get(description["method"])
    code = (
        'import transformers\n\nimport lora_lightning as ll\n\nfolder = "."  # this folder; on the hub: '
        'huggingface_hub.snapshot_download("OWNER/NAME")\n'
        f"{base_code(description)}\nll.load_adapter(model, folder)"
    )
    ways = [("In lora_lightning", code)]
    export = "python -m lora_lightning export . --format {} --output exported"
    if method is not None and method.export in ("native", "exact LoRA") and not description.get("below"):
        ways.append(("In peft and transformers", export.format("peft")))
    if method is not None and method.mergeable:
        ways.append(("As a plain model of transformers", export.format("merged")))
    return Loading(OWN_LIBRARY, "an adapter of [lora_lightning](https://pypi.org/project/lora-lightning/)", tuple(ways))


def base_code(description: Mapping[str, Any]) -> str:
    """A line of code that loads the base model, its head as large as the stored one."""
    labels, base = description.get("labels") or (), description["base"]
    size = f", num_labels={len(labels)}" if labels else ""
    architecture, name = description["fingerprint"]["architecture"], shown_name(base)
    if not base or ":" in name:  # no folder that transformers reads
        return f"model = ...  # the base model, {name} ({architecture}), as it was when the adapter was trained"
    hint = "" if hub_id(base) else "  # a local folder: give the path to it"
    return f'model = transformers.{architecture}.from_pretrained("{name}"{size}){hint}'


def _facts(description: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in description["settings"].items())
    names = sorted({path.rpartition(".")[2] for path in description["layers"]})
    lines = [
        f"- base model: {_base(description)}",
        f"- method: {description['method']} ({settings})",
        f"- adapted layers: {len(description['layers'])} ({', '.join(names)})",
    ]
    if description.get("trained"):
        lines.append(f"- trained in full: {', '.join(description['trained'])}")
    if added := description.get("vocabulary"):
        lines.append(f"- new tokens: {', '.join(f'`{token}`' for token in added['tokens'])}")
    if below := description.get("below"):
        lines.append(f"- trained on top of: {', '.join(shown_name(one['source']) for one in below)}")
    if labels := description.get("labels"):
        lines.append(f"- classes: {', '.join(map(str, labels))}")
    return "\n".join(lines)


def _base(description: Mapping[str, Any]) -> str:
    name, architecture = shown_name(description["base"]), description["fingerprint"]["architecture"]
    local = bool(description["base"]) and hub_id(description["base"]) is None and ":" not in name
    return f"{'a local folder called ' if local else ''}{name} ({architecture})"


def _values(measured: Mapping[str, Any] | None) -> list[str]:
    """What was measured, as a table."""
    if not measured or not measured.get("values"):
        return []
    rows = [("before training", measured.get("untrained")), ("linear baseline", measured.get("linear_baseline"))]
    names = list(measured["values"])
    table = [f"| validation | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for label, values in (*((label, values) for label, values in rows if values), ("trained", measured["values"])):
        cells = [f"{values[name]:.4g}" if name in values else "" for name in names]
        table.append(f"| {label} | {' | '.join(cells)} |")
    steps = f"{measured['steps']} optimizer steps, rate {measured['rate']}, seed {measured['seed']}"
    return ["## Measured", "\n".join(table), f"Trained for {steps}."]


def _results(measured: Mapping[str, Any] | None, task: str | None, datasets: Sequence[str]) -> list[Any]:
    """What was measured, as entries of the hub's model index."""
    from huggingface_hub import EvalResult

    source = datasets[0] if len(datasets) == 1 else None
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type=source or "local",
            dataset_name=source or "validation data of the run",
            dataset_split="validation",
            metric_type=name,
            metric_value=value,
        )
        for name, value in ((measured or {}).get("values") or {}).items()
    ]
