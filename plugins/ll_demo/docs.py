"""First paragraphs of the standard library's docstrings, as PyDocs has them: text, label (an area's number), module."""

from __future__ import annotations

import datasets

from ll_demo.docstrings import library_docstrings


def table() -> datasets.Dataset:
    """The table."""
    return library_docstrings()
