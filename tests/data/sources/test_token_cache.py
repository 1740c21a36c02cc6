"""Tokenised data on the disk: found again by the same contents, settings and template, and by nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lora_lightning.data import Chat, Completions, LabelledText, text
from lora_lightning.data.sources import token_cache

ROWS = [
    {"prompt": "what is", "completion": "tea"},
    {"prompt": "a", "completion": ""},
    {"prompt": "b", "completion": "c"},
]


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(text, "WORTH_KEEPING", 0.0)
    monkeypatch.setattr(token_cache, "_folder", lambda: tmp_path / "tokens")
    return tmp_path / "tokens"


@pytest.fixture
def make(write, causal_tokenizer):
    def make(rows=ROWS, name: str = "train.json", **settings) -> tuple[Completions, bool]:
        """The data, and whether anything had to be tokenised."""
        settings = {"tokenizer": causal_tokenizer, "validation_fraction": 0.0, **settings}
        data = Completions(train=write(name, rows), **settings)
        encoded: list[str] = []
        encode = data.encode
        data.encode = lambda rows, split: encoded.append(split) or encode(rows, split)
        data.setup("fit")
        return data, bool(encoded)

    return make


def test_the_same_is_read_back(make, folder, caplog):
    first, made = make()
    caplog.clear()
    again, remade = make(name="other.json", batch_size=3, packing=True)  # another place, and served another way
    assert (made, remade) == (True, False)
    assert again.examples("train")[:] == first.examples("train")[:]
    assert again.dropped == {"train": 1}
    assert "Completions: left 1 train rows out for lack of anything to learn" in caplog.text
    assert [path.name for path in folder.iterdir() if "." in path.name] == []  # nothing half written


def test_anything_that_matters_makes_another(make, bare_tokenizer, monkeypatch):
    assert make()[1]
    changed = [*ROWS[:2], {"prompt": "b", "completion": "d"}]
    assert make(rows=changed)[1]
    assert make(max_length=9)[1]
    assert make(tokenizer=bare_tokenizer)[1]
    assert make(prompt_template="{prompt} it")[1]
    assert not make(rows=changed)[1]
    monkeypatch.setattr(token_cache, "_code", lambda: "another version")
    assert make()[1]


def test_it_can_be_left_off_and_what_is_quick_is_not_kept(make, folder, monkeypatch):
    assert make(cache=False)[1]
    monkeypatch.setattr(text, "WORTH_KEEPING", 3600.0)
    assert make()[1]
    assert not folder.exists()


def test_a_template_in_a_file_counts_by_its_text(write, causal_tokenizer, tmp_path, folder):
    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "tea"}]
    examples = []
    for word in ("is", "the", "the"):
        body = f"{{% for m in messages %}}{{{{ m.content }}}} {word} {{% endfor %}}"
        (tmp_path / "mine.jinja").write_text(body)
        data = Chat(
            train=write("c.jsonl", json.dumps({"messages": turns})),
            tokenizer=causal_tokenizer,
            chat_template=str(tmp_path / "mine.jinja"),
            validation_fraction=0.0,
        )
        data.setup("fit")
        examples.append(data.examples("train")["input_ids"][:])
    assert examples[0] != examples[1] == examples[2]
    assert len(list(folder.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_no_harm(make, folder, caplog):
    folder.write_text("a file stands here")
    assert make()[1]
    assert f"tokenised data are not kept in {folder}: " in caplog.text


def test_any_text_is_kept_by_its_labels_too(write, encoder_tokenizer, folder):
    """What a label's number is depends on the training data, which are not among the rows of another split."""
    dev = write("dev.csv", "text,label\ngood,yes\nbad,yes\n")
    numbers = []
    for other in ("no", "zebra", "zebra"):
        train = write("train.csv", f"text,label\na,yes\nb,{other}\n")
        data = LabelledText(train=train, validation=dev, tokenizer=encoder_tokenizer)
        data.setup("validate")
        numbers.append(data.examples("validation")["labels"][:])
    assert numbers == [[1, 1], [0, 0], [0, 0]]
    assert len(list(folder.iterdir())) == 2


def test_what_was_not_used_for_longest_goes_first(make, folder, monkeypatch):
    def kept() -> int:
        return len(list(folder.iterdir()))

    make(max_length=9)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    make(max_length=8)
    old, older = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    os.utime(old, (2, 2))
    os.utime(older, (1, 1))
    make(max_length=9)  # which is used again
    monkeypatch.setenv("LORA_LIGHTNING_CACHE_GB", str(2.5 * size / 1e9))
    make(max_length=7)
    assert (kept(), old.exists(), older.exists()) == (2, False, True)
    monkeypatch.setenv("LORA_LIGHTNING_CACHE_GB", "0")
    assert make(max_length=6)[1]
    assert kept() == 1  # the one that was just made
    assert not make(max_length=6)[1]
