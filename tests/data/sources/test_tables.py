from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest

from lora_lightning.data.sources.faults import Faults
from lora_lightning.data.sources.lines import PLAIN, Reading
from lora_lightning.data.sources.stored import PLACE
from lora_lightning.data.sources.tables import read_stream, read_table, require_columns
from lora_lightning.errors import DataError

ROWS = {"text": ["good film", 'a "bad film'], "label": [1, 0]}


def rows_of(source: str, split: str = "train", how: Reading = PLAIN, **options) -> dict[str, list]:
    table = read_table(source, split, how, **options)
    return table.remove_columns(PLACE).to_dict()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", 'text,label\ngood film,1\n"a ""bad film",0\n'),
        ("x.tsv", 'text\tlabel\ngood film\t1\na "bad film\t0\n'),
        ("x.json", '[{"text": "good film", "label": 1}, {"text": "a \\"bad film", "label": 0}]'),
        ("x.jsonl", '{"text": "good film", "label": 1}\n{"text": "a \\"bad film", "label": 0}\n'),
        ("X.TSV", 'text\tlabel\ngood film\t1\na "bad film\t0\n'),
    ],
)
def test_files(write, name, content):
    labels = [1, 0] if "json" in name else ["1", "0"]
    assert rows_of(write(name, content)) == {**ROWS, "label": labels}


def test_parquet(tmp_path):
    datasets.Dataset.from_dict(ROWS).to_parquet(str(tmp_path / "x.parquet"))
    assert rows_of(str(tmp_path / "x.parquet"), "train") == ROWS


def test_txt_has_an_example_per_line_that_is_not_empty(write):
    assert rows_of(write("x.txt", "one\n\n  \ntwo\n"), "train") == {"text": ["one", "two"]}


def test_columns_name_a_file_without_header(write):
    how = Reading(columns=("source", "label", "mark", "text"))
    table = rows_of(write("x.tsv", 'gj04\t1\t\tHe "said so.\n'), "train", how)
    assert table == {"source": ["gj04"], "label": ["1"], "mark": [""], "text": ['He "said so.']}


@pytest.mark.parametrize("word", ["NA", "null", "None", "nan"])
def test_words_that_pandas_takes_for_missing_stay_words(write, word):
    assert read_table(write("x.csv", f"text\nhello\n{word}\n"), "train")["text"][:] == ["hello", word]


def test_a_changed_file_is_read_again(write):
    assert len(read_table(write("x.csv", "text\na\n"), "train")) == 1
    assert len(read_table(write("x.csv", "text\na\nb\n"), "train")) == 2


def test_real_files(shared):
    named = Reading(columns=("source", "label", "mark", "sentence"))
    cola = read_table(str(shared / "data/cola/in_domain_train.tsv"), "train", named)
    sst2 = read_table(str(shared / "data/sst2/train.tsv"), "train", Reading(columns=("sentence", "label")))
    gsm8k = read_table(str(shared / "data/gsm8k/test.json"), "test")
    assert (len(cola), len(sst2), len(gsm8k)) == (8551, 6920, 1319)
    assert set(cola["label"]) == set(sst2["label"]) == {"0", "1"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "glue/data").mkdir(parents=True)
    for split, rows in {"train": ROWS, "test": {"text": ["t"], "label": [1]}}.items():
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / f"glue/data/{split}-00000-of-00001.parquet"))
    return tmp_path / "glue"


def test_folder_of_parquet_files(folder):
    assert rows_of(str(folder), "train") == ROWS
    assert read_table(f"{folder}::test", "validation")["text"][:] == ["t"]


def test_folders_of_save_to_disk(tmp_path):
    table = datasets.Dataset.from_dict(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "many")
    assert rows_of(str(tmp_path / "one"), "train") == ROWS
    assert read_table(str(tmp_path / "many"), "test")["label"][:] == [0]


ONE = datasets.Dataset.from_dict({"a": [1]})


def test_hub_id_takes_config_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or ONE)
    read_table("nyu-mll/glue:mnli:validation_matched", "validation")
    read_table("stanfordnlp/imdb", "train")
    assert asked == [
        (("nyu-mll/glue", "mnli"), {"split": "validation_matched"}),
        (("stanfordnlp/imdb", None), {"split": "train"}),
    ]


# -- errors: one line each, with the nearest valid choice --------------------------------------------------------------


def fails(source: str, message: str, **options) -> None:
    with pytest.raises(DataError, match=message) as error:
        read_table(source, "train", **options)
    assert "\n" not in str(error.value)


def test_missing_file(write, tmp_path):
    write("train.tsv", "a\n1\n")
    fails(str(tmp_path / "trian.tsv"), r'^data\.train is ".*trian\.tsv"; no such file\. Nearest: train\.tsv\.$')
    fails(str(tmp_path / "up/x.tsv"), rf"no such file\. There is no folder {re.escape(str(tmp_path / 'up'))} either\.$")
    fails(
        "imdb",
        r'^data\.train is "imdb"; no such file\. .* of the hub is written "owner/name" or "owner/name:config"\.$',
    )


def test_missing_file_below_a_folder_is_no_hub_id(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    fails("data/train", "no such file")
    fails("elsewhere/train.csv", "no such file. There is no folder elsewhere either")


def test_field_is_named(tmp_path):
    fails(str(tmp_path / "zzz.csv"), r'^Completions\.train is ".*zzz\.csv"; no such file', field="Completions.train")


def test_unknown_extension(write):
    message = r'train\.xlsx"; a file must end in \.csv, .*, \.txt; text .* with \.gz, .* behind, not "\.xlsx"\.$'
    fails(write("train.xlsx", "a"), message)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "x.csv",
            'a,b\n1,2\n"3\n3",4,5\n',
            r"line 3 cannot be read: 3 fields where there are 2 columns\. data\.on_error: s",
        ),
        ("x.tsv", "a\tb\n1\t2\n3\t4\t5\n", "line 3 cannot be read: 3 fields where there are 2 columns"),
        ("x.json", '[{"a": 1},\n {"a": ', r"line 2 cannot be read: Expecting value: line 2 column 8 \(char 18\)\.$"),
        ("x.jsonl", '{"a": 1}\n{"a": 2\n{"a": 3}\n', r"line 2 cannot be read: Expecting ',' delimiter"),
        (
            "x.jsonl",
            '{"a": 1}\n\n[2]\n',
            r"line 3 cannot be read: a list, not an object of columns\. data\.on_error: skip",
        ),
        ("x.parquet", "this is not parquet", "it cannot be read: .*Parquet magic bytes not found"),
    ],
)
def test_corrupt_file(write, name, content, reason):
    fails(write(name, content), rf"{name}\"; {reason}")


@pytest.mark.parametrize(
    ("name", "content", "kept"),
    [
        ("x.csv", b'a,b\n1,x\n"3\n3",4,5\n2,y\n7,8,9\n\xff,z\n3,w\n', ["x", "y", "w"]),
        ("x.tsv", b"a\tb\n1\tx\n3\t4\t5\n2\ty\n", ["x", "y"]),
        ("x.jsonl", b'{"b": "x"}\n{"b": \n[1]\n\n{"b": "y"}\n{"b": "\xff"}\n{"b": "w"', ["x", "y"]),
    ],
)
def test_corrupt_lines_are_left_out_and_counted_when_asked(tmp_path, caplog, name, content, kept):
    (tmp_path / name).write_bytes(content)
    faults = Faults("skip")
    assert read_table(str(tmp_path / name), "train", faults=faults)["b"][:] == kept
    assert faults.count("train") == {"x.csv": 3, "x.tsv": 1, "x.jsonl": 4}[name]
    first = {"x.csv": 3, "x.tsv": 3, "x.jsonl": 2}[name]
    assert f"left out: {name}, line {first}: " in caplog.text
    assert f"(first: {name}, line {first})" in faults.told("train")


def test_wrong_encoding(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"caf\xe9\n")
    fails(
        str(tmp_path / "x.txt"), r"x\.txt\"; line 1 cannot be read: byte 0xe9 is no utf-8; set data\.encoding .*cp1252"
    )


def test_cause_is_kept(write):
    with pytest.raises(DataError) as error:
        read_table(write("x.parquet", "nothing"), "train")
    assert error.value.__cause__ is not None


def test_fewer_names_than_fields(write):
    source, how = write("x.tsv", "1\t2\t3\n"), Reading(columns=("a", "b"))
    fails(source, r"line 1 cannot be read: 3 fields where there are 2 columns", how=how)


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.csv", ""), ("x.csv", "a,b\n"), ("x.json", "[]"), ("x.txt", "\n"), ("x.jsonl", ""), ("x.tsv", "\n")],
)
def test_empty(write, name, content):
    fails(write(name, content), rf"{name}\"; it holds no examples\.$")


def test_unknown_split_and_config(folder):
    message = (
        r"it cannot be read: Unknown split \"train_x\".*\['train', 'test'\]\. Another split .* \"\.\.\.::test\"\.$"
    )
    fails(f"{folder}::train_x", message)
    fails(f"{folder}:cola", r"it cannot be read: BuilderConfig 'cola' not found\. Available: \['default'\]$")


def test_hub_out_of_reach():
    message = (
        r'^data\.train is "owner/name"; the hub cannot be reached and no copy is cached \(Couldn.t reach .*\)\.'
        r" A local file or folder needs no network\.$"
    )
    fails("owner/name", message)


def test_required_columns(write):
    source = write("train.tsv", "source\tlabel\tsentence\n1\t2\t3\n")
    table = read_table(source, "train")
    require_columns(table, source, {"LabelledText.text": "sentence"})
    message = (
        r'^LabelledText\.text is "sentnce"; train\.tsv has the columns source, label, sentence\.'
        r' Did you mean "sentence"\?$'
    )
    with pytest.raises(DataError, match=message):
        require_columns(table, source, {"LabelledText.label": "label", "LabelledText.text": "sentnce"})
    with pytest.raises(DataError, match=r"sentence\. A file without a header line needs .* in data\.columns\.$"):
        require_columns(table, source, {"LabelledText.text": "zzzzzz"})
    with pytest.raises(DataError, match=r"owner/name has|name has the columns source, label, sentence\.$"):
        require_columns(table, "owner/name", {"LabelledText.text": "zzzzzz"})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("text;label", r'looks as if ";" separated the columns: set data\.separator to ";"\.$'),
        ("text\tlabel", r'looks as if "\\t" separated the columns: set data\.separator to "\\t"\.$'),
        ("text|label", r'set data\.separator to "\|"\.$'),
    ],
)
def test_another_separator_is_seen_in_the_header(write, header, message):
    source = write("x.csv", f"{header}\na{header[4]}b\n")
    with pytest.raises(DataError, match=message):
        require_columns(read_table(source, "train"), source, {"X.text": "text"})
    assert rows_of(source, how=Reading(separator=header[4])) == {"text": ["a"], "label": ["b"]}


def test_cells_are_what_stands_in_the_file_streamed_or_not(write):
    cells = ["02134", "1.50", "1e5", "TRUE", "0", "", "123456789012345678901234567890", "+3", "0x10", "1_000", " x "]
    source = write("x.csv", "a,b\n" + "".join(f"{cell},{cell}\n" for cell in cells))
    assert rows_of(source) == {"a": cells, "b": cells}
    assert [row["b"] for row in read_stream(source, "train")] == cells


def test_a_type_that_changes_behind_row_ten_thousand(write):
    source = write("x.csv", "a,b\n" + "t,0\n" * 12_000 + "last,x\n")
    assert read_table(source, "train")["b"][-1] == "x"
    lines = '{"a": 1}\n' * 12_000 + '{"a": "x", "c": [1]}\n'
    table = rows_of(write("x.jsonl", lines))
    assert table["a"][-2:] == ["1", "x"]
    assert table["c"][-2:] == [None, [1]]


def test_paths_with_brackets_and_stars(tmp_path):
    for name in ("a[1].csv", "b*.csv", "c?.jsonl", "d{1}.parquet", "e[0-9].parquet"):
        file = tmp_path / name
        if name.endswith("parquet"):
            datasets.Dataset.from_dict({"x": ["1"]}).to_parquet(str(file))
        else:
            file.write_text("x\n1\n" if name.endswith("csv") else '{"x": "1"}\n')
        assert rows_of(str(file)) == {"x": ["1"]}
    (tmp_path / "f[1]").mkdir()
    (tmp_path / "f[1]/train.csv").write_text("x\n1\n")
    fails(str(tmp_path / "f[1]"), r"its path must hold none of \* \? \[\. Name its files")
