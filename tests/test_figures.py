"""The figures of this tree, as far as they hold, and what counts them."""

from __future__ import annotations

import shutil
from statistics import median

import figures
import pytest


def test_files_are_short():
    lengths = [figures.length(path) for path in figures.modules()]
    assert len(lengths) > 100
    assert median(lengths) <= figures.MEDIAN
    assert figures.ninth_decile(lengths) <= figures.TENTH


@pytest.mark.skipif(shutil.which("ruff") is None, reason="ruff counts the complexity, and is in the extra `dev`")
def test_no_function_is_complex():
    assert figures.complex_functions() == []


@pytest.mark.slow
def test_no_modules_import_one_another():
    assert figures.circles() == []


def test_every_room_has_a_level():
    level = figures.levels()
    rooms = {path.relative_to(figures.CORE).parts[0].removesuffix(".py") for path in figures.modules()}
    assert rooms <= level.keys()
    assert level["errors"] < level["adapters"] < level["injection"] < level["cli"]


def test_plugins_do_not_repeat_one_another():
    found = figures.repeated()
    assert len(found) >= 8
    assert {name: fraction for name, fraction in found.items() if fraction > figures.REPEATED} == {}


# -- what counts -------------------------------------------------------------------------------------------------------

SOURCE = '''"""A docstring
of two lines."""

import x  # a comment behind code

# a comment alone


class A:
    """Text."""

    field: int = 1
    """What the field is."""
    text = """a string
that is a value"""

    def f(
        self,
    ):
        return [
            self.field,  # why

        ]
'''
CODE = [
    "import x  # a comment behind code",
    "class A:",
    "field: int = 1",
    'text = """a string',
    'that is a value"""',
    "def f(",
    "self,",
    "):",
    "return [",
    "self.field,  # why",
    "]",
]


def test_code_lines_are_those_that_run():
    assert figures.code_lines(SOURCE) == CODE


@pytest.mark.parametrize(
    ("numbers", "expected"), [([5], 5), (list(range(1, 11)), 9), (list(range(20, 0, -1)), 18), ([1, 1, 9], 9)]
)
def test_ninth_decile(numbers, expected):
    assert figures.ninth_decile(numbers) == expected
    assert sum(number <= expected for number in numbers) >= 0.9 * len(numbers)


def test_a_line_is_repeated_where_it_stands_in_three_other_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "PLUGINS", tmp_path)
    for index in range(4):
        folder = tmp_path / f"ll_{index}"
        folder.mkdir()
        in_three = "rank = check(rank)\n" if index != 3 else ""
        (folder / "__init__.py").write_text(f"import torch\nscale = total()\n{in_three}own = {index}\n")
    assert figures.repeated() == pytest.approx({"ll_0": 1 / 3, "ll_1": 1 / 3, "ll_2": 1 / 3, "ll_3": 1 / 2})


def test_imports_are_seen_inside_functions_and_not_for_type_checkers(tmp_path, monkeypatch):
    package = tmp_path / "lora_lightning"
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "CORE", package)
    rooms = {
        "low": "from lora_lightning.high import b\n",
        "high": "def f():\n    from lora_lightning import low\n",
        "free": "if TYPE_CHECKING:\n    from lora_lightning import high\n",
    }
    for name, text in rooms.items():
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").write_text(text)
    (package / "high" / "b.py").write_text("")
    (tmp_path / "tests" / "high").mkdir(parents=True)
    (tmp_path / "tests" / "test_boundaries.py").write_text('ROOMS = (("free",), ("low",), ("high",))\n')
    assert figures.climbing() == [
        "lora_lightning.low imports lora_lightning.high",
        "lora_lightning.low imports lora_lightning.high.b",
    ]
    assert figures.circles() == ["lora_lightning.high", "lora_lightning.low"]
    assert figures.without_tests() == ["lora_lightning/high/b.py"]
    (tmp_path / "tests" / "high" / "test_b.py").write_text("")
    assert figures.without_tests() == []
