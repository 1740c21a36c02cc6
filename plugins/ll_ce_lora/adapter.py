"""CELoRAAdapter: LoRA's pair of factors over a base layer whose backward pass is cheap.

Chen et al., 2025, arXiv:2502.01378.

    y = W x + b + s B (A x),   dx = cheap(G, W) + s (G B) A

    paper      here               shape
    A, B       lora_A, lora_B     (rank, d_in), (d_out, rank)     trained, the whole artefact
    S          index              (K,)                            derived: absent from every file of the adapter
    B0, A0     B0, A0             (d_out, r0), (r0, d_in)         derived
    |W_s,j|    row_norms          (d_out,)                        derived
    |G_j|^2    norms              (d_out,)                        only while a step is observed

Departs from the paper: nothing known beyond `functional.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from ll_ce_lora import functional
from lora_lightning.adapters.base import check_rank
from lora_lightning.adapters.layers.base import BaseAround, BaseLayer, StackedBase
from lora_lightning.adapters.layers.quantized import QuantizedBase
from lora_lightning.adapters.low_rank import add_low_rank, add_started
from lora_lightning.adapters.pair import PairAdapter
from lora_lightning.errors import AdapterStateError, SettingsError
from lora_lightning.seeds import generator

Selection = Literal["top", "sample"]
_DERIVED = ("index", "share", "B0", "A0", "row_norms")


class CheapBase(BaseAround):
    """A linear layer that is called another way; everything else is the layer's own."""

    def __init__(self, wrapped: BaseLayer, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__(wrapped)
        self.call = call

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output, with another backward pass."""
        return self.call(x)


class CELoRAAdapter(PairAdapter):
    """A pair of factors, and the channels that the layer's backward pass uses once `refresh` has chosen them.

    The backward pass is exact before that, in eval mode, and on a layer with hooks. Of adapters stacked on a layer the
    last that has chosen channels decides how the layer is called; the updates themselves are always exact.

    Args:
        base: a linear layer.
        rank: inner width of the update, at most the smaller side of the weight.
        scaling: s.
        dropout: probability of dropping entries of the update's input while training.
        kept: fraction of output channels that the backward pass uses.
        svd_rank: width of the split, at most the smaller side of the weight.
        every_n_steps: optimizer steps between two choices.
        selection: how channels are chosen.

    Raises:
        SettingsError: a layer that is not linear; a rank above the layer's size.
    """

    additive = True
    takes_start = True
    index: Tensor | None
    share: Tensor | None
    B0: Tensor | None
    A0: Tensor | None
    row_norms: Tensor | None

    def __init__(
        self,
        base: BaseLayer,
        *,
        rank: int,
        scaling: float,
        dropout: float,
        kept: float,
        svd_rank: int,
        every_n_steps: int,
        selection: Selection,
    ) -> None:
        super().__init__()
        _check_linear(base)
        self.svd_rank, self.every_n_steps, self.selection = svd_rank, every_n_steps, selection
        self.d_in, self.d_out = base.d_in, base.d_out
        self.channels = functional.channel_count(kept, base.d_out)
        self.seed = 0
        self.hold_pair(base, rank=rank, scaling=scaling, dropout=dropout)
        check_rank(base, svd_rank, "svd_rank")
        self.shown += (
            f", backward={self.channels} of {self.d_out} channels" if self.approximates else ", backward=exact"
        )
        for name in _DERIVED:
            self.register_buffer(name, None, persistent=False)
        # no buffer: DistributedDataParallel would overwrite each process's sums with those of the first
        self.norms: Tensor | None = None

    @property
    def approximates(self) -> bool:
        """Whether some channels are left out."""
        return self.channels < self.d_out

    def reset_others(self, generator: torch.Generator) -> None:
        """No channels chosen; later draws use the generator's seed."""
        self.seed = generator.initial_seed()
        self.forget()

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """base(x) + s B (A drop(x))."""
        dropout = self.dropout if self.training else 0.0
        base = self._cheap(x, base)
        if self.start_A is None or self.start_B is None:
            return add_low_rank(base, x, self.lora_A, self.lora_B, self.scaling, dropout)
        pair, start = (self.lora_A, self.lora_B), (self.start_A, self.start_B)
        return add_started(base, x, pair, start, self.scaling, dropout)

    def _cheap(self, x: Tensor, base: BaseLayer) -> BaseLayer:
        """`base`, or one that calls the layer itself cheaply, below whatever is stacked on it."""
        if isinstance(base, StackedBase):
            return StackedBase(self._cheap(x, base.wrapped), base.adapter)
        return CheapBase(base, lambda x: self._call(x, base)) if self._acts(x, base) else base

    def _acts(self, x: Tensor, base: BaseLayer) -> bool:
        if not self.training or (self.index is None and self.norms is None):
            return False
        needed = x.requires_grad and torch.is_grad_enabled() and not base.stored.requires_grad
        # a CheapBase is neither: the layer is called cheaply once
        return needed and (base.bare if isinstance(base, QuantizedBase) else base.dense)

    def _call(self, x: Tensor, base: BaseLayer) -> Tensor:
        channels = (self.index, self.share, self.B0, self.A0)
        if isinstance(base, QuantizedBase):
            norms = self.norms
            return base.product(x, lambda G, weight: functional.grad_input(G, weight, *channels, norms))
        return functional.cheap_linear(x, base.weight(), base.bias, *channels, self.norms)

    # -- choosing the channels -----------------------------------------------------------------------------------------

    def observe(self, on: bool) -> None:
        """Add up squared column norms of output gradients from zero on, or stop doing so."""
        self.norms = torch.zeros(self.d_out, dtype=self.lora_A.dtype, device=self.lora_A.device) if on else None

    def split(self, weight: Tensor) -> None:
        """Derive B0, A0 and the norms of the remaining rows from the base weight (d_out, d_in)."""
        if self.svd_rank:
            B0, A0 = functional.split(weight, self.svd_rank)
            self._derive({"B0": B0, "A0": A0})
        self._derive({"row_norms": functional.row_norms(weight, self.B0, self.A0)})

    def refresh(self, squares: Tensor, step: int) -> None:
        """Choose the channels from squared column norms (d_out,), equal on all processes; call `split` before."""
        if self.row_norms is None:
            raise AdapterStateError("the base weight is not split yet; call split before refresh.")
        scores = squares.sqrt() * self.row_norms
        if self.selection == "top":
            self._derive({"index": functional.top_channels(scores, self.channels)})
        else:
            index, share = functional.draw_channels(scores, self.channels, generator(self.seed, "channels", step, ""))
            self._derive({"index": index, "share": share})

    def forget(self) -> None:
        """Drop everything derived; the backward pass is exact until channels are chosen again."""
        for name in _DERIVED:
            setattr(self, name, None)

    def derived(self) -> dict[str, Tensor]:
        """What `refresh` and `split` have left, by name."""
        return {name: getattr(self, name) for name in _DERIVED if getattr(self, name) is not None}

    def restore(self, derived: Mapping[str, Tensor]) -> None:
        """Take over what `derived` gave."""
        self.forget()
        self.observe(False)
        self._derive(derived)

    def _derive(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in tensors.items():
            there = getattr(self, name)
            if there is None:
                setattr(self, name, value.to(self.lora_A.device, copy=True))
            else:
                there.copy_(value)  # in place: compiled code keeps its graph

    # -- as LoRA -------------------------------------------------------------------------------------------------------

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s B A."""
        return self.plus_pair(weight, self.lora_A)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(A, s B)."""
        return self.scaled_factors()


def _check_linear(base: BaseLayer) -> None:
    if base.kind != "linear":
        kind = {"conv": "a convolution", "embedding": "an embedding"}[base.kind]
        raise SettingsError(
            f"the layer is {kind}; only linear layers have a product to approximate. Exclude it, or adapt it with "
            "another method under another adapter name."
        )
