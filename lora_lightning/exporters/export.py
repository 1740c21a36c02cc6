"""Taking an adapter to other libraries, and reading theirs.

    export(model, folder)                      peft's LORA format, with the head that trained
    export(model, folder, format="merged")     a plain Hugging Face model
    export(model, folder, server="vllm")       as that server takes it
    export(model, folder, format="delta")      what to add to the base model, layer by layer
    import_peft(model, folder)                 peft's LORA format into a plain model
    export_folder(adapter, folder, "peft")     from an adapter folder, for the command line

An export is written beside its place, read back and compared with the adapter, and only then renamed. Needs no peft.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from lora_lightning.errors import ExportError, PluginError, did_you_mean
from lora_lightning.exporters.cards import export_card, run_summary
from lora_lightning.exporters.folder import SIDE_FILE, check_free, check_only_ours, finish_interrupted, write_folder
from lora_lightning.exporters.peft import read as peft_import
from lora_lightning.exporters.report import ExportReport, Origin, Written
from lora_lightning.exporters.servers import Served, served
from lora_lightning.exporters.source import Source, find
from lora_lightning.injection.heads import heads_of
from lora_lightning.injection.report import InjectionReport
from lora_lightning.plugin_code import imported
from lora_lightning.plugins import registry
from lora_lightning.registry import FORMATS, one_line
from lora_lightning.storage.atomic import write_json
from lora_lightning.storage.card import edited_card, sealed_card
from lora_lightning.storage.description import describe_adapter
from lora_lightning.storage.stored import CARD

__all__ = ["FORMATS", "ExportReport", "export", "import_peft"]


def export(
    model: nn.Module,
    directory: str | Path,
    format: str | None = None,
    name: str = "default",
    rank: int | None = None,
    verify: bool = True,
    origin: Origin | None = None,
    processor: Any = None,
    server: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
) -> ExportReport:
    """Write one adapter of `model` in another library's format; the model stays as it is, bit for bit.

    Args:
        model: a model with adapters.
        directory: a new or empty folder, or an earlier export, which is replaced when the new one is whole.
        format: "peft" (a LORA folder, heads included), "merged" (a plain Hugging Face model), "delta" (the dense
            update of each layer), "gguf" (llama.cpp's file of factors), or one that a plugin brings. None is "peft", or
            what `server` takes.
        name: which adapter.
        rank: for "peft" and other formats that take it, the largest rank; an update without so small a form is
            truncated, and the fraction lost reported.
        verify: read the files back and compare: updates up to rounding, heads and merged weights bit for bit. "peft" is
            opened by peft where it is installed, else by its rules, and must compute the same on the base model.
        origin: where adapter and base lie on the disk; then "peft" is opened in a fresh process too.
        processor: for "merged", the tokenizer or processor that goes with the model; None takes what lies beside the
            base model's weights, where the model's configuration says where that is.
        server: who will serve it, "vllm" or "llama.cpp": what that refuses is refused here, and what it cannot read is
            converted where that is exact; see `servers`.
        dtype: for "merged" and "gguf", the data type of what is written, such as "bfloat16"; None keeps the model's,
            and writes factors in float32. A merged model is merged in float32, then rounded.
        quantize: for "merged", "nf4" or "nf4-double": the merged model, quantized by bitsandbytes.

    Returns:
        What was written, how exact it is, and the largest difference found.

    Raises:
        AdapterStateError: there is no such adapter.
        ExportError: the format cannot express the adapter, the folder is taken, or writing failed. What was there
            before is intact.
        PluginError: the plugin that brings the format fails.
    """
    if server is None:  # else the format, where none is given, depends on the adapter
        find_writer(format or "peft", rank, dtype, quantize)
    source = replace(find(model, name), processor=processor, dtype=dtype, quantize=quantize)
    found = Served(format or "peft") if server is None else served(source, server, format, rank)
    source, format = replace(source, one_rank=found.one_rank), found.format
    writer = find_writer(format, None if format == "merged" and server else rank, dtype, quantize)
    finish_interrupted(Path(directory).expanduser().resolve())
    folder = check_free(directory)
    check_only_ours(folder, _files_of_earlier(folder))

    def fill(beside: Path) -> tuple[Written, tuple[str, ...]]:
        with heads_of(source.anatomy.model, source.stack):
            written = writer.write(source, beside, rank, verify)
        if not isinstance(written, Written):
            raise PluginError(f'format "{format}": {writer.__name__}.write returned {written!r}, which is no Written.')
        if verify and origin is not None and hasattr(writer, "write_afresh"):
            written = writer.write_afresh(source, beside, written, origin)
        written = replace(written, notes=(*found.notes, *written.notes))
        description = describe_adapter(source.anatomy, source.name)
        text = export_card(description, format, run_summary(origin))
        (beside / CARD).write_bytes(edited_card(folder) or sealed_card(text))
        files = tuple(sorted(path.name for path in beside.iterdir()))
        write_json(beside / SIDE_FILE, {**description, "export": _about(source, format, written, files)})
        return written, (*files, SIDE_FILE)

    written, files = write_folder(folder, fill)
    return ExportReport(**vars(written), format=format, directory=Path(directory), files=files)


def find_writer(format: str, rank: int | None, dtype: str | None = None, quantize: str | None = None) -> ModuleType:
    """The module that writes a format; raises where there is none, it cannot be imported, or takes no such option."""
    known = registry().formats
    if format not in known:
        raise ExportError(f'format is "{format}".{did_you_mean(format, known)} Known: {", ".join(known)}.')
    try:
        writer = imported(known[format])
    except Exception as error:
        raise PluginError(f'format "{format}": its module {known[format]} fails: {one_line(error)}.') from error
    if rank is not None and (rank < 1 or not getattr(writer, "TAKES_RANK", False)):
        raise ExportError(f'rank is {rank} with format="{format}"; it must be at least 1, for a format that takes it.')
    for option, value, takes in (("dtype", dtype, "TAKES_DTYPE"), ("quantize", quantize, "TAKES_QUANTIZE")):
        able_to: tuple[str, ...] = getattr(writer, takes, ())
        if value is not None and value not in able_to:
            able = f"Known: {', '.join(able_to)}." if able_to else 'The format takes none; "merged" does.'
            raise ExportError(f'{option} is "{value}" with format="{format}".{did_you_mean(value, able_to)} {able}')
    return writer


def _about(source: Source, format: str, written: Written, files: tuple[str, ...]) -> dict[str, Any]:
    """What was exported, for people and for `check_only_ours`."""
    return {
        "format": format,
        "class": written.kind,
        "model": type(source.host).__name__,
        "largest_difference": written.difference,
        "discarded": written.discarded,
        "files": files,
    }


def _files_of_earlier(folder: Path) -> list[str]:
    try:
        return list(json.loads((folder / SIDE_FILE).read_text(encoding="utf-8"))["export"]["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def import_peft(model: nn.Module, directory: str | Path, name: str = "default", untie: bool = False) -> InjectionReport:
    """Inject the adapter of a peft LORA folder into `model`, in place; all or nothing. It trains, as after `inject`.

    Which layers are adapted, and with which rank, is read from the tensors of the file. `rank_pattern`,
    `alpha_pattern`, `use_rslora`, `lora_bias` and `modules_to_save` are honoured; an option such as `use_dora` chooses
    the installed method that it means.

    Args:
        model: the base model the adapter was trained on.
        directory: a folder with adapter_config.json and adapter_model.safetensors; pickles are not opened.
        name: name to inject it under.
        untie: give an output layer that shares the embedding's weight one of its own first; see `inject`.

    Returns:
        What was injected, as from `inject`; targets that the file names but has no tensors for are in the notes.

    Raises:
        AdapterFileError: another peft type, a variant whose factors mean something else, keys that do not fit.
        AdapterStateError: the name is taken.
        PluginError: no installed method, or more than one, reads the format with these options.
    """
    finish_interrupted(Path(directory).expanduser().resolve())
    return peft_import.import_folder(model, directory, name, untie)
