"""Completions that people prefer to others: DPO, IPO, ORPO, SimPO and KTO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lora_lightning.errors import DataError, check, did_you_mean
from lora_lightning.models.loss_head import next_tokens, token_log_probs
from lora_lightning.models.tasks.base import IGNORED, MODEL_INPUTS, Batch, Loss, PredictContext, Task
from lora_lightning.models.tasks.comparing import (
    add_rewards,
    example_pairs,
    larger,
    reward_metrics,
    reward_rows,
    step_rewards,
)
from lora_lightning.models.tasks.completion_lengths import completion_lengths
from lora_lightning.models.tasks.gathering import mean_of_all
from lora_lightning.models.tasks.preference_losses import dpo, ipo, kto, odds_ratio, simpo


@dataclass(frozen=True)
class _Kind:
    """What is particular to a loss: its paper's beta, what it is made of, and the settings that it takes."""

    beta: float
    average: bool = False
    reference: bool = True
    pairs: bool = True
    takes: tuple[str, ...] = ()


_KINDS = {
    "dpo": _Kind(beta=0.1, takes=("label_smoothing", "reference_free")),
    "ipo": _Kind(beta=0.1, average=True, takes=("reference_free",)),
    "orpo": _Kind(beta=0.1, average=True, reference=False, takes=("likelihood",)),
    "simpo": _Kind(beta=2.0, average=True, reference=False, takes=("label_smoothing", "gamma")),
    "kto": _Kind(beta=0.1, pairs=False, takes=("desirable_weight", "undesirable_weight")),
}
_EVERY_LOSS_TAKES = ("loss_type", "beta", "average_log_prob")


@dataclass(frozen=True, kw_only=True)
class Preference(Task):
    """Raises the likelihood of chosen completions against rejected ones.

    The reward of a completion is beta times its log-probability, less that of the reference where the loss has one. The
    reference is the base model, which is this one with its adapters off; its values come with the data, computed once.

    Accuracy is the share of pairs whose chosen completion has the larger reward, a tie counts half. Of completions with
    labels (kto) it is the share of desirable ones with a reward above 0 and of undesirable ones with one below.
    """

    loss_type: Literal["dpo", "ipo", "orpo", "simpo", "kto"] = "dpo"
    """dpo (arXiv:2305.18290), ipo (arXiv:2310.12036), orpo (arXiv:2403.07691), simpo (arXiv:2405.14734) on pairs; kto
    (arXiv:2402.01306) on single completions with a label. orpo and simpo need no reference."""
    beta: float | None = None
    """Strength: how fast a difference of log-probabilities counts. Null takes 0.1, and 2.0 for simpo. For ipo it is
    tau, where less leads further from the reference, for orpo lambda, the weight of the odds ratio."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong (dpo: Mitchell, 2023; simpo). It lies in [0, 0.5)."""
    gamma: float | None = None
    """Difference of rewards that simpo aims at; null takes half of beta."""
    desirable_weight: float = 1.0
    """Weight of desirable completions (kto). Where they are not as many as the undesirable ones, its authors advise
    weights whose sum over all desirable completions is 1 to 4/3 of that over the others."""
    undesirable_weight: float = 1.0
    """Weight of undesirable completions (kto)."""
    reference_free: bool = False
    """Leave the reference out of dpo or ipo, as if it found all completions equally likely."""
    average_log_prob: bool | None = None
    """Whether a completion counts by the mean log-probability of its tokens, so that long ones weigh no more. Null
    takes false for dpo and kto, and true for orpo and simpo (as their papers) and ipo (as its authors told trl)."""
    likelihood: Literal["completion", "text"] | None = None
    """The likelihood term of orpo. "completion", the default: the mean over the tokens of each chosen completion, as in
    the paper. "text": over all tokens of the prompts and chosen completions of a batch, as the authors' program does
    and trl."""

    name: ClassVar[str] = "preference"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    has_head: ClassVar[bool] = False
    per_token: ClassVar[bool] = True
    by_loss_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        nearest = did_you_mean(str(self.loss_type), _KINDS)
        check(self.loss_type in _KINDS, self, "loss_type", f"it must be one of {', '.join(_KINDS)}.{nearest}")
        for field in fields(self):
            known = field.name in _EVERY_LOSS_TAKES or field.name in self._kind.takes
            takers = [loss for loss, kind in _KINDS.items() if field.name in kind.takes]
            rule = f"{self.loss_type} has no such setting; {' and '.join(takers)} take it. Leave it out."
            check(known or getattr(self, field.name) == field.default, self, field.name, rule)
        check(self.beta is None or self.beta > 0, self, "beta", "it must be positive, or null.")
        check(0 <= self.label_smoothing < 0.5, self, "label_smoothing", "it must lie in [0, 0.5).")
        check(self.gamma is None or self.gamma >= 0, self, "gamma", "it must be at least 0, or null.")
        for name in ("desirable_weight", "undesirable_weight"):
            check(getattr(self, name) > 0, self, name, "it must be positive.")
        both = ("completion", "text", None)
        check(self.likelihood in both, self, "likelihood", 'it must be "completion" or "text".')

    @property
    def needs_reference(self) -> bool:
        """Not for orpo and simpo, nor where it is left out."""
        return self._kind.reference and not self.reference_free

    def check_data(self, data: Any) -> None:
        """Refuse labels for a loss of pairs, and pairs for one of labels."""
        judged = getattr(data, "judged", None)
        if judged is None or judged != self._kind.pairs:
            return
        if self._kind.pairs:
            raise DataError(
                f'model.task_settings.loss_type is "{self.loss_type}", which learns from pairs, but the data hold '
                "single completions with a label. Set loss_type to kto, or give data with chosen and rejected "
                "completions (data.label null, data.unpair false)."
            )
        raise DataError(
            f'model.task_settings.loss_type is "{self.loss_type}", which learns from single completions with a label, '
            "but the data hold pairs. Set data.label to the column that tells whether a completion is desirable, or "
            "data.unpair to true, which makes one of each of a pair."
        )

    def example(self, config: Any, size: int, length: int) -> dict[str, Tensor]:  # noqa: ARG002
        """Pairs of texts."""
        batch = example_pairs(size, length)
        return batch if self._kind.pairs else {**batch, "desirable": torch.ones(size, dtype=torch.int64)}

    def logits(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Log-probabilities of completions, (sides, rows, 1).

        Sides are chosen and rejected ones; or, of completions with labels, those of the rows, and behind other rows'
        prompts, without gradient. With `likelihood: text`, (sides, rows, 2): also that of the whole text.
        """
        sides = int(batch["sides"])
        if sides == 2 and not self._kind.pairs and "desirable" in batch:
            rows = len(batch["input_ids"]) // 2
            own = self._log_probabilities(model, batch, slice(None, rows))
            with torch.no_grad():
                other = self._log_probabilities(model, batch, slice(rows, None))
            return torch.stack([own, other])
        found = self._log_probabilities(model, batch, slice(None))
        return found.reshape(sides, -1, found.shape[-1])

    def _log_probabilities(self, model: Callable[..., Any], batch: Batch, rows: slice) -> Tensor:
        inputs: dict[str, Any] = {key: batch[key][rows] for key in MODEL_INPUTS if key in batch}
        labels = batch["labels"][rows]
        whole = self.likelihood == "text"
        targets = next_tokens(_every_token(batch)[rows] if whole else labels)
        each = token_log_probs(cast(nn.Module, model), inputs, targets)
        completions = each.where(next_tokens(labels) != IGNORED, 0.0).sum(-1)
        return torch.stack([completions, each.sum(-1)] if whole else [completions], -1)

    def reference(self, logits: Tensor) -> Tensor:
        """Log-probabilities of completions, (rows, sides)."""
        return logits[..., 0].T

    def loss(self, logits: Tensor, batch: Batch) -> Loss:
        """The loss of pairs or of completions, summed.

        Raises:
            DataError: the batch has other rows than the loss, or no reference.
        """
        scores = self._scores(logits, batch)
        count = torch.tensor(scores.shape[1])
        if ("desirable" in batch) == self._kind.pairs or len(scores) != 2:
            needs = "chosen and rejected completions" if self._kind.pairs else "`desirable`, and each prompt twice"
            raise DataError(f'model.task_settings.loss_type is "{self.loss_type}"; its batches need {needs}.')
        if not self._kind.pairs:
            kl, weights = mean_of_all(scores[1]).clamp_min(0), (self.desirable_weight, self.undesirable_weight)
            total = kto(scores[0], batch["desirable"].bool(), kl, self._beta, weights).sum()
            return Loss(total, count, step_rewards(*self._compared(logits, batch)))
        chosen, rejected = scores
        if self.loss_type == "orpo":
            total = odds_ratio(chosen, rejected, self._beta).sum() + self._unlikelihood(logits, batch)
        elif self.loss_type == "simpo":
            gamma = self._beta / 2 if self.gamma is None else self.gamma
            total = simpo(chosen, rejected, self._beta, gamma, self.label_smoothing).sum()
        elif self.loss_type == "ipo":
            total = ipo(chosen, rejected, self._beta).sum()
        else:
            total = dpo(chosen, rejected, self._beta, self.label_smoothing).sum()
        return Loss(total, count, step_rewards(*self._compared(logits, batch)))

    def metrics(self, num_labels: int) -> dict[str, Metric]:  # noqa: ARG002 - a language model has no labels
        """Accuracy, mean rewards of chosen and of rejected (undesirable) completions, and their difference."""
        return reward_metrics()

    def update_metrics(self, metrics: Mapping[str, Metric], logits: Tensor, batch: Batch) -> None:
        """Add rewards."""
        add_rewards(metrics, *self._compared(logits, batch))

    def predict(self, model: Any, batch: Batch, context: PredictContext) -> list[dict[str, Any]]:  # noqa: ARG002
        """Rewards of both completions and their difference; of a single completion its reward."""
        return reward_rows(self._rewards(self.logits(model, batch), batch))

    @property
    def _kind(self) -> _Kind:
        return _KINDS[self.loss_type]

    @property
    def _beta(self) -> float:
        return self._kind.beta if self.beta is None else self.beta

    def _scores(self, logits: Tensor, batch: Batch) -> Tensor:
        """What the loss compares, (sides, rows): log-probabilities, less the reference's, as sums or means."""
        scores = logits[..., 0]
        if self.needs_reference:
            if "reference" not in batch:
                raise DataError(
                    f'model.task_settings.loss_type is "{self.loss_type}", and the batch has no `reference`, the base '
                    "model's log-probabilities (rows, sides). data: Preferences has them; a data module of your own "
                    "must add them, or take orpo or simpo, which need none."
                )
            scores = scores - batch["reference"].T.to(scores.dtype)
        average = self._kind.average if self.average_log_prob is None else self.average_log_prob
        return scores / completion_lengths(batch["labels"]).reshape(scores.shape) if average else scores

    def _rewards(self, logits: Tensor, batch: Batch) -> Tensor:
        return self._beta * self._scores(logits.detach(), batch)

    def _compared(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards of what is chosen and rejected, and which comparisons come out right."""
        rewards = self._rewards(logits, batch)
        if "desirable" not in batch:
            return rewards[0], rewards[1], larger(rewards[0], rewards[1])
        good = batch["desirable"].bool()
        right = larger(torch.where(good, rewards[0], -rewards[0]), torch.zeros_like(rewards[0]))
        return rewards[0][good], rewards[0][~good], right

    def _unlikelihood(self, logits: Tensor, batch: Batch) -> Tensor:
        """orpo's negative log-likelihood, as a sum over pairs."""
        if self.likelihood == "text":
            rows = logits.shape[1]
            return -logits[0, :, 1].sum() / (_every_token(batch)[:rows, 1:] >= 0).sum() * rows
        lengths = completion_lengths(batch["labels"]).reshape(logits.shape[:2])
        return -(logits[0, :, 0] / lengths[0]).sum()


def _every_token(batch: Batch) -> Tensor:
    """A label on every token of the texts."""
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
