"""Whose file it is."""

from __future__ import annotations

import pytest

from lora_lightning.cli.imports.files import translated
from lora_lightning.errors import SettingsError

FILES = {
    "ours": ("model: {a: 1}\ndata: {b: 2}\n", r"is a config of this library already; give it as --config"),
    "nobody's": ("learning_rate: 1\n", r"is of none of the tools that are read: LLaMA-Factory has model_name_or_path"),
    "no yaml": ("a: [1\n", r"is neither YAML nor JSON"),
    "no settings": ("- a\n", r"holds no settings"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_refused(tmp_path, case):
    text, match = FILES[case]
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(SettingsError, match=match):
        translated(tmp_path / "x.yaml")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SettingsError, match=r'cannot read ".*none.yaml": No such file'):
        translated(tmp_path / "none.yaml")
