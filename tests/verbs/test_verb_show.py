import inspect

import pytest

from lora_lightning import plugins
from lora_lightning.__main__ import main
from lora_lightning.cards import fields_of


@pytest.mark.parametrize("name", sorted(plugins.load().methods))
def test_a_card_has_everything(name, capsys):
    method = plugins.method(name)
    assert main(["show", name]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{name}: {inspect.getdoc(method)}")
    assert f"https://arxiv.org/abs/{method.paper}\n" in out
    assert f"plugin     {plugins.registry().providers[name].plugin}, from " in out
    assert f"export     {method.export}\n" in out
    rows = [" ".join(line.split()) for line in out.splitlines()]
    for card in fields_of(method):
        start = f"{card.name} {card.type} {card.default} {card.text.split()[0]} "
        assert any(row.startswith(start) for row in rows), start


def test_the_readme_is_rendered(capsys, monkeypatch):
    monkeypatch.setattr("lora_lightning.verbs.show.readme_of", lambda method: "# Heading\n\nSome *words* here.\n")
    assert main(["show", "LoRA"]) == 0
    out = capsys.readouterr().out
    assert "Heading" in out
    assert "# Heading" not in out
    assert "Some words here." in out


def test_an_unknown_method(capsys):
    assert main(["show", "RosaLoRA"]) == 2
    assert capsys.readouterr().err.startswith('error: show: no method "RosaLoRA". Did you mean "RoseLoRA"? Installed: ')
