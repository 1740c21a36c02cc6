"""Merging: writing adapters into the base weight of one layer, and back.

A plain layer is written in place and its originals are kept. A quantized layer cannot be written: a plain layer with
the sum stands in its place while it is merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.base_weight import AFTER_FINAL_MERGE, BaseWeight
from lora_lightning.adapters.folded import FoldedUpdate
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.adapters.layers.quantized import QuantizedBase
from lora_lightning.distributed import all_finite, assembled, full_tensor
from lora_lightning.errors import AdapterStateError

Applied = Mapping[str, tuple[Adapter, FoldedUpdate | None]]
"""Adapters in the order in which they are applied, by name, each with what it has folded."""


class Merging:
    """The merge of one layer.

    Attributes:
        names: adapters whose update is inside the base weight now.
        stand_in: the plain layer in the place of a quantized one, while it is merged.
    """

    def __init__(self, base_weight: BaseWeight) -> None:
        self.base_weight = base_weight
        self.names: tuple[str, ...] = ()
        self.stand_in: BaseLayer | None = None

    def check_unmerged(self) -> None:
        """Raise `AdapterStateError` where the layer is merged."""
        if self.names:
            raise AdapterStateError(f"{', '.join(self.names)} is merged; {self.way_out}")

    def check(self, applied: Applied) -> None:
        """Raise `AdapterStateError` if the adapters cannot be merged: routed, not finite, or too large."""
        if self.names and self.names != tuple(applied):
            raise AdapterStateError(f"{', '.join(self.names)} is merged already; {self.way_out}")
        for name, (adapter, _) in applied.items():
            if not adapter.mergeable:
                raise AdapterStateError(f'adapter "{name}" ({type(adapter).__name__}) depends on its input; no merge.')
            for tensor_name, tensor in adapter.named_parameters():
                if not all_finite(tensor):
                    raise AdapterStateError(f'adapter "{name}": {tensor_name} holds values that are not finite.')
        if applied and not self.names:
            self._check_result(*self.merged(applied))

    def _check_result(self, weight: Tensor, bias: Tensor | None) -> None:
        base = self.base_weight.base_layer
        if bias is not None and base.bias is None and isinstance(base.stored, DTensor):
            raise AdapterStateError(
                "the layer has no bias and is sharded, so that it cannot be given the adapter's; save the "
                "adapter, and merge it into a model that is not sharded."
            )
        for tensor in (weight, bias):
            if tensor is not None and not torch.isfinite(tensor.to(base.dtype)).all():
                raise AdapterStateError(f"the merged weight overflows {base.dtype}.")

    @torch.no_grad()
    def merged(self, applied: Applied) -> tuple[Tensor, Tensor | None]:
        """The original weight (d_out, d_in) and bias with the adapters, without noise; in float32 at least."""
        base = self.base_weight.base_layer
        original_bias = self.base_weight.originals().get("bias")
        bias = None if original_bias is None else full_tensor(original_bias).to(base.device)
        weight = plain = self.base_weight.pretrained(base.adapter_dtype)
        for adapter, folded in applied.values():
            if folded is not None:
                weight, plain = folded.merged_weight(weight), folded.merged_weight(plain)
            with assembled(adapter):
                weight, bias = adapter.merged_onto(weight, plain), adapter.merged_bias(bias)
        return weight, bias

    def merge(self, applied: Applied, keep_original: bool) -> nn.Module:
        """Write the adapters into the weight; the module that is to stand in the layer's place. Call `check` first."""
        base = self.base_weight.base_layer
        base.check_writable()
        weight, bias = self.merged(applied)
        module = base.module
        if isinstance(base, QuantizedBase):
            module = base.plain(weight, bias)
            plain = cast(BaseLayer, core_base_layer(module))
            if keep_original:
                self.stand_in = plain
            else:
                self.base_weight.base_layer, self.base_weight.lost = plain, True
        else:
            self.base_weight.write_merged(weight, bias, keep_original)
        self.names = tuple(applied)
        return module

    def unmerge(self) -> nn.Module:
        """Take the adapters out again, but for the weight itself, which `BaseWeight.hold` writes next.

        Returns:
            The module that is to stand in the layer's place.

        Raises:
            AdapterStateError: the originals were not kept.
        """
        base = self.base_weight.base_layer
        if self.base_weight.lost:
            raise AdapterStateError(
                f"merged with keep_original=False; the original weight is gone. {AFTER_FINAL_MERGE}"
            )
        if self.stand_in is None:
            base.check_writable()
            self.base_weight.restore_bias()
        self.names, self.stand_in = (), None
        return base.module

    @property
    def way_out(self) -> str:
        """What helps where a merged layer is in the way."""
        return AFTER_FINAL_MERGE if self.base_weight.lost else "call unmerge first."

    def make_final(self) -> None:
        """Take the merged weight for the original from now on."""
        self.names, self.base_weight.lost = (), False
