"""Small files as people have them, and what each must give: values, or one line that names file, line and what helps.

Every file is bytes, because encodings, line ends and marks are what goes wrong. Rows of several columns are read by a
data module, so that its checks are part of it; `streamed` ones are read that way, too, and must give the same.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from dataclasses import dataclass, field
from typing import Any

import pyarrow
import pytest

from lora_lightning.data import Chat, Completions, LabelledText, MultiLabelText, TaggedWords, TextPairs
from lora_lightning.data.sources.stored import PLACE
from lora_lightning.errors import DataError

HEAD = b"prompt,completion\n"
HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def talk(*extra: dict[str, Any], **row: Any) -> bytes:
    return json.dumps({"messages": [*HI, *extra], **row}).encode() + b"\n"


def many(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@dataclass(frozen=True)
class Case:
    """A file, how it is read, and what it gives."""

    name: str
    content: bytes
    rows: list[list[Any]] | None = None
    """Values of the rows, column by column in the order of the file."""
    error: str = ""
    """What the error matches, where there is one."""
    kind: type = Completions
    settings: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""
    """With on_error skip: what was left out, by kind with the first line."""
    more: dict[str, bytes] = field(default_factory=dict)
    """Further sources, read behind the file."""


CASES = {
    # -- marks and encodings
    "byte order mark": Case("x.csv", b"\xef\xbb\xbf" + HEAD + b"q,a\n", [["q", "a"]]),
    "byte order mark in JSONL": Case(
        "x.jsonl", b"\xef\xbb\xbf" + many({"prompt": "q", "completion": "a"}), [["q", "a"]]
    ),
    "byte order mark in a document": Case("x.json", b'\xef\xbb\xbf[{"prompt": "q", "completion": "a"}]', [["q", "a"]]),
    "UTF-16 of Excel": Case("x.csv", "prompt,completion\r\nq,caf\u00e9\r\n".encode("utf-16"), [["q", "caf\u00e9"]]),
    "UTF-16 and tabs": Case("x.tsv", "prompt\tcompletion\nq,\ta\n".encode("utf-16"), [["q,", "a"]]),
    "UTF-16 in JSONL": Case("x.jsonl", '{"prompt": "q", "completion": "\u4e2d"}\n'.encode("utf-16"), [["q", "\u4e2d"]]),
    "UTF-16 without a mark": Case(
        "x.csv", "prompt,completion\nq,a\n".encode("utf-16-le"), error=r"data\.encoding: utf-16-le"
    ),
    "UTF-16 that is named": Case(
        "x.csv", "prompt,completion\nq,a\n".encode("utf-16-be"), [["q", "a"]], settings={"encoding": "utf-16-be"}
    ),
    "cp1252": Case("x.csv", HEAD + b"q,a\nr,caf\xe9\n", error=r'x\.csv"; line 3 cannot be read: byte 0xe9 .*cp1252'),
    "cp1252 that is named": Case(
        "x.csv", HEAD + b"q,caf\xe9 \x80\n", [["q", "caf\u00e9 \u20ac"]], settings={"encoding": "cp1252"}
    ),
    "cp1252 left out": Case(
        "x.csv", HEAD + b"q,a\nr,caf\xe9\n", [["q", "a"]], skipped="1 in another encoding (first: x.csv, line 3)"
    ),
    "the wrong encoding": Case(
        "x.csv", HEAD + b"q,\x81\n", error="byte 0x81 is no cp1252", settings={"encoding": "cp1252"}
    ),
    "no such encoding": Case("x.csv", HEAD, error=r'data\.encoding is "latin-99"', settings={"encoding": "latin-99"}),
    # -- separators, quotes, line ends
    "semicolons": Case("x.csv", b"prompt;completion\nq;a\n", error=r'set data\.separator to ";"'),
    "semicolons with commas inside": Case(
        "x.csv", b"prompt;completion\nq,r;a\n", error=r'separated by ";", set data\.separator'
    ),
    "semicolons that are named": Case(
        "x.csv", b"prompt;completion\nq,r;a\n", [["q,r", "a"]], settings={"separator": ";"}
    ),
    "tabs in a CSV": Case("x.csv", b"prompt\tcompletion\nq\ta\n", error=r'set data\.separator to "\\t"'),
    "tabs that are named": Case("x.csv", b"prompt\tcompletion\nq\ta\n", [["q", "a"]], settings={"separator": "\\t"}),
    "bars": Case("x.csv", b"prompt|completion\nq|a\n", error=r'set data\.separator to "\|"'),
    "quoted line breaks": Case("x.csv", HEAD + b'"q\nr","a\r\nb"\ns,t\n', [["q\nr", "a\r\nb"], ["s", "t"]]),
    "doubled quotes": Case("x.csv", HEAD + b'"say ""hi""","a, b"\n', [['say "hi"', "a, b"]]),
    "quotes in a TSV are letters": Case("x.tsv", b'prompt\tcompletion\n"q\ta"\n', [['"q', 'a"']]),
    "a quote that is never closed": Case(
        "x.csv", HEAD + b'q,a\nr,"b\ns,c\n', error="line 3 .*a quote that opens here is never"
    ),
    "a quote that swallows rows": Case(
        "x.csv",
        HEAD + b'q,"a\nr,b\ns,"c\nt,d\n',
        error="line 2 cannot be read: a quote that opens here is closed within",
    ),
    "quotes behind a backslash": Case(
        "x.csv",
        HEAD + b'"a \\"b\\" c",d\nq,a\n',
        [["q", "a"]],
        skipped="1 with quotes that do not fit (first: x.csv, line 2)",
    ),
    "quotes within a field": Case("x.csv", HEAD + b'a "b" c,5"\n', [['a "b" c', '5"']]),
    "Windows line ends": Case("x.csv", b"prompt,completion\r\nq,a\r\n", [["q", "a"]]),
    "line ends of old Macs": Case("x.csv", b"prompt,completion\rq,a\r", [["q", "a"]]),
    "no line end at the end": Case("x.csv", HEAD + b"q,a", [["q", "a"]]),
    "blank lines": Case("x.csv", b"\n" + HEAD + b"\nq,a\n\n\nr,b\n\n", [["q", "a"], ["r", "b"]]),
    "commas at the ends of lines": Case("x.csv", b"prompt,completion\nq,a,\nr,b,,\n", [["q", "a"], ["r", "b"]]),
    "too many fields": Case(
        "x.csv", HEAD + b"q,a\nr,b,c\n", error="line 3 cannot be read: 3 fields where there are 2 columns"
    ),
    "too few fields": Case("x.csv", HEAD + b'"q\nr",a\ns\n', error=r'^x\.csv, line 4: "completion" is missing'),
    "both left out": Case(
        "x.csv",
        HEAD + b"q,a\nr,b,c\ns\nt,d\n",
        [["q", "a"], ["t", "d"]],
        skipped='1 with more fields than columns (first: x.csv, line 3), 1 without "completion" (first: x.csv, line 4)',
    ),
    "two columns of one name": Case("x.csv", b"prompt,prompt\nq,a\n", error='two columns are called "prompt"'),
    "a column of numbers without a name": Case("x.csv", b",prompt,completion\n0,q,a\n", [["0", "q", "a"]]),
    "no header": Case("x.csv", b"q,a\nr,b\n", error=r"needs its column names in data\.columns"),
    "names for a file without a header": Case(
        "x.csv", b"q,a\nr,b\n", [["q", "a"], ["r", "b"]], settings={"columns": ["prompt", "completion"]}
    ),
    "blanks around a name": Case("x.csv", b"prompt, completion\nq,a\n", error='Did you mean " completion"'),
    "a long cell": Case("x.csv", HEAD + b"q," + b"a" * 200_000 + b"\n", [["q", "a" * 200_000]]),
    # -- values
    "cells that look like numbers": Case("x.csv", HEAD + b"02134,1.50\n10,1e5\n", [["02134", "1.50"], ["10", "1e5"]]),
    "cells that look like truth": Case("x.csv", HEAD + b"q,TRUE\nr,False\n", [["q", "TRUE"], ["r", "False"]]),
    "zero and one": Case("x.csv", HEAD + b"is 1 odd,1\nis 2 odd,0\n", [["is 1 odd", "1"], ["is 2 odd", "0"]]),
    "words for nothing": Case("x.csv", HEAD + b"NA,null\nNone,nan\n", [["NA", "null"], ["None", "nan"]]),
    "dates": Case("x.csv", HEAD + b"2024-01-02,01/02/24\n", [["2024-01-02", "01/02/24"]]),
    "long numbers": Case("x.csv", HEAD + b"q," + b"9" * 5000 + b"\n", [["q", "9" * 5000]]),
    "a type that changes late": Case(
        "x.csv", HEAD + b"t,0\n" * 10_001 + b"last,x\n", [["t", "0"]] * 10_001 + [["last", "x"]]
    ),
    "answers of several types": Case(
        "x.jsonl",
        many(*({"prompt": "q", "completion": value} for value in (0, False, 1.5, "x", {"a": 1}, [1]))),
        [["q", text] for text in ("0", "false", "1.5", "x", '{"a": 1}', "[1]")],
    ),
    "numbers as they stand in JSON": Case(
        "x.jsonl",
        b'{"prompt": 1.50, "completion": 100000000000000000000001}\n{"prompt": 1e5, "completion": 2}\n',
        [["1.50", "100000000000000000000001"], ["1e5", "2"]],
    ),
    "a zero byte in a cell": Case("x.csv", HEAD + b"q,a\0b\n", error=r"zero bytes and no text in UTF-8"),
    # -- JSON
    "a broken line": Case(
        "x.jsonl", b'{"prompt": "q", "completion": "a"}\n{"prompt":\n', error=r"line 2 cannot be read: Expecting"
    ),
    "lines that are no objects": Case(
        "x.jsonl",
        b'[1]\n{"prompt": "q", "completion": "a"}\nnull\n"x"\n',
        [["q", "a"]],
        skipped="3 no JSON object (first: x.jsonl, line 1)",
    ),
    "a key twice": Case(
        "x.jsonl", b'{"prompt": "q", "completion": "a", "completion": "b"}\n', error='the key "completion" stands'
    ),
    "half a letter": Case("x.jsonl", b'{"prompt": "q", "completion": "\\ud83d"}\n', error="half of a surrogate pair"),
    "a document on many lines": Case(
        "x.json", json.dumps([{"prompt": "q", "completion": "a"}], indent=2).encode(), [["q", "a"]]
    ),
    "a document that breaks": Case(
        "x.json", b'[{"prompt": "q", "completion": "a"},\n{"prompt"\n', error=r"line 3 cannot be read: Expec"
    ),
    "a document of columns": Case("x.json", b'{\n"prompt": ["q"],\n"completion": ["a"]\n}', [["q", "a"]]),
    "a document around the rows": Case(
        "x.json", b'{\n"data": [{"prompt": "q"}], "n": 1}', error=r"is one object \(data, n\)"
    ),
    "keys that only some rows have": Case(
        "x.jsonl",
        many({"prompt": "q", "completion": "a"}, {"prompt": "r", "completion": "b", "id": 1}),
        [["q", "a", None], ["r", "b", 1]],
    ),
    "a missing value": Case(
        "x.jsonl", many({"prompt": "q", "completion": None}), error=r'x\.jsonl, line 1: "completion" is missing'
    ),
    # -- packed and other formats
    "gzip": Case("x.csv.gz", gzip.compress(HEAD + b"q,a\n"), [["q", "a"]]),
    "bzip2": Case("x.jsonl.bz2", bz2.compress(many({"prompt": "q", "completion": "a"})), [["q", "a"]]),
    "xz": Case("x.tsv.xz", lzma.compress(b"prompt\tcompletion\nq\ta\n"), [["q", "a"]]),
    "zstd": Case("x.csv.zst", pyarrow.compress(HEAD + b"q,a\n", codec="zstd", asbytes=True), [["q", "a"]]),
    "gzip in name only": Case("x.csv.gz", HEAD + b"q,a\n", error=r"x\.csv\.gz cannot be read: Not a gzipped file"),
    "a gzip cut short": Case(
        "x.csv.gz", gzip.compress(HEAD + b"q,a\n" * 50)[:-9], error=r"x\.csv\.gz cannot be read: Compressed file"
    ),
    "zip": Case("x.csv.zip", b"PK", error=r'a file must end in .*, not "\.zip"'),
    "a spreadsheet": Case("x.xlsx", b"PK", error=r'a file must end in .*, not "\.xlsx"'),
    "nothing": Case("x.csv", b"", error="it holds no examples"),
    "a header alone": Case("x.csv", HEAD, error="it holds no examples"),
    "brackets and a star in the path": Case("a[1]*{b}?.csv", HEAD + b"q,a\n", [["q", "a"]]),
    "blanks and letters in the path": Case("m\u00fcll: \u4e2d #1.csv", HEAD + b"q,a\n", [["q", "a"]]),
    # -- several sources
    "another type in another file": Case(
        "x.jsonl",
        many({"prompt": "q", "completion": "a", "id": 1}),
        [["q", "a", "1"], ["r", "b", "x"]],
        more={"y.jsonl": many({"prompt": "r", "completion": "b", "id": "x"})},
    ),
    "another column in another file": Case(
        "x.csv",
        HEAD + b"q,a\n",
        [["q", "a", None], ["r", "b", "c"]],
        more={"y.csv": b"prompt,completion,note\nr,b,c\n"},
    ),
    "another format in another file": Case(
        "x.csv", HEAD + b"q,a\n", [["q", "a"], ["r", "7"]], more={"y.jsonl": many({"prompt": "r", "completion": 7})}
    ),
    "a fault in the second file": Case(
        "x.csv", HEAD + b"q,a\n", error=r'^y\.csv, line 3: "completion" is missing', more={"y.csv": HEAD + b"r,b\ns\n"}
    ),
    # -- labels
    "an empty label": Case(
        "x.csv", b"text,label\na,yes\nb,\n", error=r"^x\.csv, line 3: LabelledText\.label.* empty", kind=LabelledText
    ),
    "labels left out": Case(
        "x.csv",
        b"text,label\na,yes\nb,\nc,no\nd\n",
        [["a", "yes"], ["c", "no"]],
        kind=LabelledText,
        skipped="2 without a label (first: x.csv, line 3)",
    ),
    "a label that is not a number": Case(
        "x.jsonl",
        b'{"text": "a", "label": 1}\n{"text": "b", "label": NaN}\n',
        error="line 2: .*the label is missing",
        kind=LabelledText,
    ),
    "stars": Case(
        "x.csv",
        b"text,label\na,1\nb,5\n",
        [["a", "1"], ["b", "5"]],
        kind=LabelledText,
        settings={"labels": list("12345")},
    ),
    "an unknown label": Case(
        "x.csv",
        b"text,label\na,no\nb,yse\n",
        error='line 3: .*"yes"',
        kind=LabelledText,
        settings={"labels": ["no", "yes"]},
    ),
    "a scale with a blank": Case(
        "x.csv", b"text,label\na,0.0\nb,\n", error="line 3: .*empty", kind=LabelledText, settings={"regression": True}
    ),
    "labels with marks between": Case(
        "x.csv", b'text,labels\na,"x, y"\nb,\n', [["a", "x, y"], ["b", ""]], kind=MultiLabelText
    ),
    "words without as many tags": Case(
        "x.jsonl",
        many({"tokens": ["a", "b"], "tags": ["O"]}),
        error=r"line 1: .*2 words, but .*1 tags",
        kind=TaggedWords,
    ),
    "a score on another scale": Case(
        "x.csv",
        b"anchor,positive,s\na,b,0.5\na,b,4.5\n",
        error=r"line 3: .*no cosine",
        kind=TextPairs,
        settings={"score": "s"},
    ),
    # -- conversations
    "turns": Case("x.jsonl", talk(), [[HI]], kind=Chat),
    "turns as text in a CSV": Case(
        "x.csv", b'messages\n"' + json.dumps(HI).replace('"', '""').encode() + b'"\n', [[HI]], kind=Chat
    ),
    "an unknown role": Case(
        "x.jsonl", talk() + talk({"role": "bot", "content": "x"}), error='line 2: .*the role "bot"', kind=Chat
    ),
    "an image": Case(
        "x.jsonl",
        talk({"role": "user", "content": [{"type": "image_url"}]}),
        error="line 1: .*type image_url",
        kind=Chat,
    ),
    "a weight of a half": Case(
        "x.jsonl", talk({"role": "assistant", "content": "x", "weight": 0.5}), error="weight: 0.5", kind=Chat
    ),
    "a conversation in place of a prompt": Case(
        "x.jsonl", many({"prompt": HI, "completion": HI}), error="line 1: .*Chat learns"
    ),
    "a system column for prompts": Case(
        "x.csv", b"system,prompt,completion\ns,q,a\n", error='line 2: .* the column "system"'
    ),
    "a weight of nothing": Case(
        "x.csv", b"prompt,completion,weight\nq,a,1\nr,b,0\n", error='line 3: .* has 0 in the column "weight"'
    ),
    "rows that are not to be trained": Case(
        "x.csv",
        b"prompt,completion,train\nq,a,true\nr,b,false\n",
        [["q", "a", "true"]],
        skipped='1 with a value in "train" (first: x.csv, line 3)',
    ),
    "weights that are ignored": Case(
        "x.csv",
        b"text,label,weight\nq,a,1\nr,b,0\n",
        [["q", "a"], ["r", "b"]],
        kind=LabelledText,
        settings={"ignore": ["weight"]},
    ),
    "a preference as a chat": Case("x.jsonl", talk(rejected="no"), error="line 1: .*Preferences learns", kind=Chat),
    "a turn with a mask": Case(
        "x.jsonl", talk({"role": "assistant", "content": "x", "mask": True}), error="line 1: .*mask: True", kind=Chat
    ),
    "a refusal in place of content": Case(
        "x.jsonl", talk({"role": "assistant", "content": None, "refusal": "no"}), error="has refusal, which", kind=Chat
    ),
    "an answer that is only begun": Case(
        "x.jsonl", talk({"role": "assistant", "content": "so", "prefix": True}), error="has prefix, which", kind=Chat
    ),
    "conversations left out": Case(
        "x.jsonl",
        talk() + talk({"role": "bot", "content": "x"}) + b"{\n" + many({"messages": []}),
        [[HI]],
        kind=Chat,
        skipped="1 no JSON object (first: x.jsonl, line 3), 1 with an unknown role (first: x.jsonl, line 2), "
        "1 without turns (first: x.jsonl, line 4)",
    ),
}


@pytest.fixture
def read(tmp_path, letters):
    def read(case: Case, streaming: bool = False) -> Any:
        files = {case.name: case.content, **case.more}
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        sources = [str(tmp_path / name) for name in files]
        own = {"chat_template": "chatml"} if case.kind is Chat else {}
        own |= {"streaming": True} if streaming else {}
        common = {"tokenizer": letters, "validation_fraction": 0.0, "on_error": "skip" if case.skipped else "raise"}
        return case.kind(train=sources[0] if len(sources) == 1 else sources, **common, **own, **case.settings)

    return read


def values(rows: Any, kind: type) -> list[list[Any]]:
    found = [[value for name, value in row.items() if not name.startswith("__")] for row in rows]
    return [[json.loads(value) for value in row] for row in found] if kind is Chat else found


@pytest.mark.parametrize("name", CASES)
def test_files_as_people_have_them(read, name):
    case = CASES[name]
    data = read(case)
    if case.error:
        with pytest.raises(DataError, match=case.error) as error:
            data.setup("fit")
        assert "\n" not in str(error.value)
        return
    data.setup("fit")
    kept = data.examples("train")["index"][:]
    rows = [row for number, row in enumerate(data.inputs("train")) if number in kept]
    assert values(rows, case.kind) == case.rows
    assert PLACE not in data.inputs("train").column_names
    assert sorted(data.sources.faults.told("train").split("), ")) == sorted(case.skipped.split("), "))


STREAMED = [name for name, case in CASES.items() if case.kind in (Completions, Chat) and case.rows is not None]


MOST = [pytest.param(name, marks=pytest.mark.slow if number % 3 else ()) for number, name in enumerate(STREAMED)]


@pytest.mark.parametrize("name", MOST)
def test_a_stream_gives_the_same(read, name):
    """The same examples, token for token, and as many rows left out."""
    case = CASES[name]
    table, stream = read(case), read(case, streaming=True)
    table.setup("fit")
    stream.setup("fit")
    wanted = {tuple(ids) for ids in table.examples("train")["input_ids"]}
    seen: set[tuple[int, ...]] = set()
    loader = stream.train_dataloader()
    for batch in loader:
        for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
            seen.add(tuple(token for token, own in zip(ids, mask, strict=True) if own))
        if loader.counts()["examples"] >= len(table.examples("train")):
            break
    assert seen == wanted
