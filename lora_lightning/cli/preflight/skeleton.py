"""A module's model with its adapters, without values: what `estimate` counts and `compare` describes."""

from __future__ import annotations

from typing import Any

import torch

from lora_lightning.cli.preflight.trace import Meter
from lora_lightning.models.loading import load_skeleton
from lora_lightning.models.meta import expect_values
from lora_lightning.models.token_rows import as_ids, has_texts
from lora_lightning.training.module import AdapterModule


def assemble_skeleton(module: AdapterModule, data: Any, meter: Meter, dtype: torch.dtype | None = None) -> None:
    """Load the module's model and inject its adapter, inside `without_values`.

    Args:
        module: its `num_labels` and `train_tokens` are filled in from the data module.
        data: the data module.
        meter: of `without_values`.
        dtype: of all weights; None takes the module's.
    """

    def load(*args: Any, **options: Any) -> torch.nn.Module:
        options.pop("quantize", None)
        if dtype is not None:
            options["dtype"] = dtype
        meter.answer = False  # a weight is drawn again until none of its values is out of bounds
        net = load_skeleton(*args, **options)
        meter.answer = True
        tokens = getattr(data, "new_tokens", ())
        if tokens and module.start is None:
            from lora_lightning.models.new_tokens import Vocabulary, add_rows

            add_rows(net, Vocabulary(tuple(tokens), len(net.get_input_embeddings().weight)))  # type: ignore[operator]
        return expect_values(net)  # so that no plan or start is computed from them

    if module.num_labels is None:
        module.num_labels = getattr(data, "num_labels", None)
    if module.train_tokens:
        needed = has_texts(module.train_tokens)
        module.train_tokens = as_ids(module.train_tokens, getattr(data, "tokenizer_object", None) if needed else None)
    module.assemble(load)
