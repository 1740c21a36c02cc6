"""Gates of blocks, and what one forward of a model knows: weights of experts, of samples, where the prompt is.

A gate reads the hidden states that enter its block and weights what adapters inside the block do. It runs in the
block's forward pre-hook; adapters read its answer from the context of their forward. What an adapter leaves there is
read by those of later layers (`Adapter.reads_context`).

    forward of the model    opens a ForwardContext                       one object a forward
      block's pre-hook      context.gates[gate] = gate(hidden, context)  (b, l, E)
        adapter             gate_weights(gate), leave(adapter, x), left_by(adapter before)
    backward                recomputes blocks, with the context of their own forward

Contexts are kept in a context variable: threads and asynchronous tasks have their own, and a forward inside another
one puts the outer context back when it ends. Backward may run in another thread, and two forwards may come before one
backward. So activation checkpointing must say which context a recomputation belongs to, which `recomputation` does:

    checkpoint(..., use_reentrant=False, context_fn=recomputation)

Without it the recomputation finds no context and is an error. The reentrant form runs forward without gradients, so
that a gate would never train; it is refused where a gate is read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.linked import Linked, LinkedAdapters
from lora_lightning.errors import AdapterStateError

Phase = Literal["full", "prefill", "decode"]


@dataclass(eq=False)
class ForwardContext:
    """What is known in one forward of a model."""

    sample_weights: Tensor | None = None
    """Weights of experts for each sample, (b, E); None where nobody gave any."""
    prompt_mask: Tensor | None = None
    """True where a token belongs to the prompt, (b, l); None where nobody gave any."""
    phase: Phase = "full"
    """"full" where a forward sees whole texts, in training and evaluation; "prefill" and "decode" while generating."""
    gates: dict[nn.Module, Tensor] = field(default_factory=dict)
    """What gates have answered, (b, l, E)."""
    values: dict[nn.Module, tuple[Tensor, ...]] = field(default_factory=dict)
    """What adapters have left for those of later layers."""
    overwritten: set[nn.Module] = field(default_factory=set)
    """Adapters that have left values more than once."""
    wants_gradients: bool = False
    """Whether gradients were on when the forward began."""
    opened: tuple[int, Token[Any]] | None = None
    """Which model's forward opened it, and how the context before is put back."""


class Gate(Linked):
    """A module at a block that weights E experts, token by token, from the hidden states that enter the block.

    It is asked in each forward, whether adapters that read it are active or not.
    """

    group: ClassVar[str] = "gate"

    @abstractmethod
    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Weights (b, l, E) for hidden states (b, l, d)."""


_given: ContextVar[ForwardContext] = ContextVar("given", default=ForwardContext())  # noqa: B039 - replaced, never changed
_current: ContextVar[ForwardContext | None] = ContextVar("current", default=None)
_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)


@contextmanager
def context(sample_weights: Tensor | None = None, prompt_mask: Tensor | None = None) -> Iterator[None]:
    """What forwards inside the block know beside their inputs.

    Args:
        sample_weights: weights of experts for each sample, (b, E).
        prompt_mask: True where a token belongs to the prompt, (b, l).
    """
    token = _given.set(ForwardContext(sample_weights, prompt_mask))
    try:
        yield
    finally:
        _given.reset(token)


def current() -> ForwardContext:
    """The context of the forward that runs now.

    Raises:
        AdapterStateError: none runs, or activations are recomputed without saying of which forward.
    """
    found = _current.get()
    if found is None:
        raise AdapterStateError(
            "a gate was asked, or an earlier layer's value, outside a forward of the model that was adapted. Call that "
            "model; and where "
            "activations are recomputed, give gradient_checkpointing_enable, or torch's checkpoint, "
            "use_reentrant=False and context_fn=lora_lightning.injection.gates.recomputation."
        )
    return found


def gate_weights(gate: Gate) -> Tensor:
    """What `gate` has answered in this forward, (b, l, E).

    Raises:
        AdapterStateError: its block has not been entered; or gradients are off inside a forward that wants them, as
            under reentrant checkpointing.
    """
    now = current()
    _refuse_reentrant(now, gate)
    if gate not in now.gates:
        raise AdapterStateError(f"the block of a {type(gate).__name__} was not entered before a layer inside it.")
    return now.gates[gate]


def leave(adapter: nn.Module, *values: Tensor) -> None:
    """Keep values of an adapter for those of later layers in the same forward; a recomputation leaves the first ones.

    Raises:
        AdapterStateError: gradients are off inside a forward that wants them, as under reentrant checkpointing.
    """
    now = current()
    _refuse_reentrant(now, adapter)
    if _recomputing.get():
        return  # the graph of the forward hangs on what it has left
    if adapter in now.values:
        now.overwritten.add(adapter)
    now.values[adapter] = values


def left_by(adapter: nn.Module) -> tuple[Tensor, ...]:
    """What `adapter` has left in this forward.

    Raises:
        AdapterStateError: its layer has not been called; or activations are recomputed of a forward that has called it
            more than once, so that the earlier values are gone.
    """
    now = current()
    if adapter not in now.values:
        raise AdapterStateError(
            f"an earlier layer of a {type(adapter).__name__} was not called before a layer that reads its values; "
            "exclude layers that a forward leaves out."
        )
    if _recomputing.get() and adapter in now.overwritten:
        raise AdapterStateError(
            f"the layer of a {type(adapter).__name__} is called several times in a forward, and what it left first is "
            "gone when activations are recomputed; train without gradient checkpointing."
        )
    return now.values[adapter]


def _refuse_reentrant(now: ForwardContext, module: nn.Module) -> None:
    if now.wants_gradients and not torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
        raise AdapterStateError(
            f"{type(module).__name__} trains, but its block runs without gradients inside a forward that has them, as "
            "reentrant checkpointing does; its gradient would be lost. Take use_reentrant=False, and "
            "context_fn=lora_lightning.injection.gates.recomputation."
        )


def recomputation() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """`context_fn` of torch's checkpoint: a recomputation gets the context of the forward that it repeats."""
    return nullcontext(), _restored(_current.get())


@contextmanager
def _restored(own: ForwardContext | None) -> Iterator[None]:
    token, recomputing = _current.set(own), _recomputing.set(True)
    try:
        yield
    finally:
        _current.reset(token)
        _recomputing.reset(recomputing)


# -- hooks: plain functions that find all they need on their module, so that a copy of a model has its own -------------


def add_gate_hooks(model: nn.Module, block: nn.Module) -> None:
    """Let each forward of `model` have a context of its own, and `block` ask its gates when it is entered; once."""
    add_context_hooks(model)
    if _ask_gates not in block._forward_pre_hooks.values():
        block.register_forward_pre_hook(_ask_gates, with_kwargs=True)


def add_context_hooks(model: nn.Module) -> None:
    """Let each forward of `model` have a context of its own; once."""
    if _begin not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_begin, prepend=True, with_kwargs=True)
        model.register_forward_hook(_end, always_call=True)


def remove_gate_hooks(block: nn.Module) -> None:
    """Take the hook off `block` where it has no gate left."""
    if not any(isinstance(module, Gate) for module in block.modules()):
        _remove(block._forward_pre_hooks, _ask_gates)


def remove_context_hooks(model: nn.Module) -> None:
    """Take the hooks off `model` where nothing in it reads a context any more."""
    if not any(isinstance(module, Gate) or getattr(module, "reads_context", False) for module in model.modules()):
        _remove(model._forward_pre_hooks, _begin)
        _remove(model._forward_hooks, _end)


def _remove(hooks: MutableMapping[int, Any], function: Callable[..., Any]) -> None:
    for key in [key for key, hook in hooks.items() if hook is function]:
        del hooks[key]


def _begin(model: nn.Module, _: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    own = replace(_given.get(), phase=_phase(kwargs), gates={}, wants_gradients=torch.is_grad_enabled())
    own.values, own.overwritten = {}, set()
    own.opened = (id(model), _current.set(own))


def _end(model: nn.Module, *_: Any) -> None:
    now = _current.get()
    if now is not None and now.opened is not None and now.opened[0] == id(model):
        _current.reset(now.opened[1])


def _phase(kwargs: Mapping[str, Any]) -> Phase:
    """By the cache of keys and values that a forward is given: none, an empty one, or one that holds a prompt."""
    cache = kwargs.get("past_key_values")
    if cache is None:
        return "full"
    return "decode" if cache.get_seq_length() else "prefill"


def _ask_gates(block: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    now = current()
    hidden = inputs[0] if inputs else kwargs["hidden_states"]
    for gate in cast(LinkedAdapters, block.adapters).values():
        if isinstance(gate, Gate):
            now.gates[gate] = gate(hidden, now)
