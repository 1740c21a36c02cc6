"""Callbacks for any Lightning project: each finds adapters itself and assumes nothing about the module."""

from lora_lightning.callbacks.best import KeepBest
from lora_lightning.callbacks.cascade import Cascade
from lora_lightning.callbacks.guard import TrainingGuard
from lora_lightning.callbacks.inject import InjectAdapters
from lora_lightning.callbacks.noise import NoiseInjection
from lora_lightning.callbacks.rank_pruning import RankPruning
from lora_lightning.callbacks.resume import ExactResume
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.sparsity import SparsitySchedule
from lora_lightning.callbacks.steps import StepCallback

__all__ = [
    "Cascade",
    "ExactResume",
    "InjectAdapters",
    "KeepBest",
    "NoiseInjection",
    "RankPruning",
    "ScheduleCallback",
    "SparsitySchedule",
    "StepCallback",
    "TrainingGuard",
]
