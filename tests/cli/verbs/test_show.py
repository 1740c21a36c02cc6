import dataclasses
import importlib
import inspect
import subprocess
import sys

import pytest

from lora_lightning import plugins
from lora_lightning.cli.cards import arguments_of, fields_of, page_of
from lora_lightning.cli.main import main
from lora_lightning.registry import KNOWN


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
    monkeypatch.setattr("lora_lightning.cli.verbs.show.readme_of", lambda method: "# Heading\n\nSome *words* here.\n")
    assert main(["show", "LoRA"]) == 0
    out = capsys.readouterr().out
    assert "Heading" in out
    assert "# Heading" not in out
    assert "Some words here." in out


def test_a_page_of_a_card():
    card = (
        "# Name\n\nIdea.\n\n**When to use it.** Now.\n\n**Settings.** Many.\n\n    a: {b: 1}\n\n"
        "```\n**no section**\n```\n\n## Measured\n\n| a |\n\n**Cost.** Little.\n\n**Export.** None.\n"
    )
    page, left = page_of(card)
    assert page == "# Name\n\nIdea.\n\n**When to use it.** Now.\n\n**Cost.** Little.\n\n**Export.** None.\n"
    assert left == ["Settings", "Measured"]
    assert page_of("Only text.\n") == ("Only text.\n", [])


@pytest.mark.parametrize("name", sorted(plugins.load().methods))
def test_a_card_is_a_page_in_a_terminal(name, capsys, monkeypatch):
    monkeypatch.setattr("lora_lightning.cli.console.PIPED_WIDTH", 120)
    assert main(["show", name]) == 0
    page = capsys.readouterr().out.splitlines()
    settings = len(dataclasses.fields(plugins.registry().methods[name]))
    assert len(page) <= 66 + 3 * max(0, settings - 10)  # lines of a printed page, and some for many settings
    assert page[-1].startswith(f"show {name} --card adds: ")
    assert "Measured" in page[-1]
    assert main(["show", name, "--card"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > len(page)


def test_an_unknown_method(capsys):
    assert main(["show", "RosaLoRA"]) == 2
    assert capsys.readouterr().err.startswith('error: show: no method "RosaLoRA". Did you mean "RoseLoRA"? Installed: ')


CARDS = {
    "RiemannianAdamW": ("optimizer, named in model.optimizer", "ll_optimizers, from lora-lightning ", "lr float"),
    "AdamW": ("optimizer, named in model.optimizer", "torch ", "lr "),
    "SparsitySchedule": ("callback, named in trainer.callbacks", "lora-lightning ", "sparsity float 0.8 "),
    "WeightDecomposition": (
        "callback, named in trainer.callbacks",
        "ll_weight_change, from lora-lightning ",
        "at Sequence[float] ",
    ),
    "LabelledText": ("data module, named in data", "lora-lightning ", "batch_size int 16 Examples of a batch"),
    "FSDP2": ("strategy, named in trainer.strategy", "lora-lightning ", "reshard_after_forward bool True give "),
}


@pytest.mark.parametrize("name", CARDS)
def test_other_components_have_cards(name, capsys):
    kind, package, setting = CARDS[name]
    assert main(["show", name]) == 0
    out = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert rows[0].startswith(f"{name}: ")
    assert len(rows[0]) > len(name) + 10
    assert f"kind {kind}" in rows
    assert any(row.startswith(f"package {package}") for row in rows)
    assert any(row.startswith(setting) for row in rows), out
    assert "Args:" not in out


def test_every_setting_of_our_components_has_a_meaning():
    ours = [component for component in KNOWN.values() if component.path.startswith("lora_lightning.")]
    bare = [
        f"{component.name}.{card.name}"
        for component in (*ours, *plugins.registry().components.values())
        for card in arguments_of(component.load())
        if not card.text
    ]
    assert bare == []


def test_a_misspelt_name_imports_nothing():
    script = (
        "import sys; from lora_lightning.cli.main import main; assert main(['show', 'AdamWW']) == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr.endswith('"AdamWW". Did you mean "AdamW"?\n')


def test_a_component_of_a_blocked_plugin_has_no_card(capsys):
    assert main(["show", "WeightDecomposition", "-p", "no:ll_weight_change"]) == 2
    assert capsys.readouterr().err.startswith("error: show: no ")
    plugins.load()


def test_the_nearest_of_all_components_is_named(capsys):
    assert main(["show", "SparsitySchedul"]) == 2
    err = capsys.readouterr().err
    assert err.endswith('"SparsitySchedul". Did you mean "SparsitySchedule"?\n')


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *sorted(plugins.load().methods),
        *(name for kind in ("callback", "optimizer") for name in plugins.load().component_names(kind)),
        *("TextPairs", "FSDP2"),
    ],
)
def test_the_class_path_for_a_command_line_of_somebody_elses(name, capsys):
    assert main(["show", name]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("elsewhere ")]
    path = line.split()[2].removesuffix(",")
    module, _, attribute = path.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    component = plugins.registry().component(name)
    assert found is (component.load() if component else plugins.method(name))
