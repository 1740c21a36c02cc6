from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import two_random_adapters
from toy_runs import WORDS, decoder_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_lightning as ll
from lora_lightning.cli.main import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_folder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return two_random_adapters(base, tmp_path_factory)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": n, "prompt": " ".join(WORDS[n : 2 * n + 1])} for n in range(1, 8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def generated(*words: Any) -> int:
    return main(["generate", *map(str, words), "--max_new_tokens", "8", "--device", "cpu"])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def one_by_one(base: Path, adapter: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Greedy answers of transformers, without batches."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    ll.load_adapter(model, adapter)
    found = []
    for row in rows:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        written = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=2)[0]
        found.append(tokenizer.decode(written[ids.shape[1] :], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("flags", [[], ["--unmerged", "--batch_size", "3"]])
def test_batches_answer_as_prompts_one_by_one_do(
    base: Path, adapters: list[Path], prompts: Path, tmp_path: Path, flags: list[str]
) -> None:
    output = tmp_path / "out.jsonl"
    assert generated(adapters[0], "--input", prompts, "--output", output, *flags) == 0
    rows = read(output)
    assert [list(row) for row in rows] == [["id", "prompt", "index", "prediction"]] * 7
    assert [row["index"] for row in rows] == list(range(7))
    assert [row["prediction"] for row in rows] == one_by_one(base, adapters[0], rows)


def test_several_adapters_give_a_column_each(
    base: Path, adapters: list[Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    assert generated(*adapters, "--with_base", "--input", prompts, "--output", output) == 0
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "prompt", "index", "prediction_one", "prediction_two", "prediction_base"]
    for name, adapter in zip(("one", "two"), adapters, strict=True):
        assert [row[f"prediction_{name}"] for row in rows] == one_by_one(base, adapter, rows)
    assert any(row["prediction_one"] != row["prediction_base"] for row in rows)
    said = capsys.readouterr().out
    assert "one: merged into the weights" in said
    assert f"predictions: {output} (7 rows)" in said


def test_draws_with_a_seed_are_the_same_again(adapters: list[Path], prompts: Path, tmp_path: Path) -> None:
    found = []
    for seed in ("1", "1", "2"):
        output = tmp_path / "out.jsonl"
        settings = ["--temperature", "9", "--seed", seed]
        assert generated(adapters[0], "--input", prompts, "--output", output, *settings) == 0
        found.append([row["prediction"] for row in read(output)])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "out.txt"], '--output is "out.txt"; it must end in .csv or .jsonl'),
        (["--output", "out.csv", "--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
        (["--output", "out.csv", "--top_p", "7"], "top_p is 7.0; it must lie in (0, 1]"),
        (["--output", "out.csv", "--column", "promt"], '--column is "promt". Did you mean "prompt"?'),
        (["--output", "out.csv", "--inptu", "x"], "generate: it takes no"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    adapters: list[Path],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert generated(adapters[0], "--input", prompts, *flags) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_column_that_answers_would_replace(
    adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.csv").write_text("prompt,prediction\nw5,w6\n")
    assert generated(adapters[0], "--input", tmp_path / "in.csv", "--output", tmp_path / "out.csv") == 2
    assert 'has a column "prediction", which the answers go to; rename it' in capsys.readouterr().err
