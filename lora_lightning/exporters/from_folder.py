"""Exporting an adapter folder: the base model is loaded, the adapter onto it, and both are handed to `export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterFileError, ExportError, ModelError
from lora_lightning.exporters.companions import names_template, run_processor
from lora_lightning.exporters.export import export, find_writer
from lora_lightning.exporters.folder import check_free
from lora_lightning.exporters.report import ExportReport, Origin
from lora_lightning.exporters.servers import served
from lora_lightning.exporters.source import find
from lora_lightning.exporters.trained_adapter import TrainedAdapter, find_adapter
from lora_lightning.models.pretrained import resolve
from lora_lightning.models.quantized_loading import Loading, check_format
from lora_lightning.models.random import build_random, config_of, is_random
from lora_lightning.storage.stored import Stored, read_folder


def export_folder(
    adapter: Path,
    output: Path,
    format: str | None,
    rank: int | None = None,
    pretrained: str | None = None,
    server: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
) -> ExportReport:
    """Export an adapter folder: load its base model, the adapter onto it, and export.

    For "merged" without a `dtype` the base is loaded in its file's own, else in float32, so that heads stay bit for
    bit. A base that was quantized in training is quantized again: it is what the adapter was trained on. Where a server
    takes a merged model only, that has the data type of the base's file.

    Args:
        adapter: an adapter folder.
        output: folder to write.
        format: see `export`.
        rank: see `export`.
        pretrained: the base model (folder, hub id or pkg: name); None takes what the adapter folder states.
        server: see `export`.
        dtype: see `export`.
        quantize: see `export`.

    Raises:
        AdapterFileError: the folder is no adapter of this library, or does not fit the base model.
        ExportError: the base model is not known or cannot be loaded, and see `export`.
    """
    if format is not None:
        find_writer(format, rank, dtype, quantize)
    check_free(output)
    stored = read_folder(adapter)
    whole = with_below(find_adapter(str(adapter)))
    base = pretrained or whole[-1].base
    if base is None:
        raise ExportError(f'"{adapter}" does not say which base model it was trained on; give it with --pretrained.')
    where = "--pretrained" if pretrained else f'the base model of "{adapter}"'
    try:
        folder = resolve(base, field=where)
    except ModelError as error:
        raise ExportError(f"{error}{'' if pretrained else ' Give the base model with --pretrained.'}") from error
    own = format == "merged" and dtype is None
    model = load_base(folder, stored_whole(whole), where, "auto" if own else torch.float32)
    whole[-1].load(model, stored.name)
    merged = format == "merged"
    if (
        format is None
        and server is not None
        and served(find(model, stored.name), server, None, rank).format == "merged"
    ):
        merged, dtype = True, dtype or _file_dtype(folder)
    processor = run_processor(adapter) if merged or names_template(adapter) else None
    origin = Origin(adapter, base)
    return export(
        model,
        output,
        format,
        stored.name,
        rank,
        origin=origin,
        processor=processor,
        server=server,
        dtype=dtype,
        quantize=quantize,
    )


def _file_dtype(folder: str) -> str | None:
    """The data type that a base model's configuration states."""
    from transformers import AutoConfig

    if is_random(folder):
        return None
    stated = AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype
    return None if stated is None else str(stated).removeprefix("torch.")


def with_below(adapter: TrainedAdapter) -> list[TrainedAdapter]:
    """An adapter behind all those that it was trained on top of.

    Raises:
        AdapterFileError: one of them is not where it lay.
    """
    return [*(one for under in adapter.below() for one in with_below(under)), adapter]


def stored_whole(adapters: Sequence[TrainedAdapter]) -> Stored:
    """What the last of these adapters states, with the heads and tensors of all.

    Raises:
        ExportError: the last one is in peft's format.
    """
    known = [one.stored for one in adapters if one.stored is not None]
    if not known or known[-1] is not adapters[-1].stored:
        raise ExportError(f"{adapters[-1]} does not state the class of its model; it is in peft's format already.")
    return replace(
        known[-1],
        tensors={key: tensor for one in known for key, tensor in one.tensors.items()},
        trained=tuple(dict.fromkeys(name for one in known for name in one.trained)),
    )


def load_base(folder: str, stored: Stored, where: str, dtype: torch.dtype | str = torch.float32) -> nn.Module:
    """The base model in the class it was trained in, its head as large as the stored one.

    Raises:
        ExportError: it cannot be loaded, or lacks weights that the adapter does not bring.
    """
    import transformers

    from lora_lightning.models.loading import quantized_options, zero_absent  # imports transformers

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
        config = (
            config_of(folder)
            if is_random(folder)
            else cls.config_class.from_pretrained(folder, trust_remote_code=False)
        )
        labels = _labels(cls, config, {key: stored.tensors[key] for key in stored.trained})
        if labels is not None:
            config.num_labels = labels
        names = stored.description.get("labels") or ()
        if len(names) == config.num_labels:
            config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        if is_random(folder):
            return build_random(folder, lambda: cls(config))
        quantized = {}
        if stored.quantization is not None:  # the adapter belongs to that function, not to the plain model's
            check_format(stored.quantization, where="the adapter's base model")
            how = Loading(stored.quantization)
            quantized = quantized_options(config, lambda: cls(config), how, stored.trained)
        model, info = cls.from_pretrained(
            folder,
            config=config,
            **quantized,
            trust_remote_code=False,
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
        raise ExportError(
            f'{where} is "{folder}", which lacks {min(absent)} of {architecture}; it is another model. '
            "Give the one that it was trained on with --pretrained."
        )
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
