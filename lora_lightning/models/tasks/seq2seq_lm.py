"""A text from a text, by an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torchmetrics import MeanMetric, Metric

from lora_lightning.errors import check
from lora_lightning.models.loss_head import decoder_inputs, loss_head, summed_loss
from lora_lightning.models.tasks.base import IGNORED, Batch, Loss, PredictContext, Task
from lora_lightning.models.tasks.generated import add_texts, label_texts, should_generate, text_metrics


@dataclass(frozen=True, kw_only=True)
class Seq2SeqLM(Task):
    """Cross-entropy over the target's tokens, averaged over tokens; tokens and whole targets that come out right."""

    generate_batches: int = 0
    """Batches of each validation whose texts are generated, for BLEU, chrF and ROUGE-L; it takes about as long as
    predict."""

    name: ClassVar[str] = "seq2seq-lm"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    has_head: ClassVar[bool] = False
    per_token: ClassVar[bool] = True
    by_loss_head: ClassVar[bool] = True
    generates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(self.generate_batches >= 0, self, "generate_batches", "it must be at least 0, which generates none.")

    def logits(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Scores of each target token given the source and the target before it."""
        logits: Tensor = model(**self.inputs(batch), labels=batch["labels"]).logits  # the model shifts them its own way
        return logits

    def loss_of(self, model: nn.Module, batch: Batch) -> Loss:
        """The same as `loss`, by the model's loss head."""
        if loss_head(model).way == "plain":
            return self.loss(self.logits(model, batch), batch)
        labels = batch["labels"]
        inputs = self.inputs(batch) | decoder_inputs(model, labels)
        return Loss(summed_loss(model, inputs, labels), (labels != IGNORED).sum())

    def loss(self, logits: Tensor, batch: Batch) -> Loss:
        """Cross-entropy summed over target tokens."""
        labels = batch["labels"]
        total = F.cross_entropy(logits.float().mT, labels, ignore_index=IGNORED, reduction="sum")
        return Loss(total, (labels != IGNORED).sum())

    def metrics(self, num_labels: int) -> dict[str, Metric]:  # noqa: ARG002 - a language model has no labels
        """Fraction of target tokens that are right given those before, and of targets with every token right.

        The second is exactly the fraction that greedy decoding gets right. `generate_batches` adds BLEU, chrF, ROUGE-L.
        """
        texts = text_metrics() if self.generate_batches else {}
        return {"accuracy": MeanMetric(), "exact_match": MeanMetric(), **texts}

    def update_metrics(self, metrics: Mapping[str, Metric], logits: Tensor, batch: Batch) -> None:
        """Add the target tokens."""
        labels = batch["labels"]
        counts, right = labels != IGNORED, logits.argmax(-1) == labels
        metrics["accuracy"].update(right[counts].float())
        metrics["exact_match"].update((right | ~counts).all(-1).float())

    def update_text_metrics(
        self, metrics: Mapping[str, Metric], model: Any, batch: Batch, context: PredictContext
    ) -> None:
        """Add the text generated for each source."""
        if should_generate(metrics, self.generate_batches):
            expected = label_texts(batch["labels"], context.tokenizer)
            add_texts(metrics, _generated(model, batch, context), expected)

    def predict(self, model: Any, batch: Batch, context: PredictContext) -> list[dict[str, Any]]:
        """The greedy continuation of each source, and the mean loss of its target's tokens where it has one."""
        rows: list[dict[str, Any]] = [{"prediction": text} for text in _generated(model, batch, context)]
        if "labels" in batch:
            labels = batch["labels"]
            with torch.no_grad():
                scores = self.logits(model, batch).float().mT
            losses = F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="none").sum(-1)
            for row, loss, n in zip(rows, losses, (labels != IGNORED).sum(-1), strict=True):
                row["loss"] = round(float(loss / n), 6)
        return rows


def _generated(model: Any, batch: Batch, context: PredictContext) -> list[str]:
    generated = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=context.max_new_tokens,
        do_sample=False,
        num_beams=1,
    )
    return [text.strip() for text in context.tokenizer.batch_decode(generated, skip_special_tokens=True)]
