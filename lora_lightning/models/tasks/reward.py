"""A number for a text, trained on pairs of which one is preferred."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lora_lightning.errors import check
from lora_lightning.models.tasks.base import Batch, Loss, PredictContext, Task
from lora_lightning.models.tasks.comparing import (
    add_rewards,
    example_pairs,
    larger,
    reward_metrics,
    reward_rows,
    step_rewards,
)
from lora_lightning.models.tasks.preference_losses import logistic


@dataclass(frozen=True, kw_only=True)
class Reward(Task):
    """The chosen text of a pair shall have the larger number: Bradley-Terry, -log s(chosen - rejected).

    As in Ouyang et al., 2022, arXiv:2203.02155, eq. 1, of one pair a prompt. The number is the one output of a
    classification head.
    """

    center: float = 0.0
    """Weight of (chosen + rejected)^2, which keeps rewards around 0 (Eisenstein et al., 2023, arXiv:2312.09244); 0.01
    is usual."""

    name: ClassVar[str] = "reward"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    per_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(self.center >= 0, self, "center", "it must be at least 0.")

    def model_options(self, num_labels: int | None) -> dict[str, Any]:  # noqa: ARG002 - always one output
        """One output."""
        return {"num_labels": 1, "problem_type": "regression"}

    def example(self, config: Any, size: int, length: int) -> dict[str, Tensor]:  # noqa: ARG002
        """Pairs of texts."""
        return example_pairs(size, length)

    def logits(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Rewards, (sides, rows); sides are chosen and rejected texts."""
        found = super().logits(model, batch).squeeze(-1)
        return found.to(torch.promote_types(found.dtype, torch.float32)).reshape(int(batch["sides"]), -1)

    def loss(self, logits: Tensor, batch: Batch) -> Loss:  # noqa: ARG002 - the first of a pair is the chosen one
        """Summed over pairs."""
        chosen, rejected = logits
        losses = logistic(chosen - rejected, 0.0) + self.center * (chosen + rejected) ** 2
        return Loss(losses.sum(), torch.tensor(len(losses)), step_rewards(*_compared(logits.detach())))

    def metrics(self, num_labels: int) -> dict[str, Metric]:  # noqa: ARG002 - always one output
        """Share of pairs in the right order, a tie counts half; mean rewards and their difference."""
        return reward_metrics()

    def update_metrics(self, metrics: Mapping[str, Metric], logits: Tensor, batch: Batch) -> None:  # noqa: ARG002
        """Add rewards."""
        add_rewards(metrics, *_compared(logits))

    def score_rows(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Whether the chosen text of each pair has the larger reward."""
        right = _compared(logits)[2].float()
        return right, torch.ones_like(right)

    def predict(self, model: Any, batch: Batch, context: PredictContext) -> list[dict[str, Any]]:  # noqa: ARG002
        """Rewards of both texts and their difference; of a single text its reward."""
        return reward_rows(self.logits(model, batch))


def _compared(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chosen, rejected = logits
    return chosen, rejected, larger(chosen, rejected)
