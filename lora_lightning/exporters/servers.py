"""What programs that serve models refuse of an adapter, and in which form they take it.

vllm        peft's folder; one rank and one scaling for all layers, since it reads no patterns in all of its versions
llama.cpp   a GGUF file of factors

What cannot travel as an adapter travels as a merged model, which is exact, where the update does not depend on the
input. Facts are of 2026-11-30; docs/export.md names their sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lora_lightning.errors import AdapterStateError, ExportError, did_you_mean
from lora_lightning.exporters import llama_cpp
from lora_lightning.exporters.peft.factors import Factors, find_factors
from lora_lightning.exporters.source import Source, find
from lora_lightning.models.heads import output_embeddings
from lora_lightning.models.published import pipeline_tag
from lora_lightning.plugin_code import imported
from lora_lightning.registry import FORMATS, SERVERS

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""
_DEFAULT_RANK = 16
_NO_ADAPTERS = (
    "BloomForCausalLM",
    "DbrxForCausalLM",
    "FalconForCausalLM",
    "FalconMambaForCausalLM",
    "FlexOlmoForCausalLM",
    "GPT2LMHeadModel",
    "GPTJForCausalLM",
    "GPTNeoXForCausalLM",
    "Gemma3nForCausalLM",
    "Mamba2ForCausalLM",
    "MambaForCausalLM",
    "OlmoeForCausalLM",
    "StableLmForCausalLM",
    "Zamba2ForCausalLM",
)
"""Classes of transformers that vLLM serves, but without adapters."""
_GENERATE = ("text-generation", "image-text-to-text", "feature-extraction")
"""Tasks that llama.cpp serves; it has no heads of classes."""


@dataclass(frozen=True)
class Served:
    """In which form a server takes an adapter."""

    format: str
    one_rank: bool = False
    notes: tuple[str, ...] = ()


def served(source: Source, server: str, format: str | None = None, rank: int | None = None) -> Served:
    """How an adapter is written for a server.

    Args:
        source: the adapter.
        server: a name of `SERVERS`.
        format: the format that is asked for; None takes the server's own, or "merged" where it refuses the adapter.
        rank: see `export`.

    Raises:
        ExportError: no such server, a format that it does not read, or an adapter that it refuses in this form.
    """
    if server not in SERVERS:
        raise ExportError(f'--for is "{server}".{did_you_mean(server, SERVERS)} Known: {", ".join(SERVERS)}.')
    own = SERVERS[server]
    if format not in (None, own, "merged"):
        raise ExportError(f'--for {server} reads no "{format}". It reads {own} and merged; leave --format out.')
    reasons = [] if format == "merged" else obstacles(source, server, rank)
    if reasons and format is not None:
        raise ExportError(f"{server} refuses this adapter: {' '.join(reasons)} --format merged writes one model.")
    if format == "merged" or reasons:
        if hard := refused(source, server):
            why = f"{' '.join(reasons)} " if reasons else ""
            raise ExportError(f"{server} serves this adapter in no form: {why}Merged: {hard}")
        kept = tuple(f"{server} refuses the adapter itself, so the model is merged: {reason}" for reason in reasons)
        return Served("merged", notes=(*kept, *_how_merged(server)))
    return Served(own, one_rank=server == "vllm", notes=_how(source, server, rank))


def preview(model: nn.Module, server: str, name: str = "default") -> list[str]:
    """Lines that say before training what a server will refuse; none where it takes the adapter as it is.

    Of a sharded model nothing is said.

    Raises:
        ExportError: no such server.
    """
    if server not in SERVERS:
        raise ExportError(f'serve_with is "{server}".{did_you_mean(server, SERVERS)} Known: {", ".join(SERVERS)}.')
    try:
        found = served(find(model, name), server)
    except AdapterStateError:
        return []
    except ExportError as error:
        return [] if "is sharded" in str(error) else [str(error)]
    return list(found.notes)


def obstacles(source: Source, server: str, rank: int | None = None) -> list[str]:
    """Why a server does not take an adapter as it is; each names what is refused. Needs no values."""
    found = []
    architecture = type(source.host).__name__
    if server == "vllm" and architecture in _NO_ADAPTERS:
        found.append(f"it serves {architecture} without adapters.")
    try:
        if server == "vllm":
            imported(FORMATS["peft"]).check(source)  # by its name: it stands above, since it exports in a fresh process
        else:
            llama_cpp.check(source, rank)
        factors, options = find_factors(source, rank)
    except ExportError as error:
        return [*found, str(error)]
    return found if server != "vllm" else [*found, *_vllm(source, factors, options)]


def _vllm(source: Source, factors: Mapping[str, Factors], options: Mapping[str, object]) -> list[str]:
    """What vLLM refuses of what peft's format can say."""
    found = [f"it reads no {', '.join(options)} ({source.method})."] if options else []
    if source.heads:
        found.append(f"it reads no modules_to_save and no biases, and {source.heads[0]} trains in full.")
    if source.extended:
        found.append(
            f"it reads no rows of tokens in all of its versions, and those of {next(iter(source.extended))} train."
        )
    head = output_embeddings(source.host)
    for path, layer in source.layers.items():
        last = head in (layer, layer.base)
        if layer.base_layer.kind != "linear" or last:
            what = "the output layer" if last else f'a layer of kind "{layer.base_layer.kind}"'
            found.append(f"it serves linear layers of blocks in each of its models, and {path} is {what}.")
            break
    if biased := next((path for path, f in factors.items() if f.bias is not None), None):
        found.append(f"it reads no lora_bias, and that of {biased} trains.")
    largest = max(f.rank for f in factors.values())
    if largest > _RANKS[-1]:
        found.append(
            f"its largest rank is {_RANKS[-1]}, and this adapter has {largest}; --rank {_RANKS[-1]} truncates."
        )
    return found


def refused(source: Source, server: str) -> str | None:
    """Why a server does not take the merged model either; None where it does."""
    from lora_lightning.exporters import merged  # imports data modules, which only it needs

    try:
        merged.check(source)
    except ExportError as error:
        return str(error)
    architecture = type(source.host).__name__
    if server == "llama.cpp" and pipeline_tag(architecture) not in _GENERATE:
        return f"it has no heads of classes, and this is {architecture}."
    return None


def _how(source: Source, server: str, rank: int | None) -> tuple[str, ...]:
    """What the server has to be told."""
    if server != "vllm":
        return ()
    ranks = [f.rank for f in find_factors(source, rank)[0].values()]
    if max(ranks) <= _DEFAULT_RANK:
        return ()
    needed = next(size for size in _RANKS if size >= max(ranks))
    return (f"rank {max(ranks)} needs: vllm serve BASE --enable-lora --max-lora-rank {needed}",)


def _how_merged(server: str) -> tuple[str, ...]:
    return ("llama.cpp: convert the folder with its convert_hf_to_gguf.py",) if server == "llama.cpp" else ()
