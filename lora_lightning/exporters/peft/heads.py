"""What trained in full, as peft keeps it: whole modules, which it replaces by copies from the file."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from lora_lightning.errors import ExportError
from lora_lightning.exporters.peft import rules as peft_rules
from lora_lightning.exporters.source import Source, users

_NO_COPY = (nn.ModuleList, nn.ModuleDict)
"""Containers that peft cannot save whole."""


@dataclass
class Heads:
    """Modules that are saved whole."""

    task: str | None
    modules: list[str]
    """`modules_to_save`."""
    copied: list[str] = field(default_factory=list)
    """Every module that peft replaces by a copy from the file."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_heads(source: Source, modules: dict[str, nn.Module]) -> Heads:
    """Modules to save whole, with the task if peft's own additions for it do no harm.

    Args:
        source: the adapter.
        modules: every module of the plain model by path.

    Raises:
        ExportError: a parameter that trains without the rest of its module, or an adapted layer inside a copied one.
    """
    own = _whole_modules(source, modules)
    for task in dict.fromkeys((peft_rules.task_type(source.host), None)):
        heads = Heads(task, own)
        saved = [*own, *peft_rules.task_heads(task)]
        heads.copied = peft_rules.wrapped(saved, modules)
        inside = [path for path in source.layers if any(path == m or path.startswith(f"{m}.") for m in heads.copied)]
        if not inside:
            break
    else:
        raise ExportError(
            f"{inside[0]} is adapted, but lies in a module that peft would replace by a copy, because its name ends "
            f'like one of {", ".join(own)}. Use format="merged".'
        )
    for path in heads.copied:
        heads.tensors |= {f"{path}.{key}": t.detach().cpu().clone() for key, t in modules[path].state_dict().items()}
        if path not in own:
            heads.notes.append(
                f"{path} did not train, but peft's rule for names saves it too; its weights are in the file"
            )
    return heads


def _whole_modules(source: Source, modules: dict[str, nn.Module]) -> list[str]:
    """The largest modules of which every parameter trains in full.

    Raises:
        ExportError: a parameter that trains without the rest of its module.
    """
    owned = [name.rpartition(".") for name in source.heads]
    trained = {id(modules[path]._parameters[leaf]) for path, _, leaf in owned}

    def whole(path: str) -> bool:
        return all(id(parameter) in trained for parameter in modules[path].parameters())

    found: dict[str, None] = {}
    for name in [n for key, names in users(source.host).items() if key in trained for n in names]:
        path, _, leaf = name.rpartition(".")
        if not path or not whole(path) or isinstance(modules[path], _NO_COPY):
            raise ExportError(
                f"{name} trains in full, but is not a whole module: peft saves modules, not single parameters such as "
                f'"{leaf}". Train the whole module, or use format="merged".'
            )
        parent = path.rpartition(".")[0]
        while parent and whole(parent) and not isinstance(modules[parent], _NO_COPY):
            path, parent = parent, parent.rpartition(".")[0]
        found[path] = None
    return list(found)
