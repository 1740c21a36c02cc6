"""Task: what turns a model's outputs and a batch into a loss, metrics and predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection

Batch = Mapping[str, Tensor]
IGNORED = -100
"""Label of a token without loss."""
MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "pixel_values")


@dataclass(frozen=True)
class PredictContext:
    """What predictions need beside the logits."""

    label_names: Sequence[str] = ()
    tokenizer: Any = None
    max_new_tokens: int = 64
    in_turns: bool = False
    """Whether the texts are turns of conversations, as the tokenizer's chat template writes them."""


@dataclass(frozen=True)
class Loss:
    """A loss as a sum and what it is summed over, so that unequal batches average right."""

    total: Tensor
    count: Tensor
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    """Further numbers that are logged for each training batch."""


class Task(ABC):
    """One kind of problem. A task with settings is a dataclass; they are checked where it is made.

    Class facts:
        name: what YAML calls it.
        auto_class: class of transformers that loads the model.
        metric: the metric of the summary.
        higher_is_better: its direction.
        has_head: whether a head is trained from scratch, so that a linear baseline makes sense.
        per_token: whether the loss is averaged over what it counts (tokens; pairs of a preference), across an
            accumulation window and all processes.
        by_loss_head: whether the model's `loss_head` computes the loss, so that it can do without most logits.
        generates: whether it generates texts, of at most `max_new_tokens`.
        reads_logits: whether metrics read logits, so that validation needs those of all tokens.
        unused: names of modules that the task passes by, so that a file without their weights will do.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    has_head: ClassVar[bool] = True
    per_token: ClassVar[bool] = False
    by_loss_head: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = True
    unused: ClassVar[tuple[str, ...]] = ()

    def model_options(self, num_labels: int | None) -> dict[str, Any]:
        """Extra arguments of `from_pretrained`; none where no head is trained."""
        return {"num_labels": num_labels} if self.has_head and num_labels is not None else {}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What the model gets of a batch."""
        inputs: dict[str, Any] = {key: batch[key] for key in MODEL_INPUTS if key in batch}
        if "position_ids" in inputs:  # with a cache, transformers takes a packed row for one text
            inputs["use_cache"] = False
        return inputs

    def logits(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The model's logits for a batch."""
        logits: Tensor = model(**self.inputs(batch)).logits
        return logits

    def loss_of(self, model: nn.Module, batch: Batch) -> Loss:
        """Summed loss of a batch, computed with the model; a language model's without the logits of other tokens."""
        return self.loss(self.logits(model, batch), batch)

    def example(self, config: Any, size: int, length: int) -> dict[str, Tensor]:  # noqa: ARG002 - one question for all
        """A batch of zeros in the shapes of training: what memory is counted with.

        Args:
            config: the model's configuration.
            size: examples.
            length: tokens of each, where the task is one of texts.
        """
        ids = torch.zeros(size, length, dtype=torch.int64)
        labels = torch.zeros_like(ids if self.per_token else ids[:, 0])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the base model's answers, which a batch then carries as `reference`."""
        return False

    def reference(self, logits: Tensor) -> Tensor:
        """What of the base model's logits the loss compares with, (rows, values)."""
        raise NotImplementedError(f"{self.name} compares with nothing.")

    def check_data(self, data: Any) -> None:  # noqa: B027 - most tasks know their data by `task_kinds`
        """Raise `DataError` for a data module whose rows have another form than the task's settings need."""

    def score_rows(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """What each row of a batch adds to `metric`, where that is a mean over rows or what they hold.

        Returns:
            Sums of the metric, (rows,), and what each is summed over, (rows,): the metric is the sum of all sums by
            that of all counts. None for a metric that is no such mean. Here the loss, where it is the metric.
        """
        if self.metric != "loss":
            return None
        rows = len(logits)
        parts = [self.loss(logits[row : row + 1], _row(batch, row, rows)) for row in range(rows)]
        counts = torch.stack([part.count.to(logits.device) for part in parts])
        return torch.stack([part.total for part in parts]).float(), counts.float()

    @abstractmethod
    def loss(self, logits: Tensor, batch: Batch) -> Loss:
        """Summed loss of a batch."""

    @abstractmethod
    def metrics(self, num_labels: int) -> dict[str, Metric]:
        """Fresh metrics by name; `loss` is always measured as well."""

    @abstractmethod
    def update_metrics(self, metrics: Mapping[str, Metric], logits: Tensor, batch: Batch) -> None:
        """Add a batch to the metrics."""

    def update_text_metrics(  # noqa: B027 - a task that generates no texts has nothing to add
        self, metrics: Mapping[str, Metric], model: Any, batch: Batch, context: PredictContext
    ) -> None:
        """Add texts that the model generates for a batch, where the task has metrics of them; nothing by default."""

    @abstractmethod
    def predict(self, model: Any, batch: Batch, context: PredictContext) -> list[dict[str, Any]]:
        """One plain dictionary an example."""


def _row(batch: Batch, row: int, rows: int) -> Batch:
    """One row of a batch; what is no tensor of rows stays as it is."""
    return {
        key: value[row : row + 1] if value.dim() and len(value) == rows else value
        for key, value in batch.items()
        if isinstance(value, Tensor)
    }


def metrics(task: Task, model: nn.Module) -> MetricCollection:
    """Fresh metrics for a model: `loss` and the task's own."""
    labels = getattr(getattr(model, "config", None), "num_labels", 1)
    return MetricCollection({"loss": MeanMetric(), **task.metrics(labels)}, compute_groups=False)


def update_metrics(task: Task, collection: MetricCollection, logits: Tensor, batch: Batch) -> None:
    """Add a batch to metrics made by `metrics`, but for texts that the model has to generate."""
    _update_loss(collection, task.loss(logits, batch))
    task.update_metrics(_own(collection), logits, batch)


def measure(task: Task, collection: MetricCollection, model: nn.Module, batch: Batch) -> None:
    """As `update_metrics`, with logits only where the task's metrics read them."""
    if task.reads_logits:
        logits = task.logits(model, batch)
        update_metrics(task, collection.to(logits.device), logits, batch)
    else:
        loss = task.loss_of(model, batch)
        _update_loss(collection.to(loss.total.device), loss)


def _update_loss(collection: MetricCollection, loss: Loss) -> None:
    collection["loss"].update(loss.total / loss.count.clamp_min(1), weight=loss.count)


def update_text_metrics(
    task: Task, collection: MetricCollection, model: nn.Module, batch: Batch, context: PredictContext
) -> None:
    """Add texts that the model generates for a batch."""
    task.update_text_metrics(_own(collection), model, batch, context)


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, batches: Iterable[Batch], context: PredictContext) -> dict[str, float]:
    """All metrics of a model in eval mode; its modules go back to the modes they were in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    collection = metrics(task, model)
    for batch in batches:
        measure(task, collection, model, batch)
        update_text_metrics(task, collection, model, batch, context)
    for module, mode in modes.items():
        module.training = mode
    return {name: float(value) for name, value in collection.compute().items()}


def _own(collection: MetricCollection) -> dict[str, Metric]:
    return {name: metric for name, metric in collection.items() if name != "loss"}
