"""ResLoRA: residual paths between low-rank updates of layers of the same type, in the order of depth.

Shi et al., 2024, arXiv:2402.18039, section 3.

    block shortcut   y_n = W_n x_n + s sum_(k = 0..m) B_(n-k) A_(n-k) x_n
    merged           W_n + s sum_(k = 0..m) B_(n-k) A_(n-k)

    paper  here          shape (out, in as nn.Linear stores it)
    W      weight        (d_out, d_in)   frozen
    A, B   lora_A/B      (rank, d_in), (d_out, rank)   start at LoRA's values: B is zero
    s      scaling       alpha / rank
    n      depth of the layer's block among blocks with a layer at that place, all query projections for one
    m      previous      pre_num in the released code

Departs from the paper: one dropout mask for all pairs of a layer. Layers of other shapes at the same place are passed
over, where the released code would fail. The released code merges with A^T B^T, which is right for square layers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lora_lightning.errors import check
from lora_lightning.methods import Adapters, LowRankFields, Method, check_low_rank

if TYPE_CHECKING:
    from torch import nn

    from ll_reslora.adapter import BlockShortcuts
    from lora_lightning.adapters.layers.base import BaseLayer
    from lora_lightning.adapters.linked import Linked


@dataclass(frozen=True, kw_only=True)
class ResLoRA(LowRankFields, Method):
    """Low-rank updates that act in later blocks as well, so that gradients reach early ones by a shorter path.

    Block shortcuts (ResLoRA_bs) of Shi et al., 2024: a layer adds the updates of its predecessors of the same type to
    its own, and merges exactly. It trains as many numbers as LoRA.
    """

    paper: ClassVar[str] = "2402.18039"
    bibtex: ClassVar[str] = """@inproceedings{shi2024reslora,
  title = {{ResLoRA}: Identity Residual Mapping in Low-Rank Adaption},
  author = {Shi, Shuhua and Huang, Shaohan and Song, Minghui and Li, Zhoujun and Zhang, Zihan and Huang, Haizhen
            and Wei, Furu and Deng, Weiwei and Sun, Feng and Zhang, Qi},
  booktitle = {Findings of the Association for Computational Linguistics: ACL},
  year = {2024},
  note = {arXiv:2402.18039}
}"""
    export: ClassVar[str] = "exact LoRA"
    run_wide: ClassVar[tuple[str, ...]] = ("previous",)

    previous: int = -1
    """How many earlier layers of its type a layer reads; -1 for all of them, 0 for none, which is LoRA. Every one of
    them is a further product of rank r in the layer, and a further r in the rank of an export."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        check(self.previous >= -1, self, "previous", "it must be at least 0, or -1 for all earlier layers.")

    def build(self, base: BaseLayer) -> BlockShortcuts:
        """One pair of factors; `link` joins those of earlier layers."""
        from ll_reslora.adapter import BlockShortcuts

        shortcuts = self.previous != 0
        return BlockShortcuts(base, rank=self.rank, scaling=self.scaling, dropout=self.dropout, shortcuts=shortcuts)

    def link(self, model: nn.Module, adapters: Adapters) -> Mapping[str, Linked]:
        """Earlier layers of the same type and shape, as peers; nothing lies above layers."""
        from lora_lightning.models.blocks import same_place_before

        for path, earlier in same_place_before(model, adapters).items():
            own = adapters[path]
            alike = [adapters[place] for place in earlier if shapes(adapters[place]) == shapes(own)]
            own.peers = tuple(alike if self.previous < 0 else alike[: self.previous])
        return {}

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """How many earlier layers each layer reads, and how many layers read none."""
        read = {path: len(adapter.peers) for path, adapter in adapters.items()}
        return {"without_shortcut": sum(not count for count in read.values()), "earlier_layers": read}


def shapes(adapter: Any) -> tuple[int, ...]:
    """What must be equal for pairs to be joined: leading axes and both widths."""
    return (*adapter.lora_A.shape[:-2], adapter.lora_A.shape[-1], adapter.lora_B.shape[-2])
