"""An export in peft's format is opened by peft on the base model, and both must compute the same.

Where peft is not installed, `apply` opens it by peft's rules. On a Hugging Face model the outputs of the whole model
are compared; on another, those of each adapted layer.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import ExportError, LoraLightningError
from lora_lightning.exporters.peft import folder as peft_file
from lora_lightning.exporters.peft.apply import apply_folder
from lora_lightning.exporters.peft.experts import find_stacks
from lora_lightning.exporters.peft.folder import PeftFolder
from lora_lightning.exporters.peft.former_names import names_to_write, with_names_of
from lora_lightning.exporters.peft.plain_copy import CopyError, plain_copy
from lora_lightning.exporters.peft.sample_inputs import Inputs, sample_inputs
from lora_lightning.exporters.peft.torch_attention import with_projections
from lora_lightning.exporters.source import Source
from lora_lightning.injection.records import iter_adapters
from lora_lightning.injection.switches import set_active
from lora_lightning.models.paths import join

_ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-3}
_ALLOWED_IN_HALF = 0.1
_WAY_OUT = 'Nothing was put in place. Use format="merged".'
_COPY = "modules_to_save.default."
"""What peft puts into the names of modules that it has from a file."""
Loader = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Verdict:
    """What was compared."""

    by: str
    """Who opened the export and what was compared, or why nothing was run."""
    ran: bool


def verify(source: Source, folder: Path, truncated: bool) -> Verdict:
    """Open the export with peft, or by its rules, and compare.

    Args:
        source: the adapter.
        folder: the files.
        truncated: whether a part of the update is left out on purpose; then peft is compared with its rules.

    Raises:
        ExportError: peft cannot open it, or computes something else.
    """
    has_peft = importlib.util.find_spec("peft") is not None
    content = read_export(source, folder)
    load, who = (lambda model: load_with_peft(model, folder), version()) if has_peft else (_by_rules(content), _RULES)
    if source.anatomy.quantized and not has_peft:
        return Verdict("the base model is quantized, and peft is not installed", ran=False)
    try:
        with plain_copy(source, brought(content)) as base:
            inputs = sample_inputs(base, _new_ids(source))
            if inputs is None:
                return _by_layer(source, content, load(base), who)
            expected = _expected(source, content, inputs, truncated)
            if isinstance(expected, str):
                return Verdict(expected, ran=False)
            return compare(expected, outputs(load(base), inputs), who)
    except LoraLightningError:
        raise
    except (CopyError, MemoryError, torch.OutOfMemoryError) as error:
        return Verdict(_line(error), ran=False)
    except Exception as error:
        raise ExportError(not_opened(who, error)) from error


def read_export(source: Source, folder: Path) -> PeftFolder:
    """What an export of `source` has, under the names of the layers here."""
    found = peft_file.read(folder, find_stacks(source.here(source.anatomy.layers)))
    found = with_names_of(found, names_to_write(source.host, source.layers))
    return with_projections(found, source.modules, folder)


_RULES = "peft's rules"


def version() -> str:
    """The installed peft, with its version."""
    return f"peft {importlib.metadata.version('peft')}"


def not_opened(who: str, error: BaseException) -> str:
    """What to say where the export cannot be opened."""
    return f"{who} does not open the export: {_line(error)}. {_WAY_OUT}"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def brought(content: PeftFolder) -> list[str]:
    """Names of the base model's tensors that a folder has values for."""
    ends = {"base": "weight", "base_bias": "bias"}
    return [*content.heads, *(join(path, ends[role]) for path, role in content.keys if role in ends)]


def load_with_peft(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the folder opened by peft.

    Raises:
        ExportError: peft misses tensors in the file.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import peft

        theirs: nn.Module = peft.PeftModel.from_pretrained(model, folder)
    missing = [str(warning.message) for warning in caught if "missing adapter keys" in str(warning.message)]
    if missing:
        raise ExportError(f"peft misses tensors in the export: {missing[0][:300]}. {_WAY_OUT}")
    return theirs.eval()


def _by_rules(content: PeftFolder) -> Loader:
    def load(model: nn.Module) -> nn.Module:
        apply_folder(content, model)
        return model

    return load


def _new_ids(source: Source) -> list[int]:
    return [i for ids, _ in source.rows.values() for i in ids][:8]


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Floating-point outputs, the first of them the logits or states."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output: Any = model(**inputs)
    first = output[0] if not isinstance(output, Tensor) else output
    logits = getattr(output, "logits", None)
    return [t for t in (logits, first) if isinstance(t, Tensor) and t.is_floating_point()][:1]


def reference(source: Source, folder: Path, truncated: bool) -> tuple[Inputs, list[Tensor]] | str:
    """Inputs and what must come out, see `verify`; or why there are none."""
    content = read_export(source, folder)
    with plain_copy(source, brought(content)) as base:
        inputs = sample_inputs(base, _new_ids(source))
    if inputs is None:
        return f"inputs of {type(source.host).__name__} are not known"
    expected = _expected(source, content, inputs, truncated)
    return expected if isinstance(expected, str) else (inputs, expected)


def _expected(source: Source, content: PeftFolder, inputs: Inputs, truncated: bool) -> list[Tensor] | str:
    """What must come out; or why the model cannot be run on such inputs."""
    try:
        if not truncated:
            with only(source):
                found = outputs(source.host, inputs)
        else:
            with plain_copy(source, brought(content)) as base:
                apply_folder(content, base)
                found = outputs(base, inputs)
    except Exception as error:
        return f"{type(source.host).__name__} could not be called with {', '.join(inputs)} ({_line(error)})"
    if not found or not all(torch.isfinite(t).all() for t in found):
        return f"{type(source.host).__name__} gives no finite numbers on the inputs tried"
    return found


@contextmanager
def only(source: Source) -> Iterator[None]:
    """Inside, the model computes with this adapter alone, unmerged and in evaluation mode."""
    root = source.anatomy.model
    layers = [layer for _, layer in iter_adapters(root)]
    modes = [(module, module.training) for module in root.modules()]
    before = list(dict.fromkeys(name for layer in layers for name in layer.active))
    merged, disabled = [layer for layer in layers if layer.merged], [layer.disabled for layer in layers]
    for layer in merged:
        layer.unmerge()
    try:
        root.eval()
        set_active(root, [source.name])
        for layer in layers:
            layer.disabled = False
        yield
    finally:
        set_active(root, before)
        for layer, was in zip(layers, disabled, strict=True):
            layer.disabled = was
        for layer in merged:
            layer.merge()
        for module, training in modes:
            module.training = training


def compare(expected: list[Tensor], found: list[Tensor], who: str) -> Verdict:
    """Compare outputs of two models.

    Raises:
        ExportError: they differ by more than rounding.
    """
    worst = 0.0
    for ours, theirs in zip(expected, found, strict=True):
        scale = float(ours.double().abs().max()) or 1.0
        if ours.shape != theirs.shape:
            raise ExportError(f"{who} computes outputs of shape {tuple(theirs.shape)}, not {tuple(ours.shape)}.")
        difference = float((ours.double() - theirs.double()).abs().nan_to_num(torch.inf).max()) / scale
        if difference > _ALLOWED.get(ours.dtype, _ALLOWED_IN_HALF):
            raise ExportError(
                f"{who} computes another model from the export: outputs differ by {difference:.3g} of their size. "
                f"{_WAY_OUT}"
            )
        worst = max(worst, difference)
    return Verdict(f"{who} on the base model, outputs alike up to {worst:.1e} of their size", ran=True)


def _by_layer(source: Source, content: PeftFolder, theirs: nn.Module, who: str) -> Verdict:
    """Compare each layer on inputs of its own, and what is saved whole by its values."""
    if content.rows:
        return Verdict(f"inputs of {type(source.host).__name__} are not known", ran=False)
    inner = getattr(theirs, "base_model", theirs)
    inner = getattr(inner, "model", inner) if inner is not theirs else theirs
    own = {
        key.replace(_COPY, ""): tensor
        for key, tensor in sorted(inner.state_dict().items(), key=lambda i: _COPY in i[0])
    }
    for name, value in content.heads.items():
        if not torch.equal(own[name].cpu(), value.to(own[name].dtype)):
            raise ExportError(f"{who} has another {name} than the export. {_WAY_OUT}")
    drawn = torch.Generator().manual_seed(0)
    bases = {path: layer.base_layer for path, layer in source.layers.items()}
    if source.anatomy.weight_read(f"{source.prefix}{path}" for path in bases):
        return _by_weight(source, theirs, who)
    with only(source), torch.no_grad():
        for path, layer in source.layers.items():
            x = _input_of(layer.base_layer, drawn)
            if x is None:
                return _by_weight(source, theirs, who)
            compare([layer(x)], [inner.get_submodule(path)(x)], f"{who}, at {path},")
    return Verdict(f"{who}, each layer's outputs alike", ran=True)


def _by_weight(source: Source, theirs: Any, who: str) -> Verdict:
    """Compare each weight after a merge, where not every layer can be called alone."""
    if source.anatomy.quantized:
        return Verdict("the base model is quantized, and not every layer can be called alone", ran=False)
    inner = theirs
    if hasattr(theirs, "merge_adapter"):  # not merge_and_unload, which leaves what lies inside a wrapper
        for parameter in theirs.parameters():
            parameter.data = parameter.data.clone()  # the adapted model has the same numbers, and keeps them
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it comes by the projection inside an attention twice
            theirs.merge_adapter()
        inner = theirs.base_model.model
    found = {key.replace(".base_layer", ""): tensor for key, tensor in inner.state_dict().items()}
    with only(source), torch.no_grad():
        for path, layer in source.layers.items():
            compare([layer.weight], [found[layer.base_layer.weight_name(path)]], f"{who}, at {path},")
    return Verdict(f"{who}, each layer's merged weight alike", ran=True)


def _input_of(base: Any, drawn: torch.Generator) -> Tensor | None:
    """An input of one layer on its device; None for a kind that has none of its own."""
    if base.kind == "linear":
        x = torch.randn(3, base.d_in, generator=drawn)
    elif base.kind == "embedding":
        return torch.randint(base.d_in, (1, 8), generator=drawn).to(base.device)
    elif base.kind == "conv":
        conv = base.module
        size = [4 + d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        x = torch.randn(1, conv.in_channels, *size, generator=drawn)
    else:
        return None
    return x.to(base.device, base.dtype)
