"""Chat templates: the tokenizer's own, one of ours by name, that of a family of models, a file, or Jinja text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.data.tokens.causal import end_id, start_ids
from lora_lightning.errors import DataError, did_you_mean
from lora_lightning.models.generation import behind_answer


@dataclass(frozen=True)
class ChatTemplate:
    """A layout of turns; an assistant's turn is marked from its text to its end."""

    head: str
    """What opens a turn: Jinja, with `role` in it."""
    end: str
    """What ends every turn."""
    answer_end: str
    """What ends an assistant's turn, the last thing that the model learns to write."""
    gap: str = "\n"
    """What stands between turns."""
    tokens: tuple[str, ...] = ()
    """What must be one token each for the model to make sense of it."""

    def jinja(self, start: str) -> str:
        """The template, with `start` before everything."""
        role, end, answer_end, gap = (self.head, self.end, self.answer_end, self.gap)
        return (
            f"{{{{- {start!r} -}}}}{{%- for message in messages -%}}{{%- set role = message.role -%}}{{{{- {role} -}}}}"
            "{%- if role == 'assistant' -%}"
            f"{{%- generation -%}}{{{{- message.content + {answer_end} -}}}}{{%- endgeneration -%}}"
            f"{{%- else -%}}{{{{- message.content + {end} -}}}}{{%- endif -%}}{{{{- {gap!r} -}}}}{{%- endfor -%}}"
            f"{{%- if add_generation_prompt -%}}{{%- set role = 'assistant' -%}}{{{{- {role} -}}}}{{%- endif -%}}"
        )


TEMPLATES = {
    "chatml": ChatTemplate(
        head=r"'<|im_start|>' + role + '\n'",
        end="'<|im_end|>'",
        answer_end="'<|im_end|>'",
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
    "llama-3": ChatTemplate(
        head=r"'<|start_header_id|>' + role + '<|end_header_id|>\n\n'",
        end="'<|eot_id|>'",
        answer_end="'<|eot_id|>'",
        gap="",
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "phi-3": ChatTemplate(
        head=r"'<|' + role + '|>\n'",
        end="'<|end|>'",
        answer_end="'<|end|>'",
        tokens=("<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "phi-4": ChatTemplate(
        head="'<|im_start|>' + role + '<|im_sep|>'",
        end="'<|im_end|>'",
        answer_end="'<|im_end|>'",
        gap="",
        tokens=("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    ),
    "zephyr": ChatTemplate(head=r"'<|' + role + '|>\n'", end="eos_token", answer_end="eos_token"),
    "plain": ChatTemplate(head=r"role | capitalize + ':\n'", end="''", answer_end="eos_token"),
}
"""zephyr and plain are of ordinary text and the end-of-text token, so that any tokenizer can do with them."""

_DEEPSEEK = tuple(f"<\uff5c{name}\uff5c>" for name in ("User", "Assistant", "end\u2581of\u2581sentence"))
FAMILIES = {
    "deepseek-r1": (*_DEEPSEEK, "<think>"),
    "deepseek-v3": _DEEPSEEK,
    "gemma-3": ("<start_of_turn>", "<end_of_turn>"),
    "harmony": ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"),
    "llama-3.1": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "qwen-2.5": ("<|im_start|>", "<|im_end|>"),
    "qwen-3": ("<|im_start|>", "<|im_end|>"),
}
"""Tokens of the templates in the folder families, which write tools and reasoning as those models know them."""


NAMES = {**{name: template.tokens for name, template in TEMPLATES.items()}, **FAMILIES}
"""Templates by name, with the tokens that they are made of."""


def family(name: str) -> str:
    """The template of a family of models, Jinja text."""
    return (Path(__file__).parent / "families" / f"{name}.jinja").read_text(encoding="utf-8")


def choose_template(tokenizer: Any, setting: str | None, owner: str = "Chat") -> tuple[str | None, str]:
    """The template that `setting` means and what to call it in messages; None for the tokenizer's own.

    Args:
        tokenizer: The tokenizer that will render it.
        setting: `chat_template` of the data module.
        owner: The data module's name, for messages.

    Raises:
        DataError: no such template, or the tokenizer lacks tokens that it is made of.
    """
    choices = f"Choose one of {', '.join(NAMES)}, or give a file or a Jinja text."
    if setting is None:
        if not tokenizer.chat_template:
            fits = _fitting(tokenizer)
            others = [name for name in NAMES if name not in fits]
            with_tokens = f" With data.new_tokens: {', '.join(others)}." if others else ""
            raise DataError(
                f"{owner}.chat_template is null, and the tokenizer {tokenizer.name_or_path} has no template. Choose "
                f"one that fits its tokens: {', '.join(fits)}; or give a file or a Jinja text.{with_tokens}"
            )
        return None, f"of {tokenizer.name_or_path}"
    if setting in NAMES:
        return _named(tokenizer, setting, owner), f'"{setting}"'
    if "{{" in setting or "{%" in setting:
        return setting, "that was given"
    path = Path(setting).expanduser()
    if not path.is_file():
        raise DataError(f'{owner}.chat_template is "{setting}"; no such file.{did_you_mean(setting, NAMES)} {choices}')
    return path.read_text(encoding="utf-8"), f"in {path.name}"


def _fitting(tokenizer: Any) -> list[str]:
    """Names of templates whose tokens a tokenizer has."""
    vocabulary = tokenizer.get_vocab()
    return [name for name, tokens in NAMES.items() if all(token in vocabulary for token in tokens)]


def _named(tokenizer: Any, name: str, owner: str) -> str:
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in NAMES[name] if token not in vocabulary]
    if missing:
        raise DataError(
            f'{owner}.chat_template is "{name}"; the tokenizer {tokenizer.name_or_path} has no token {missing[0]}, so '
            f"that it would be letters to the model. data.new_tokens: {missing!r} makes it fit: rows for them train "
            f"along. Templates that fit as it is: {', '.join(_fitting(tokenizer))}."
        )
    if name in FAMILIES:
        return family(name)
    end_id(tokenizer)
    return TEMPLATES[name].jinja(start="".join(tokenizer.convert_ids_to_tokens(start_ids(tokenizer))))


def end_of_turn(tokenizer: Any) -> int | None:
    """Id of the token that ends an assistant's turn; None without a template, or where it ends with ordinary text."""
    behind = behind_answer(tokenizer).lstrip()
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if behind else []
    marks = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return int(ids[0]) if ids and ids[0] in marks else None
