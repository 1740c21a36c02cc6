"""Taking an adapter to other libraries, and reading theirs.

    export(model, folder)                      peft's LORA format, with the head that trained
    export(model, folder, format="merged")     a plain Hugging Face model
    export(model, folder, format="delta")      what to add to the base model, layer by layer
    import_peft(model, folder)                 peft's LORA format into a plain model
    export_folder(adapter, folder, "peft")     from an adapter folder, for the command line

An export is written beside its place, read back and compared with the adapter, and only then renamed. Needs no peft.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.checkpoint import Stored, describe, load_adapter, read_folder
from lora_lightning.errors import AdapterFileError, ExportError, ModelError, PluginError, did_you_mean
from lora_lightning.exporters import peft_import
from lora_lightning.exporters.folder import SIDE_FILE, check_free, check_only_ours, write_folder
from lora_lightning.exporters.report import ExportReport, Written
from lora_lightning.exporters.source import Source, find
from lora_lightning.files import write_json
from lora_lightning.formats import FORMATS
from lora_lightning.injection import InjectionReport
from lora_lightning.plugins import describe as described
from lora_lightning.plugins import registry
from lora_lightning.pretrained import resolve
from lora_lightning.quantisation import Loading, check
from lora_lightning.random_models import build, config_of, is_random

__all__ = ["FORMATS", "ExportReport", "export", "export_folder", "import_peft"]


def export(
    model: nn.Module,
    directory: str | Path,
    format: str = "peft",
    name: str = "default",
    rank: int | None = None,
    verify: bool = True,
) -> ExportReport:
    """Write one adapter of `model` in another library's format; the model stays as it is, bit for bit.

    Args:
        model: a model with adapters.
        directory: a new or empty folder, or an earlier export, which is replaced when the new one is whole.
        format: "peft" (a LORA folder, heads included), "merged" (a plain Hugging Face model), "delta" (the dense
            update of each layer), or one that a plugin brings.
        name: which adapter.
        rank: for "peft" and other formats that take it, the largest rank; an update without so small a form is
            truncated, and the share lost reported.
        verify: read the files back and compare: updates up to rounding, heads and merged weights bit for bit.

    Returns:
        What was written, how exact it is, and the largest difference found.

    Raises:
        AdapterStateError: there is no such adapter.
        ExportError: the format cannot express the adapter, the folder is taken, or writing failed. What was there
            before is intact.
        PluginError: the plugin that brings the format fails.
    """
    writer = _writer(format, rank)
    source = find(model, name)
    folder = check_free(directory)
    check_only_ours(folder, _files_of_earlier(folder))

    def fill(beside: Path) -> tuple[Written, tuple[str, ...]]:
        written = writer.write(source, beside, rank, verify)
        if not isinstance(written, Written):
            raise PluginError(f'format "{format}": {writer.__name__}.write returned {written!r}, which is no Written.')
        files = tuple(sorted(path.name for path in beside.iterdir()))
        write_json(beside / SIDE_FILE, _description(source, format, written, files))
        return written, (*files, SIDE_FILE)

    written, files = write_folder(folder, fill)
    return ExportReport(**vars(written), format=format, directory=Path(directory), files=files)


def _writer(format: str, rank: int | None) -> ModuleType:
    """The module that writes a format; raises where there is none, it cannot be imported, or takes no such rank."""
    known = registry().formats
    if format not in known:
        raise ExportError(f'format is "{format}".{did_you_mean(format, known)} Known: {", ".join(known)}.')
    try:
        writer = importlib.import_module(known[format])
    except (Exception, SystemExit) as error:
        raise PluginError(f'format "{format}": its module {known[format]} fails: {described(error)}.') from error
    if rank is not None and (rank < 1 or not getattr(writer, "TAKES_RANK", False)):
        raise ExportError(f'rank is {rank} with format="{format}"; it must be at least 1, for a format that takes it.')
    return writer


def _description(source: Source, format: str, written: Written, files: tuple[str, ...]) -> dict[str, Any]:
    """Where the export comes from, for people and for `check_only_ours`."""
    return {
        **describe(source.root, source.name, source.record),
        "export": {
            "format": format,
            "class": written.kind,
            "model": type(source.host).__name__,
            "largest_difference": written.difference,
            "discarded": written.discarded,
            "files": files,
        },
    }


def _files_of_earlier(folder: Path) -> list[str]:
    try:
        return list(json.loads((folder / SIDE_FILE).read_text(encoding="utf-8"))["export"]["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def import_peft(model: nn.Module, directory: str | Path, name: str = "default") -> InjectionReport:
    """Inject the adapter of a peft LORA folder into `model`, in place; all or nothing. It trains, as after `inject`.

    Which layers are adapted, and with which rank, is read from the tensors of the file. `rank_pattern`,
    `alpha_pattern`, `use_rslora`, `lora_bias` and `modules_to_save` are honoured; an option such as `use_dora` chooses
    the installed method that it means.

    Args:
        model: the base model the adapter was trained on.
        directory: a folder with adapter_config.json and adapter_model.safetensors; pickles are not opened.
        name: name to inject it under.

    Returns:
        What was injected, as from `inject`; targets that the file names but has no tensors for are in the notes.

    Raises:
        AdapterFileError: another peft type, a variant whose factors mean something else, keys that do not fit.
        AdapterStateError: the name is taken.
        PluginError: no installed method, or more than one, reads the format with these options.
    """
    return peft_import.import_folder(model, directory, name)


def export_folder(
    adapter: Path, output: Path, format: str, rank: int | None = None, pretrained: str | None = None
) -> str:
    """Export an adapter folder: load its base model, the adapter onto it, export, and return the report as text.

    For "merged" the base is loaded in its file's own dtype, else in float32, so that heads stay bit for bit. A base
    that was quantised in training is quantised again: it is what the adapter was trained on.

    Args:
        adapter: an adapter folder.
        output: folder to write.
        format: see `export`.
        rank: see `export`.
        pretrained: the base model (folder, hub id or pkg: name); None takes what the adapter folder states.

    Raises:
        AdapterFileError: the folder is no adapter of this library, or does not fit the base model.
        ExportError: the base model is not known or cannot be loaded, and see `export`.
    """
    _writer(format, rank)
    check_free(output)
    stored = read_folder(adapter)
    base = pretrained or stored.base
    if base is None:
        raise ExportError(f'"{adapter}" does not say which base model it was trained on; give it with --pretrained.')
    where = "--pretrained" if pretrained else f'the base model of "{adapter}"'
    try:
        folder = resolve(base, field=where)
    except ModelError as error:
        raise ExportError(f"{error}{'' if pretrained else ' Give the base model with --pretrained.'}") from error
    model = _load_base(folder, stored, where, "auto" if format == "merged" else torch.float32)
    load_adapter(model, adapter, stored.name)
    return str(export(model, output, format, stored.name, rank))


def _load_base(folder: str, stored: Stored, where: str, dtype: torch.dtype | str) -> nn.Module:
    """The base model in the class it was trained in, its head as large as the stored one."""
    import transformers

    from lora_lightning.loading import quantised_options, zero_absent  # imports transformers

    architecture = stored.fingerprint["architecture"]
    cls = getattr(transformers, architecture, None)
    if cls is None or not hasattr(cls, "config_class"):
        raise ExportError(
            f"the adapter was trained inside {architecture}, which is no class of transformers; load the model and the "
            "adapter in Python, and call lora_lightning.export."
        )
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # the head is not in the base, and comes from the adapter
    try:
        config = config_of(folder) if is_random(folder) else cls.config_class.from_pretrained(folder)
        labels = _labels(cls, config, {key: stored.tensors[key] for key in stored.trained})
        if labels is not None:
            config.num_labels = labels
        if is_random(folder):
            return build(folder, lambda: cls(config))
        quantised = {}
        if stored.quantisation is not None:  # the adapter belongs to that function, not to the plain model's
            check(stored.quantisation, where="the adapter's base model")
            how = Loading(stored.quantisation)
            quantised = quantised_options(config, lambda: cls(config), how, stored.trained)
        model, info = cls.from_pretrained(
            folder,
            config=config,
            **quantised,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split("\n", maxsplit=1)[0].split())
        raise ExportError(
            f'{where} is "{folder}", which cannot be loaded: {reason} Give another with --pretrained.'
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])} - stored.tensors.keys()
    absent -= zero_absent(model, info["missing_keys"], ["pooler"])  # the task did without
    if absent:
        raise ExportError(f'{where} is "{folder}", which lacks {min(absent)} of {architecture}; it is another model.')
    return model  # type: ignore[no-any-return]


def _labels(cls: Any, config: Any, tensors: dict[str, Tensor]) -> int | None:
    """Size of the stored head where it is another than the configuration's."""
    with torch.device("meta"):
        plain = dict(cls(config).named_parameters())
    sizes = {
        tensors[key].shape[0]
        for key, parameter in plain.items()
        if key in tensors and tensors[key].shape != parameter.shape and tensors[key].shape[1:] == parameter.shape[1:]
    }
    if len(sizes) > 1:
        raise AdapterFileError(f"the stored heads have {sorted(sizes)} rows; no single num_labels gives these.")
    return sizes.pop() if sizes else None
