"""`save_pretrained` and `push_to_hub` of other libraries do not write a model with adapters.

They write a model's keys for `from_pretrained`, which builds the plain model and would leave every weight whose key has
another name at random. So their methods look first whether the model has a layer that gives its weights other names. A
model's own dictionary (`state_dict`, and what writes that) is what it says, and fits a model with the same adapters.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from lora_lightning.errors import AdapterStateError

_OWNERS = {
    "transformers.modeling_utils": "PreTrainedModel",
    "huggingface_hub.hub_mixin": "ModelHubMixin",
    "diffusers.models.modeling_utils": "ModelMixin",
}
"""Classes with such methods, by the module that is there if anything of them is."""
_METHODS = ("save_pretrained", "push_to_hub")
_MARK = "_lora_lightning_checked"


def check_foreign_saving() -> None:
    """Let the methods of these classes refuse models with adapters, and do for others what they always did."""
    for module, name in _OWNERS.items():
        owner = getattr(sys.modules.get(module), name, None)
        for method in _METHODS if owner is not None else ():
            own = getattr(owner, method)
            if not hasattr(own, _MARK):
                setattr(owner, method, _checked(own))


def _checked(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def checked(self: Any, *args: Any, **options: Any) -> Any:
        _refuse_renamed(self, save.__name__)
        return save(self, *args, **options)

    setattr(checked, _MARK, True)
    return checked


def _refuse_renamed(model: Any, method: str) -> None:
    path = _renamed(model) if isinstance(model, nn.Module) else None
    if path is not None:
        raise AdapterStateError(
            f"{type(model).__name__}.{method} would write keys that from_pretrained does not know: {path} has an "
            "adapter or new rows on it. lora_lightning.export(model, folder) writes the adapter for peft, "
            'export(model, folder, format="merged") a plain model with it, and save_adapter(model, folder) our own '
            "format. For the base model alone, eject(model) first."
        )


def _renamed(module: nn.Module, path: str = "") -> str | None:
    """Path of the first layer whose weights have other names; None where there is none."""
    if getattr(type(module), "renames_weights", False):
        return path
    children = (
        _renamed(child, f"{path}.{name}".lstrip(".")) for name, child in module._modules.items() if child is not None
    )
    return next((found for found in children if found is not None), None)
