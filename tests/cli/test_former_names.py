"""Former names of settings, of classes made for the purpose and of core's own, through the parser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback

from lora_lightning import plugins
from lora_lightning.cli import former_names
from lora_lightning.cli.parser import Parser
from lora_lightning.errors import SettingsError
from lora_lightning.methods import Method, plain_settings


@dataclass(frozen=True, kw_only=True)
class Mixing(Method):
    former_fields: ClassVar[Mapping[str, str]] = {"share": "mix"}

    mix: float = 0.5
    inner: Method | None = None

    def build(self, base):
        raise NotImplementedError


class Following(Callback):
    former_fields: ClassVar[Mapping[str, str]] = {"share": "pace", "kept": "still"}

    def __init__(self, pace: float = 1.0, kept: int = 0) -> None:
        self.pace, self.kept = pace, kept


class FollowingMore(Following):
    former_fields: ClassVar[Mapping[str, str]] = {"more": "number"}

    def __init__(self, number: int = 0, pace: float = 1.0) -> None:
        super().__init__(pace)
        self.number = number


class Rows(LightningDataModule):
    def __init__(self, size: int = 1, source: str = "") -> None:
        super().__init__()


@pytest.fixture(autouse=True)
def names(monkeypatch):
    known = plugins.load()
    monkeypatch.setitem(known.methods, "Mixing", Mixing)
    monkeypatch.setitem(former_names.FIELDS, "Rows", {"old_size": "size"})
    monkeypatch.setattr(
        type(known), "current_class_path", lambda self, path: path.replace("gone.package.", f"{__name__}.")
    )


@pytest.fixture
def parse(tmp_path):
    """Parses configs, given as YAML, and flags."""
    parser = Parser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--model.method", type=Method | None)
    parser.add_argument("--data", type=LightningDataModule | None, sub_configs=True)
    parser.add_argument("--trainer.callbacks", type=list[Callback] | None)

    def run(*texts, flags=()):
        words = []
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.yaml").write_text(text)
            words += ["--config", str(tmp_path / f"{number}.yaml")]
        return parser.parse_args([*words, *flags])

    return run


INNER = "{class_path: Mixing, init_args: {share: 2}}"
NESTED = f"model: {{method: {{class_path: Mixing, init_args: {{share: 0.1, inner: {INNER}}}}}}}"


def test_settings_of_classes_and_of_those_inside(parse):
    method = parse(NESTED).model.method
    assert method.class_path == f"{__name__}.Mixing"
    assert method.init_args.mix == 0.1
    assert method.init_args.inner.init_args.mix == 2


def test_a_class_of_a_list_is_its_own(parse):
    text = """
trainer:
  callbacks:
  - {class_path: Following, init_args: {share: 0.25}}
  - {class_path: FollowingMore, init_args: {share: 0.75, more: 3}}
"""
    one, two = parse(text).trainer.callbacks
    assert one.init_args.as_dict() == {"pace": 0.25, "kept": 0}
    assert two.init_args.as_dict() == {"pace": 0.75, "number": 3}


def test_a_name_that_the_class_still_takes_is_none_of_the_former(parse):
    text = "trainer: {callbacks: [{class_path: Following, init_args: {kept: 4}}]}"
    assert parse(text).trainer.callbacks[0].init_args.kept == 4
    assert former_names.former_fields(Following) == {"share": "pace"}
    assert former_names.former_fields(FollowingMore) == {"share": "pace", "kept": "still", "more": "number"}


@pytest.mark.parametrize("later", ["{share: 0.75}", "{init_args: {share: 0.75}}"])
def test_a_later_config_need_not_name_the_class(parse, later):
    method = parse(NESTED, f"model: {{method: {later}}}").model.method
    assert method.init_args.mix == 0.75
    assert method.init_args.inner.init_args.mix == 2


def test_flags(parse):
    flags = [
        "--model.method.share=3",
        "--model.method.inner.init_args.share",
        "4",
        "--trainer.callbacks+",
        "FollowingMore",
        "--trainer.callbacks.more=5",
        "--data",
        "Rows",
        "--data.old_size",
        "6",
    ]
    parsed = parse(NESTED, flags=flags)
    assert parsed.model.method.init_args.mix == 3
    assert parsed.model.method.init_args.inner.init_args.mix == 4
    assert parsed.trainer.callbacks[0].init_args.number == 5
    assert parsed.data.init_args.size == 6
    parsed = parse(flags=["--model.method", "{class_path: Mixing, init_args: {share: 7}}"])
    assert parsed.model.method.init_args.mix == 7


def test_classes_that_have_moved(parse):
    text = "data: {class_path: gone.package.Rows, init_args: {old_size: 3}}"
    parsed = parse(text, flags=["--data.old_size", "4"])
    assert parsed.data.class_path == f"{__name__}.Rows"
    assert parsed.data.init_args.size == 4


def test_a_config_stays_the_file_that_it_is(parse, tmp_path):
    """So a path in it is one beside it, and so are old names in the file that it names."""
    (tmp_path / "rows.yaml").write_text("{class_path: Rows, init_args: {old_size: 5}}")
    parsed = parse("data: rows.yaml")
    assert parsed.data.init_args.size == 5
    assert str(parsed.config[0]) == str(tmp_path / "0.yaml")


def test_an_error_speaks_of_the_name_of_today(parse):
    with pytest.raises(Exception, match=r'Parser key "mix"'):
        parse("model: {method: {class_path: Mixing, init_args: {share: much}}}")


def test_values_are_left_alone(parse):
    text = "data: {class_path: Rows, init_args: {source: '{share: 1}'}}"
    assert parse(text).data.init_args.source == "{share: 1}"


def test_places_that_name_no_class():
    config = yaml.safe_load(
        "fit: {model: {quantisation: int8, lr_scheduler: {decay: linear}}, else: {quantisation: 1}}"
    )
    assert former_names.current(config, former_names.PLACES) == {
        "fit": {"model": {"quantization": "int8", "lr_scheduler": {"decay": "linear"}}, "else": {"quantisation": 1}}
    }


def test_stored_settings_are_restored():
    plain = plain_settings(Mixing(mix=0.1, inner=Mixing(mix=0.2)))
    former = {"share": 0.1, "inner": {"class_path": "Mixing", "init_args": {"share": 0.2, "inner": None}}}
    for fields in (plain, former):
        assert plugins.restore_settings(Mixing, "settings", fields) == Mixing(mix=0.1, inner=Mixing(mix=0.2))
    with pytest.raises(SettingsError, match='settings: Mixing has no "shre"'):
        plugins.restore_settings(Mixing, "settings", {"shre": 0.1})
