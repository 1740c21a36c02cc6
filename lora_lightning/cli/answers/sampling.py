"""How the next token is chosen: flags, settings by name, and what they mean to transformers."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

from lora_lightning.errors import SettingsError, did_you_mean


@dataclass(frozen=True)
class Sampling:
    """Settings of generation; None takes the model's own.

    Raises:
        SettingsError: a value outside its rule.
    """

    temperature: float | None = None
    """Divides the logits; 0 takes the most likely token, as `greedy` does."""
    top_p: float | None = None
    """Fraction of the probability that is drawn from, the most likely tokens first."""
    top_k: int | None = None
    """How many of the most likely tokens are drawn from; 0 is all."""
    max_new_tokens: int = 256
    """Most tokens of an answer."""
    seed: int | None = None
    """Seed of the draws; None draws anew each time."""
    greedy: bool = False
    """Always the most likely token."""

    def __post_init__(self) -> None:
        rules = {
            "temperature": (self.temperature is None or self.temperature >= 0, "it must be at least 0"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "it must lie in (0, 1]"),
            "top_k": (self.top_k is None or self.top_k >= 0, "it must be at least 0, which is all"),
            "max_new_tokens": (self.max_new_tokens >= 1, "it must be at least 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise SettingsError(f"{name} is {getattr(self, name)}; {rule}.")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn, whatever the model says."""
        return self.greedy or self.temperature == 0

    def config(self, model: Any, tokenizer: Any, last: str = "") -> Any:
        """The generation config of a call: the model's own with these settings, and where an answer ends.

        Args:
            model: a model that generates.
            tokenizer: its tokenizer.
            last: text that ends an answer too.
        """
        from lora_lightning.models.generation import end_ids

        config = copy.deepcopy(model.generation_config)
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, end_ids(model, tokenizer) or None
        config.stop_strings = [last] if last else None
        config.max_length = None
        config.max_new_tokens = self.max_new_tokens
        given = (self.temperature, self.top_p, self.top_k)
        config.do_sample = not self.is_greedy and (any(value is not None for value in given) or bool(config.do_sample))
        for name, value, off in zip(("temperature", "top_p", "top_k"), given, (1.0, 1.0, 50), strict=True):
            if not config.do_sample:
                setattr(config, name, off)  # what transformers takes for not set
            elif value is not None:
                setattr(config, name, value)
        return config

    def replaced(self, name: str, text: str) -> Sampling:
        """These settings with one of them read from text; "null" takes the model's own.

        Raises:
            SettingsError: no such setting, or no such value.
        """
        kinds = {"temperature": float, "top_p": float, "top_k": int, "max_new_tokens": int, "seed": int, "greedy": bool}
        if name not in kinds:
            raise SettingsError(
                f'there is no setting "{name}".{did_you_mean(name, kinds)} Settings: {", ".join(kinds)}.'
            )
        if text in ("null", "none", "None") and name not in ("max_new_tokens", "greedy"):
            cleared: dict[str, Any] = {name: None}
            return dataclasses.replace(self, **cleared)
        truths = {"true": True, "false": False, "on": True, "off": False, "1": True, "0": False}
        try:
            value: Any = truths[text.lower()] if kinds[name] is bool else kinds[name](text)
        except (KeyError, ValueError) as error:
            wanted = "true or false" if kinds[name] is bool else "a number"
            raise SettingsError(f'{name} is "{text}"; it must be {wanted}.') from error
        return dataclasses.replace(self, **{name: value})

    def __str__(self) -> str:
        return ", ".join(f"{field.name} {getattr(self, field.name)}" for field in dataclasses.fields(self))


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of these settings, under their own names."""
    parser.add_argument("--temperature", type=float, metavar="T", help="divide the logits by it; 0 is greedy")
    parser.add_argument("--top_p", type=float, metavar="P", help="draw from this much of the probability")
    parser.add_argument("--top_k", type=int, metavar="K", help="draw from so many tokens; 0 is all")
    parser.add_argument("--max_new_tokens", type=int, default=256, metavar="N", help="most tokens of an answer; 256")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the draws")
    parser.add_argument("--greedy", action="store_true", help="always the most likely token")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of how the model is loaded."""
    parser.add_argument("--pretrained", metavar="MODEL", help="the base model, where the adapters' own is not at hand")
    parser.add_argument("--dtype", default="auto", metavar="auto|float32|bfloat16|float16", help="of the base weights")
    parser.add_argument("--device", metavar="cpu|cuda|...", help="where it computes; an accelerator if there is one")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The settings that flags gave."""
    return Sampling(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Sampling)})
