"""All layers at once: adapters into base weights and back, or off the model (`adapters/merge_weight.py`: one layer)."""

from __future__ import annotations

from torch import nn

from lora_lightning.adapters.base_weight import AFTER_FINAL_MERGE
from lora_lightning.distributed import reshard
from lora_lightning.errors import AdapterStateError
from lora_lightning.injection.heads import forget_heads, show_heads
from lora_lightning.injection.links import detach
from lora_lightning.injection.merge_quantized import Dequantized
from lora_lightning.injection.place import set_module
from lora_lightning.injection.records import check_known, injected_root, iter_adapters, records, stack_of
from lora_lightning.injection.statistics import release_statistics
from lora_lightning.models.anatomy import survey
from lora_lightning.models.new_tokens import holds_rows
from lora_lightning.models.token_rows import remove_token_rows, write_into_base
from lora_lightning.models.untied import forget_untied, retie


def merge(model: nn.Module, keep_original: bool = True) -> None:
    """Write the active adapters into the base weights, all or none.

    A quantized layer is not written: a plain one, dequantized once, stands in its place, and what that changes is
    printed.

    Args:
        model: a model with adapters.
        keep_original: keep each original weight (on the CPU; a quantized layer where it is), so that `unmerge`
            restores it bit for bit.

    Raises:
        AdapterStateError: no adapter is active; one is routed, not finite or too large for the weight's dtype; or a
            weight is shared with another module. Nothing is merged then.
    """
    reshard(model)
    layers = dict(iter_adapters(injected_root(model)))
    if not any(layer.active for layer in layers.values()):
        raise AdapterStateError("no adapter is active, so there is nothing to merge; call set_active first.")
    for path, layer in layers.items():
        if layer.tied_to and layer.active:
            raise AdapterStateError(
                f"{path} shares its weight with {', '.join(layer.tied_to)}, which a merge would change too; "
                "keep the adapter unmerged, or train one with untie=True, which gives the output layer a weight of its "
                "own."
            )
        try:
            layer.check_mergeable()
        except AdapterStateError as error:
            raise AdapterStateError(f"{path}: {error} Nothing was merged.") from error
    dequantized = Dequantized()
    for path, layer in layers.items():
        dequantized.merge(path, layer, keep_original)
    if dequantized.layers:
        print(dequantized)


def unmerge(model: nn.Module) -> None:
    """Take merged adapters out of the base weights, restoring them bit for bit; does nothing where none is merged.

    Raises:
        AdapterStateError: a layer was merged with `keep_original=False`. Nothing is restored then.
    """
    reshard(model)
    layers = [layer for _, layer in iter_adapters(injected_root(model))]
    if any(not layer.can_unmerge for layer in layers):
        raise AdapterStateError(f"merged with keep_original=False; the original weights are gone. {AFTER_FINAL_MERGE}")
    for layer in layers:
        layer.unmerge()


def eject(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter, or all of them, off the model.

    With the last adapter the plain layers come back: with their original weights, or, where they were merged with
    `keep_original=False`, with the merged ones. So do the heads: the base model's own, or, after such a merge, the ones
    that were trained. Nothing is unfrozen, and no other adapter becomes active.

    Raises:
        AdapterStateError: no such adapter, one of several that were merged with `keep_original=False`, or one that
            another adapter was trained on top of.
    """
    root = injected_root(model)
    reshard(root)
    names = check_known(root, list(records(root)) if name is None else [name])
    for other in records(root):
        if other not in names and (under := [one for one in stack_of(root, other)[:-1] if one in names]):
            raise AdapterStateError(f'adapter "{other}" was trained on top of "{under[0]}"; eject "{other}" first.')
    anatomy = survey(root)
    layers = anatomy.adapted
    for path, layer in layers.items():
        if name is not None and not layer.can_unmerge:
            raise AdapterStateError(f"{path}: merged with keep_original=False; eject all adapters or none.")
    final = not all(layer.can_unmerge for layer in layers.values())
    if not final:
        active = dict.fromkeys(other for layer in layers.values() for other in layer.active)
        show_heads(root, [other for other in active if other not in names])
    else:
        write_into_base(anatomy)
    rows = [parameter for one in names for parameter in records(root)[one].trained if holds_rows(parameter)]
    for layer in layers.values():
        if layer.can_unmerge:
            layer.unmerge()
        else:
            layer.merging.make_final()
        for adapter_name in names:
            if adapter_name in layer.adapters:
                layer.remove(adapter_name)
        if not layer.adapters:
            set_module(anatomy.places[id(layer)], layer.base)
    for adapter_name in names:
        detach(root, adapter_name, records(root)[adapter_name].linked)
        forget_heads(root, adapter_name)
        del records(root)[adapter_name]
    kept = {parameter for record in records(root).values() for parameter in record.trained}
    remove_token_rows(root, set(rows) - kept)
    if final:
        forget_untied(root)
    elif not records(root):
        retie(root)
    if not records(root):
        release_statistics(anatomy)
