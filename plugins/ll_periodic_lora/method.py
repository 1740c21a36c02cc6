"""PeriodicLoRA: breaking the low-rank bottleneck in LoRA optimization.

Meng et al., 2024, arXiv:2402.16141.

    full unloading (m = 1):   W <- W + s B A,     A ~ init,  B = 0
    momentum unloading:       W <- W + m s B A,   A <- sqrt(1 - m) A,  B <- sqrt(1 - m) B

so that W + s B A stays as it is: m s B A + s (1 - m) B A = s B A.

    paper   here           meaning
    m       blend          fraction that is unloaded; 1 begins the adapter again
    d       blend_decay    the k-th piece is multiplied by d^k

Departs from the paper: the formula of the momentum variant is read from a public training script with the first
author's initials, not from the paper, as are m = 0.1 and moments of which 99.9 % are put to zero. An unloading that
takes each factor times 1 - m, for which the function jumps, is `remainder: shrink_each`. For the paper's full
unloading take `blend: 1`, `moments: reset` and `lr: restart`. Intervals that grow or follow a metric are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lora_lightning.stages import StagedMethod


@dataclass(frozen=True, kw_only=True)
class PeriodicLoRA(StagedMethod):
    """Unloads a fraction of the update into the weights every few steps, leaving the function (Meng et al., 2024)."""

    paper: ClassVar[str] = "2402.16141"
    bibtex: ClassVar[str] = """@article{meng2024periodiclora,
  title = {{PeriodicLoRA}: Breaking the Low-Rank Bottleneck in {LoRA} Optimization},
  author = {Meng, Xiangdi and Dai, Damai and Luo, Weiyao and Yang, Zhe and Wu, Shaoxiang and Wang, Xiaochen and
            Wang, Peiyi and Dong, Qingxiu and Chen, Liang and Sui, Zhifang},
  journal = {arXiv preprint arXiv:2402.16141},
  year = {2024}
}"""

    blend: float = 0.1
    """Fraction m of the update that is unloaded, in (0, 1]; 1 unloads all and begins the adapter again at zero."""
    remainder: Literal["restart", "shrink", "shrink_each"] = "shrink"
    """What becomes of the adapter: "shrink" keeps the function, "shrink_each" takes each factor times 1 - m."""
    moments: Literal["reset", "keep", "prune"] = "prune"
    """Whether the optimizer forgets, keeps, or thins out its state of an adapter whose stage has ended."""
