"""What tells training data apart: what they hold and how examples are made of them, not where they lie."""

from __future__ import annotations

import json
import shutil

import pytest

from lora_lightning.data import Chat, Completions, LabelledImages

ROWS = [{"prompt": f"what is {word}", "completion": "yes"} for word in "abcd"]
SETTINGS = {"validation_fraction": 0.0, "batch_size": 2}


@pytest.fixture
def make(write, causal_tokenizer):
    def make(rows=ROWS, name="rows.jsonl", kind=Completions, **settings):
        file = write(name, "\n".join(map(json.dumps, rows)))
        return kind(train=file, **{"tokenizer": causal_tokenizer, **SETTINGS, **settings}).training_identity()

    return make


def test_the_place_and_what_only_serves_count_nothing(make):
    other = make(name="moved.jsonl", batch_size=1, num_workers=2, cache=False, validation_batch_size=3)
    assert make() == other


CHANGED = {
    "a word": [*ROWS[:3], {"prompt": "what is d", "completion": "no"}],
    "the order": ROWS[::-1],
    "a row less": ROWS[:3],
    "a row twice": [*ROWS, ROWS[0]],
    "an empty answer": [*ROWS[:3], {"prompt": "what is d", "completion": ""}],
    "one text in the other column": [*ROWS[:3], {"prompt": "yes", "completion": "what is d"}],
}


@pytest.mark.parametrize("case", CHANGED)
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_count(make, case, streaming):
    """Of a stream too, where the number of rows is not known before."""
    name = "training data"
    assert make(streaming=streaming)[name] != make(CHANGED[case], streaming=streaming)[name]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_length", 128), ("packing", True), ("seed", 1), ("limit", 3), ("new_tokens", ["<x>"])],
)
def test_settings_count_by_name(make, setting, value):
    before, after = make(), make(**{setting: value})
    assert f"Completions.{setting}" in {name for name in before if before[name] != after[name]}


def test_the_template_of_a_tokenizer_counts(write, letters):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    file = write("chat.jsonl", json.dumps({"messages": turns}))
    found = []
    for mark in "!?":
        template = "{% for m in messages %}{{ m.role }}" + mark + "{{ m.content }}</s>{% endfor %}"
        data = Chat(train=file, tokenizer=letters(template=template), **SETTINGS)
        _ = data.renderer
        found.append(data.training_identity())
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"chat template"}


def test_images_are_told_apart_by_name_and_folder(tmp_path):
    from PIL import Image

    for place in ("one", "two"):
        for label in ("cat", "dog"):
            (tmp_path / place / label).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / place / label / "1.png")
    shutil.copy(tmp_path / "two/cat/1.png", tmp_path / "two/cat/2.png")

    def identity(place):
        return LabelledImages(train=str(tmp_path / place), **SETTINGS).training_identity()["training data"]

    one = identity("one")
    (tmp_path / "one").rename(tmp_path / "moved")
    assert identity("moved") == one != identity("two")
    assert one.startswith("2 rows, digest ")
