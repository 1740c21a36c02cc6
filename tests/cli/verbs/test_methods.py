from dataclasses import dataclass
from typing import ClassVar

import pytest

from lora_lightning import plugins
from lora_lightning.cli.main import main
from lora_lightning.cli.verbs.methods import markdown_table
from lora_lightning.methods import Method
from lora_lightning.registry import Provider, Registry


@dataclass(frozen=True, kw_only=True)
class Routed(Method):
    """A method for tables."""

    paper: ClassVar[str] = "1234.56789"
    mergeable: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False
    export: ClassVar[str] = "not expressible"

    def build(self, base):
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Anonymous(Method):
    """A method without a paper."""

    def build(self, base):
        raise NotImplementedError


@pytest.fixture
def registry(monkeypatch):
    """Two methods of two packages; one plugin failed and one is blocked."""
    known = Registry(
        methods={"Routed": Routed, "Anonymous": Anonymous},
        providers={
            "Routed": Provider("ll_routed", "routed-package", "3.1"),
            "Anonymous": Provider("ll_anonymous", "other-package", "0.2"),
        },
        failed={"ll_broken": ImportError("no module\nat all")},
        blocked={"ll_away": "away", "ll_dark": "dark.inner"},
    )
    monkeypatch.setattr(plugins, "load", lambda blocked=(): known)
    monkeypatch.setattr(plugins, "_current", known)
    return known


def test_the_table_and_what_is_not_in_it(registry, capsys):
    assert main(["methods"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == "Method Paper Package Version Mergeable Starts at base Export"
    assert lines[2:] == [
        "Anonymous - other-package 0.2 yes yes merged only",
        "Routed arXiv:1234.56789 routed-package 3.1 no no not expressible",
        "blocked: ll_away by -p no:ll_away",
        "blocked: ll_dark by -p no:ll_dark",
        "failed: ll_broken: ImportError: no module at all",
    ]


def test_the_installed_methods_are_listed(capsys):
    plugins.load()
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    for name in plugins.registry().methods:
        assert f" {name} " in out
    assert "failed:" not in out


def test_the_table_for_a_readme(registry):
    link = "[arXiv:1234.56789](https://arxiv.org/abs/1234.56789)"
    assert markdown_table(registry) == (
        "| Method | Paper | Package | Mergeable | Starts at base | Export |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| Anonymous | - | other-package | yes | yes | merged only |\n"
        f"| Routed | {link} | routed-package | no | no | not expressible |\n"
    )
