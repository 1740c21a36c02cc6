"""Each task's loss against its formula in float64, and its metrics against scikit-learn."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, label_ranking_average_precision_score, log_loss, matthews_corrcoef

from lora_lightning.errors import SettingsError
from lora_lightning.models.tasks import all_tasks, find_task
from lora_lightning.models.tasks.base import PredictContext, metrics, update_metrics


def model(labels: int) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(num_labels=labels))


def measured(task, batches, labels=3):
    collection = metrics(task, model(labels))
    for logits, batch in batches:
        update_metrics(task, collection, logits, batch)
    return {name: float(value) for name, value in collection.compute().items()}


def test_every_task_has_a_name_and_a_direction():
    assert set(all_tasks()) == {
        "causal-lm",
        "image-classification",
        "masked-lm",
        "multi-label-classification",
        "regression",
        "sentence-embedding",
        "sentence-similarity",
        "seq2seq-lm",
        "sequence-classification",
        "token-classification",
    }
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


def test_multi_label():
    task = find_task("multi-label-classification", {"threshold": 0.4})
    logits, labels = torch.randn(40, 4), torch.randint(0, 2, (40, 4)).float()
    values = measured(
        task, [(a, {"labels": b}) for a, b in zip(logits.split(16), labels.split(16), strict=True)], labels=4
    )
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    y, predicted = labels.int().numpy(), p >= 0.4
    assert values == pytest.approx(
        {
            "loss": np.mean([log_loss(y[:, i], p[:, i]) for i in range(4)]),
            "f1": f1_score(y, predicted, average="macro"),
            "f1_micro": f1_score(y, predicted, average="micro"),
            "exact_match": accuracy_score(y, predicted),
            "ranking": label_ranking_average_precision_score(y, p),
        },
        abs=1e-6,
    )
    assert task.model_options(4)["problem_type"] == "multi_label_classification"


def test_multi_label_predictions_are_names():
    def net(**inputs):
        return SimpleNamespace(logits=torch.tensor([[2.0, -3.0, 0.5], [-1.0, -1.0, -1.5]]))

    rows = find_task("multi-label-classification").predict(net, {}, PredictContext(label_names=["a", "b", "c"]))
    assert [row["prediction"] for row in rows] == ["a, c", ""]
    assert rows[0]["probabilities"] == "a 0.881, c 0.622, b 0.047"


def texts_of(vectors):
    """A model whose hidden states are given, and a batch of two sides."""
    hidden = torch.randn(6, 4, 5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]] * 2)
    return (
        (lambda **inputs: SimpleNamespace(last_hidden_state=hidden)),
        {
            "input_ids": mask,
            "attention_mask": mask,
            "sides": torch.tensor(2),
        },
        hidden,
    )


def test_sentence_embedding():
    task = find_task("sentence-embedding", {"temperature": 0.1})
    net, batch, hidden = texts_of(2)
    sides = task.logits(net, batch)
    means = [hidden[i, : int(batch["attention_mask"][i].sum())].double().mean(0) for i in range(6)]
    unit = torch.stack([mean / mean.norm() for mean in means])
    cosines = unit[:3] @ unit[3:].T
    losses = [-(c / 0.1).log_softmax(dim)[range(3), range(3)] for dim, c in ((1, cosines), (0, cosines))]
    ranks = [1 + sum(float(cosines[i, j]) > float(cosines[i, i]) for j in range(3)) for i in range(3)]
    assert measured(task, [(sides, batch)]) == pytest.approx(
        {
            "loss": float(torch.stack(losses).mean()),
            "accuracy": np.mean([rank == 1 for rank in ranks]),
            "mrr": np.mean([1 / rank for rank in ranks]),
        },
        abs=1e-6,
    )
    shown = task.predict(net, batch, PredictContext())
    assert [row["similarity"] for row in shown] == pytest.approx(cosines.diagonal().tolist(), abs=2e-6)
    [first, *_] = task.predict(net, {**batch, "sides": torch.tensor(1)}, PredictContext())
    assert first["embedding"] == pytest.approx(unit[0].tolist(), abs=2e-6)
    assert torch.equal(
        find_task("sentence-embedding", {"pooling": "first"}).logits(net, batch)[0, 1],
        torch.nn.functional.normalize(hidden[1, 0], dim=-1),
    )


def test_negatives_of_their_own_are_further_candidates():
    task = find_task("sentence-embedding", {"temperature": 1.0})
    sides = torch.nn.functional.normalize(torch.randn(3, 4, 5), dim=-1)
    there = torch.cat([sides[0] @ sides[1].T, sides[0] @ sides[2].T], 1).double().log_softmax(1)
    back = (sides[1] @ sides[0].T).double().log_softmax(1)
    expected = -(there[range(4), range(4)].sum() + back[range(4), range(4)].sum()) / 2
    assert float(task.loss(sides, {}).total) == pytest.approx(float(expected), rel=1e-6)


def test_sentence_similarity():
    task = find_task("sentence-similarity")
    net, batch, _ = texts_of(2)
    cosines = task.logits(net, batch)
    sides = find_task("sentence-embedding").logits(net, batch)
    assert torch.allclose(cosines, (sides[0] * sides[1]).sum(-1))
    labels = torch.tensor([0.1, -0.2, 0.9])
    values = measured(task, [(cosines, {"labels": labels})])
    assert values["loss"] == values["mse"] == pytest.approx(float(((cosines - labels) ** 2).mean()), rel=1e-5)
    assert values["spearman"] == pytest.approx(spearmanr(cosines, labels)[0], abs=1e-5)


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


def test_masked_lm_counts_hidden_tokens_only():
    task = find_task("masked-lm")
    logits, labels = torch.randn(4, 6, 11), torch.full((4, 6), -100)
    labels[0, 2], labels[1, 1], labels[1, 4], labels[3, 5] = 3, 10, 0, 7
    logits[0, 2, 3] = 9.0
    values = measured(task, [(a, {"labels": b}) for a, b in zip(logits.split(2), labels.split(2), strict=True)])
    keep = labels != -100
    log_p, true = logits[keep].double().log_softmax(-1), labels[keep]
    mean = -float(log_p[range(4), true].mean())
    accuracy = float((log_p.argmax(-1) == true).double().mean())
    assert values == pytest.approx({"loss": mean, "accuracy": accuracy, "perplexity": np.exp(mean)}, rel=1e-5)
    assert 0 < accuracy < 1


def test_masked_lm_fills_in():
    words = ["[PAD]", "[MASK]", "the", "dog", "sleeps"]
    tokenizer = SimpleNamespace(
        mask_token_id=1, decode=lambda ids, **_: " ".join(words[int(i)] for i in ids if int(i) or len(ids) == 1)
    )
    logits = torch.zeros(2, 3, 5)
    logits[0, 1, 3], logits[0, 1, 4], logits[1, 0, 2] = 4.0, 2.0, 3.0
    batch = {
        "input_ids": torch.tensor([[2, 1, 4], [4, 3, 0]]),
        "labels": torch.tensor([[-100, -100, -100], [2, -100, -100]]),  # "the dog", with a random word in its place
    }
    task = find_task("masked-lm", {"top": 2})
    asked, hidden = task.predict(lambda **_: SimpleNamespace(logits=logits), batch, PredictContext(tokenizer=tokenizer))
    share = torch.tensor([0, 0, 0, 4.0, 2.0]).softmax(0)
    assert asked == {
        "prediction": "the dog sleeps",
        "fillings": f"dog {share[3]:.3f}, sleeps {share[4]:.3f}",
        "loss": None,
    }
    assert hidden["prediction"] == "the dog"
    assert hidden["loss"] == pytest.approx(np.log(4 + np.exp(3)) - 3, abs=1e-6)
