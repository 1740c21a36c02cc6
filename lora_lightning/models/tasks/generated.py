"""Texts that a model generates, compared with those that were expected."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import CHRFScore, SacreBLEUScore
from torchmetrics.text.rouge import ROUGEScore

from lora_lightning.errors import DataError

TEXT_METRICS = ("bleu", "chrf", "rouge_l")
"""Names of what `text_metrics` measures."""


class RougeL(ROUGEScore):  # type: ignore[misc]  # torchmetrics' is not typed here
    """F measure of ROUGE-L: the longest words in common, in their order. A word is letters or digits of any script.

    For ASCII texts it is that of the package rouge_score without its stemmer.
    """

    def __init__(self) -> None:
        super().__init__(rouge_keys="rougeL", normalizer=_words)

    def compute(self) -> Tensor:
        """The mean over texts."""
        mean: Tensor = super().compute()["rougeL_fmeasure"]
        return mean


def _words(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.lower())


def text_metrics() -> dict[str, Metric]:
    """BLEU with sacreBLEU's 13a words (arXiv:1804.08771), chrF2 of up to six characters, ROUGE-L; from 0 to 1 each.

    BLEU is 0 where no text has four words, and chrF stays below 1 where none has six characters.
    """
    return {"bleu": SacreBLEUScore(), "chrf": CHRFScore(n_word_order=0), "rouge_l": RougeL()}


def should_generate(metrics: Mapping[str, Metric], batches: int) -> bool:
    """Whether texts of one more batch are to be generated, of `batches` in all."""
    return bool(batches) and metrics["bleu"].update_count < batches


def add_texts(metrics: Mapping[str, Metric], generated: Sequence[str], expected: Sequence[str]) -> None:
    """Add generated texts to the metrics of `text_metrics`, each with the one expected text."""
    for name in TEXT_METRICS:
        metrics[name].update(generated, [[text] for text in expected])


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `DataError` where there is none."""
    if tokenizer is None:
        raise DataError("model.task_settings.generate_batches needs data with a tokenizer, such as TextToText.")


def label_texts(labels: Iterable[Tensor | Sequence[int]], tokenizer: Any) -> list[str]:
    """The texts of rows of labels. Places without a label and special tokens are left out.

    Raises:
        DataError: there is no tokenizer.
    """
    check_tokenizer(tokenizer)
    rows = [[token for token in torch.as_tensor(row).tolist() if token >= 0] for row in labels]
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
