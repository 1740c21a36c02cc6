"""PairOptimizer: an optimizer whose rule looks at both factors of a pair; a subclass says what a step does."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lora_lightning.adapters.base import FactorPair
from lora_lightning.errors import SettingsError, TrainingError
from lora_lightning.optim.directions import AdamForm
from lora_lightning.optim.pairs import Factorised, Side, Stack

Rule = tuple[Callable[[Any], bool], str]

RULES: Mapping[str, Rule] = {
    "lr": (lambda v: v >= 0, "it must be at least 0."),
    "weight_decay": (lambda v: v >= 0, "it must be at least 0."),
    "betas": (
        lambda v: len(v) == 2 and all(0 <= b < 1 for b in v),
        "both must lie in [0, 1); (0.9, 0.999) is usual.",
    ),
    "eps": (lambda v: v > 0, "it must be above 0; 1e-8 to 1e-6 is usual."),
    "adam_form": (lambda v: v in get_args(AdamForm), f"it takes {', '.join(get_args(AdamForm))}."),
    "damping": (lambda v: v >= 0, "it must be at least 0. Added to the diagonals of the r x r matrices."),
}
"""What must hold for settings that several optimizers share, and what to say otherwise."""


class PairOptimizer(Optimizer, ABC):
    """Parameters of factor pairs are stepped by the pairs' rule, all others by the plain rule of the same family.

    The pairs are handed over by `bind_pairs`, which `build_optimizer` calls; a step without them is an error. What a
    subclass keeps between steps lies in the parameters' state, as tensors shaped by the factors and plain numbers.

    Parameters may be sharded on several processes: `stack_pairs` gives full factors and gradients, or as little as
    Grams take; `Stack.own` and the functions of `directions` go back to shards. State shaped like a parameter lies like
    it (`as_shard_of`).

    Class facts:
        trains: sides of a pair that must train: "any", "both", or "B" for B alone.
        clips_itself: True where clipping before the step would spoil the rule, which clips where it should.

    Args:
        params: parameters or groups.
        defaults: options of a group.
        settings: options of the whole optimizer, kept in `defaults` beside the others.
    """

    trains: ClassVar[Literal["any", "both", "B"]] = "any"
    clips_itself: ClassVar[bool] = False

    def __init__(self, params: Any, defaults: dict[str, Any], settings: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self.defaults |= settings
        self.pairs: tuple[FactorPair, ...] = ()

    @abstractmethod
    def take_step(self) -> None:
        """Step every parameter that has a gradient; gradients are complete and are not changed."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure once, with gradients on, then take the step.

        Returns:
            What the closure returned.

        Raises:
            TrainingError: `bind_pairs` was not called.
        """
        if not self.pairs:
            raise TrainingError(
                f"{type(self).__name__} does not know the factor pairs; call "
                "optimizer.bind_pairs(lora_lightning.optim.groups.factor_pairs(model)) before the first step."
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self.take_step()
        return loss

    def bind_pairs(self, pairs: tuple[FactorPair, ...]) -> None:
        """Take the pairs of which a side is in this optimizer.

        Raises:
            TrainingError: there is none; a factor is in half precision, or part of two pairs; the sides that
                train are not those the rule needs.
        """
        held = {id(p) for group in self.param_groups for p in group["params"]}
        ours = tuple(pair for pair in pairs if {id(pair.lora_A), id(pair.lora_B)} & held)
        if not ours:
            raise TrainingError(
                f"{type(self).__name__} needs factor pairs, and nothing that trains is one; use AdamW here, or a "
                "method with factor pairs."
            )
        seen: set[int] = set()
        for pair in ours:
            self._check_pair(pair, held)
            if {id(pair.lora_A), id(pair.lora_B)} & seen:
                raise self._refused(pair, "shares a factor with another pair, so that no step fits both")
            seen |= {id(pair.lora_A), id(pair.lora_B)}
        self.pairs = ours

    def _check_pair(self, pair: FactorPair, held: set[int]) -> None:
        factors = (pair.lora_A, pair.lora_B)
        if any(factor.dtype in (torch.float16, torch.bfloat16) for factor in factors):
            raise self._refused(pair, "is in half precision, where small updates are lost; keep adapters in float32")
        trained = [name for name, factor in zip("AB", factors, strict=True) if id(factor) in held]
        if self.trains == "both" and trained != ["A", "B"]:
            raise self._refused(pair, f"trains {trained[0]} alone; it needs both sides (train: both)")
        if self.trains == "B" and trained != ["B"]:
            raise self._refused(pair, "trains A; this optimizer keeps A as it is, so set the method's option train: B")

    def _refused(self, pair: FactorPair, why: str) -> TrainingError:
        return TrainingError(f'{type(self).__name__}: the factor pair "{pair.name}" {why}.')

    def with_gradient(self, *sides: Side) -> tuple[FactorPair, ...]:
        """Pairs of which one of `sides` is in this optimizer and has a gradient."""
        held = {id(p) for group in self.param_groups for p in group["params"] if p.grad is not None}
        return tuple(
            pair for pair in self.pairs if any(id(pair.lora_A if s == "A" else pair.lora_B) in held for s in sides)
        )

    def plain_gradients(self) -> dict[Tensor, Tensor]:
        """Gradients of the parameters in no pair."""
        paired = {id(factor) for pair in self.pairs for factor in (pair.lora_A, pair.lora_B)}
        params = [p for group in self.param_groups for p in group["params"] if id(p) not in paired]
        return {p: p.grad for p in params if p.grad is not None}

    def count_damped(self, stack: Stack, factorised: Factorised, side: Side) -> None:
        """Note, under the parameters of `side`, the pairs whose damping had to be raised; warn at a pair's first."""
        if not bool(factorised.raises.any()):
            return
        parts = zip(stack.pairs, stack.factors(side), factorised.raises.split(stack.counts), strict=True)
        for pair, factor, raises in parts:
            if bool(raises.any()):
                self._note(pair, factor, int(raises.max()))

    def _note(self, pair: FactorPair, factor: Tensor, raises: int) -> None:
        state = self.state[factor]
        if "damped" not in state:
            warnings.warn(
                f'{type(self).__name__}: factors of the pair "{pair.name}" are so near singular that its damping was '
                f"raised {raises} times tenfold; a larger damping says so openly. Later ones are counted in report().",
                stacklevel=2,
            )
        state["damped"] = state.get("damped", 0) + 1

    def report(self) -> dict[str, int]:
        """Steps at which the damping had to be raised, by name of the pair; empty where it never was."""
        counts = {
            pair.name: sum(self.state.get(factor, {}).get("damped", 0) for factor in (pair.lora_A, pair.lora_B))
            for pair in self.pairs
        }
        return {name: count for name, count in counts.items() if count}


def check_settings(optimizer: Optimizer, more: Mapping[str, Rule] | None = None) -> None:
    """Raise `SettingsError` for a default outside its rule: the shared ones, and those of `more`."""
    for name, (holds, rule) in {**RULES, **(more or {})}.items():
        if name in optimizer.defaults and not holds(optimizer.defaults[name]):
            raise SettingsError(f"{type(optimizer).__name__}.{name} is {optimizer.defaults[name]!r}; {rule}")


def one_of(*choices: str) -> Rule:
    """The rule of a setting that takes one of `choices`."""
    return (lambda v: v in choices), f"it takes {', '.join(choices)}."
