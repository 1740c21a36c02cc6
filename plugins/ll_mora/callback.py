"""MapTurns: other maps for each stage of ReMoRA, without which the rank of what is folded would not grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from lightning.pytorch.callbacks import Callback

from ll_mora.adapter import MoRAAdapter
from ll_mora.functional import MAPS
from lora_lightning.adapters.base import Adapter
from lora_lightning.callbacks.cascade import Cascade
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.step_counting import STAGE_ENDS
from lora_lightning.errors import SettingsError


class MapTurns(ScheduleCallback):
    """Takes the next maps where a `Cascade` has just folded the update, while the matrix is zero.

    The maps lie in buffers of the adapters, so that a resumed run, and whoever loads the adapter, has them.

    Args:
        maps: "two" for remainders and groups in turn, "all" for the four ways to share entries.

    Raises:
        SettingsError: there is no cascade, or one with noise.
        NoEffectError: no trainable adapter shares entries.
    """

    phase: ClassVar[int] = STAGE_ENDS + 1
    requires: ClassVar[str] = "a square matrix whose entries inputs share"

    def __init__(self, maps: Literal["two", "all"] = "two") -> None:
        super().__init__()
        self.maps = maps

    def accepts(self, adapter: Adapter) -> bool:
        """MoRA's, unless they rotate."""
        return isinstance(adapter, MoRAAdapter) and adapter.inputs is not None

    def check_run(self, total: int | None, others: Sequence[Callback]) -> None:
        """Find the cascade.

        Raises:
            SettingsError: there is none, or its noise would undo what is done here.
        """
        found = [other for other in others if isinstance(other, Cascade)]
        if not found:
            raise SettingsError("MapTurns acts at the ends of a Cascade's stages, and there is none; add one.")
        if found[0].noise:
            raise SettingsError(
                f"MapTurns: the Cascade's noise is {found[0].noise}, which starts adapters again in each stage, under the "
                "maps of their settings; set it to 0."
            )
        self._cascade = found[0]

    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Take the maps of the stage that begins."""
        if self._cascade.finished(step):
            cycle = list(MAPS)[: 2 if self.maps == "two" else None]
            for adapter in adapters.values():
                if isinstance(adapter, MoRAAdapter):
                    adapter.turn(cycle[(cycle.index(adapter.maps) + self._cascade.stage) % len(cycle)])
