"""Token ids back to text, with what carries no loss marked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lora_lightning.data.tokens.causal import NO_LOSS


def mark(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> str:
    """Decoded tokens, those without loss in double brackets."""
    runs = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] == NO_LOSS)
    texts = ((masked, tokenizer.decode([token for token, _ in run])) for masked, run in runs)
    return "".join(f"[[{text}]]" if masked else text for masked, text in texts)
