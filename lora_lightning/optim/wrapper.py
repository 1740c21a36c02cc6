"""OptimizerWrapper: an optimizer around another one, for methods that add to a step and leave the rest as it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch.optim import AdamW, Optimizer

from lora_lightning.adapters.base import FactorPair
from lora_lightning.methods import renamed


def adamw(params: Any) -> Optimizer:
    """AdamW as a run takes it that names no optimizer: a rate of 1e-3, no decay."""
    return AdamW(params, lr=1e-3, weight_decay=0.0)


class OptimizerWrapper(Optimizer, ABC):
    """Shares parameter groups, state and defaults with the optimizer inside; a subclass says what a step adds.

    What a subclass keeps for a parameter lies in that parameter's state beside the inner optimizer's, so that it is
    saved, loaded and moved like it. It may write there only after the inner optimizer has taken its first step on the
    parameter: optimizers take an empty state for a new one.

    Class facts:
        own_copies: names of entries that are copies of a parameter's value, to be taken anew where one is missing.
        former_fields: settings by the name that they had before, as older checkpoints and configs spell them.

    Args:
        inner: the optimizer that takes the steps.
        settings: the wrapper's own, told in `defaults` beside the inner optimizer's, so that a resume compares them.
    """

    own_copies: ClassVar[tuple[str, ...]] = ()
    former_fields: ClassVar[Mapping[str, str]] = {}

    def __init__(self, inner: Optimizer, settings: Mapping[str, Any] | None = None) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, inner.defaults)
        self.defaults = {**inner.defaults, "inner": type(inner).__name__, **(settings or {})}
        self._share()

    @property
    def clips_itself(self) -> bool:
        """Whether the inner optimizer clips, so that nothing else may."""
        return bool(getattr(self.inner, "clips_itself", False))

    @property
    def copies(self) -> tuple[str, ...]:
        """Entries of a parameter's state that are copies of its value, the inner optimizer's among them."""
        return (*self.own_copies, *getattr(self.inner, "copies", ()))

    def _share(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    @abstractmethod
    def take_step(self) -> None:
        """Step the inner optimizer, and whatever comes with it; gradients are complete."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure once, with gradients on, then take the step.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self.take_step()
        return loss

    def bind_pairs(self, pairs: tuple[FactorPair, ...]) -> None:
        """Hand the factor pairs to the inner optimizer, where it asks for them."""
        if hasattr(self.inner, "bind_pairs"):
            self.inner.bind_pairs(pairs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the inner optimizer, options under the names of today; share its new groups and state."""
        groups = [renamed(group, self.former_fields) for group in state_dict["param_groups"]]
        self.inner.load_state_dict({**state_dict, "param_groups": groups})
        self._share()


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer at the core of wrappers around one another."""
    while isinstance(optimizer, OptimizerWrapper):
        optimizer = optimizer.inner
    return optimizer


def former_names(optimizer: Optimizer) -> dict[str, str]:
    """Former names of settings, to those of today, of an optimizer and of those it is wrapped around."""
    found: dict[str, str] = {}
    while True:
        found |= getattr(optimizer, "former_fields", {})
        if not isinstance(optimizer, OptimizerWrapper):
            return found
        optimizer = optimizer.inner
