"""Tokenizers by path, hub id or `pkg:IMPORT_NAME/FOLDER`."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from lora_lightning.errors import DataError
from lora_lightning.pretrained import resolve


def load_tokenizer(name: str | None) -> Any:
    """The tokenizer that `name` means; one without a padding token pads with its end-of-text token.

    Raises:
        DataError: no name, nothing that is a tokenizer there, or no token to pad with.
        ModelError: the folder or package does not exist.
    """
    if name is None:
        raise DataError(
            "data.tokenizer is null; set it to the model's path or hub id (the command line copies model.pretrained; a "
            "random: model has none)."
        )
    folder = resolve(name, "data.tokenizer", needs=None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f'data.tokenizer is "{name}"; no tokenizer can be read there: {reason}') from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise DataError(f'data.tokenizer is "{name}"; it has neither a padding nor an end-of-text token.')
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
