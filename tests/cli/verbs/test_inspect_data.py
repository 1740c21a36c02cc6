import sys
from types import SimpleNamespace

import pytest

from lora_lightning.cli.main import main


@pytest.mark.parametrize(("words", "n"), [([], 3), (["-n", "7"], 7)])
def test_data_are_prepared_and_shown(monkeypatch, capsys, words, n):
    seen = []
    data = SimpleNamespace(
        prepare_data=lambda: seen.append("prepare_data"), setup=lambda stage: seen.append(f"setup {stage}")
    )

    def show_examples(datamodule, n):
        assert datamodule is data
        assert seen == ["prepare_data", "setup fit"]
        return f"{n} examples with [[masked]] text"

    monkeypatch.setitem(sys.modules, "lora_lightning.cli.lightning", SimpleNamespace(build=lambda flags: (None, data)))
    monkeypatch.setitem(sys.modules, "lora_lightning.data.inspect", SimpleNamespace(show_examples=show_examples))
    assert main(["inspect-data", "{}", *words]) == 0
    assert capsys.readouterr().out == f"{n} examples with [[masked]] text\n"
