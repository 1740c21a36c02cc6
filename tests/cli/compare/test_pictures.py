from __future__ import annotations

import re

import comparisons
import pytest
from PIL import Image

from lora_lightning.cli.compare import pictures
from lora_lightning.cli.compare.outcomes import outcomes


@pytest.fixture
def shown(finished):
    return finished[1:]


@pytest.mark.parametrize("name", pictures.PANELS)
def test_every_panel_is_drawn_in_the_colour_of_the_page(shown, name):
    image = pictures.svg(name, *shown)
    assert image.startswith("<svg")
    assert "currentColor" in image
    assert pictures.INK not in image
    named = [one.name for one in shown[1] if name != "differences" or one.difference is not None]
    assert all(arm in image for arm in named)


def test_nothing_is_drawn_of_nothing(tmp_path):
    plan = comparisons.plan()
    plan.write(tmp_path)
    found = outcomes(tmp_path, plan)
    assert [pictures.svg(name, plan, found) for name in pictures.PANELS] == [""] * len(pictures.PANELS)
    pictures.draw(tmp_path / "report.png", plan, found)


def test_one_picture_of_all(shown, tmp_path):
    pictures.draw(tmp_path / "report.png", *shown)
    with Image.open(tmp_path / "report.png") as image:
        assert image.size[0] > 1500


def test_arms_are_told_apart_without_colour(shown):
    styles = pictures.styles(shown[1])
    assert len({(style["marker"], style["linestyle"]) for style in styles.values()}) == len(styles)


def test_the_front_holds_what_none_is_cheaper_and_better_than():
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (4.0, 0.8), (1.0, 0.3)]
    assert pictures.pareto(points, True) == [(1.0, 0.5), (3.0, 0.9)]
    assert pictures.pareto(points, False) == [(1.0, 0.3)]


def test_no_date_stands_in_a_picture(shown):
    assert not re.search(r"<dc:date>", pictures.svg("values", *shown))
