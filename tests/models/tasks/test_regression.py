"""Loss by its formula, correlations by SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from lora_lightning.models.tasks import find_task


def test_regression(measured):
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
