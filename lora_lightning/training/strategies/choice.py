"""Which sharded strategies know adapters."""

from __future__ import annotations

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from lora_lightning.errors import SettingsError
from lora_lightning.training.strategies.deepspeed import DeepSpeed
from lora_lightning.training.strategies.fsdp1 import FSDP1
from lora_lightning.training.strategies.fsdp2 import FSDP2


def check_strategy(strategy: Strategy) -> None:
    """Refuse Lightning's own strategies that shard.

    They know nothing of adapters: they would write frozen weights, or shard nothing where the module does not itself.

    Raises:
        SettingsError: it is one of them; names ours.
    """
    for theirs, ours, config in (
        (ModelParallelStrategy, FSDP2, "fsdp2"),
        (FSDPStrategy, FSDP1, "fsdp"),
        (DeepSpeedStrategy, DeepSpeed, "deepspeed"),
    ):
        if isinstance(strategy, theirs) and not isinstance(strategy, ours):
            raise SettingsError(
                f"trainer.strategy is {type(strategy).__name__}, which knows nothing of adapters; "
                f"nearest: {ours.__name__} (--config strategies/{config})."
            )
