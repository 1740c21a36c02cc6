from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_lightning.cli.answers.run_data import RunData, run_data
from lora_lightning.data.prompt_formats import FORMATS
from lora_lightning.errors import DataError


@pytest.mark.parametrize(
    ("data", "in_turns", "asked"),
    [
        ({"class_path": "lora_lightning.data.Chat"}, True, "why"),
        ({"class_path": "MediaChat", "init_args": {"messages": None}}, True, "why"),
        ({"class_path": "PlainText"}, False, "why"),
        ({"class_path": "TextToText", "init_args": {"prefix": "ask: "}}, False, "ask: why"),
        (
            {"class_path": "Completions", "init_args": {"format": "alpaca"}},
            False,
            FORMATS["alpaca"].bare.format(instruction="why"),
        ),
        ({"class_path": "Completions", "init_args": {"prompt_template": "{a}? {a}!"}}, False, "why? why!"),
        ({"class_path": "Completions"}, False, "why"),
    ],
)
def test_how_a_run_was_asked(data: dict[str, Any], in_turns: bool, asked: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    found = run_data(tmp_path / "adapter")
    assert found.in_turns == in_turns
    assert found.asked("why", "the line") == asked


@pytest.mark.parametrize("text", ["", "data: [", "data: null", "[]", "data: {init_args: {}}"])
def test_a_folder_that_says_nothing_of_a_run(text: str, tmp_path: Path) -> None:
    assert run_data(tmp_path / "adapter") == RunData()
    (tmp_path / "config.yaml").write_text(text)
    assert run_data(tmp_path / "adapter") == RunData()
    assert RunData().in_turns


def test_a_text_for_several_columns() -> None:
    with pytest.raises(DataError, match="the line is a text, and the prompts of this run are built from a and b"):
        RunData("Completions", {"prompt_template": "{a} {b}"}).asked("why", "the line")
