from __future__ import annotations

from html.parser import HTMLParser

import comparisons
import pytest

from lora_lightning.cli.compare.html import page
from lora_lightning.cli.compare.outcomes import outcomes

EMPTY = {"meta", "link", "br", "img", "path", "use", "rect", "line", "circle"}


class Checked(HTMLParser):
    """Open tags, ids, and every address that a browser would ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.asked: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.asked += [values[name] for name in ("src", "href", "xlink:href") if values.get(name)]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def text(finished):
    return page(*finished)


def test_the_page_is_whole_and_asks_for_nothing(text):
    checked = Checked()
    checked.feed(text)
    assert checked.open == []
    assert len(checked.ids) == len(set(checked.ids))
    assert all(address.startswith(("#", "data:")) for address in checked.asked)
    assert "<script" not in text


def test_what_stands_on_it(text):
    for words in (
        "better against first: better by ",
        "Rates were tuned for each arm on 20% of the training rows",
        "Validation rows on which arms differ, a seed",
        "<summary>18 runs</summary>",
        "python -m lora_lightning fit --config lora --model.optimizer AdamW --model.optimizer.lr ",
        "seed_everything: ",
        "torch ",
        "prefers-color-scheme: dark",
    ):
        assert words in text


def test_names_are_no_markup(tmp_path):
    plan = comparisons.ended(tmp_path / "<b>001", tune_rate=False, seeds=1)
    assert "<b>" not in page(tmp_path / "<b>001", plan, outcomes(tmp_path / "<b>001", plan))
