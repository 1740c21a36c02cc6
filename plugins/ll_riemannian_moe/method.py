"""MoELoRA: a mixture of low-rank experts with gate-aware Riemannian gradients.

Sun et al., 2025, arXiv:2502.15828; preconditioner of each expert: Zhang and Pilanci, 2024,
arXiv:2402.02347. The equations stand in `functional.py`; the preconditioned optimizers are those of the plugin
`ll_optimizers`.

    y = W x + b + sum_i g_i(x) s B_i A_i x,   g = softmax over the k largest entries of G x

    paper        here                      meaning
    E, k         experts, top_k            experts of a layer, and how many a token uses
    r            rank                      inner width of one expert; all of them together have E r
    s            scaling                   alpha / rank
    g^(1/2)      gate_exponent             power of the gate in backward, in place of the gate itself

Departs from the paper: the exponent is free; a balance loss and a z-loss can be added; experts share a dropout mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lora_lightning.errors import check
from lora_lightning.methods import Adapters, LowRankFields, Method, check_low_rank

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from torch import Tensor
    from torch.optim import Optimizer

    from ll_riemannian_moe.adapter import MoELoRAAdapter
    from lora_lightning.adapters.base import GroupSpec
    from lora_lightning.adapters.layers.base import BaseLayer


@dataclass(frozen=True, kw_only=True)
class MoELoRA(LowRankFields, Method):
    """Low-rank experts mixed token by token, trained with Riemannian gradients that allow for the gates.

    Experts of a layer share one dropout mask; the authors use 0.05.
    """

    paper: ClassVar[str] = "2502.15828"
    bibtex: ClassVar[str] = """@inproceedings{sun2025stronger,
  title = {A Stronger Mixture of Low-Rank Experts for Fine-Tuning Foundation Models},
  author = {Sun, Mengyang and Wang, Yihao and Feng, Tao and Zhang, Dan and Zhu, Yifan and Tang, Jie},
  booktitle = {International Conference on Machine Learning},
  year = {2025},
  note = {arXiv:2502.15828}
}"""
    mergeable: ClassVar[bool] = False
    export: ClassVar[str] = "not expressible"
    run_wide: ClassVar[tuple[str, ...]] = ("router_lr_ratio", "router_clip")

    rank: int = 4
    """Inner width of one expert."""
    experts: int = 20
    """Experts on each layer. All are computed for every token, so cost grows with experts * rank."""
    top_k: int = 10
    """Experts that each token uses. With 1 the gate is constant and the router needs balance_loss to learn."""
    gate_exponent: float = 0.5
    """Power q of the gate in backward: 1 is the plain gradient, 0.5 the paper's, 0 takes the gate out of it. Outputs
    are the same. Under AdamW the overall size of gradients cancels, so expect little there."""
    balance_loss: float = 0.0
    """Weight of the load-balance loss, a mean over layers that is 1 at balance; 0.01 is usual. The paper has none."""
    z_loss: float = 0.0
    """Weight of the squared log-sum-exp of the router's logits, which keeps them small; 0.001 is usual."""
    router_lr_ratio: float = 0.003
    """Learning rate of the router over that of the experts. The authors' AdamW runs have 3e-8 over 1e-5, which all but
    freezes it; raise it where routing should be learnt."""
    router_clip: float | None = 1.0
    """Largest gradient norm of all routers together; null leaves them to the trainer's clipping."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        check(self.experts >= 1, self, "experts", "it must be at least 1; the authors use 20.")
        check(
            1 <= self.top_k <= self.experts,
            self,
            "top_k",
            f"it must lie between 1 and experts, which is {self.experts}.",
        )
        learns = self.top_k > 1 or self.experts == 1 or self.balance_loss > 0 or self.z_loss > 0
        check(
            learns,
            self,
            "top_k",
            "a single gate is always 1, so the router would get no gradient. Nearest: top_k=2, or balance_loss=0.01.",
        )
        check(
            0 <= self.gate_exponent <= 1,
            self,
            "gate_exponent",
            "it must lie in [0, 1]. Power of the gate in backward; the paper's is 0.5.",
        )
        for field in ("balance_loss", "z_loss"):
            check(getattr(self, field) >= 0, self, field, "it must be at least 0. Weight of a loss; 0 leaves it out.")
        check(self.router_lr_ratio > 0, self, "router_lr_ratio", "it must be above 0; 1 trains it like the experts.")
        clip = self.router_clip
        check(clip is None or clip > 0, self, "router_clip", "it must be above 0, or null for no clipping of its own.")

    def build(self, base: BaseLayer) -> MoELoRAAdapter:
        """Stacked experts and their router."""
        from ll_riemannian_moe.adapter import MoELoRAAdapter

        return MoELoRAAdapter(
            base,
            experts=self.experts,
            top_k=self.top_k,
            rank=self.rank,
            scaling=self.scaling,
            dropout=self.dropout,
            gate_exponent=self.gate_exponent,
            balance=self.balance_loss,
            z=self.z_loss,
        )

    def param_groups(self, adapters: Adapters) -> dict[str, GroupSpec]:
        """Sides of the experts as "A" and "B", routers with a rate and a clipping norm of their own."""
        from lora_lightning.adapters.base import GroupSpec, pair_groups

        groups = pair_groups(adapters)
        routers = groups.pop("other").params
        groups["router"] = GroupSpec(params=routers, lr_ratio=self.router_lr_ratio, clip=self.router_clip)
        return groups

    def optimizer(self) -> Callable[[Any], Optimizer]:
        """RiemannianAdamW, which another plugin provides."""
        from lora_lightning.plugins import optimizer_of

        return optimizer_of(type(self), "RiemannianAdamW")

    def callbacks(self) -> Sequence[Callback]:
        """Load statistics of the routers."""
        from ll_riemannian_moe.callback import RouterStatistics

        return [RouterStatistics()]

    def penalty(self, adapters: Adapters) -> Tensor | None:
        """Mean of the weighted router losses over layers and forwards since the last backward; None without any.

        To be called once, after the forward and before its backward. Each process counts its own tokens, padding too.
        """
        if not (self.balance_loss or self.z_loss):
            return None
        import torch

        from ll_riemannian_moe.adapter import MoELoRAAdapter

        found = [a for a in adapters.values() if isinstance(a, MoELoRAAdapter)]
        losses = [loss for adapter in found for loss in adapter.take_losses()]
        return torch.stack(losses).mean() if losses else None
