import dataclasses
import sys
from dataclasses import dataclass, field

import pytest

from lora_lightning import plugins
from lora_lightning.cli.cards import FieldCard, attribute_docstrings, fields_of, readme_of


@dataclass(frozen=True, kw_only=True)
class Base:
    """Not this one."""

    rank: int = 8
    """Inner width,
    on two lines."""
    silent: bool = False
    share: float = 0.5
    """What the base says."""


@dataclass(frozen=True, kw_only=True)
class Child(Base):
    share: float = 0.25
    """What the child says."""
    inner: Base
    """Has no default."""
    names: list[str] = field(default_factory=list)
    """A list."""


def test_fields_of_a_class_and_its_bases():
    assert fields_of(Child) == [
        FieldCard("rank", "int", "8", "Inner width, on two lines."),
        FieldCard("silent", "bool", "False", ""),
        FieldCard("share", "float", "0.25", "What the child says."),
        FieldCard("inner", "Base", "required", "Has no default."),
        FieldCard("names", "list[str]", "[]", "A list."),
    ]


def test_types_are_written_as_in_the_source():
    cards = {card.name: card for card in fields_of(plugins.method("RoseLoRA"))}
    assert cards["clamp"].type == "float | None"
    assert cards["clamp"].default == "None"
    assert cards["keep_rule"].default == "'floor'"


@pytest.mark.parametrize("name", sorted(plugins.load().methods))
def test_every_setting_of_every_method_is_documented(name):
    assert not [card.name for card in fields_of(plugins.method(name)) if not card.text]


def test_without_source_there_is_no_text():
    made = dataclasses.make_dataclass("made", [("rank", int, 3)])
    assert attribute_docstrings(made) == {}
    assert fields_of(made) == [FieldCard("rank", "int", "3", "")]


def test_what_is_no_dataclass_has_no_fields():
    with pytest.raises(TypeError):
        fields_of(int)


def test_the_readme_of_the_nearest_package(tmp_path, monkeypatch):
    for folder in ("around_all", "around_all/own", "around_all/bare"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
        (tmp_path / folder / "settings.py").write_text("class Thing: pass\n")
    (tmp_path / "around_all" / "README.md").write_text("# outer\n")
    (tmp_path / "around_all" / "own" / "README.md").write_text("# inner\n")
    monkeypatch.syspath_prepend(tmp_path)
    from around_all.bare.settings import Thing as Bare
    from around_all.own.settings import Thing as Own

    assert readme_of(Own) == "# inner\n"
    assert readme_of(Bare) == "# outer\n"
    (tmp_path / "around_all" / "README.md").unlink()
    assert readme_of(Bare) == ""
    for name in [name for name in sys.modules if name.startswith("around_all")]:
        del sys.modules[name]
