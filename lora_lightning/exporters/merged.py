"""Writing a plain Hugging Face model with the adapter merged in, and leaving the caller's model as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from lora_lightning.adapters.layer import AdaptedLayer
from lora_lightning.errors import AdapterStateError, ExportError
from lora_lightning.exporters.report import Written
from lora_lightning.exporters.source import Source, check_finite, write_files
from lora_lightning.injection import iter_adapters, put
from lora_lightning.paths import places
from lora_lightning.vocabulary import plain_vocabulary


def write(source: Source, folder: Path, rank: int | None, verify: bool) -> Written:  # noqa: ARG001 - every format's signature
    """Write the merged model into `folder` with `save_pretrained`.

    Args:
        source: the adapter; other adapters of the model do not count.
        folder: an empty folder.
        rank: no rank limits a merged model.
        verify: load the model again and compare every tensor bit for bit.

    Raises:
        ExportError: no Hugging Face model, an input-routed method, a tied weight, or a bias the architecture lacks.
    """
    from transformers import PreTrainedModel

    if not isinstance(source.host, PreTrainedModel):
        raise ExportError(
            f"{type(source.host).__name__} is no PreTrainedModel of transformers, so it has no folder format. "
            "Merge in place instead: merge(model, keep_original=False), then eject(model), and save its state_dict."
        )
    _check_mergeable(source)
    with _plain(source), plain_vocabulary(source.host):
        check_finite("the model", source.host.state_dict().values())
        config = copy.copy(source.host.config.__dict__)
        try:
            source.host.save_pretrained(folder)
            write_files(source.tokenizer, folder)
            difference = _compare(source.host, folder) if verify else None
        finally:
            source.host.config.__dict__.clear()
            source.host.config.__dict__.update(config)
    dtypes = {p.dtype for p in source.host.parameters() if p.is_floating_point()}
    notes = ("its tensors have several dtypes; from_pretrained makes them one unless told otherwise",)
    return Written(
        kind="merged", layers=len(source.layers), difference=difference, notes=notes if len(dtypes) > 1 else ()
    )


def _check_mergeable(source: Source) -> None:
    for path, layer in source.layers.items():
        adapter = source.adapter(path)
        source.check_fixed(path)
        if layer.tied_to:
            raise ExportError(
                f"{path} shares its weight with {', '.join(layer.tied_to)}, so a merged model would change both. Use "
                'format="peft", which keeps the update apart, or untie the weight before training.'
            )
        if "bias" not in layer.originals() and adapter.merged_bias(None) is not None:
            raise ExportError(
                f"{path} has no bias in {type(source.host).__name__}, but the adapter trained one, which a plain model "
                'would drop on loading. Use format="peft", or train with bias=False.'
            )


@contextmanager
def _plain(source: Source) -> Iterator[None]:
    """Inside, the model is the plain one with exactly this adapter merged; afterwards it is as before, bit for bit."""
    layers = dict(iter_adapters(source.root))
    before = {path: (layer.active, layer.merged) for path, layer in layers.items()}
    where = places(source.root)
    wanted = {path: (source.name,) if source.name in layer.adapters else () for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            try:
                _set_merged(layer, wanted[path])
            except AdapterStateError as error:
                raise ExportError(f"{path}: {error}") from error
        for layer in layers.values():
            put(where[id(layer)], layer.base)
        yield
    finally:
        for path, layer in layers.items():
            put(where[id(layer)], layer)
            _set_merged(layer, before[path][1])
            layer.active = before[path][0]


def _set_merged(layer: AdaptedLayer, names: tuple[str, ...]) -> None:
    """Merge exactly `names`."""
    if layer.merged == names:
        return
    layer.unmerge()
    layer.active = names
    layer.check_mergeable()
    layer.merge()


def _compare(model: nn.Module, folder: Path) -> float:
    """Load the folder and compare every tensor bit for bit, in a dtype that holds all of them; 0.0.

    Raises:
        ExportError: a tensor is missing or differs.
    """
    own = model.state_dict()
    wide = torch.float16
    for tensor in own.values():
        wide = torch.promote_types(wide, tensor.dtype) if tensor.is_floating_point() else wide
    with torch.random.fork_rng(devices=[]):
        loaded, info = type(model).from_pretrained(folder, dtype=wide, output_loading_info=True)  # type: ignore[attr-defined]
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    if wrong:
        raise ExportError(
            f"the merged model does not load again: {wrong[0]} is missing, unexpected or of another shape."
        )
    state = loaded.state_dict()
    for key, tensor in own.items():
        value, tensor = state[key], tensor.cpu()
        if tensor.is_floating_point():
            value, tensor = value.to(wide), tensor.to(wide)
        if not torch.equal(value, tensor):
            raise ExportError(f"the merged model does not load again as it was: {key} differs.")
    return 0.0
