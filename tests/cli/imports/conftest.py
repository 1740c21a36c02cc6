"""A tiny model, and what the parser makes of a translated config."""

from __future__ import annotations

import pytest
import yaml
from toy_runs import decoder_folder

from lora_lightning import plugins


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return str(decoder_folder(tmp_path_factory.mktemp("imported") / "model"))


@pytest.fixture
def parsed(tmp_path, monkeypatch):
    """A function that writes settings as a file of another tool; gives its translation, module, data and trainer."""
    from lora_lightning.cli.command_line import read
    from lora_lightning.cli.hints import hide_hints
    from lora_lightning.cli.imports.files import translated
    from lora_lightning.cli.lightning import Description

    monkeypatch.chdir(tmp_path)
    plugins.load()
    hide_hints()

    def parse(settings, name="theirs.yaml"):
        file = tmp_path / name
        file.write_text(yaml.safe_dump(settings))
        found = translated(file)
        (tmp_path / "ours.yaml").write_text(found.text(name))
        assert yaml.safe_load((tmp_path / "ours.yaml").read_text()) == found.nested()
        more = [] if "data" in found.config else ["--data=Completions", "--data.train=rows.csv"]
        built = Description(read(["--config", str(tmp_path / "ours.yaml"), *more]))
        return found, built.model, built.datamodule, built.settings

    return parse
