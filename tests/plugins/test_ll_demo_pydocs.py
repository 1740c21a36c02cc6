from __future__ import annotations

import hashlib
import sys
from collections import Counter
from pathlib import Path

import pytest
from toy_runs import encoder_folder
from transformers import AutoTokenizer

from ll_demo import docstrings, pydocs
from ll_demo.areas import AREA_NAMES, AREA_OF, AREAS
from ll_demo.docstrings import library_docstrings
from ll_demo.pydocs import PyDocs
from lora_lightning.data.sources.splits import folded
from lora_lightning.errors import DataError


@pytest.fixture(scope="module")
def library():
    return library_docstrings()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One that tells the first text of a pair from the second, as BERT's does."""
    folder = encoder_folder(tmp_path_factory.mktemp("encoder"))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    AutoTokenizer.from_pretrained(folder, model_input_names=names).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(library, monkeypatch, tokenizer) -> PyDocs:
    monkeypatch.setattr(pydocs, "library_docstrings", lambda: library)
    return PyDocs(tokenizer=tokenizer)


def test_size_and_balance(library):
    counts = Counter(library["label"])
    assert 3500 < len(library) < 8000
    assert set(counts) == set(range(8))
    assert min(counts.values()) > len(library) / 25
    assert max(counts.values()) < len(library) / 4


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the library changes with each release")
def test_size_with_this_release(library):
    assert 5200 < len(library) < 5500


def test_texts_are_unique_long_enough_and_folded_to_one_line(library):
    texts = library["text"][:]
    assert len({folded(text) for text in texts}) == len(texts)
    assert min(map(len, texts)) >= 40
    assert not any("\n" in text or "  " in text for text in texts)


def test_no_tests_and_no_site_packages(library):
    parts = {part for module in library["module"] for part in module.split(".")}
    assert parts.isdisjoint({"test", "tests", "idle_test", "idlelib", "site-packages"})


def test_splits_share_no_text(data):
    data.setup("fit")
    train, validation = (data.inputs(split)["text"][:] for split in ("train", "validation"))
    assert {folded(text) for text in train}.isdisjoint(folded(text) for text in validation)
    assert 0.18 < len(validation) / (len(train) + len(validation)) < 0.22
    for text in validation[:50]:
        assert int(hashlib.sha256(folded(text).encode()).hexdigest()[:16], 16) / 2**64 < 0.2


def test_batches_are_those_of_a_classification(data):
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert batch["input_ids"].shape[0] == 16
    assert batch["input_ids"].shape[1] <= 48
    assert (data.num_labels, data.label_names) == (8, AREA_NAMES)
    assert data.examples("train")["labels"][:] == data.inputs("train")["label"][:]


def test_test_and_predict_are_the_validation_split(data):
    data.setup("test")
    data.setup("predict")
    assert data.inputs("test")["text"][:] == data.inputs("predict")["text"][:] == data.inputs("validation")["text"][:]
    batch = next(iter(data.predict_dataloader()))
    assert "labels" not in batch
    row = data.inputs("predict")[int(batch["index"][3])]
    assert AREA_OF[row["module"].partition(".")[0]] == row["label"]


def test_table_of_areas():
    assert len(AREAS) == 8
    assert sum(len(modules.split()) for modules in AREAS.values()) == len(AREA_OF), "a module stands in two areas"


# -- a library of the test's own ---------------------------------------------------------------------------------------

LONG = "What this says is long enough to tell the area of it"


def write_library(folder: Path, files: dict[str, str], order: int = 1) -> Path:
    for name, text in list(files.items())[::order]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


FILES = {
    "json/__init__.py": f'"""{LONG}, in a module.\n\nAnd a second paragraph."""\n',
    "json/tool.py": f'class C:\n  """{LONG},\n    in a class."""\n  async def f(self):\n    "{LONG}, in a method."\n',
    "ast.py": f'if True:\n    def f():\n        "{LONG}, in a function."\ndef g():\n    "{LONG}, in a MODULE."\n',
    "os.py": f'"{LONG}, twice."\ndef f():\n    "{LONG},  TWICE."\ndef g():\n    "Too short."\n',
    "email/test/test_x.py": f'"{LONG}, in a test."\n',
    "re.py": f'"{LONG}, in a broken file."\ndef (',
    "unlisted.py": f'"{LONG}, in a module without area."\n',
    "site-packages/json.py": f'"{LONG}, in a package."\n',
}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(docstrings, "FEWEST", 1)


def test_what_is_read(tmp_path, few):
    rows = library_docstrings(write_library(tmp_path, FILES))
    assert rows.to_list() == [
        {"text": f"{LONG}, in a function.", "label": AREA_OF["ast"], "module": "ast"},
        {"text": f"{LONG}, in a class.", "label": AREA_OF["json"], "module": "json.tool"},
        {"text": f"{LONG}, in a method.", "label": AREA_OF["json"], "module": "json.tool"},
        {"text": f"{LONG}, twice.", "label": AREA_OF["os"], "module": "os"},
    ]  # "in a module" stands in two areas


def test_order_is_that_of_files_not_of_the_file_system(tmp_path, few):
    one = library_docstrings(write_library(tmp_path / "one", FILES))
    other = library_docstrings(write_library(tmp_path / "other", FILES, order=-1))
    assert one.to_list() == other.to_list()


def test_nothing_is_imported(tmp_path, few):
    write_library(tmp_path, {"os.py": f'"{LONG}."\nraise SystemExit("imported")\n'})
    assert len(library_docstrings(tmp_path)) == 1


def test_interpreter_without_sources(tmp_path):
    message = (
        rf"^PyDocs found 0 docstrings in {tmp_path}/gone; it needs at least 1000, from the sources \(\.py\) of Python's"
        r" standard library\. Use an interpreter that carries them, or another data set\.$"
    )
    with pytest.raises(DataError, match=message):
        library_docstrings(tmp_path / "gone")
