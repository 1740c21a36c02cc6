"""What a method answers from data, as plain data and tensors, so that it can be kept and found again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from lora_lightning.injection.probe import Probe


@dataclass(frozen=True)
class Answer:
    """A plan (plain data), or start values (tensors)."""

    plain: Any = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Remember(Protocol):
    """Gives the answer to a question: an earlier one, where all that it depends on is the same, or a new one."""

    def __call__(
        self, probe: Probe, question: str, make: Callable[[], Answer], before: Mapping[str, Tensor], /
    ) -> Answer:
        """The answer.

        Args:
            probe: what is asked of, bound to a model.
            question: what is asked.
            make: answers anew.
            before: tensors that the answer depends on, beside the model and the batches.
        """


def asked_anew(_probe: Probe, _question: str, make: Callable[[], Answer], _before: Mapping[str, Tensor], /) -> Answer:
    """A `Remember` that keeps nothing."""
    return make()
