"""What trains stays in float32 when a model is cast to half precision, where small updates would be lost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

HALVES = (torch.float16, torch.bfloat16)


def kept(change: Callable[[Tensor], Tensor], precise: Callable[[Tensor], bool]) -> Callable[[Tensor], Tensor]:
    """`change`, as `nn.Module._apply` takes it, without its cast to half precision where `precise` says so."""

    def apply(tensor: Tensor) -> Tensor:
        changed = change(tensor)
        lowered = changed.dtype in HALVES and tensor.dtype in (torch.float32, torch.float64)
        return tensor.to(changed.device) if lowered and precise(tensor) else changed

    return apply


def compute_in_float32(owners: Iterable[nn.Module]) -> None:
    """Turn a module's own half-precision parameters to float32; what it takes and gives stays in half precision.

    A parameter that several of them share stays shared.
    """
    precise: dict[int, nn.Parameter] = {}
    for owner in owners:
        half = next((p.dtype for p in owner.parameters(recurse=False) if p.dtype in HALVES), None)
        if half is not None:
            for name, parameter in list(owner.named_parameters(recurse=False)):
                new = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
                owner._parameters[name] = precise.setdefault(id(parameter), new)
            owner.register_forward_pre_hook(_raise_inputs)
            owner.register_forward_hook(functools.partial(_lower_output, half))


def _raise_inputs(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.dtype in HALVES else x for x in inputs)


def _lower_output(half: torch.dtype, _module: nn.Module, _inputs: Any, output: Any) -> Any:
    return output.to(half) if isinstance(output, Tensor) and output.dtype == torch.float32 else output
