from __future__ import annotations

import doctest
import hashlib

import pytest

from lora_lightning.data.sources import splits
from lora_lightning.data.sources.faults import Faults, RowError
from lora_lightning.data.sources.splits import Sources, folded, in_fraction
from lora_lightning.data.sources.stored import PLACE
from lora_lightning.errors import DataError, SettingsError


def read(sources: Sources, split: str):
    return sources.read(split, {"X.text": "text"}, texts=["text"], hold_out_by=["text"])


@pytest.fixture
def numbered(write) -> str:
    return write("train.csv", "text\n" + "".join(f"text {n}\n" for n in range(300)))


def test_folding():
    assert folded("  The\n  QUICK\tfox ") == folded("the quick Fox") == "the quick fox"


def test_fraction_depends_on_the_folded_text_alone():
    assert in_fraction("A  text", 0.5) == in_fraction("a text", 0.5)
    for n in range(50):
        digest = hashlib.sha256(f"text {n}".encode()).hexdigest()
        assert in_fraction(f"text {n}", 0.2) == (int(digest[:16], 16) / 2**64 < 0.2)


def test_held_out_fraction_is_stable_disjoint_and_complete(numbered):
    sources = Sources(owner="X", train=numbered, validation_fraction=0.2)
    train, validation = read(sources, "train")["text"][:], read(sources, "validation")["text"][:]
    assert validation == [text for text in (f"text {n}" for n in range(300)) if in_fraction(text, 0.2)]
    assert 40 < len(validation) < 80
    assert sorted(train + validation) == sorted(f"text {n}" for n in range(300))


def test_nothing_is_held_out_beside_validation_data(numbered, write):
    sources = Sources(owner="X", train=numbered, validation=write("dev.csv", "text\nx\n"), validation_fraction=0.2)
    assert len(read(sources, "train")) == 300
    assert len(read(sources, "validation")) == 1


def test_fraction_of_zero(numbered):
    sources = Sources(owner="X", train=numbered)
    assert len(read(sources, "train")) == 300
    assert read(sources, "validation") is None


def test_predict_falls_back_to_test_then_validation(numbered, write):
    one, two, three = (write(f"{n}.csv", f"text\n{n}\n") for n in ("one", "two", "three"))
    assert read(Sources(owner="X", predict=one, test=two, validation=three), "predict")["text"][:] == ["one"]
    assert read(Sources(owner="X", test=two, validation=three), "predict")["text"][:] == ["two"]
    assert read(Sources(owner="X", validation=three), "predict")["text"][:] == ["three"]
    held_out = Sources(owner="X", train=numbered, validation_fraction=0.2)
    assert read(held_out, "predict")["text"][:] == read(held_out, "validation")["text"][:]
    assert read(Sources(owner="X", train=numbered), "predict") is None


def test_fraction_that_leaves_nothing(write):
    sources = Sources(owner="X", train=write("x.csv", "text\none\n"), validation_fraction=1e-9)
    assert len(read(sources, "train")) == 1
    with pytest.raises(
        DataError, match=r"^X\.validation_fraction is 1e-09; of the 1 training rows it leaves none for valid"
    ):
        read(sources, "validation")


def test_rows_that_are_all_equal_stay_together(write):
    sources = Sources(owner="X", train=write("x.csv", "text\n" + "one\n" * 16), validation_fraction=0.25)
    with pytest.raises(
        DataError, match=r"of the 16 training rows, of which 1 differ and equal ones stay together, it leaves none for"
    ):
        read(sources, "validation")


def test_a_file_that_is_learned_and_measured_is_named(write, caplog):
    one, other = write("x.csv", "text\none\n"), write("y.csv", "text\ntwo\n")
    Sources(owner="X", train={one: 1.0, other: 2.0}, validation="./no.csv", test=other)
    assert [record.getMessage() for record in caplog.records] == [
        f"X: {other} is a file of train and of test, so that what is measured has been learned"
    ]
    caplog.clear()
    Sources(owner="X", train=one, validation=[other], test="owner/name", predict=one)
    Sources(owner="X", train="owner/name", validation="owner/name")
    assert not caplog.records


def test_examples_in_docstrings():
    assert doctest.testmod(splits) == (0, 1)  # failed, attempted


# -- several sources ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two(write) -> tuple[str, str]:
    def rows(name, count, extra=""):
        return "\n".join(f'{{"text": "{name}{n}"{extra}}}' for n in range(count))

    return write("a.jsonl", rows("a", 1200)), write("b.jsonl", rows("b", 300, ', "more": 1'))


def test_weights_are_fractions_of_the_rows(two):
    a, b = two
    texts = read(Sources(owner="X", train={a: 2.0, b: 1.0}), "train")["text"][:]
    fraction, n = 2 / 3, len(texts)
    deviation = (fraction * (1 - fraction) / n) ** 0.5
    assert abs(sum(text[0] == "a" for text in texts) / n - fraction) < 3 * deviation
    assert set(texts) == {f"a{n}" for n in range(1200)} | {f"b{n}" for n in range(300)}
    assert len([text for text in texts if text[0] == "a"]) == 1200  # the last to end comes once, the other again
    half = texts[: n // 2]
    assert abs(sum(text[0] == "a" for text in half) / len(half) - fraction) < 3 * deviation * 2**0.5
    assert read(Sources(owner="X", train={a: 2.0, b: 1.0}), "train")["text"][:] == texts


def test_sources_without_weights_follow_one_another(two):
    rows = read(Sources(owner="X", train=list(two)), "train")
    assert rows["text"][:] == [f"a{n}" for n in range(1200)] + [f"b{n}" for n in range(300)]
    assert set(rows.column_names) == {"text", "more", PLACE}
    assert set(rows["more"]) == {None, 1}
    assert Sources(owner="X", train=list(two)).column_names("train") == ["text"]


def test_what_is_held_out_of_a_mixture_comes_once_and_is_not_trained(two):
    sources = Sources(owner="X", train=dict.fromkeys(two, 1.0), validation_fraction=0.2)
    train, validation = read(sources, "train")["text"][:], read(sources, "validation")["text"][:]
    assert len(set(validation)) == len(validation)
    assert not set(train) & set(validation)
    assert len(set(train) | set(validation)) == 1500


def test_sources_that_do_not_fit(two, write):
    a, _ = two
    with pytest.raises(DataError, match=r"^X\.text is \"text\"; d\.jsonl has the columns txt"):
        read(Sources(owner="X", train=[a, write("d.jsonl", '{"txt": "x"}')]), "train")
    with pytest.raises(SettingsError, match=r"^X\.train is {'a': 0}; weights must be above 0\.$"):
        Sources(owner="X", train={"a": 0})
    with pytest.raises(SettingsError, match=r"^X\.test is \[\]; it must name a source, or be null\.$"):
        Sources(owner="X", test=[])


def test_a_column_of_several_types_is_text(write):
    """A column that nobody uses is a number in one source and a text in the other; one has it in lists."""
    parts = [write(f"{n}.jsonl", f'{{"text": "{n}", "id": {value}}}') for n, value in enumerate(("1", '"x1"', "[2]"))]
    assert read(Sources(owner="X", train=parts), "train")["id"][:] == ["1", "x1", "[2]"]


def test_rows_that_cannot_be_used(write):
    """An error that names the line of the file, or all of them left out and counted by kind, once each."""
    source = write("x.csv", 'text,n\n"a\nb",1\nshort\nc,3\nd,x\n')

    def judge(row):
        if row["n"] is None or not row["n"].isdigit():
            raise RowError("without a number", f"{row['n']!r} is no number")

    def sources(**options):
        return Sources(owner="X", train=source, **options).read(
            "train", {"X.text": "text"}, texts=["text"], hold_out_by=["text"], judge=judge, judged=["n"]
        )

    with pytest.raises(DataError, match=r"^x\.csv, line 4: None is no number\. data\.on_error: skip leaves such"):
        sources()
    faults = Faults("skip")
    for _ in range(2):
        assert sources(faults=faults)["text"][:] == ["a\nb", "c"]
    assert faults.told("train") == "2 without a number (first: x.csv, line 4)"


def test_texts_that_are_missing_or_blank(write):
    with pytest.raises(DataError, match=r'^x\.jsonl, line 3: "text" is missing'):
        read(Sources(owner="X", train=write("x.jsonl", '{"text": "a"}\n\n{"text": null}\n')), "train")
    with pytest.raises(DataError, match=r'^y\.csv: "text" is blank in every row\.$'):
        read(Sources(owner="X", train=write("y.csv", "text,b\n ,1\n,2\n")), "train")
