"""A parameter that an owner module reads itself becomes a layer at the parameter's own path, and back.

That is one 3-D parameter of fused experts, or one alone: a router's matrix, the in-projection of
nn.MultiheadAttention, the weights of a recurrent layer, a stack of matrices whatever it is for.

The owner reads its parameters instead of calling a layer. So the adapted layer stands where the parameter stood, and
while the owner's forward runs its name means the weight that the layer applies then, made once a call:

    owner.gate_up_proj                      Parameter (E, 2m, d)      before
    owner.gate_up_proj                      AdaptedLayer              after; `.base.weight` is that parameter
    owner.gate_up_proj, inside forward      W + s B A, (E, 2m, d)

Autograd keeps that weight, E x d_out x d_in numbers, until backward. In half precision the update is rounded into it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.layers.kinds import ExpertStack

_TRANSPOSED = {
    "InklingSharedExperts": False,
    "JetMoeParallelExperts": False,
    "Llama4TextExperts": True,
    "LongcatFlashExperts": False,
    "Step3p7Experts": False,
}
"""Classes of transformers that do not state `is_transposed`: whether their matrices are stored as (d_in, d_out)."""


def expert_parameters(path: str, module: nn.Module) -> Iterator[str]:
    """Names of a module's own 3-D parameters, if it holds experts and is itself no layer."""
    if "expert" in f"{path} {type(module).__name__}".lower() and not isinstance(module, AdaptedLayer | ExpertStack):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                yield name


def is_transposed(owner: nn.Module) -> bool | None:
    """Whether the owner's matrices are stored as (d_in, d_out); None where neither it nor this file knows."""
    stated = getattr(owner, "is_transposed", None)
    return stated if isinstance(stated, bool) else _TRANSPOSED.get(type(owner).__name__)


def stack(owner: nn.Module, name: str) -> ExpertStack | None:
    """The owner's parameter `name` as a layer, not put in place yet; None where its orientation is not known."""
    parameter, transposed = owner._parameters.get(name), is_transposed(owner)
    if parameter is None or transposed is None or not parameter.is_floating_point():
        return None
    return ExpertStack(parameter, transposed, tuple(owner._parameters))


_UNREAD = (nn.ParameterList, nn.ParameterDict)
"""Owners whose parameters something else reads: whoever indexes them."""
_WRITERS = ("__init__", "__setstate__", "reset_parameters", "_reset_parameters", "extra_repr")


def alone(owner: nn.Module) -> Iterator[str]:
    """Names of a module's own parameters of two or three axes that its code reads, if it is itself no layer."""
    layers = (nn.Linear, nn.Embedding, AdaptedLayer, ExpertStack)
    if isinstance(owner, (*layers, *_UNREAD)):
        return
    owner_class: Any = type(owner)  # a class is hashable, which mypy doubts of module classes
    axes = (2,) if owner_class.__module__.startswith("torch.nn.") else (2, 3)  # three are kernels there
    recurrent = isinstance(owner, nn.RNNBase)  # which reads its parameters by names in a list
    for name, parameter in owner.named_parameters(recurse=False):
        bias = name.endswith("bias")  # of each expert
        taken = parameter.dim() in axes and parameter.is_floating_point() and not bias
        if taken and (recurrent or _reads(owner_class, name)):
            yield name


@functools.cache
def _reads(owner: Any, name: str) -> bool:
    """Whether a function of the class, beside those that make or fill its parameters, has the name in it."""
    functions = (
        inspect.unwrap(member)
        for cls in owner.__mro__
        if cls is not nn.Module
        for key, member in vars(cls).items()
        if inspect.isfunction(member) and key not in _WRITERS
    )
    return any(name in function.__code__.co_names for function in functions)


def single(owner: nn.Module, name: str) -> ExpertStack:
    """The owner's parameter `name`, one of `alone`, as a layer, not put in place yet; stored as peft reads such."""
    transposed = getattr(owner, "is_transposed", False) is True
    parameter = owner.get_parameter(name)
    return ExpertStack(parameter, transposed and parameter.dim() == 3, tuple(owner._parameters), alone=True)


def is_alone(module: nn.Module) -> bool:
    """Whether a layer stands for a parameter alone, which only its name reaches."""
    return isinstance(module, ExpertStack) and module.alone


def stands_for_parameter(module: nn.Module) -> bool:
    """Whether a module, or the base of an adapted layer, is the stack of an owner's parameter."""
    base = module.base if isinstance(module, AdaptedLayer) else module
    return isinstance(base, ExpertStack) and base.owned


def install(owner: nn.Module, name: str, layer: AdaptedLayer) -> None:
    """Put an adapted stack in the place of the owner's parameter."""
    delattr(owner, name)  # a parameter does not give way to a module by itself
    setattr(owner, name, layer)
    if _read_weights not in owner._forward_pre_hooks.values():
        owner.register_forward_pre_hook(_read_weights)
        owner.register_forward_hook(_forget_weights, always_call=True)


def restore(owner: nn.Module, name: str, base: ExpertStack) -> None:
    """Put the plain parameter back, where it was among the others."""
    setattr(owner, name, base.weight)
    owner._parameters = dict(sorted(owner._parameters.items(), key=lambda item: base.siblings.index(item[0])))
    if not any(True for _ in _adapted(owner)):
        for hooks, ours in ((owner._forward_pre_hooks, _read_weights), (owner._forward_hooks, _forget_weights)):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
                owner._forward_hooks_always_called.pop(key, None)


def _adapted(owner: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    for name, module in owner._modules.items():
        if isinstance(module, AdaptedLayer) and stands_for_parameter(module):
            yield name, module


def _read_weights(owner: nn.Module, _inputs: Any) -> None:
    for name, layer in _adapted(owner):
        object.__setattr__(owner, name, layer.weight)  # an attribute of the object is found before its modules


def _forget_weights(owner: nn.Module, _inputs: Any, _output: Any) -> None:
    for name, layer in _adapted(owner):
        if owner.__dict__.pop(name, None) is not None and isinstance(owner, nn.RNNBase):
            setattr(owner, name, layer)  # its own list of weights lets go of that of this call
