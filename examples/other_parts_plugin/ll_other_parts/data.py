"""FewShotText: labelled texts, of which training sees so many of each class."""

from __future__ import annotations

import random
from typing import Any

import datasets

from lora_lightning.data import LabelledText
from lora_lightning.errors import DataError, check


class FewShotText(LabelledText):
    """Texts with a class each, of which training sees `shots` of each class, drawn from `seed`.

    Args:
        shots: Training examples of each class; published few-shot runs have 4 to 64.
        labelled: Settings of labelled texts.
    """

    def __init__(self, shots: int = 16, **labelled: Any) -> None:
        super().__init__(**labelled)
        self.shots = shots
        check(shots >= 1, self, "shots", "it must be at least 1.")
        check(not self.regression, self, "regression", "numbers have no classes to draw examples from.")

    def read(self, split: str) -> datasets.Dataset | None:
        """Rows as `LabelledText` reads them; of training rows, `shots` of each class."""
        rows = super().read(split)
        return rows if rows is None or split != "train" else rows.select(self._draw(rows[self.label][:]))

    def _draw(self, labels: list[Any]) -> list[int]:
        chosen: list[int] = []
        generator = random.Random(self.seed)
        for label in sorted(set(labels)):
            own = [row for row, other in enumerate(labels) if other == label]
            if len(own) < self.shots:
                raise DataError(
                    f'FewShotText.shots is {self.shots}; class "{label}" has {len(own)} training rows, so it must be '
                    "at most that."
                )
            chosen += generator.sample(own, self.shots)
        return sorted(chosen)
