"""Where a generated text ends: at what the model, its tokenizer or its chat template call the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

_ANSWER = "hello"


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens of which each ends a text.

    They are those of the model's generation config (of its config where it has none), the tokenizer's end of text, and
    the token with which the tokenizer's chat template ends an assistant's turn.
    """
    config = getattr(model, "generation_config", None) or getattr(model, "config", None)
    own = getattr(config, "eos_token_id", None)
    ends = list(own) if isinstance(own, Sequence) else [own]
    behind = behind_answer(tokenizer)
    return list(
        dict.fromkeys(end for end in (*ends, tokenizer.eos_token_id, _mark(behind, tokenizer)) if end is not None)
    )


def end_of_answer(tokenizer: Any) -> int | None:
    """The token with which the chat template ends an assistant's turn; without one, the tokenizer's end of text."""
    if not getattr(tokenizer, "chat_template", None):
        return cast("int | None", tokenizer.eos_token_id)
    return _mark(behind_answer(tokenizer), tokenizer)


def end_text(tokenizer: Any) -> str:
    """The text with which the chat template ends an assistant's turn, before the token that does; mostly empty."""
    behind = behind_answer(tokenizer)
    mark = _mark(behind, tokenizer)
    return (behind if mark is None else behind.partition(tokenizer.convert_ids_to_tokens(mark))[0]).strip()


def before_end(ids: Sequence[int], ends: Sequence[int]) -> Sequence[int]:
    """`ids` up to the first of `ends`."""
    return next((ids[:place] for place, token in enumerate(ids) if token in ends), ids)


def behind_answer(tokenizer: Any) -> str:
    """What the chat template writes behind the last turn, an assistant's.

    Empty without a template, or where it writes such turns neither as texts nor in parts.
    """
    if not getattr(tokenizer, "chat_template", None):
        return ""
    forms: tuple[Callable[[str], Any], ...] = (str, _in_parts)
    for content in forms:  # some templates take one of them alone
        turns = [{"role": "user", "content": content("hi")}, {"role": "assistant", "content": content(_ANSWER)}]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception:  # a template is a program, and may want other turns
            continue
        if _ANSWER in text:
            return text.rpartition(_ANSWER)[2]
    return ""


def _in_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _mark(text: str, tokenizer: Any) -> int | None:
    """The first token of `text` that is special or was added."""
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return next((token for token in found if token in marks), None)


def continued_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    last: str = "",
    config: Any = None,
    **options: Any,
) -> list[str]:
    """The continuation of each prompt, without what ends it; prompts are padded on the left.

    Args:
        model: a model that generates.
        tokenizer: its tokenizer, with a token to pad with.
        prompts: token ids, none empty; of a model with an encoder, what it reads.
        last: text that ends an answer too, see `end_text`.
        config: a generation config that says where answers end; None takes the model's own, and says it.
        options: further arguments of `generate`.
    """
    inputs = padded(prompts, tokenizer.pad_token_id, model.device)
    return continued_batch(model, tokenizer, inputs, last, config, **options)


def padded(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> dict[str, Tensor]:
    """Token ids and their mask, (b, l), padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def continued_batch(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    last: str = "",
    config: Any = None,
    **options: Any,
) -> list[str]:
    """As `continued_texts`, of prompts that are padded on the left already.

    Args:
        model: a model that generates.
        tokenizer: its tokenizer.
        inputs: what the model gets beside options: input_ids and attention_mask (b, l), and images and the like.
        last: text that ends an answer too.
        config: a generation config that says where answers end.
        options: further arguments of `generate`.
    """
    pad = tokenizer.pad_token_id
    ends = end_ids(model, tokenizer)
    if config is not None:
        options["generation_config"] = config
    else:
        options |= {"pad_token_id": pad, "eos_token_id": ends or None, **({"stop_strings": [last]} if last else {})}
    with torch.no_grad():
        generated = model.generate(**inputs, tokenizer=tokenizer, **options)
    begins = 1 if getattr(model.config, "is_encoder_decoder", False) else inputs["input_ids"].shape[1]
    answers = [before_end(row, ends) for row in generated[:, begins:].tolist()]
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [text.partition(last)[0] for text in texts] if last else texts
