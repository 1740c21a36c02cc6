"""Quantizing a base model while it is loaded: which formats there are, what each needs, and where each works.

Imports neither torch nor a quantizing package before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, get_args

from lora_lightning.errors import SettingsError, did_you_mean

Quantization = Literal["nf4", "nf4-double", "int8", "torchao-int8"]
FORMATS: tuple[str, ...] = get_args(Quantization)
DEVICES = ("cpu", "cuda")
"""Types of device that packages have kernels for and tests stand on."""
_FULL_WEIGHTS = ("single", "auto", "ddp")
"""Beginnings of the names of strategies that keep full weights on each process."""
_HALVES = {"bf16": "bfloat16", "16": "float16"}


@dataclass(frozen=True)
class Loading:
    """How a model is quantized on loading.

    Attributes:
        format: one of `FORMATS`.
        device: where it is loaded, which is where it stays.
        compute: data type of four-bit products, by torch's name.
    """

    format: str
    device: str = "cpu"
    compute: str = "float32"


def check_format(
    format: str,
    strategy: str = "auto",
    precision: str = "32-true",
    device: str = "cpu",
    where: str = "model.quantization",
) -> None:
    """Refuse what cannot work, before anything is loaded.

    Args:
        format: one of `FORMATS`, or what `quantized_formats` says of a model.
        strategy: the trainer's strategy, by its name ("ddp", "fsdp", "deepspeed_stage_3") or class name.
        precision: the trainer's precision.
        device: type of device, such as "cuda".
        where: the setting that asks for it.

    Raises:
        SettingsError: an unknown format, a package that is not installed, or a strategy, precision or device that the
            format does not work with; it names what does.
    """
    said = f'{where} is "{format}"'
    if format == "torchao-int4":
        raise SettingsError(
            f"{said}; its weights are quantized from bfloat16 on a GPU only: quantize such a model in Python and call "
            'inject. Nearest: "nf4".'
        )
    for name in format.split(", "):
        if name not in FORMATS:
            raise SettingsError(f"{said}.{did_you_mean(name, FORMATS)} Known: {', '.join(FORMATS)}.")
    for package in ("accelerate", "torchao" if "torchao" in format else "bitsandbytes"):
        if find_spec(package) is None:
            raise SettingsError(f'{said}; it needs {package}: pip install "lora-lightning[quant]".')
    if not strategy.lower().startswith(_FULL_WEIGHTS):
        raise SettingsError(
            f'{said} and trainer.strategy is "{strategy}", which shards weights: quantized ones stay as they are. '
            'Works: one device, or "ddp" with the base on each.'
        )
    if precision in ("64-true", "transformer-engine", "transformer-engine-float16"):
        raise SettingsError(f'{said} and trainer.precision is "{precision}"; nearest: "bf16-mixed" or "32-true".')
    if device not in DEVICES:
        raise SettingsError(f'{said} and the device is "{device}"; it works on {" and ".join(DEVICES)}.')


def loading(format: str, precision: str, device: str) -> Loading:
    """How to load for a trainer's precision and device: four-bit products in the precision's half, if it has one."""
    half = next((name for prefix, name in _HALVES.items() if precision.startswith(f"{prefix}-")), "float32")
    return Loading(format, device, half)


def quantization_config(how: Loading, keep: Iterable[str]) -> Any:
    """The configuration that transformers quantizes by.

    Args:
        how: format and compute type.
        keep: paths of modules that stay as they are: heads, the output layer, and what trains in full.
    """
    import torch
    import transformers

    if how.format.startswith("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(keep))
    if how.format == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(keep))
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=how.format == "nf4-double",
        bnb_4bit_compute_dtype=getattr(torch, how.compute),
        llm_int8_skip_modules=list(keep),
    )


def stated(config: Any) -> str | None:
    """The format that a checkpoint's own configuration says its weights have; None for a plain checkpoint."""
    own = getattr(config, "quantization_config", None)
    if own is None:
        return None
    given: Mapping[str, Any] = own if isinstance(own, Mapping) else own.to_dict()
    method = str(given.get("quant_method", "unknown")).rpartition(".")[2].lower()
    if given.get("load_in_8bit"):
        return "int8"
    if given.get("load_in_4bit"):
        kind = str(given.get("bnb_4bit_quant_type", "fp4"))
        return f"{kind}-double" if given.get("bnb_4bit_use_double_quant") else kind
    if method == "torchao":
        return "torchao-int8" if "Int8WeightOnly" in str(given.get("quant_type")) else "torchao-int4"
    return method
