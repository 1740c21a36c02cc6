"""Token ids of a causal language model's examples: start and end tokens, the loss mask, what is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_lightning.errors import DataError

NO_LOSS = -100


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of `texts` alone, uncut and without start and end tokens."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def start_ids(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before every text: one for Llama, none for GPT-2."""
    ids: list[int] = tokenizer("a")["input_ids"]
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    before = next((n for n in range(len(ids)) if ids[n : n + len(text)] == text), 0)
    return ids[:before]


def end_id(tokenizer: Any) -> int:
    """The end-of-text token.

    Raises:
        DataError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path} has no end-of-text token, which causal-lm data ends examples with."
        )
    return int(tokenizer.eos_token_id)


def end_ids(tokenizer: Any) -> list[int]:
    """The token that ends a text: the end-of-text token, or what an encoder's tokenizer writes behind one.

    Raises:
        DataError: the tokenizer has neither.
    """
    behind = tokenizer("a")["input_ids"][len(start_ids(tokenizer)) + len(plain_ids(tokenizer, ["a"])[0]) :]
    return behind if tokenizer.eos_token_id is None and behind else [end_id(tokenizer)]


def completion_example(
    start: Sequence[int], prompt: Sequence[int], completion: Sequence[int], max_length: int
) -> dict[str, Any]:
    """One example with the loss on the completion, cut to `max_length`.

    The prompt loses its first tokens, then the completion its last. Something always stands before the completion
    where there is anything, because the first token of an example is never predicted.
    """
    before = len(start) or min(1, len(prompt))
    completion = completion[: max_length - before]
    room = max_length - len(start) - len(completion)
    kept = prompt[max(0, len(prompt) - room) :]
    ids = [*start, *kept, *completion]
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": [NO_LOSS] * (len(ids) - len(completion)) + list(completion),
    }
