"""Callbacks for any Lightning project: each finds adapters itself and assumes nothing about the module.

Those that serve our own module alone live in `lora_lightning.training`; their names are handed on from here as well.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora_lightning.callbacks.best import KeepBest
from lora_lightning.callbacks.cascade import Cascade
from lora_lightning.callbacks.federated import FederatedRounds
from lora_lightning.callbacks.forgetting import Forgetting
from lora_lightning.callbacks.guard import TrainingGuard
from lora_lightning.callbacks.inject import InjectAdapters
from lora_lightning.callbacks.meters import Meters
from lora_lightning.callbacks.noise import NoiseInjection
from lora_lightning.callbacks.privacy import PrivateGradients
from lora_lightning.callbacks.rank_pruning import RankPruning
from lora_lightning.callbacks.resume import ExactResume
from lora_lightning.callbacks.samples import Samples
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.sparsity import SparsitySchedule
from lora_lightning.callbacks.step_counting import StepCallback

__all__ = [
    "Cascade",
    "ExactResume",
    "FederatedRounds",
    "Forgetting",
    "InjectAdapters",
    "KeepBest",
    "Meters",
    "NoiseInjection",
    "PrivateGradients",
    "RankPruning",
    "Samples",
    "ScheduleCallback",
    "SparsitySchedule",
    "StepCallback",
    "TrainingGuard",
]

_OF_TRAINING = {"LinearBaseline": "linear_baseline", "PackingCheck": "packing_check", "RunReport": "run_report"}
"""Module of `lora_lightning.training` by class; found at first use, since that room stands above this one."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _OF_TRAINING:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"lora_lightning.training.{_OF_TRAINING[name]}"), name)
