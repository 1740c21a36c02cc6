from __future__ import annotations

import pytest

from ll_demo import dates, documented, kin, pairs, sizes, traits, weekdays, words

SOURCE = '''
import sys

if sys.platform:

    class Shelf:
        """Books in a row."""

        def put(self, book, where=None):
            """Put a book where there is room, or raise ValueError.

            The shelf grows by one. None of the others moves.

            >>> Shelf().put(1)
            """
            for place in self.places:
                if place is book:
                    raise ValueError
            return place


def silent(a):
    return a


async def wait(*, seconds):
    """Wait for
    seconds."""
    return None
'''


@pytest.fixture
def library(tmp_path):
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text(SOURCE)
    (tmp_path / "json" / "test.py").write_text("not python")
    (tmp_path / "unknown.py").write_text(SOURCE)
    return tmp_path


def test_documented_functions_and_classes(library):
    shelf, put, wait = documented.documented(library)
    assert (shelf.name, put.name, wait.name) == ("json.Shelf", "json.Shelf.put", "json.wait")
    assert shelf.paragraphs == ("Books in a row.",)
    assert put.paragraphs == (
        "Put a book where there is room, or raise ValueError.",
        "The shelf grows by one. None of the others moves.",
    )
    assert put.parameters == {"book", "where"}
    assert put.traits == {"returns", "branches", "method", "parameters"}
    assert shelf.traits == {"class"}
    assert wait.paragraphs == ("Wait for seconds.",)
    assert (wait.parameters, wait.traits) == ({"seconds"}, {"parameters"})


def test_words_of_a_documentation(library, monkeypatch):
    monkeypatch.setattr(words, "documented", lambda: documented.documented(library))
    [row] = words.table()
    found = {word: tag for word, tag in zip(row["tokens"], row["tags"], strict=True) if tag != "other"}
    assert found == {"book": "parameter", "where": "parameter", "ValueError": "type"}
    assert row["name"] == "json.Shelf.put"


def test_traits_of_functions(library, monkeypatch):
    monkeypatch.setattr(traits, "documented", lambda: documented.documented(library))
    [row] = traits.table()  # the other texts are too short
    assert row["labels"] == ["branches", "method", "parameters", "returns"]
    assert row["text"].startswith("Put a book")


def test_pairs_of_paragraphs(library, monkeypatch):
    monkeypatch.setattr(pairs, "documented", lambda: documented.documented(library) * 2)
    [row] = pairs.table()  # once, although it is there twice
    assert (row["anchor"][:10], row["positive"][:10], row["name"]) == ("Put a book", "The shelf ", "json.Shelf.put")


def test_sizes_of_functions(library, monkeypatch):
    monkeypatch.setattr(sizes, "documented", lambda: documented.documented(library))
    [row] = sizes.table()  # a class has no size, the other text is too short
    assert (row["text"][:10], row["size"]) == ("Put a book", 2.0)  # for, if, raise, return


def test_nearness_of_documented_things(monkeypatch):
    def entry(name: str) -> documented.Documented:
        paragraphs = (f"{name}: what it does, in one sentence.", f"{name}: more about what it does, in another one.")
        return documented.Documented(name, paragraphs, frozenset(), frozenset())

    names = ["json.A.f", "json.A.g", "json.h", "ast.i"]
    entries = [entry(name) for name in names]
    scores = [[kin.nearness(one, other) for other in entries] for one in entries[:3]]
    assert scores == [[1, 2 / 3, 1 / 3, 0], [2 / 3, 1, 1 / 3, 0], [1 / 3, 1 / 3, 1, 0]]
    monkeypatch.setattr(kin, "documented", lambda: entries * 5)
    rows = kin.table()
    assert {round(3 * score) for score in rows["score"]} == {0, 1, 2, 3}
    for row in rows:
        first, second = (entry(row[side].partition(":")[0]) for side in ("first", "second"))
        assert (row["first"], row["second"]) == (first.paragraphs[0], second.paragraphs[1])


def test_conversations_about_days():
    """Each answer is a day after or before the one asked about."""
    for row in weekdays.table().select(range(50)):
        turns = [turn["content"] for turn in row["messages"]]
        assert [turn["role"] for turn in row["messages"]] == ["system", *["user", "assistant"] * 3]
        day = dates.DAYS.index(turns[1].split()[-1].strip("?"))
        for asked, answer in zip(turns[1::2], turns[2::2], strict=True):
            day = (day + (1 if "after" in asked else -1)) % 7
            assert answer == f"{dates.DAYS[day]}."
