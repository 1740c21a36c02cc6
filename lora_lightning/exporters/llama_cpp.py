"""Writing an adapter as llama.cpp reads it: factors in one GGUF file, through the gguf package, and read back with it.

    general.type "adapter", general.architecture, adapter.type "lora", adapter.lora.alpha
    <name>.lora_a    (r, d_in)                       token_embd.weight: (vocabulary, r)
    <name>.lora_b    (d_out, r)

llama.cpp adds alpha / r * B A to the weight <name>, with the r of each pair; other scalings go into B. It keeps
weights of Conv1D as (d_out, d_in), and for architecture "llama" the rows of q and k in another order: those of a head,
first half beside second half, one by one in turn. Rows of B are put in that order too.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import ExportError
from lora_lightning.exporters.peft.factors import Factors, delta, find_factors
from lora_lightning.exporters.report import Written
from lora_lightning.exporters.source import Source, check_finite

TAKES_RANK = True
TAKES_DTYPE = ("float32", "float16", "bfloat16")
SERVER = "llama.cpp"
"""Whoever does not serve with it need not know what it refuses."""
FILE = "adapter.gguf"

_FAMILIES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "gemma3": "GEMMA3",
    "gemma3_text": "GEMMA3",
    "gpt2": "GPT2",
}
"""Name in gguf's `MODEL_ARCH` by the configuration's model_type."""
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_QUANTIZATION = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_SMALLEST = 2.0**-24
"""Half of this is the largest error of a number below the normal ones of float16."""


@dataclass(frozen=True)
class Pair:
    """One layer's factors as the file has them, in float32."""

    name: str
    """Of the weight in llama.cpp."""
    A: Tensor
    B: Tensor


def write(source: Source, folder: Path, rank: int | None, verify: bool) -> Written:
    """Write the adapter into `folder`.

    Args:
        source: the adapter; its `dtype` is that of the factors, float32 where it is None.
        folder: an empty folder.
        rank: largest rank; see `find_factors`.
        verify: read the file back and compare.

    Raises:
        ExportError: no gguf package; a model, a layer, a head or an update that the format does not know.
    """
    check(source, rank)
    import gguf

    factors, _ = find_factors(source, rank)
    pairs, alpha = _pairs(source, factors)
    dtype = source.dtype or "float32"
    kind = gguf.GGMLQuantizationType[_QUANTIZATION[dtype]]
    writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[_architecture(source)])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for pair in pairs.values():
        for end, tensor in ((".lora_a", pair.A), (".lora_b", pair.B)):
            check_finite("the adapter", {pair.name + end: tensor.to(getattr(torch, dtype))})
            writer.add_tensor(pair.name + end, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    discarded = {path: f.discarded for path, f in factors.items() if f.discarded}
    return Written(
        kind="truncated SVD" if discarded else "exact LoRA" if dtype == "float32" else f"LoRA in {dtype}",
        layers=len(pairs),
        difference=_compared(source, folder, factors, pairs, alpha, dtype) if verify else None,
        verified_by="gguf's reader",
        discarded=discarded,
        notes=("llama.cpp: llama-server -m BASE.gguf --lora " + FILE,),
    )


def check(source: Source, rank: int | None = None) -> None:
    """Raise `ExportError` for what `write` will refuse whatever values are trained."""
    if importlib.util.find_spec("gguf") is None:
        raise ExportError('format "gguf" needs the package gguf: pip install "lora-lightning[gguf]"')
    source.refuse_below()
    _architecture(source)
    if source.trained:
        raise ExportError(
            f"{source.trained[0]} trains in full, and a GGUF adapter holds factors only: no heads, no rows of tokens, "
            'no biases. Use format="merged".'
        )
    factors, options = find_factors(source, rank)
    if options:
        raise ExportError(
            f'{source.method} is a LoRA with {", ".join(options)}, which GGUF has no place for. Use format="merged", '
            "which is exact."
        )
    for path, found in factors.items():
        if found.bias is not None:
            raise ExportError(f'{path} trains a bias, which a GGUF adapter has no place for. Use format="merged".')
        _name(source, path)


def _architecture(source: Source) -> Any:
    import gguf

    host: Any = source.host
    kind = getattr(getattr(host, "config", None), "model_type", None)
    known = ", ".join(sorted({*_FAMILIES}))
    if kind not in _FAMILIES or not type(host).__name__.endswith(_LANGUAGE_MODELS):
        raise ExportError(
            f"{type(host).__name__} is no language model of {known}, whose layers are known by llama.cpp's names here. "
            'Use format="merged", and llama.cpp\'s convert_hf_to_gguf.py.'
        )
    return gguf.MODEL_ARCH[_FAMILIES[kind]]


def _name(source: Source, path: str) -> str:
    """The name of a layer's weight in llama.cpp.

    Raises:
        ExportError: it has none, or another layer has the same weight.
    """
    import gguf

    layer, host = source.layers[path], source.host
    text: Any = host.config.get_text_config()  # type: ignore[operator, union-attr]
    names = gguf.get_tensor_name_map(_architecture(source), text.num_hidden_layers)
    found = names.get_name(f"{path.replace('language_model.', '', 1)}.weight", try_suffixes=(".weight",))
    kind = layer.base_layer.kind
    if found is None or kind not in ("linear", "embedding"):
        raise ExportError(f'{path} has no name in llama.cpp\'s {type(host).__name__}. Leave it out, or use "merged".')
    if layer.tied_to:
        raise ExportError(
            f"{path} shares its weight with {', '.join(layer.tied_to)}, llama.cpp would use the factors for both; "
            "leave it out, or train with untie=True (model.untie) and merge."
        )
    return str(found)


def _pairs(source: Source, factors: Mapping[str, Factors]) -> tuple[dict[str, Pair], float]:
    """Factors as the file has them, and the alpha that holds for all."""
    (alpha, _), *_ = Counter(f.scaling * f.rank for f in factors.values()).most_common(1)
    alpha = float(torch.tensor(alpha or 1.0))  # as float32 has it
    pairs = {}
    for path, f in factors.items():
        A, B = f.A.float(), f.B.float()
        if f.scaling * f.rank != alpha:
            B = (f.B.double() * (f.scaling * f.rank / alpha)).float()
        if (heads := _heads(source, path)) is not None:
            B = B.reshape(heads, 2, -1, B.shape[1]).transpose(1, 2).reshape(B.shape)
        if source.layers[path].base_layer.kind == "embedding":
            A = A.mT
        pairs[path] = Pair(_name(source, path), A.contiguous(), B.contiguous())
    return pairs, alpha


def _heads(source: Source, path: str) -> int | None:
    """Number of heads of a layer whose rows llama.cpp has in another order; None for other layers."""
    import gguf

    host: Any = source.host
    last = path.rpartition(".")[2]
    if _architecture(source) != gguf.MODEL_ARCH.LLAMA or last not in ("q_proj", "k_proj"):
        return None
    config = host.config.get_text_config()
    heads = config.num_attention_heads if last == "q_proj" else config.num_key_value_heads
    return int(heads)


def _compared(
    source: Source, folder: Path, factors: Mapping[str, Factors], pairs: Mapping[str, Pair], alpha: float, dtype: str
) -> float:
    """Largest difference between the updates that the file states and the adapter's.

    Raises:
        ExportError: a factor differs by more than its data type rounds, an update by more than that, or alpha.
    """
    import gguf

    reader = gguf.GGUFReader(folder / FILE)
    stated = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA)
    if stated is None or stated.contents() != alpha:
        raise ExportError("the GGUF file does not read back: its alpha is another one.")
    there = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    if there.keys() != {pair.name + end for pair in pairs.values() for end in (".lora_a", ".lora_b")}:
        raise ExportError("the GGUF file does not read back: it lists other tensors than were written.")
    largest = 0.0
    for path, pair in pairs.items():
        A, B = there[f"{pair.name}.lora_a"], there[f"{pair.name}.lora_b"]
        for wanted, found in ((pair.A, A), (pair.B, B)):
            allowed = _ROUNDING[dtype] * wanted.abs() + (_SMALLEST if dtype != "float32" else 0.0)
            if wanted.shape != found.shape or not ((found - wanted).abs() <= allowed).all():
                raise ExportError(f"{path}: a factor does not read back from the GGUF file up to rounding.")
        largest = max(largest, _off(source, path, (A, B), alpha, factors[path], dtype))
    return largest


def _off(source: Source, path: str, read: tuple[Tensor, Tensor], alpha: float, factors: Factors, dtype: str) -> float:
    """How far an update that was read is from the adapter's; raises where it is more than rounding."""
    A, B = read[0].double(), read[1].double()
    if source.layers[path].base_layer.kind == "embedding":
        A = A.mT
    if (heads := _heads(source, path)) is not None:
        B = B.reshape(heads, -1, 2, B.shape[1]).transpose(1, 2).reshape(B.shape)
    found = alpha / B.shape[1] * B @ A
    expected, noise = delta(source.layers[path], source.name)
    if factors.discarded:
        expected = factors.scaling * factors.B.double() @ factors.A.double()
    difference = float((found - expected).abs().max())
    size = factors.scaling * (factors.B.double().abs() @ factors.A.double().abs())
    allowed = (1e-5 + 2.5 * _ROUNDING[dtype]) * float(size.abs().max()) + noise
    allowed += 0.0 if dtype == "float32" else _SMALLEST * factors.rank * abs(factors.scaling)
    if not difference <= allowed:
        raise ExportError(
            f"{path}: the GGUF file gives an update that differs by {difference:.3g}, more than rounding."
        )
    return difference
