"""Hidden tokens of a text, found from both sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torchmetrics import MeanMetric, Metric
from torchmetrics.text import Perplexity

from lora_lightning.errors import check
from lora_lightning.models.loss_head import summed_loss
from lora_lightning.models.tasks.base import IGNORED, Batch, Loss, PredictContext, Task


@dataclass(frozen=True, kw_only=True)
class MaskedLM(Task):
    """Cross-entropy over the hidden tokens, averaged over tokens; how many are found, and perplexity over them."""

    top: int = 5
    """Fillings of a mask that `predict` names, likeliest first."""

    name: ClassVar[str] = "masked-lm"
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    has_head: ClassVar[bool] = False
    per_token: ClassVar[bool] = True
    by_loss_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(self.top >= 1, self, "top", "it must be at least 1.")

    def loss(self, logits: Tensor, batch: Batch) -> Loss:
        """Cross-entropy summed over hidden tokens."""
        hidden = batch["labels"] != IGNORED
        return Loss(F.cross_entropy(logits[hidden].float(), batch["labels"][hidden], reduction="sum"), hidden.sum())

    def loss_of(self, model: nn.Module, batch: Batch) -> Loss:
        """The same, by the model's loss head."""
        labels = batch["labels"]
        return Loss(summed_loss(model, self.inputs(batch), labels), (labels != IGNORED).sum())

    def metrics(self, num_labels: int) -> dict[str, Metric]:  # noqa: ARG002 - a language model has no labels
        """Fraction of hidden tokens found at first guess, and perplexity over them."""
        return {"accuracy": MeanMetric(), "perplexity": Perplexity()}

    def update_metrics(self, metrics: Mapping[str, Metric], logits: Tensor, batch: Batch) -> None:
        """Add the hidden tokens."""
        hidden = batch["labels"] != IGNORED
        scores, wanted = logits[hidden].float(), batch["labels"][hidden]
        metrics["accuracy"].update((scores.argmax(-1) == wanted).float())
        metrics["perplexity"].update(scores.unsqueeze(0), wanted.unsqueeze(0))

    def score_rows(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Right and hidden tokens of each text."""
        hidden = batch["labels"] != IGNORED
        right = hidden & (logits.argmax(-1) == batch["labels"])
        return right.sum(1).float(), hidden.sum(1).float()

    def predict(self, model: Any, batch: Batch, context: PredictContext) -> list[dict[str, Any]]:
        """Each text with its masks and hidden tokens filled in, the likeliest fillings of each, and the loss."""
        logits, tokenizer = self.logits(model, batch).float(), context.tokenizer
        return [
            self._fill(scores, ids, labels, tokenizer)
            for scores, ids, labels in zip(logits, batch["input_ids"], batch["labels"], strict=True)
        ]

    def _fill(self, scores: Tensor, ids: Tensor, labels: Tensor, tokenizer: Any) -> dict[str, Any]:
        hidden = labels != IGNORED
        sought = hidden | (ids == tokenizer.mask_token_id)
        likely = scores[sought].softmax(-1).topk(self.top)
        fillings = [
            ", ".join(f"{tokenizer.decode([token])} {p:.3f}" for token, p in zip(tokens, probabilities, strict=True))
            for tokens, probabilities in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
        ]
        filled = ids.masked_scatter(sought, likely.indices[:, 0])
        loss = float(F.cross_entropy(scores[hidden], labels[hidden])) if hidden.any() else None
        return {
            "prediction": tokenizer.decode(filled, skip_special_tokens=True),
            "fillings": " | ".join(fillings),
            "loss": None if loss is None else round(loss, 6),
        }
