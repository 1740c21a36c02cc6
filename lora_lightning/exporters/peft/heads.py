"""Fully trained parameters, as peft keeps them: whole modules, which it replaces by copies from the file."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor, nn

from lora_lightning.errors import ExportError
from lora_lightning.exporters.peft import rules as peft_rules
from lora_lightning.exporters.peft.read_heads import tensors_of
from lora_lightning.exporters.source import Source, plain_modules, users
from lora_lightning.models.new_tokens import plain_vocabulary
from lora_lightning.models.paths import plain

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
    biases: list[str] = field(default_factory=list)
    """Biases that trained without the rest of their modules: peft's `bias="all"`."""
    notes: list[str] = field(default_factory=list)


def whole_vocabulary(source: Source) -> dict[str, Tensor]:
    """Tensors of the base model that follow its vocabulary, of the full size with all new rows, by name.

    Empty where rows of new tokens alone say the same: peft computes a layer with such rows without its bias, and looks
    up plainly in an embedding.
    """
    if not source.extended:
        return {}
    before = tensors_of(source.host)
    extended = [plain(path) for path in source.here(source.anatomy.extended)]
    with plain_vocabulary(list(source.anatomy.extended.values()), source.anatomy.places):
        after = tensors_of(source.host)
        known = {id(tensor) for tensor in before.values()}
        grown = {name: t.detach().cpu() for name, t in after.items() if id(t) not in known}
        modules = plain_modules(source.host)
        own_lookup = [path for path in extended if not peft_rules.looks_up_plainly(modules[path])]
        for path in own_lookup:  # as a module that is saved whole
            grown |= {f"{path}.{key}": t.detach().cpu() for key, t in modules[path].state_dict().items()}
    trained = any(_in_extended(source, name) for name in source.heads)
    return grown if trained or own_lookup or not all(name.endswith(".weight") for name in grown) else {}


def _in_extended(source: Source, name: str) -> bool:
    return any(name.startswith(f"{plain(path)}.") for path in source.here(source.anatomy.extended))


def _matrices_train(source: Source) -> bool:
    """Whether matrices of the vocabulary are saved as ones that trained; those of new tokens are a larger base's."""
    if any(_in_extended(source, name) for name in source.heads):
        return True
    return not any(layer.new_rows is not None for layer in source.extended.values()) and bool(whole_vocabulary(source))


def find_heads(source: Source) -> Heads:
    """Modules to save whole, with the task if peft's own additions for it do no harm.

    Raises:
        ExportError: a parameter that trains without the rest of its module, or an adapted layer inside a copied one.
    """
    modules = source.modules
    extended = [plain(path) for path in source.here(source.anatomy.extended)]
    own, biases = _whole_modules(source)
    if _matrices_train(source):
        own += extended
    for task in dict.fromkeys((peft_rules.task_type(source.host), None)):
        heads = Heads(task, own, biases=biases)
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
    state = tensors_of(source.host) if biases else {}
    heads.tensors |= {name: state[name].detach().cpu().clone() for name in biases}
    for path in heads.copied:
        if any(path == other or path.startswith(f"{other}.") for other in extended):
            continue  # see `whole_vocabulary`
        heads.tensors |= {f"{path}.{key}": t.detach().cpu().clone() for key, t in modules[path].state_dict().items()}
        if path not in own:
            heads.notes.append(
                f"{path} did not train, but peft's rule for names saves it too; its weights are in the file"
            )
    return heads


def _whole_modules(source: Source) -> tuple[list[str], list[str]]:
    """The largest modules that are fully trained, and biases that train without the rest of their modules.

    Raises:
        ExportError: a parameter that trains without the rest of its module.
    """
    modules = source.modules
    owned = [name.rpartition(".") for name in source.heads if not _in_extended(source, name)]
    trained = {id(modules[path]._parameters[leaf]) for path, _, leaf in owned}
    partly = _partly_frozen(source, trained)

    def whole(path: str) -> bool:
        return path not in partly

    by_parameter = users(modules, source.here(source.anatomy.adapted))
    found: dict[str, None] = {}
    biases: dict[str, None] = {}
    for name in [n for key, names in by_parameter.items() if key in trained for n in names]:
        path, _, leaf = name.rpartition(".")
        if not path or not whole(path) or isinstance(modules[path], _NO_COPY):
            if leaf == "bias":
                biases[name] = None
                continue
            raise ExportError(
                f"{name} trains in full, but is not a whole module: peft saves modules and biases, no single "
                f'parameter such as "{leaf}". Train the whole module, or use format="merged".'
            )
        parent = path.rpartition(".")[0]
        while parent and whole(parent) and not isinstance(modules[parent], _NO_COPY):
            path, parent = parent, parent.rpartition(".")[0]
        found[path] = None
    return list(found), list(biases)


def _partly_frozen(source: Source, trained: Collection[int]) -> set[str]:
    """Paths of modules that hold a parameter that is not one of `trained`, or an adapted layer, at any depth."""
    own = {plain(path) for path in source.here(source.anatomy.adapted)}
    for path, module in source.modules.items():
        if any(id(parameter) not in trained for parameter in module.parameters(recurse=False)):
            own.add(path)
    found = set(own)
    for path in own:
        while path := path.rpartition(".")[0]:
            found.add(path)
    return found
