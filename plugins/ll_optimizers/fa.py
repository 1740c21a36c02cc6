"""LoRA-FA: a frozen first factor, and the second one's gradient corrected for it.

Zhang et al., 2023, arXiv:2308.03303; the correction as in the later LoRA-FA optimizer of peft.

    h_B = gB (A A^T + d I)^-1 / s^2,   B = B - lr Adam(h_B)

    paper  here     shape
    A      lora_A   (..., r, d_in)    frozen, a buffer
    B      lora_B   (..., d_out, r)
    gB     grad_B   (..., d_out, r)
    s      scaling  a number of each pair
    d      damping  a number

s h_B A is then the gradient of the full weight projected on the rows of A. A never changes, so the factorised Gram is
kept until A is written to.

Departs from the reference code: float32 and better throughout, where it multiplies in bfloat16. eps comes after the
bias correction and the decay before the step, as in torch; `adam_form="transformers"` is the reference code's order.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from lora_lightning.optim.directions import AdamForm, adam, descend
from lora_lightning.optim.pair_optimizer import PairOptimizer, check_settings
from lora_lightning.optim.pairs import Factorised, Stack, factorise, grams, stack_pairs


class LoRAFA(PairOptimizer):
    """AdamW on second factors whose gradient is corrected for a frozen first factor (LoRA's option `train: B`).

    Args:
        params: parameters or groups; the factor pairs arrive by `bind_pairs`.
        lr: learning rate, as for plain LoRA.
        betas: memory of Adam's first and second moment.
        eps: added to the root of the second moment.
        weight_decay: fraction lr * weight_decay by which parameters shrink at each step.
        damping: added to the diagonal of A A^T.
        adam_form: "torch" adds eps after the bias correction and decays before the step; "transformers" adds it before
            and decays after, as the reference code does.
    """

    bibtex: ClassVar[str] = """@article{zhang2023lorafa,
  title = {{LoRA-FA}: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning},
  author = {Zhang, Longteng and Zhang, Lin and Shi, Shaohuai and Chu, Xiaowen and Li, Bo},
  journal = {arXiv preprint arXiv:2308.03303},
  year = {2023}
}"""

    trains: ClassVar[Literal["any", "both", "B"]] = "B"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        damping: float = 1e-8,
        adam_form: AdamForm = "torch",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, {"damping": damping, "adam_form": adam_form})
        check_settings(self)
        self._kept: tuple[object, list[Factorised]] = (None, [])

    def take_step(self) -> None:
        """AdamW on corrected gradients, and on those of parameters in no pair as they are."""
        stacks = stack_pairs(self.with_gradient("B"), ("A", "grad_B"), sharded=True)
        found = self.plain_gradients()
        for stack, gram in zip(stacks, self._grams(stacks), strict=True):
            held = stack.held("B")
            found |= stack.own(gram.at(held).solve_right(stack.grad_B) / stack.scaling[held] ** 2, "B")
        form = self.defaults["adam_form"]
        descend(self, adam(self, found, form=form), form)

    def _grams(self, stacks: list[Stack]) -> list[Factorised]:
        """Factorised A A^T, kept while no A is written to."""
        frozen: list[Tensor] = [A for stack in stacks for A in stack.factors("A")]
        key = [(id(A), A.data_ptr(), A._version) for A in frozen]
        if self._kept[0] != key:
            self._kept = (key, factorise(grams([(stack, "A") for stack in stacks]), self.defaults["damping"]))
            for stack, gram in zip(stacks, self._kept[1], strict=True):
                self.count_damped(stack, gram, "B")
        return self._kept[1]
