"""GeLoRA: the rank of each block is the growth of intrinsic dimension across it, plus one.

Ed-dib, Datbayev and Aboussalah, 2024, arXiv:2412.09250; the estimator is in `functional.py`.

    r_i = max(round(d_i - d_(i-1)), 0) + 1,   W' = W + s B A

    paper      here                shape
    d_(i-1)    before              intrinsic dimension of what enters block i, one vector an example
    d_i        after               of what leaves it
    + 1        rank                the least rank, which the gain is added to
    s          alpha / rank        the same for every block: alpha grows with the rank
    B, A       lora_B, lora_A      (d_out, r_i), (r_i, d_in)

Departs from the paper: the rounding, the offset and the vector of an example were not to be checked, see the card; a
layer in no block is a block of its own; the least rank is a setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_lightning.errors import SettingsError, check, did_you_mean
from lora_lightning.methods import Adapters, LowRankFields, Method, Plan, check_low_rank

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lora_lightning.adapters.layers.base import BaseLayer
    from lora_lightning.adapters.low_rank import LowRankAdapter
    from lora_lightning.injection.probe import Probe


@dataclass(frozen=True, kw_only=True)
class GeLoRA(LowRankFields, Method):
    """LoRA whose ranks follow from the geometry of hidden states, before training (Ed-dib et al., 2024).

    A block where the intrinsic dimension of the hidden states grows by g gets rank g more than `rank`. It needs
    batches: of the training data in a run, of `Probe(batches)` where it is injected in Python.
    """

    paper: ClassVar[str] = "2412.09250"
    bibtex: ClassVar[str] = """@inproceedings{eddib2025gelora,
  title = {{GeLoRA}: Geometric Adaptive Ranks for Efficient {LoRA} Fine-tuning},
  author = {Ed-dib, Abdessalam and Datbayev, Zhanibek and Aboussalah, Amine Mohamed},
  booktitle = {Findings of the Association for Computational Linguistics: EMNLP},
  year = {2025},
  note = {arXiv:2412.09250}
}"""
    export: ClassVar[str] = "exact LoRA"
    run_wide: ClassVar[tuple[str, ...]] = ("calibration_batches", "pooling", "estimator", "discard", "gains")

    rank: int = 1
    """Rank of a block whose hidden states gain no dimension; what they gain is added to it. 1 in the paper."""
    alpha: float = 2.0
    """Numerator of the scaling at that rank; a block of a larger rank has the same scaling."""
    calibration_batches: int = 64
    """Batches of training data that are looked at; 500 to 5000 examples in all, each of which is one point."""
    pooling: Literal["mean", "first", "last"] = "mean"
    """What stands for an example: the mean of its tokens, the first ([CLS]) or the last."""
    estimator: Literal["fit", "mle"] = "fit"
    """Of the dimension: a line through the sorted ratios of distances without the largest, or the likelihood's mode."""
    discard: float = 0.1
    """Fraction of the largest ratios that the fit leaves out."""
    gains: dict[str, int] | None = None
    """Dimensions that blocks gain, by the block's path, as a run before reported them; 0 for those not named. No data
    is looked at then. Null looks."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        check(self.calibration_batches >= 1, self, "calibration_batches", "it must be at least 1; 64 is the default.")
        check(0 <= self.discard < 1, self, "discard", "it must lie in [0, 1). A fraction; 0.1 is usual.")
        whole = self.gains is None or all(type(gain) is int and gain >= 0 for gain in self.gains.values())
        check(whole, self, "gains", "it must map paths of blocks to whole numbers of at least 0, or be null.")

    def build(self, base: BaseLayer) -> LowRankAdapter:
        """One pair of factors."""
        from lora_lightning.adapters.low_rank import LowRankAdapter

        return LowRankAdapter(base, rank=self.rank, scaling=self.scaling, dropout=self.dropout)

    def probe_batches(self) -> int:
        """None where the gains are known."""
        return self.calibration_batches if self.gains is None else 0

    def plan(self, model: nn.Module, targets: Mapping[str, BaseLayer], probe: Probe) -> Plan:
        """Rank and alpha of each layer, from the gain of its block."""
        from lora_lightning.models.blocks import blocks_of

        blocks = {path: block.path for path, block in blocks_of(model, targets).items()}
        gains = self._measured(targets, set(blocks.values()), probe) if self.gains is None else self.gains
        for path in gains:
            if path not in blocks.values():
                raise SettingsError(
                    f"GeLoRA.gains names {path}, which is no block with adapted layers."
                    f"{did_you_mean(path, blocks.values())}"
                )
        ranks = {path: self.rank + gains.get(block, 0) for path, block in blocks.items()}
        return {path: {"rank": rank, "alpha": self.scaling * rank} for path, rank in ranks.items()}

    def _measured(self, targets: Mapping[str, BaseLayer], blocks: set[str], probe: Probe) -> dict[str, int]:
        """Gains by the path of the block; an embedding, which token ids enter, has none."""
        from ll_gelora.functional import gain, pooled, two_nn

        seen = sorted(path for path in blocks if path not in targets or targets[path].kind != "embedding")

        def reduce(path: str, x: Tensor, mask: Tensor | None) -> Tensor:
            return pooled(x, mask, self.pooling, path in targets and targets[path].kind == "conv")

        points = probe.around(seen, reduce)
        sides = {
            path: [two_nn(side, self.estimator, self.discard) for side in points.pop(path)] for path in list(points)
        }
        return {path: gain(*dimensions) for path, dimensions in sides.items()}

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """Rank of each layer, and their mean."""
        ranks = {path: pair.lora_A.shape[-2] for path, a in adapters.items() for pair in a.factor_pairs()}
        return {"ranks": ranks, "mean_rank": sum(ranks.values()) / max(len(ranks), 1)}
