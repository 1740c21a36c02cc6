"""MethodContract: the four contracts of an adapter method, joined. Public API.

A plugin's test file is one class:

    from lora_lightning.testing import MethodContract

    class TestMine(MethodContract):
        method = Mine(rank=2, alpha=4.0)

Needs pytest, which is all it imports beside this library and what that needs.
"""

from __future__ import annotations

from lora_lightning.testing.law import LawContract
from lora_lightning.testing.quantized import QuantizedContract
from lora_lightning.testing.sharing import SharingContract
from lora_lightning.testing.storage import StorageContract
from lora_lightning.testing.training import TrainingContract


class MethodContract(LawContract, TrainingContract, StorageContract, SharingContract, QuantizedContract):
    """What every adapter method keeps to. Subclass it, name the subclass `Test...`, set `method`.

    It never branches on a method's name. What a method does otherwise it declares: `starts_at_base` and `mergeable` on
    its settings class, `additive` and `mergeable` on its adapter, and here:

    Attributes:
        method: settings to test, small enough for layers of 4 to 6 outputs; its class must be installed as a plugin.
        base_kinds: base layers that the method takes, of `BASE_KINDS`; `build` must refuse the others with a
            `SettingsError`. `DROPPING_KINDS` are those with an input to drop entries of.
        compile_reason: why the method does not work under `torch.compile(fullgraph=True)`; empty where it does.
        random_start: False where start values do not depend on the seed.
        tolerance: largest difference between two orders of computation in float64.

    Example:
        >>> from ll_lora import LoRA
        >>> from lora_lightning.testing import DROPPING_KINDS, MethodContract
        >>> class TestLoRAWithDropout(MethodContract):
        ...     method = LoRA(rank=2, alpha=4.0, dropout=0.1)
        ...     base_kinds = DROPPING_KINDS  # token ids cannot be dropped, nor the inputs of stacked experts
    """
