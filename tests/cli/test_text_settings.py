"""Texts for settings that are text, by flag and in YAML: they stay as they are, or one error says to quote them."""

from __future__ import annotations

import pytest
import yaml
from jsonargparse import get_loader

from lora_lightning.cli import former_names
from lora_lightning.cli.lightning import build
from lora_lightning.cli.text_settings import is_text, texts_in
from lora_lightning.data import Chat, Completions
from lora_lightning.training.module import AdapterModule

PLACES = {"model": AdapterModule, "data": Completions}
TEXTS = """{question}|{a: 1}|[/INST] {q}|[INST]|[|{|yes|no|On|1e5|1|1.0|0x10|1_000|true|None|a: b|You are: {q}|x: y: z
- x|# a|x # y|'q'|"q"|@x|`x`|%x|!x|&x|*x|> x|?|{}|[]|2001-01-01|.inf|=|: x|x:""".replace("\n", "|").split("|")
TEXTS += ["{question}\n", "|"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("joined", [True, False])
def test_a_flag_keeps_the_text_that_it_has(text, joined):
    """What the parser loads is the text, or nothing that it would prefer to the text."""
    flag = "--data.prompt_template"
    words = ["--data", "Completions", *([f"{flag}={text}"] if joined else [flag, text])]
    assert (text in texts_in(words, PLACES)) == (not isinstance(loaded(text, get_loader("yaml")), str))
    with former_names.understood(words):
        assert isinstance(loaded(text, former_names.load), str)


def loaded(text, load):
    try:
        return load(text)
    except yaml.YAMLError:
        return text  # which the parser then takes
    except TypeError:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("text", ["{question}\n", "[/INST]", "1e5", "a: b", "# a", "?", "'q'"])
@pytest.mark.parametrize("setting", ["data.prompt_template", "data.tokenizer", "model.pretrained"])
def test_it_arrives(text, setting):
    words = {"--data": "Completions", "--model.method": "LoRA", "--model.pretrained": "x", f"--{setting}": text}
    module, data = build([word for pair in words.items() for word in pair])
    assert getattr({"data": data, "model": module}[setting.partition(".")[0]], setting.partition(".")[2]) == text


@pytest.mark.parametrize("null", ["null", "~"])
def test_null_is_null_where_it_may_be(null):
    _, data = build(
        ["--data", "Completions", "--data.format", null, "--model.pretrained", "x", "--model.method", "LoRA"]
    )
    assert data.format is None


def test_settings_of_other_types_are_read_as_yaml():
    words = [
        "--model.targets",
        "[q_proj]",
        "--data.batch_size=3",
        "--model.pretrained",
        "[q]",
        "--data.prompt",
        "[q_proj]",
    ]
    assert texts_in(words, PLACES) == {"[q]"}  # the other is a list to one of the two
    assert is_text("model.targets", PLACES) is None
    assert is_text("data.prompt", PLACES) is False
    assert is_text("data.prompt_template", PLACES) is True
    assert is_text("data.encoding", {"data": Chat}) is not None
    assert is_text("trainer.x", PLACES) is None


@pytest.mark.parametrize(
    ("text", "read"),
    [("{question}", "a mapping"), ("[/INST]", "a list"), ("yes", "true"), ("no", "False"), ("1e5", "a number")],
)
def test_in_yaml_an_unquoted_text_is_one_error_that_says_to_quote_it(tmp_path, capsys, text, read):
    (tmp_path / "c.yaml").write_text(f"data:\n  class_path: Completions\n  init_args:\n    prompt_template: {text}\n")
    with pytest.raises(SystemExit):
        build(["--config", str(tmp_path / "c.yaml"), "--model.pretrained", "x", "--model.method", "LoRA"])
    error = capsys.readouterr().err
    assert error.startswith("error: data.prompt_template is ")
    assert "it must be text or null. YAML reads it as " in error
    assert read in error
    assert "put the text in quotes" in error


@pytest.mark.parametrize("text", ["You are: helpful", "@x", "%x", "- x", "*x", "'a", "{a", "[a", "`x`"])
def test_what_is_no_yaml_names_the_file_the_line_and_the_way_out(tmp_path, capsys, text):
    file = tmp_path / "c.yaml"
    file.write_text(f"data:\n  class_path: Completions\n  init_args:\n    prompt_template: {text}\n")
    with pytest.raises(SystemExit):
        build(["--config", str(file), "--model.pretrained", "x", "--model.method", "LoRA"])
    error = capsys.readouterr().err
    assert f"in {file}, line 4" in error
    assert "needs quotes" in error
    assert error.count("\n") == 1


def test_a_key_without_a_name():
    with pytest.raises(yaml.YAMLError, match="a key in line 1 has no name"):
        former_names.load("? \n: 1")
