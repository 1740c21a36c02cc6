from __future__ import annotations

import pytest

from lora_lightning.cli.preflight import machine


@pytest.mark.parametrize(
    ("installed", "extra", "problem"),
    [
        ("2.5", "", None),
        ("3.0rc1", "", "pack is 3.0rc1; needed: <3,>=2."),
        (None, "", "pack is not installed; needed: <3,>=2."),
        (None, "quant", None),
        ("1.0", "quant", "pack is 1.0; needed: <3,>=2."),
    ],
)
def test_versions_are_judged(installed, extra, problem):
    assert machine.Version("pack", installed, "<3,>=2", extra).problem == problem


def test_the_required_packages_are_those_of_the_distribution():
    found = {version.name: version for version in machine.versions()}
    assert found["torch"].extra == ""
    assert found["torchao"].extra == "quant"
    assert "pytest" not in found
    assert found["lightning"].tested == "2.6.6"
