"""LoRA: low-rank adaptation of frozen weights.

Hu et al., 2021, arXiv:2106.09685, section 4.1; scaling alpha/sqrt(r): Kalajdzievski, 2023, arXiv:2312.03732.

    y = W x + b + s B (A x)

    paper  here        shape (out, in as nn.Linear stores it)
    W      weight      (d_out, d_in)   frozen
    A      lora_A      (rank, d_in)    starts at U(-1/sqrt(d_in), 1/sqrt(d_in)), as in the reference code
    B      lora_B      (d_out, rank)   starts at 0
    s      scaling     alpha / rank, or alpha / sqrt(rank)

Departs from the paper: the paper's text starts A at a Gaussian; that is `start="gaussian"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lora_lightning.methods import Method, ScaledLowRankFields

if TYPE_CHECKING:
    from lora_lightning.adapters.layers.base import BaseLayer
    from lora_lightning.adapters.low_rank import LowRankAdapter


@dataclass(frozen=True, kw_only=True)
class LoRA(ScaledLowRankFields, Method):
    """Low-rank update of frozen weights (Hu et al., 2021)."""

    paper: ClassVar[str] = "2106.09685"
    bibtex: ClassVar[str] = """@inproceedings{hu2022lora,
  title = {{LoRA}: Low-Rank Adaptation of Large Language Models},
  author = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean
            and Wang, Lu and Chen, Weizhu},
  booktitle = {International Conference on Learning Representations},
  year = {2022},
  note = {arXiv:2106.09685}
}"""
    export: ClassVar[str] = "native"
    peft_type: ClassVar[str] = "LORA"

    train: Literal["both", "A", "B"] = "both"
    """Which side trains. "B" freezes a random A (half the trainables, as in FFA-LoRA), "A" a random B."""
    bias: bool = False
    """Also train an additive bias per adapted layer; the layer's own bias is never touched."""
    start: Literal["kaiming", "gaussian"] = "kaiming"
    """Distribution of the side that does not start at zero: uniform by row length, or N(0, 1/rank^2)."""
    order: Literal["autograd", "flops"] = "autograd"
    """"flops" takes the cheapest order of products at each shape (RunLoRA, arXiv:2312.03415): it keeps no
    intermediate for backward, and pays off in time for large ranks only. Plain linear layers without dropout."""

    def build(self, base: BaseLayer) -> LowRankAdapter:
        """One pair of factors."""
        from ll_lora.run_lora import add_low_rank_cheaply
        from lora_lightning.adapters.low_rank import LowRankAdapter, add_low_rank

        return LowRankAdapter(
            base,
            rank=self.rank,
            scaling=self.scaling,
            dropout=self.dropout,
            train=self.train,
            bias=self.bias,
            start=self.start,
            product=add_low_rank if self.order == "autograd" else add_low_rank_cheaply,
            rank_pruning=True,
        )
