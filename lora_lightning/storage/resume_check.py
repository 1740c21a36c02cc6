"""Whether a trainer checkpoint belongs to an adapter: base model, method, settings, heads, names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_lightning.errors import ResumeError, SettingsError
from lora_lightning.injection.records import injected_root, records
from lora_lightning.methods import Method, plain_settings
from lora_lightning.models.anatomy import survey
from lora_lightning.plugins import restore_settings
from lora_lightning.storage.description import describe_adapter, described_formats
from lora_lightning.storage.fingerprint import differences, say_how_compared
from lora_lightning.storage.state import adapter_state


def check_same(model: nn.Module, name: str, theirs: Mapping[str, Any]) -> None:
    """Compare an adapter with the description in a checkpoint: base model, method, settings by layer, heads.

    Raises:
        ResumeError: something differs, naming it and both values.
    """
    root = injected_root(model)
    own = describe_adapter(survey(root), name)
    ours, base = own["fingerprint"], theirs["fingerprint"]
    differing = differences(ours, base)
    if differing:
        raise ResumeError(
            f"the checkpoint was trained on another base model ({', '.join(differing)} differ). Give "
            "the same model.pretrained, with the files that it had then, or start a new run."
        )
    say_how_compared(ours, base, own["quantization"], described_formats(theirs))
    if own["method"] != theirs["method"]:
        raise ResumeError(
            f"the checkpoint was trained with {theirs['method']}; the model has {own['method']}. "
            "Give the same method, or start a new run."
        )
    theirs = {**theirs, **_settings_now(type(records(root)[name].method), theirs)}
    for key, value in own["settings"].items():
        if value != theirs["settings"].get(key):
            raise ResumeError(
                f"{own['method']}.{key} is {value!r}; the checkpoint was trained with {theirs['settings'].get(key)!r}. "
                "Give the same value, or start a new run."
            )
    planned = theirs.get("plan", {})  # older checkpoints have none
    if own["plan"] != planned:
        raise ResumeError(
            f"the checkpoint was trained with another plan of {own['method']}: {_difference(planned, own['plan'])}. It "
            "is read before the adapter is built where trainer.ckpt_path is set before fit is called."
        )
    rows, before = ({path: stated["ids"] for path, stated in d.get("tokens", {}).items()} for d in (own, theirs))
    if rows != before:
        raise ResumeError(f"the checkpoint was trained with other rows of tokens: {_difference(before, rows)}.")
    if own["untied"] != theirs.get("untied", []):
        was = ", ".join(theirs.get("untied", [])) or "nothing"
        raise ResumeError(f"the checkpoint was trained with {was} untied; give model.untie the same value.")
    below, before = own.get("below", []), theirs.get("below", [])
    if [one["digest"] for one in below] != [one["digest"] for one in before]:
        raise ResumeError(
            f"the checkpoint was trained on top of other adapters: {_difference(before, below)}. Put those back where "
            "model.adapter names them."
        )
    for key in ("layers", "trained", "labels"):
        if own[key] != theirs[key]:
            raise ResumeError(
                f"the checkpoint was trained with other {key}: {_difference(theirs[key], own[key])}. "
                "Give the same settings and data, or start a new run."
            )


def _settings_now(method: type[Method], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a description, as a whole and by layer, under the names that fields have today."""
    common = _named_now(method, theirs["settings"])
    layers = {}
    for path, differing in theirs["layers"].items():
        own = _named_now(method, {**theirs["settings"], **differing})
        layers[path] = {key: value for key, value in own.items() if value != common[key]}
    return {"settings": common, "layers": layers}


def _named_now(method: type[Method], settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return plain_settings(restore_settings(method, "the checkpoint", settings))
    except SettingsError as error:
        raise ResumeError(
            f"the checkpoint's settings are not those of a {method.__name__} of today: {error}"
        ) from error


def _difference(theirs: Any, own: Any) -> str:
    """What stands only on one side, shortened."""
    if isinstance(theirs, Mapping):
        theirs, own = [*map(str, theirs.items())], [*map(str, own.items())]
    lost, new = [x for x in theirs or () if x not in (own or ())], [x for x in own or () if x not in (theirs or ())]
    return f"{lost[:2]} there, {new[:2]} here"


def check_fits(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Compare names and shapes of an adapter's tensors with those of a checkpoint.

    Raises:
        ResumeError: a name is missing or unexpected, or a shape differs.
    """
    wanted = {key: tuple(tensor.shape) for key, tensor in adapter_state(model, name).items()}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if wanted != found:
        first = min(wanted.items() ^ found.items())[0]
        raise ResumeError(
            f"the checkpoint's adapter does not fit: {first} is {wanted.get(first, 'missing')} in the model and "
            f"{found.get(first, 'missing')} in the checkpoint."
        )
