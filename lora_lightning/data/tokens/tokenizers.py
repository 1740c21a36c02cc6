"""Tokenizers by path, hub id or `pkg:IMPORT_NAME/FOLDER`, and made from the texts of a built-in table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from lora_lightning.data.sources.builtin import PREFIX, builtin_table
from lora_lightning.errors import DataError
from lora_lightning.models.pretrained import resolve

MOST = 4096
"""Tokens of a tokenizer that is made from a table."""


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
    if name.startswith(PREFIX):
        return builtin_tokenizer(name)
    folder = resolve(name, "data.tokenizer", needs=None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "custom code" in str(error):
            raise DataError(
                f'data.tokenizer is "{name}", which brings code of its own, and such code is not run. If you trust it, '
                "load it in Python with trust_remote_code=True, write what its backend_tokenizer holds into a folder "
                "(PreTrainedTokenizerFast(tokenizer_object=...).save_pretrained), and give that folder."
            ) from error
        reason = str(error).strip().splitlines()[0]
        raise DataError(f'data.tokenizer is "{name}"; no tokenizer can be read there: {reason}') from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise DataError(f'data.tokenizer is "{name}"; it has neither a padding nor an end-of-text token.')
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def builtin_tokenizer(name: str) -> Any:
    """Byte-level BPE of the texts of a table, "builtin:NAME", for models that start at random.

    Words that stand twice are one token each, up to 4,096 tokens in all; no text is unknown. It pads with "<pad>" (0)
    and ends a text with "</s>" (1).

    Raises:
        DataError: there is no such table, or it has no texts.
    """
    from transformers import PreTrainedTokenizerFast

    texts = list(_texts(builtin_table(name, f'data.tokenizer is "{name}"')[:]))
    if not texts:
        raise DataError(f'data.tokenizer is "{name}"; that table has no texts to make tokens of.')
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # a word is one token wherever it stands
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MOST,
        min_frequency=2,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", name_or_path=name, padding_side="right"
    )


def _texts(value: Any) -> Iterator[str]:
    """The texts in columns, in lists and in dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)
