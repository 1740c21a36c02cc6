from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from lora_lightning.cli.answers.prompts import Prompter, Row, batches, read_rows
from lora_lightning.cli.answers.run_data import run_data
from lora_lightning.cli.answers.voices import Voice
from lora_lightning.errors import DataError


def voice(base: Path, data: dict[str, Any] | None = None, folder: Path | None = None) -> Voice:
    adapter: Any = None
    if data is not None and folder is not None:
        (folder / "adapter").mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))
        adapter = SimpleNamespace(folder=folder / "adapter")
    found = {} if adapter is None else {"data": run_data(adapter.folder)}
    return Voice("toy", AutoTokenizer.from_pretrained(base), (), adapter, **found)


def text(prompter: Prompter, row: dict[str, Any], room: int | None = None) -> str:
    return str(prompter.voice.tokenizer.decode(prompter.prompt(row, "row 0", room).ids))


TURNS = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}, {"role": "user", "content": "w7"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "w5"}, "w1 w5 [EOS] w2"),
        ({"id": 3, "text": "w5"}, "w1 w5 [EOS] w2"),
        ({"messages": TURNS}, "w1 w5 [EOS] w2 w6 [EOS] w1 w7 [EOS] w2"),
        ({"messages": [*TURNS, {"role": "assistant", "content": "w9"}]}, "w1 w5 [EOS] w2 w6 [EOS] w1 w7 [EOS] w2"),
        ({"conversations": '[{"from": "human", "value": "w5"}]'}, "w1 w5 [EOS] w2"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "w5"}, " w6"]}]}, "w1 w5 w6 [EOS] w2"),
    ],
)
def test_rows_as_people_have_them(base: Path, row: dict[str, Any], expected: str) -> None:
    assert text(Prompter(voice(base), None, ""), row) == expected


def test_texts_without_a_template_are_gone_on_with_and_cut_on_the_left(base: Path, plain_base: Path) -> None:
    bare = Prompter(voice(plain_base), None, "")
    assert text(bare, {"prompt": "w5 w6"}) == "w5 w6"
    assert text(bare, {"prompt": "w5 w6 w7"}, room=2) == "w6 w7"
    assert text(Prompter(voice(base), None, "", as_plain=True), {"prompt": "w5"}) == "w5"
    with pytest.raises(DataError, match="row 0 holds turns; toy has no chat template that would write them"):
        bare.prompt({"messages": TURNS}, "row 0", None)
    with pytest.raises(DataError, match="row 0 is empty, so there is nothing to go on from"):
        bare.prompt({"prompt": " "}, "row 0", None)


def test_prompts_are_made_as_the_run_made_them(base: Path, tmp_path: Path) -> None:
    data = {"class_path": "lora_lightning.data.Completions", "init_args": {"prompt_template": "w3 {q} w4"}}
    own = voice(base, data, tmp_path)
    assert text(Prompter(own, None, ""), {"q": "w5"}) == "w3 w5 w4"
    assert text(Prompter(own, None, ""), {"prompt": "w5"}) == "w3 w5 w4"
    assert text(Prompter(own, "b", ""), {"q": "w5", "b": "w6"}) == "w3 w6 w4"
    assert text(Prompter(own, None, "", as_plain=True), {"q": "w5"}) == "w5"
    assert text(Prompter(own, None, ""), {"messages": TURNS[:1]}) == "w1 w5 [EOS] w2"


def test_a_text_where_prompts_are_built_from_several_columns(base: Path, tmp_path: Path) -> None:
    data = {"class_path": "Completions", "init_args": {"prompt_template": "{q} w4 {r}"}}
    own = Prompter(voice(base, data, tmp_path), None, "")
    assert text(own, {"q": "w5", "r": "w6"}) == "w5 w4 w6"
    with pytest.raises(
        DataError, match="row 0 is a text, and the prompts of this run are built from q and r; give rows"
    ):
        own.prompt({"prompt": "w5"}, "row 0", None)


def test_content_that_is_no_text(base: Path) -> None:
    with pytest.raises(DataError, match=r"row 0, turn 0: its content is an object \(a\); give text"):
        Prompter(voice(base), None, "").prompt({"messages": [{"role": "user", "content": {"a": 1}}]}, "row 0", None)


def test_which_column_holds_the_prompts(base: Path) -> None:
    assert text(Prompter(voice(base), "b", ""), {"prompt": "w5", "b": "w6"}) == "w1 w6 [EOS] w2"
    with pytest.raises(DataError, match=r'--column is "promt". Did you mean "prompt"\? Columns: prompt, b'):
        Prompter(voice(base), "promt", "").prompt({"prompt": "w5", "b": "w6"}, "row 0", None)
    with pytest.raises(DataError, match="--column is not given, and the rows have a, b; name the one of the prompts"):
        Prompter(voice(base), None, "").prompt({"a": "w5", "b": "w6"}, "row 0", None)


def test_what_the_template_refuses_and_what_is_too_long(base: Path) -> None:
    with pytest.raises(DataError, match="no system here"):
        Prompter(voice(base), None, "w3").prompt({"prompt": "w5"}, "row 0", None)
    with pytest.raises(DataError, match="row 0 has 4 tokens; the model has room for 3 beside the answer"):
        Prompter(voice(base), None, "").prompt({"prompt": "w5"}, "row 0", 3)


@pytest.mark.parametrize(
    ("row", "held"),
    [
        ({"prompt": "w5", "image": "a.png"}, 'a value in the column "image"'),
        ({"messages": TURNS[:1], "audios": ["a.wav"]}, 'a value in the column "audios"'),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]}, "a part of type image"),
        ({"messages": '[{"role": "user", "content": [{"type": "audio_url", "url": "a"}]}]'}, "a part of type audio"),
    ],
)
def test_images_and_sounds_are_no_prompt(base: Path, row: dict[str, Any], held: str) -> None:
    with pytest.raises(DataError, match=f"row 0.* has {held}, and toy reads texts alone: it has no processor"):
        Prompter(voice(base), None, "").prompt(row, "row 0", None)
    without = {"image": None, "prompt": "w5"}
    assert text(Prompter(voice(base), None, ""), without) == "w1 w5 [EOS] w2"


OPTIONED = "{% if loud %}w9 {% endif %}{% for m in messages %}{{ m.content }} {% endfor %}{{ tools[0].w if tools }}"


def test_variables_of_the_template_and_tools_are_those_of_the_run_and_of_the_row(base: Path, tmp_path: Path) -> None:
    settings = {"chat_template_kwargs": {"loud": True}, "tools": "kit"}
    own = voice(base, {"class_path": "Chat", "init_args": settings}, tmp_path)
    own.tokenizer.chat_template = OPTIONED
    assert text(Prompter(own, None, ""), {"prompt": "w5"}) == "w9 w5"
    assert text(Prompter(own, None, ""), {"prompt": "w5", "chat_template_kwargs": {"loud": False}}) == "w5"
    assert text(Prompter(own, None, ""), {"prompt": "w5", "kit": [{"w": "w7"}]}) == "w9 w5 w7"
    assert own.renderer.prompt([{"role": "user", "content": "w5"}], None, "") == own.tokenizer("w9 w5 ")["input_ids"]
    with pytest.raises(DataError, match=r"row 0: chat_template_kwargs.*the chat template does not read it"):
        Prompter(own, None, "").prompt({"prompt": "w5", "chat_template_kwargs": {"lous": 1}}, "row 0", None)


def test_files_are_read_as_data_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.csv").write_bytes("prompt,n\nété,02\n".encode("utf-8-sig"))
    assert [list(row.values.values()) for row in read_rows(str(tmp_path / "a.txt"))] == [["one"], ["two"]]
    assert read_rows(str(tmp_path / "b.csv")) == [Row({"prompt": "été", "n": "02"}, tmp_path)]
    with pytest.raises(DataError, match=r'--input is ".*c.csv"; no such file'):
        read_rows(str(tmp_path / "c.csv"))


def test_batches_hold_prompts_of_similar_length() -> None:
    assert batches([3, 9, 4, 8, 1], 2) == [[1, 3], [2, 0], [4]]
