"""Each task's loss against its formula in float64, and its metrics against scikit-learn."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from lora_lightning.tasks import all_tasks, find_task
from lora_lightning.tasks.base import measure, meters


def model(labels: int) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(num_labels=labels))


def measured(task, batches, labels=3):
    collection = meters(task, model(labels))
    for logits, batch in batches:
        measure(task, collection, logits, batch)
    return {name: float(value) for name, value in collection.compute().items()}


def test_every_task_has_a_name_and_a_direction():
    assert set(all_tasks()) == {"causal-lm", "regression", "sequence-classification", "token-classification"}
    assert all(find_task(name).name == name for name in all_tasks())


def test_classification():
    task = find_task("sequence-classification")
    logits, labels = torch.randn(50, 3), torch.randint(0, 3, (50,))
    values = measured(task, [(part, {"labels": y}) for part, y in zip(logits.split(20), labels.split(20), strict=True)])
    log_p = logits.double() - logits.double().exp().sum(1, keepdim=True).log()
    predicted = logits.argmax(1)
    assert values == pytest.approx(
        {
            "loss": -float(log_p[range(50), labels].mean()),
            "accuracy": accuracy_score(labels, predicted),
            "f1": f1_score(labels, predicted, average="macro"),
            "mcc": matthews_corrcoef(labels, predicted),
        },
        abs=1e-6,
    )


def test_regression():
    task = find_task("regression")
    outputs, labels = torch.randn(40, 1), torch.randn(40)
    values = measured(task, [(a, {"labels": b}) for a, b in zip(outputs.split(16), labels.split(16), strict=True)])
    x, y = outputs[:, 0].numpy(), labels.numpy()
    assert values == pytest.approx(
        {
            "loss": float(np.mean((x - y) ** 2)),
            "mse": float(np.mean((x - y) ** 2)),
            "pearson": pearsonr(x, y)[0],
            "spearman": spearmanr(x, y)[0],
        },
        abs=1e-5,
    )
    assert task.model_options(7) == {"num_labels": 1, "problem_type": "regression"}


def test_causal_lm_counts_labelled_tokens_only():
    task = find_task("causal-lm")
    logits, labels = torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6))
    labels[0, :3], labels[1, 4:] = -100, -100
    total, count = 0.0, 0
    for row in range(2):
        for t in range(1, 6):
            if labels[row, t] != -100:
                scores = logits[row, t - 1].double()
                total += float(scores.exp().sum().log() - scores[labels[row, t]])
                count += 1
    loss = task.loss(logits, {"labels": labels})
    assert int(loss.count) == count == 6
    assert float(loss.total) == pytest.approx(total, rel=1e-6)
    assert measured(task, [(logits, {"labels": labels})]) == pytest.approx({"loss": total / count}, rel=1e-6)


def test_token_classification_counts_labelled_tokens_only():
    task = find_task("token-classification")
    logits, labels = torch.randn(4, 6, 3), torch.randint(0, 3, (4, 6))
    labels[:, 0], labels[1, 3:] = -100, -100
    values = measured(task, [(a, {"labels": b}) for a, b in zip(logits.split(3), labels.split(3), strict=True)])
    keep = labels != -100
    log_p = logits.double().log_softmax(-1)
    true, predicted = labels[keep], logits.argmax(-1)[keep]
    assert values == pytest.approx(
        {
            "loss": -float(log_p[keep][range(len(true)), true].mean()),
            "accuracy": accuracy_score(true, predicted),
            "f1": f1_score(true, predicted, average="macro"),
        },
        abs=1e-6,
    )
