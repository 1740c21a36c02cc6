"""Texts that are generated while validating: BLEU, chrF and ROUGE-L from their definitions, exact match, how many."""

from __future__ import annotations

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from toy_runs import WORDS, completion_data, decoder_folder, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from lora_lightning.cli.main import main
from lora_lightning.data import Chat, Completions, PlainText, TextToText
from lora_lightning.errors import DataError, SettingsError
from lora_lightning.models.tasks import find_task
from lora_lightning.models.tasks.base import PredictContext, evaluate, metrics, update_text_metrics
from lora_lightning.models.tasks.generated import text_metrics


def grams(items, n: int) -> Counter:
    return Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def bleu(made: list[str], wanted: list[str]) -> float:
    """Of a corpus with one reference a text, up to four words (Papineni et al., 2002)."""
    pairs = [(a.split(), b.split()) for a, b in zip(made, wanted, strict=True)]
    logs = 0.0
    for n in range(1, 5):
        right = sum((grams(a, n) & grams(b, n)).total() for a, b in pairs)
        total = sum(grams(a, n).total() for a, _ in pairs)
        if not right:
            return 0.0
        logs += math.log(right / total) / 4
    lengths = [sum(len(side) for side in sides) for sides in zip(*pairs, strict=True)]
    return math.exp(logs + min(0.0, 1 - lengths[1] / lengths[0]))


def chrf(made: list[str], wanted: list[str]) -> float:
    """F2 averaged over one to six characters, blanks left out (Popović, 2015)."""
    scores = []
    for n in range(1, 7):
        sides = [[grams(text.replace(" ", ""), n) for text in pair] for pair in zip(made, wanted, strict=True)]
        right = sum((a & b).total() for a, b in sides)
        precision, recall = (right / max(1, sum(side[which].total() for side in sides)) for which in (0, 1))
        scores.append(5 * precision * recall / max(1e-30, 4 * precision + recall))
    return sum(scores) / 6


def measured(task, model, data, batches, **context) -> dict[str, float]:
    values = evaluate(task, model, batches, PredictContext(tokenizer=data.tokenizer_object, **context))
    return {name: value for name, value in values.items() if name in ("bleu", "chrf", "exact_match")}


@pytest.fixture
def decoder(tmp_path):
    folder = decoder_folder(tmp_path / "decoder")
    return folder, AutoModelForCausalLM.from_pretrained(folder).eval()


def answers(folder, model, prompts: list[str], length: int) -> list[str]:
    """What the model writes to each prompt alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
        made.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return made


def test_completions(decoder, tmp_path):
    """Half of the completions are what the model writes, the others differ in a word; the last batch is not written."""
    folder, model = decoder
    prompts = [" ".join(WORDS[(3 * i + j) % 30] for j in range(2 + i % 3)) for i in range(12)]
    made = answers(folder, model, prompts, 6)
    wanted = [text if i % 2 else f"{text.rpartition(' ')[0]} w1 w2" for i, text in enumerate(made)]
    rows = [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, wanted, strict=True)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = Completions(validation=str(tmp_path / "rows.json"), tokenizer=str(folder), batch_size=4)
    data.setup("validate")
    found = measured(
        find_task("causal-lm", {"generate_batches": 2}), model, data, data.val_dataloader(), max_new_tokens=6
    )
    made, wanted = made[:8], wanted[:8]
    right = sum(a == b for a, b in zip(made, wanted, strict=True)) / 8
    assert 0 < right < 1
    expected = {"bleu": bleu(made, wanted), "chrf": chrf(made, wanted), "exact_match": right}
    assert found == pytest.approx(expected, abs=1e-6)
    assert measured(find_task("causal-lm"), model, data, data.val_dataloader()) == {}


def test_the_first_answer_of_a_conversation(decoder, tmp_path):
    folder, model = decoder
    turns = [("user", "w1 w2"), ("assistant", "w3 w4"), ("user", "w5"), ("assistant", "w6 w7 w8")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    data = Chat(validation=str(tmp_path / "chat.json"), tokenizer=str(folder), chat_template="plain")
    data.setup("validate")
    seen = []
    task = find_task("causal-lm", {"generate_batches": 1})
    collection = metrics(task, model)
    collection["chrf"].update = lambda made, wanted: seen.append(wanted)
    (batch,) = data.val_dataloader()
    update_text_metrics(
        task, collection, model, batch, PredictContext(tokenizer=data.tokenizer_object, max_new_tokens=3)
    )
    assert seen == [[["w3 w4"]]]


def test_targets(tmp_path):
    save_tokenizer(tmp_path)
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(
        T5Config(
            **sizes, vocab_size=43, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, initializer_factor=9.0
        )
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    sources = [" ".join(WORDS[(5 * i + j) % 40] for j in range(3)) for i in range(6)]
    made = []
    for source in sources:
        out = model.generate(**tokenizer(source, return_tensors="pt"), max_new_tokens=6, do_sample=False)
        made.append(tokenizer.decode(out[0], skip_special_tokens=True).strip())
    wanted = [f"{text} w1" if i % 2 else text for i, text in enumerate(made)]
    (tmp_path / "rows.json").write_text(
        json.dumps([{"source": a, "target": b} for a, b in zip(sources, wanted, strict=True)])
    )
    data = TextToText(validation=str(tmp_path / "rows.json"), tokenizer=str(tmp_path), batch_size=3)
    data.setup("validate")
    task = find_task("seq2seq-lm", {"generate_batches": 9})
    found = measured(task, model, data, data.val_dataloader(), max_new_tokens=6)
    del found["exact_match"]  # of the targets' tokens: see test_seq2seq
    assert found == pytest.approx({"bleu": bleu(made, wanted), "chrf": chrf(made, wanted)}, abs=1e-6)
    assert 0.5 < found["chrf"] < 1


def test_a_run_shows_them_before_and_after(decoder, tmp_path, monkeypatch):
    """In the baseline before training, at each validation, and again by validate."""
    folder, _ = decoder
    completion_data(folder)  # which writes the file
    monkeypatch.chdir(tmp_path)
    words = [f"--model.pretrained={folder}", "--model.task=causal-lm", "--model.method=LoRA", "--data=Completions"]
    words += ["--model.task_settings={generate_batches: 2}", "--model.max_new_tokens=4", "--trainer.max_steps=4"]
    words += [
        f"--data.train={folder}/pairs.csv",
        "--data.validation_fraction=0.3",
        "--trainer.enable_progress_bar=false",
    ]
    assert main(["fit", *words, "--trainer.accelerator=cpu"]) == 0
    summary = json.loads((tmp_path / "runs/run/001/summary.json").read_text())
    for values in (summary["untrained"], summary["values"]):
        assert set(values) == {"loss", "bleu", "chrf", "rouge_l", "exact_match"}
        assert 0 <= values["chrf"] <= 1
    assert "val_chrf" in (tmp_path / "runs/run/001/metrics.csv").read_text()


PAIRS = {
    "the same": ("a b c", "a b c", 1.0),
    "half": ("a x b y", "a b", 2 * 0.5 * 1.0 / 1.5),
    "another order": ("c b a", "a b c", 1 / 3),
    "case and marks": ("The Cat, sat!", "the cat sat", 1.0),
    "another script": ("кошка спит", "кошка ест", 0.5),
    "nothing": ("", "a", 0.0),
}


@pytest.mark.parametrize("case", PAIRS)
def test_rouge_counts_the_longest_words_in_common(case):
    made, wanted, expected = PAIRS[case]
    metric = text_metrics()["rouge_l"]
    metric.update([made], [[wanted]])
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-6)
    metric.update(["a b c"], [["a b c"]])
    assert float(metric.compute()) == pytest.approx((expected + 1) / 2, abs=1e-6)


def test_refusals(decoder, tmp_path):
    folder, model = decoder
    for task in ("causal-lm", "seq2seq-lm"):
        with pytest.raises(SettingsError, match=r"LM\.generate_batches is -1; it must be at least 0"):
            find_task(task, {"generate_batches": -1})
    (tmp_path / "t.txt").write_text("w1 w2 w3\nw4 w5\n")
    data = PlainText(validation=str(tmp_path / "t.txt"), tokenizer=str(folder), block=False)
    data.setup("validate")
    task = find_task("causal-lm", {"generate_batches": 2})
    with pytest.raises(
        DataError, match=r"generate_batches is 2, but the data have no prompts to go on from\. Set it to 0"
    ):
        measured(task, model, data, data.val_dataloader())
    completions = completion_data(folder)
    completions.setup("validate")
    with pytest.raises(DataError, match="generate_batches needs data with a tokenizer, such as TextToText"):
        measured(task, model, SimpleNamespace(tokenizer_object=None), completions.val_dataloader())
