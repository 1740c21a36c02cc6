"""How much memory a forward leaves allocated until backward, whatever holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def kept_bytes(call: Callable[..., Tensor], *inputs: Any) -> int:
    """Bytes that a forward leaves allocated, its output among them."""
    call(*inputs)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        output = call(*inputs)
    assert output.requires_grad
    return sum(int(event.self_cpu_memory_usage) for event in found.key_averages())
