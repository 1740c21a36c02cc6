"""Strategies that shard, with checkpoints that hold the adapter alone."""

from lora_lightning.training.strategies.choice import check_strategy
from lora_lightning.training.strategies.deepspeed import DeepSpeed
from lora_lightning.training.strategies.fsdp1 import FSDP1
from lora_lightning.training.strategies.fsdp2 import FSDP2

__all__ = ["FSDP1", "FSDP2", "DeepSpeed", "check_strategy"]
