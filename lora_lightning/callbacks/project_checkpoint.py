"""Checkpoints of a foreign project with adapters: base weights under the project's own names, the adapter in a section.

    state_dict        the project's tensors by its own names; fully trained ones with their trained values
    lora_lightning    description and tensors of the adapter, averaged ones where a callback averages weights
                      current: the adapter that is being trained, beside averaged ones

The project can read its file without this library; then the adapter is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch import Tensor
from torch.distributed.tensor import DTensor

from lora_lightning.callbacks.step_counting import REPORTS
from lora_lightning.distributed import put, shard_like
from lora_lightning.errors import ResumeError, SettingsError
from lora_lightning.injection.heads import heads_of, waiting_heads
from lora_lightning.injection.records import check_unmerged, injected_root, iter_adapters, records
from lora_lightning.models.anatomy import survey
from lora_lightning.storage.description import describe_adapter
from lora_lightning.storage.folded import make_room_for_folded, rewrite_weights
from lora_lightning.storage.resume_check import check_fits, check_same
from lora_lightning.storage.state import adapter_keys

SECTION = "lora_lightning"
_CURRENT = "current_model_state"
"""Where callbacks of averages put the state of the model that trains; `state_dict` is then the average."""

Contents = Literal["full", "adapter"]


class SaveUnderProjectNames(Callback):
    """Writes the section, after every callback that changes what a checkpoint holds.

    Args:
        name: which adapter.
        contents: "full" keeps the project's own contents, "adapter" drops everything frozen.
    """

    phase: ClassVar[int] = REPORTS + 1

    def __init__(self, name: str, contents: Contents) -> None:
        self.name, self.contents = name, contents

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the adapter out of the state, and give the rest its names back."""
        root = injected_root(pl_module)
        section: dict[str, Any] = {"description": describe_adapter(survey(root), self.name)}
        checkpoint["state_dict"], section["tensors"] = self._split(pl_module, checkpoint["state_dict"])
        if _CURRENT in checkpoint:
            checkpoint[_CURRENT], section["current"] = self._split(pl_module, checkpoint[_CURRENT])
        checkpoint[SECTION] = section

    def _split(
        self, module: LightningModule, state: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A state as the project's part, by its own names, and the adapter's."""
        own = {key: state[key] for key in adapter_keys(module, self.name) if key in state}
        own |= waiting_heads(module, self.name)
        if self.contents == "adapter":
            return {}, own
        layers = [path for path, _ in iter_adapters(module)]
        rest = {_project_name(key, layers): value for key, value in state.items() if key not in own}
        trained = set(records(injected_root(module))[self.name].trained)
        return rest | {key: value for key, value in own.items() if key in trained}, own


def load_section(module: LightningModule, name: str, checkpoint: dict[str, Any]) -> None:
    """Load an adapter from a checkpoint's section, exactly; a callback of averages then reads what it had written.

    Raises:
        ResumeError: the checkpoint has no adapter, or another one.
    """
    if SECTION not in checkpoint:
        raise ResumeError("the checkpoint has no adapter section: it was written without InjectAdapters.")
    section = checkpoint[SECTION]
    check_unmerged(module)
    check_same(module, name, section["description"])
    tensors: dict[str, Tensor] = section["tensors"]
    make_room_for_folded(module, name, tensors)
    check_fits(module, name, tensors)
    state = module.state_dict()
    with heads_of(injected_root(module), [name]):
        for key, value in tensors.items():
            put(state[key], value)
    rewrite_weights(module)
    if "current" in section:
        checkpoint["state_dict"] = {**state, **tensors}
        checkpoint[_CURRENT] = {**state, **section["current"]}


def accept_project_names(module: LightningModule, name: str, state_dict: dict[str, Any]) -> None:
    """Before loading a state: the project's names become those of today; adapter tensors keep their values."""
    for path, _layer in iter_adapters(module):
        for key in [k for k in state_dict if k.startswith(f"{path}.")]:
            rest = key.removeprefix(f"{path}.")
            if not rest.startswith(("base.", "adapters.", "shifts.")):
                state_dict[f"{path}.base.{rest}"] = state_dict.pop(key)
    current = module.state_dict()
    for key, own in current.items():
        if key in state_dict and isinstance(own, DTensor):
            state_dict[key] = shard_like(state_dict[key], own)
    for key in adapter_keys(module, name):
        state_dict.setdefault(key, current[key])


def check_averages(callbacks: Iterable[Callback], ours: Callback) -> None:
    """Refuse callbacks of averages that would lose adapters.

    Raises:
        SettingsError: one stands before ours, and so copies a module without adapters.
    """
    follows = False
    for callback in callbacks:
        follows = follows or callback is ours
        kind = type(callback).__name__
        if not follows and isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise SettingsError(
                f"callbacks: {kind} stands before {type(ours).__name__} and would average a copy of the module without "
                f"adapters; list {type(ours).__name__} first."
            )


def _project_name(key: str, layers: Iterable[str]) -> str:
    for path in layers:
        if key.startswith(f"{path}.base."):
            return f"{path}.{key.removeprefix(f'{path}.base.')}"
    return key
