"""Writing a plain Hugging Face model with the adapter merged in, and leaving the caller's model as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.layers.quantized import QuantizedBase
from lora_lightning.adapters.low_rank import NO_BIAS
from lora_lightning.errors import AdapterStateError, ExportError
from lora_lightning.exporters.companions import any_generation_config, companion_files, ending_turns, write_below
from lora_lightning.exporters.precision import check_precision, in_dtype, quantize, state_dtype
from lora_lightning.exporters.report import Written
from lora_lightning.exporters.source import Source, check_finite
from lora_lightning.injection.links import without_linked
from lora_lightning.injection.merge_quantized import Dequantized
from lora_lightning.injection.place import set_module
from lora_lightning.models.anatomy import Anatomy
from lora_lightning.models.new_tokens import plain_vocabulary

TAKES_DTYPE = ("float32", "bfloat16", "float16")
TAKES_QUANTIZE = ("nf4", "nf4-double")
_SAY_QUANTIZED = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


def write(source: Source, folder: Path, rank: int | None, verify: bool) -> Written:  # noqa: ARG001 - every format's signature
    """Write the merged model into `folder` with `save_pretrained`.

    Args:
        source: the adapter, and those below it; other adapters of the model do not count. Of its `dtype` are all
            numbers that are written; by its `quantize` the merged model is quantized.
        folder: an empty folder.
        rank: no rank limits a merged model.
        verify: load the model again and compare every tensor bit for bit.

    Raises:
        ExportError: no Hugging Face model, an input-routed method, a tied weight, or a bias the architecture lacks.
    """
    check(source)
    check_precision(source)
    host: Any = source.host
    dequantized, anatomy = Dequantized(), source.anatomy
    extended = list(anatomy.extended.values())
    plain = (_plain(source, dequantized), without_linked(anatomy.model), _unquantized(source))
    files = companion_files(host, source.processor, source.tokenizer)
    notes: list[str] = []
    with ExitStack() as stack:
        for context in (*plain, plain_vocabulary(extended, anatomy.places), ending_turns(host, files)):
            stack.enter_context(context)
        kept = host.state_dict(keep_vars=True)
        state, buffers = (
            in_dtype(kept, source.dtype),
            {n: t for n, t in kept.items() if not isinstance(t, nn.Parameter)},
        )
        check_finite(f"the model in {source.dtype}" if source.dtype else "the model", state, buffers)
        with _own_config(host), any_generation_config(host, folder):
            _save(host, folder, None if source.dtype is None else state)
            write_below(files, folder)
        if source.dtype is not None:
            state_dtype(folder, source.dtype)
        difference = _compare(type(host), state, folder) if verify else None
    if source.quantize is not None:
        difference, note = quantize(type(host), folder, source.quantize, [*source.trained], verify)
        notes.append(note)
    notes += [str(dequantized)] if dequantized.layers else []
    if len({t.dtype for t in state.values() if isinstance(t, nn.Parameter) and t.is_floating_point()}) > 1:
        notes.append("its tensors have several dtypes; from_pretrained makes them one unless told otherwise")
    if not files:
        notes.append(
            f"no tokenizer and no processor: none lies beside the base model "
            f'("{host.config._name_or_path}"); give it to export as `processor`'
        )
    return Written(kind="merged", layers=len(source.layers), difference=difference, notes=tuple(notes))


def _save(model: Any, folder: Path, state: Mapping[str, Tensor] | None) -> None:
    """Write a plain model, of other tensors where some are given."""
    try:
        model.save_pretrained(folder, **({} if state is None else {"state_dict": state}))
    except (RuntimeError, ValueError) as error:
        raise ExportError(
            f"transformers does not save this {type(model).__name__}, with an adapter or without: "
            f'{" ".join(str(error).split())} Use format="peft", which needs no new copy of the model.'
        ) from error


@contextmanager
def _own_config(model: Any) -> Iterator[None]:
    """The configuration of a model is afterwards what it was before, whatever saving notes in it."""
    before = copy.copy(model.config.__dict__)
    try:
        yield
    finally:
        model.config.__dict__.clear()
        model.config.__dict__.update(before)


def check(source: Source) -> None:
    """Raise `ExportError` for what `write` will refuse whatever values are trained."""
    from transformers import PreTrainedModel

    if not isinstance(source.host, PreTrainedModel):
        raise ExportError(
            f"{type(source.host).__name__} is no PreTrainedModel of transformers, so it has no folder format. "
            "Merge in place instead: merge(model, keep_original=False), then eject(model), and save its state_dict."
        )
    for path, layer in source.layers.items():
        adapter = source.adapter(path)
        source.check_fixed(path)
        if layer.tied_to:
            raise ExportError(
                f"{path} shares its weight with {', '.join(layer.tied_to)}, so a merged model would change both. Use "
                'format="peft", which keeps the update apart, or train with untie=True (model.untie).'
            )
        if "bias" not in layer.originals() and adapter.merged_bias(None) is not None:
            beside = next((other for other, one in source.layers.items() if one.base_layer.kind in NO_BIAS), None)
            way_out = 'Use format="peft", or train with bias=False.'
            if beside:  # which peft's format refuses
                way_out = f'Train with bias=False; or leave out {beside}, and use format="peft".'
            raise ExportError(
                f"{path} has no bias in {type(source.host).__name__}, but the adapter trained one, which a plain model "
                f"would drop on loading. {way_out}"
            )
    for path, layer in source.anatomy.adapted.items():
        under = [name for name in source.stack[:-1] if name in layer.adapters]
        if under and (layer.tied_to or not all(layer.adapter(name).mergeable for name in under)):
            why = "its weight is shared with another module" if layer.tied_to else "its update depends on the input"
            raise ExportError(f'{path} carries the adapter below, "{under[0]}", which cannot be merged: {why}.')


@contextmanager
def _plain(source: Source, dequantized: Dequantized) -> Iterator[None]:
    """Inside, the model is plain, with exactly this adapter and those below it merged; afterwards as before."""
    layers, where = source.anatomy.adapted, source.anatomy.places
    before = {path: (layer.active, layer.merged) for path, layer in layers.items()}
    wanted = {path: tuple(name for name in source.stack if name in layer.adapters) for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            try:
                _set_merged(layer, wanted[path], path, dequantized)
            except AdapterStateError as error:
                raise ExportError(f"{path}: {error}") from error
        for layer in layers.values():
            set_module(where[id(layer)], layer.base)
        yield
    finally:
        for path, layer in layers.items():
            set_module(where[id(layer)], layer)
            _set_merged(layer, before[path][1], path, Dequantized())
            layer.active = before[path][0]


@contextmanager
def _unquantized(source: Source) -> Iterator[None]:
    """Inside, quantized layers without an adapter are plain as well, and nothing says that the model is quantized."""
    standing = _standing_quantized(source.anatomy)
    own = source.host.__dict__
    said = {name: own.pop(name) for name in _SAY_QUANTIZED if name in own}
    config: Any = source.host.config
    stated = config.__dict__.pop("quantization_config", None)
    if said and own.get("_weight_conversions"):  # of a checkpoint that was quantized, some unpack its files
        said["_weight_conversions"] = own["_weight_conversions"]
        own["_weight_conversions"] = [each for each in own["_weight_conversions"] if _has_reverse(each)]
    try:
        for base, where in standing:
            set_module(where, base.plain(base.weight(torch.float32), base.bias))
        yield
    finally:
        for base, where in standing:
            set_module(where, base.module)
        own.update(said)
        if stated is not None:
            config.quantization_config = stated


def _standing_quantized(anatomy: Anatomy) -> list[tuple[QuantizedBase, Sequence[tuple[nn.Module, str]]]]:
    """Quantized layers that stand in the model while adapted layers are out, each with its (parent, name) places."""
    found = []
    for path, base in anatomy.quantized.items():
        layer = anatomy.adapted.get(path)
        if layer is None:
            found.append((base, anatomy.places[id(base.module)]))
        elif layer.base is base.module:  # else a plain one with the adapter merged in has its place
            found.append((base, anatomy.places[id(layer)]))
    return found


def _has_reverse(conversion: Any) -> bool:
    """Whether transformers can undo, in saving, what it has done to tensors in loading."""
    try:
        conversion.reverse_transform()
    except (NotImplementedError, ValueError):
        return False
    return True


def _set_merged(layer: AdaptedLayer, names: tuple[str, ...], path: str, dequantized: Dequantized) -> None:
    """Merge exactly `names`."""
    if layer.merged == names:
        return
    layer.unmerge()
    layer.active = names
    layer.check_mergeable()
    dequantized.merge(path, layer)


def _compare(model_class: Any, own: Mapping[str, Tensor], folder: Path) -> float:
    """Load the folder and compare every tensor bit for bit, in a dtype that holds all of them; 0.0.

    Raises:
        ExportError: a tensor is missing or differs.
    """
    wide = torch.float16
    for tensor in own.values():
        wide = torch.promote_types(wide, tensor.dtype) if tensor.is_floating_point() else wide
    try:
        with torch.random.fork_rng(devices=[]):
            loaded, info = model_class.from_pretrained(folder, dtype=wide, output_loading_info=True)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"the merged model does not load again as a {model_class.__name__}: {reason}") from error
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    if wrong:
        raise ExportError(
            f"the merged model does not load again: {wrong[0]} is missing, unexpected or of another shape."
        )
    state = loaded.state_dict()
    for key, tensor in own.items():
        value, tensor = state[key], tensor.detach().cpu()
        if tensor.is_floating_point():
            value, tensor = value.to(wide), tensor.to(wide)
        if not torch.equal(value, tensor):
            raise ExportError(f"the merged model does not load again as it was: {key} differs.")
    return 0.0
