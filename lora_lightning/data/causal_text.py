"""What the data of a causal language model share: token counts, and packing."""

from __future__ import annotations

from typing import Any

import datasets
from torch.utils.data import DistributedSampler

from lora_lightning.data.loader import count_targets
from lora_lightning.data.packing import PackSampler, best_fit
from lora_lightning.data.text import TextData, token_counts
from lora_lightning.errors import check


class CausalText(TextData):
    """Text for a causal language model.

    Batches: input_ids, attention_mask, labels (-100 where there is no loss), window_tokens. Packed ones have
    position_ids, which start again with each example, in place of attention_mask.

    Args:
        packing: Put several training examples into one row of max_length tokens; batch_size then counts rows. No
            example sees another, and positions start anew, so that losses are those of unpacked examples. A model
            that cannot keep examples apart is refused before the first step.
        common: Settings that all text data share.
    """

    task_kinds = ("causal-lm",)

    def __init__(self, *, packing: bool = False, **common: Any) -> None:
        super().__init__(**common)
        self.packing = packing
        self.count = count_targets
        check(not (packing and self.group_by_length), self, "packing", "it leaves nothing to group_by_length; use one.")

    def sampler(self, examples: datasets.Dataset, batch_size: int, **options: Any) -> DistributedSampler[Any]:
        """Packed rows in training, where asked for."""
        if not (self.packing and options.get("shuffle")):
            return super().sampler(examples, batch_size, **options)
        return PackSampler(token_counts(examples), self.max_length, **options)

    def packs(self, split: str) -> int:
        """Rows that the examples of a split fill."""
        return len(best_fit(sorted(token_counts(self.examples(split)), reverse=True), self.max_length))
