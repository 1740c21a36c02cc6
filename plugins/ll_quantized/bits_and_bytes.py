"""Linear4bit and Linear8bitLt of bitsandbytes.

    nf4, fp4       W = absmax[block] * code[4-bit index], blocks of 64; "-double": absmax is quantized as well
    int8           W = CB * SCB / 127, one scale a row

Dettmers et al., 2023, arXiv:2305.14314 (4 bits), and 2022, arXiv:2208.07339 (8 bits). The package is not imported
before there is such a layer.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from lora_lightning.adapters.layers.quantized import QuantizedBase

_CPU_ROWS = 32
"""Rows of a block in the format that bitsandbytes packs four-bit weights into on a processor with AVX512-BF16."""


class FourBitBase(QuantizedBase):
    """Linear4bit, whose product is that of the dequantized weight in the layer's compute dtype."""

    def __init__(self, module: nn.Module) -> None:
        layer, state = cast(Any, module), cast(Any, module.weight).quant_state
        name = f"{state.quant_type}-double" if state.nested else state.quant_type
        transposed = _from_conv1d(module)
        if layer.out_features % _CPU_ROWS or layer.in_features % state.blocksize:
            layer.support_avx512bf16_for_cpu = False  # else the package fails in evaluation: it cannot pack the layer
        super().__init__(module, name, layer.in_features, layer.out_features, state.dtype, transposed)

    @property
    def parts(self) -> list[Tensor]:
        """The numbers and their scales."""
        self._unpack()
        weight = cast(Any, self.module.weight)
        state = weight.quant_state
        return [weight.data, state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]

    def _unpack(self) -> None:
        if getattr(cast(Any, self.module.weight).quant_state, "packing_format_for_cpu", False):
            self.module.state_dict()  # an inference has packed the numbers for the processor; saving unpacks them

    def dequantize(self) -> Tensor:
        """The weight, as the package's own function gives it."""
        from bitsandbytes.functional import dequantize_4bit

        self._unpack()
        weight = cast(Any, self.module.weight)
        return cast(Tensor, dequantize_4bit(weight.data, weight.quant_state))


class EightBitBase(QuantizedBase):
    """Linear8bitLt; on a GPU its product quantizes the input as well, so it is near the weight's, not equal to it."""

    def __init__(self, module: nn.Module) -> None:
        layer = cast(Any, module)
        super().__init__(module, "int8", layer.in_features, layer.out_features, None, _from_conv1d(module))

    @property
    def parts(self) -> list[Tensor]:
        """The numbers and their scales."""
        return [self._numbers, self._scale]

    @property
    def _numbers(self) -> Tensor:
        state = cast(Any, self.module.state)
        return cast(Tensor, state.CB if state.CB is not None else cast(Any, self.module.weight).data)

    @property
    def _scale(self) -> Tensor:
        # the first forward moves it from the parameter into the state
        state = cast(Any, self.module.state)
        return cast(Tensor, state.SCB if state.SCB is not None else cast(Any, self.module.weight).SCB)

    def dequantize(self) -> Tensor:
        """Each row's numbers times its scale / 127, in float32."""
        return self._numbers.float().mul_(self._scale.float().unsqueeze(1) / 127)


def _from_conv1d(module: nn.Module) -> bool:
    """Whether transformers has put the layer in the place of a Conv1D, whose weight it transposed."""
    return getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D"


def bits_and_bytes(module: nn.Module) -> QuantizedBase | None:
    """The base layer of a layer whose weight bitsandbytes has quantized."""
    kind, weight = type(module).__name__, cast(Any, module._parameters.get("weight"))
    if weight is None or not type(module).__module__.startswith("bitsandbytes."):
        return None
    if kind.startswith("Linear") and getattr(weight, "quant_state", None) is not None:
        return FourBitBase(module)
    if kind == "Linear8bitLt" and not cast(Any, module.state).has_fp16_weights and not weight.is_floating_point():
        return EightBitBase(module)
    return None
