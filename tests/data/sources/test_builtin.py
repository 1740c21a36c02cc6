from __future__ import annotations

import datasets
import pytest

from lora_lightning import plugins
from lora_lightning.data import TaggedWords
from lora_lightning.data.sources.builtin import builtin_table
from lora_lightning.errors import DataError

calls = []


def table():
    """A table of a plugin."""
    calls.append(1)
    return datasets.Dataset.from_dict({"tokens": [["a", "b"]], "tags": [["other", "type"]]})


def none():
    """No table."""


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """What plugins bring, and two tables of this file."""
    known = plugins.registry()
    ours = {"ours-words": f"{__name__}:table", "ours-none": f"{__name__}:none"}
    monkeypatch.setattr(known, "tables", {**known.tables, **ours})
    calls.clear()


def test_a_built_in_table_is_a_source(encoder_tokenizer):
    data = TaggedWords(train="builtin:ours-words", tokenizer=encoder_tokenizer, validation_fraction=0.0)
    assert data.label_names == ["other", "type"]
    data.setup("fit")
    assert len(data.examples("train")) == 1


def test_an_unknown_table(encoder_tokenizer):
    data = TaggedWords(train="builtin:python-word", tokenizer=encoder_tokenizer, validation_fraction=0.0)
    with pytest.raises(
        DataError, match=r'TaggedWords.train is "builtin:python-word"; there .* Did you mean "python-words"\? Built in'
    ):
        data.setup("fit")


def test_without_the_plugin_a_table_is_unknown_and_the_plugin_named(monkeypatch):
    monkeypatch.setattr(plugins, "_current", None)
    plugins.load(["ll_demo"])
    expected = (
        r"^data.train is x; there is no such table\. Built in: none\. Plugin ll_demo is blocked by -p no:ll_demo\.$"
    )
    with pytest.raises(DataError, match=expected):
        builtin_table("builtin:dates", "data.train is x")


def test_what_is_no_table(monkeypatch):
    with pytest.raises(DataError, match=r"data.train is x; \S+:none returned None, which is no datasets\.Dataset\."):
        builtin_table("builtin:ours-none", "data.train is x")


def test_a_table_is_made_once():
    first = builtin_table("builtin:ours-words", "")
    before = len(calls)
    assert builtin_table("builtin:ours-words", "") is first
    assert len(calls) == before
