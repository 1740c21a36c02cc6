from __future__ import annotations

import doctest
import hashlib

import pytest

from lora_lightning.data import splits
from lora_lightning.data.splits import Sources, folded, in_share
from lora_lightning.errors import DataError


def read(sources: Sources, split: str):
    return sources.read(split, {"X.text": "text"}, texts=["text"], hold_out_by=["text"])


@pytest.fixture
def numbered(write) -> str:
    return write("train.csv", "text\n" + "".join(f"text {n}\n" for n in range(300)))


def test_folding():
    assert folded("  The\n  QUICK\tfox ") == folded("the quick Fox") == "the quick fox"


def test_share_depends_on_the_folded_text_alone():
    assert in_share("A  text", 0.5) == in_share("a text", 0.5)
    for n in range(50):
        digest = hashlib.sha256(f"text {n}".encode()).hexdigest()
        assert in_share(f"text {n}", 0.2) == (int(digest[:16], 16) / 2**64 < 0.2)


def test_held_out_share_is_stable_disjoint_and_complete(numbered):
    sources = Sources(owner="X", train=numbered, validation_share=0.2)
    train, validation = read(sources, "train")["text"][:], read(sources, "validation")["text"][:]
    assert validation == [text for text in (f"text {n}" for n in range(300)) if in_share(text, 0.2)]
    assert 40 < len(validation) < 80
    assert sorted(train + validation) == sorted(f"text {n}" for n in range(300))


def test_nothing_is_held_out_beside_validation_data(numbered, write):
    sources = Sources(owner="X", train=numbered, validation=write("dev.csv", "text\nx\n"), validation_share=0.2)
    assert len(read(sources, "train")) == 300
    assert len(read(sources, "validation")) == 1


def test_share_of_zero(numbered):
    sources = Sources(owner="X", train=numbered)
    assert len(read(sources, "train")) == 300
    assert read(sources, "validation") is None


def test_predict_falls_back_to_test_then_validation(numbered, write):
    one, two, three = (write(f"{n}.csv", f"text\n{n}\n") for n in ("one", "two", "three"))
    assert read(Sources(owner="X", predict=one, test=two, validation=three), "predict")["text"][:] == ["one"]
    assert read(Sources(owner="X", test=two, validation=three), "predict")["text"][:] == ["two"]
    assert read(Sources(owner="X", validation=three), "predict")["text"][:] == ["three"]
    held_out = Sources(owner="X", train=numbered, validation_share=0.2)
    assert read(held_out, "predict")["text"][:] == read(held_out, "validation")["text"][:]
    assert read(Sources(owner="X", train=numbered), "predict") is None


def test_share_that_leaves_nothing(write):
    sources = Sources(owner="X", train=write("x.csv", "text\none\n"), validation_share=1e-9)
    assert len(read(sources, "train")) == 1
    with pytest.raises(
        DataError, match=r"^X\.validation_share is 1e-09; of the 1 training rows it leaves none for valid"
    ):
        read(sources, "validation")


def test_examples_in_docstrings():
    assert doctest.testmod(splits) == (0, 1)  # failed, attempted
