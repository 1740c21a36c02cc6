"""Method: the base of every method's settings, and the questions a method may answer.

Imports neither torch nor Lightning, so that `--help` and `methods` stay fast; `build`, `optimizer` and `callbacks`
import what they need inside.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lora_lightning.errors import SettingsError, did_you_mean

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from torch import Tensor
    from torch.optim import Optimizer

    from lora_lightning.adapters.base import Adapter, GroupSpec
    from lora_lightning.adapters.weights import BaseLayer

Adapters = Mapping[str, "Adapter"]
"""Adapters of one name by the path of the layer they sit on."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Settings of an adapter method. Fields are the documentation, `--help` and the YAML.

    Class facts:
        paper: arXiv identifier.
        bibtex: BibTeX entry of the paper, printed by `cite`.
        mergeable: False where the update depends on the input, so that no merged weight exists.
        starts_at_base: True where the adapted model equals the base model before the first step.
        export: how the method travels to other libraries ("native", "exact LoRA", "merged only", "not expressible").
        peft_type: peft's name of the format that this method is read from ("LORA": its fields are then `rank`, `alpha`,
            `dropout`, `scaling_rule` and `bias`, its adapters own one factor pair); empty for none.
    """

    paper: ClassVar[str] = ""
    bibtex: ClassVar[str] = ""
    mergeable: ClassVar[bool] = True
    starts_at_base: ClassVar[bool] = True
    export: ClassVar[str] = "merged only"
    peft_type: ClassVar[str] = ""

    @abstractmethod
    def build(self, base: BaseLayer) -> Adapter:
        """The adapter for one layer, on the layer's device; `inject` gives it its start values by `reset`."""

    def param_groups(self, adapters: Adapters) -> dict[str, GroupSpec]:
        """Trainables by group name: sides of factor pairs as "A" and "B", the rest as "other"."""
        from lora_lightning.adapters.base import pair_groups

        return pair_groups(adapters)

    def optimizer(self) -> Callable[[Any], Optimizer] | None:
        """The method's own default optimizer as a factory over parameter groups; None for AdamW."""
        return None

    def callbacks(self) -> Sequence[Callback]:
        """Lightning callbacks the method needs; each yields to a trainer callback of its class or a subclass."""
        return ()

    def penalty(self, adapters: Adapters) -> Tensor | None:  # noqa: ARG002 - a question with a default answer
        """Extra loss per optimizer step, already weighted."""
        return None

    def report(self, adapters: Adapters) -> dict[str, Any]:  # noqa: ARG002 - a question with a default answer
        """Facts for the summary, name to plain value."""
        return {}


def replace(method: Method, where: str, fields: Mapping[str, Any]) -> Method:
    """`method` with other values for `fields`.

    Raises:
        SettingsError: a field that the method does not have, naming `where` it was given and the nearest one.
    """
    names = [f.name for f in dataclasses.fields(method)]
    for name in fields:
        if name not in names:
            raise SettingsError(
                f'{where}: {type(method).__name__} has no "{name}".{did_you_mean(name, names)} '
                f"It takes: {', '.join(names)}."
            )
    return dataclasses.replace(method, **fields)
