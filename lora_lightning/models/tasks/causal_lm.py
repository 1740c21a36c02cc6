"""Next-token prediction, on whole texts or on completions only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torchmetrics import MeanMetric, Metric

from lora_lightning.errors import DataError, check
from lora_lightning.models.generation import before_end, continued_texts, end_ids, end_text
from lora_lightning.models.loss_head import next_tokens, summed_loss, token_log_probs
from lora_lightning.models.tasks.base import IGNORED, Batch, Loss, PredictContext, Task
from lora_lightning.models.tasks.generated import add_texts, check_tokenizer, label_texts, should_generate, text_metrics


@dataclass(frozen=True, kw_only=True)
class CausalLM(Task):
    """Cross-entropy over the tokens that carry a label; averaged over tokens, never over batches."""

    generate_batches: int = 0
    """Batches of each validation whose completions are generated, for BLEU, chrF, ROUGE-L and the fraction that is
    right as a whole; it takes about as long as predict. Of a conversation the first answer counts."""

    name: ClassVar[str] = "causal-lm"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    has_head: ClassVar[bool] = False
    per_token: ClassVar[bool] = True
    by_loss_head: ClassVar[bool] = True
    generates: ClassVar[bool] = True
    reads_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self.generate_batches >= 0, self, "generate_batches", "it must be at least 0, which generates none.")

    def loss(self, logits: Tensor, batch: Batch) -> Loss:
        """Cross-entropy of each labelled token given those before it, summed."""
        labels = batch["labels"][:, 1:]
        total = F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return Loss(total, (labels != IGNORED).sum())

    def loss_of(self, model: nn.Module, batch: Batch) -> Loss:
        """The same, by the model's loss head."""
        targets = next_tokens(batch["labels"])
        return Loss(summed_loss(model, self.inputs(batch), targets), (targets != IGNORED).sum())

    def metrics(self, num_labels: int) -> dict[str, Metric]:  # noqa: ARG002 - a language model has no labels
        """None beside the loss, unless texts are generated."""
        return {**text_metrics(), "exact_match": MeanMetric()} if self.generate_batches else {}

    def update_metrics(self, metrics: Mapping[str, Metric], logits: Tensor, batch: Batch) -> None:
        """Nothing beside the loss."""

    def update_text_metrics(
        self, metrics: Mapping[str, Metric], model: Any, batch: Batch, context: PredictContext
    ) -> None:
        """Add the completion generated for each prompt.

        Raises:
            DataError: the data have no prompts.
        """
        if not should_generate(metrics, self.generate_batches):
            return
        check_tokenizer(context.tokenizer)
        labels = batch["labels"]
        continued = self.continued(model, batch, context)
        if continued is None:
            raise DataError(
                f"model.task_settings.generate_batches is {self.generate_batches}, but the data have no prompts to go "
                "on from. Set it to 0, or use Completions, Chat or MediaChat."
            )
        ends = end_ids(model, context.tokenizer)
        answers = [before_end(_first_answer(row).tolist(), ends) for row in labels]
        expected = label_texts(answers, context.tokenizer)
        if context.in_turns and (last := end_text(context.tokenizer)):
            expected = [text.removesuffix(last).rstrip() for text in expected]
        generated = [text.strip() for text in continued]
        add_texts(metrics, generated, expected)
        right = [a == b for a, b in zip(generated, expected, strict=True)]
        metrics["exact_match"].update(torch.tensor(right, dtype=torch.float32, device=labels.device))

    def predict(self, model: Any, batch: Batch, context: PredictContext) -> list[dict[str, Any]]:
        """Mean loss of each example's labelled tokens, if any, and, where it has a prompt, the greedy continuation."""
        targets = next_tokens(batch["labels"])
        losses = -token_log_probs(model, self.inputs(batch), targets).sum(-1)
        counts = (targets != IGNORED).sum(-1)
        rows: list[dict[str, Any]] = [
            {"loss": round(float(loss / n), 6) if n else None, "tokens": int(n)}
            for loss, n in zip(losses, counts, strict=True)
        ]
        continued = self.continued(model, batch, context) if context.tokenizer is not None else None
        for row, text in zip(rows, continued or (), strict=continued is not None):
            row["prediction"] = text
        return rows

    def continued(self, model: Any, batch: Batch, context: PredictContext) -> list[str] | None:
        """The greedy continuation of each prompt, without what ends it; None where a row has no prompt."""
        prompts = [self._prompt(batch, row) for row in range(len(batch["labels"]))]
        if not all(map(len, prompts)):
            return None
        ids = [prompt.tolist() for prompt in prompts]
        return continued_texts(model, context.tokenizer, ids, last_text(context), **greedy(context))

    @staticmethod
    def _prompt(batch: Batch, row: int) -> Tensor:
        """Tokens before the first labelled one; all of them where none is."""
        labelled = (batch["labels"][row] != IGNORED).nonzero()
        first = int(labelled[0]) if len(labelled) else int(batch["attention_mask"][row].sum())
        return batch["input_ids"][row, :first]


def _first_answer(labels: Tensor) -> Tensor:
    """The first stretch of a row's labels."""
    labelled = labels != IGNORED
    begins = labelled & ~labelled.roll(1)
    begins[0] = labelled[0]
    return labels[labelled & (begins.cumsum(0) == 1)]


def last_text(context: PredictContext) -> str:
    """The text that ends an answer too, mostly empty."""
    return end_text(context.tokenizer) if context.in_turns else ""


def greedy(context: PredictContext) -> dict[str, Any]:
    """Options of generation without chance."""
    return {"max_new_tokens": context.max_new_tokens, "do_sample": False}
