"""One training step without values: what it holds in memory at its fullest, before anything is loaded.

Inside `without_values` every tensor is one of torch's fake tensors: shape, dtype and autograd are real, the data lie on
the meta device and take no memory. The model, its adapters and its optimizer run there as they are, so the count is of
this model with this method, attention and checkpointing, and of no formula. `Meter` adds up the storages that are
alive. Where a value would decide, it is taken as 1 or true, so that a mask selects everything; an optimizer that stops
at its own checks then gets the other answer.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.modules.linear_cross_entropy  # which registers the operation
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.initialization import no_init_weights

from lora_lightning.cli.preflight.memory import Unit, quantized_size
from lora_lightning.training.strategies.units import find_blocks


@dataclass(frozen=True)
class Step:
    """Bytes of one process in a training step, nothing sharded. Tensors that share a storage count once."""

    optimizer: int
    """Optimizer state."""
    kept: int
    """Buffers, and what adapters keep from the frozen weights between steps."""
    activations: int
    """The most held beside parameters, gradients, optimizer state and what is kept: saved for backward, logits, loss,
    and whatever is made on the way."""


class Meter(TorchDispatchMode):
    """Bytes of all tensor storages that are alive, made inside the block or given to `count`, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.answer = True
        """What a value that is asked for is taken as."""
        self._known: set[int] = set()

    def count(self, tensor: Tensor) -> None:
        """Add the storage of `tensor`, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ):
        """Run the operation and count what it makes."""
        if func is torch.ops.torch_nn._linear_cross_entropy_batch_chunked.default:  # whose rules leave out its chunk
            self.count(_chunk(*args))
        result = _run(func, args, dict(kwargs or {}), self.answer)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self.count(leaf)
        return result


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], answer: bool) -> Any:
    """The operation without values; where it depends on one, its result for `answer`, or for true everywhere."""
    if func is torch.ops.aten._grouped_mm.default:  # whose rules for meta tensors take bfloat16 alone
        return _grouped(*args, **kwargs)
    try:
        return func(*args, **kwargs)
    except DataDependentOutputException:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is not torch.bool:
            return float(answer) if args[0].is_floating_point() else int(answer)
        return answer  # of a comparison
    except DynamicOutputShapeException:
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_zeros((args[0].numel(), args[0].dim()), dtype=torch.long)
        if func is torch.ops.aten.masked_select.default:
            return args[0].new_zeros(args[0].numel())
        if func is torch.ops.aten.index.Tensor:
            return func(args[0], _everything(args[1]), **kwargs)
        raise


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, out_dtype: torch.dtype | None = None) -> Tensor:
    """What products of groups of rows are written into; the group is a dimension where neither side has one."""
    groups = () if a.dim() != b.dim() else (a.shape[0] if offs is None else offs.shape[0],)
    return a.new_empty((*groups, a.shape[-2], b.shape[-1]), dtype=out_dtype)


def _chunk(states: Tensor, weight: Tensor, targets: Tensor, *options: Any) -> Tensor:
    """The logits of a chunk, with which torch's chunked loss works; its rows are the sixth of the options."""
    return states.new_empty(min(options[5], len(targets)), len(weight))


def _everything(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Boolean masks in `indices` as the indices they would be with every entry true."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype is not torch.bool:
            found.append(index)
        else:
            found += [index.new_zeros(index.numel(), dtype=torch.long) for _ in range(index.dim())]
    return found


class GpuKernels(TorchFunctionMode):
    """Functions as a GPU's kernels hold memory: attention drops entries without keeping them, dropout keeps bytes."""

    def __torch_function__(  # type: ignore[no-untyped-def]
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ):
        """Run the function, or its counterpart."""
        options = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            options.pop("dropout_p", None)
            args = args[:4] + (0.0,) * (len(args) > 4) + args[5:]
        if func is F.dropout:
            x, p, training, inplace = _bind(args, options)
            if training and p and not inplace:
                return torch.native_dropout(x, p, True)[0]
        return func(*args, **options)


def _bind(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, float, bool, bool]:
    names, defaults = ("input", "p", "training", "inplace"), (None, 0.5, True, False)
    given = {**dict(zip(names, defaults, strict=True)), **dict(zip(names, args, strict=False)), **options}
    return given["input"], given["p"], given["training"], given["inplace"]


@contextmanager
def without_values(gpu: bool = True) -> Iterator[Meter]:
    """Inside, tensors have no data. Gives the meter that counts them.

    Args:
        gpu: whether operations hold memory as a GPU's kernels do, or as the CPU's.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        # some values are drawn until all lie within bounds, which those that are not there never do
        with no_init_weights(), FakeTensorMode(), Meter() as meter, GpuKernels() if gpu else nullcontext():
            yield meter


def trace_step(
    meter: Meter,
    model: nn.Module,
    loss: Callable[[], Tensor],
    optimizer: Callable[[], Optimizer],
    autocast: torch.dtype | None = None,
    whole: bool = False,
) -> Step:
    """Run forward, backward and an optimizer step inside `without_values`, and say what they hold.

    Gradients are there from the start, as between the batches of an accumulation window. Of a model that is one list of
    equal blocks, two and three of them are run: everything grows by as much with each further one.

    Args:
        meter: what `without_values` gave.
        model: in train mode, with adapters; made inside the block.
        loss: computes the loss of one batch with `model`.
        optimizer: makes a fresh one over the trainables of `model`.
        autocast: dtype of mixed precision; None for none.
        whole: run all blocks, whatever they are.
    """
    fixed = meter.live - size(list(model.parameters()))
    stack = None if whole else _equal_blocks(model)
    if stack is None:
        last = next(reversed(find_blocks(model).values()), model)
        run = _run_step(meter, model, last, loss, optimizer, autocast)
        return Step(run.optimizer, fixed + run.kept, max(run.early, run.late))
    every = dict(stack._modules)
    runs = []
    for depth in (2, 3):
        stack._modules = dict(list(every.items())[:depth])
        runs.append(_run_step(meter, model, stack[-1], loss, optimizer, autocast))
    stack._modules = every
    two, three = runs
    more = len(every) - 2
    return Step(
        optimizer=two.optimizer + more * (three.optimizer - two.optimizer),
        kept=fixed + two.kept + more * three.kept,  # the first two blocks kept theirs already
        activations=max(two.early, two.late + more * (three.saved - two.saved)),
    )


@dataclass(frozen=True)
class _Run:
    optimizer: int
    kept: int
    """What was made and is still there."""
    saved: int
    """Held for backward."""
    early: int
    """Peak before the last block starts."""
    late: int
    """Peak from there on."""


def _run_step(
    meter: Meter,
    model: nn.Module,
    last: nn.Module,
    loss: Callable[[], Tensor],
    make: Callable[[], Optimizer],
    autocast: torch.dtype | None,
) -> _Run:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    early = start = meter.peak = meter.live

    def starts(_module: nn.Module, _inputs: Any) -> None:
        nonlocal early
        handle.remove()  # a block that is recomputed starts again
        early, meter.peak = meter.peak, meter.live

    handle = last.register_forward_pre_hook(starts)
    device = next(model.parameters()).device.type
    with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        value = loss()
    saved = meter.live - start
    value.backward()
    del value
    kept, late = meter.live - start, meter.peak
    optimizer = make()
    _step(meter, optimizer)
    state = size([value for values in optimizer.state.values() for value in values.values()])
    for parameter in trained:
        parameter.grad = None
    meter.answer = True
    return _Run(state, kept, saved - kept, early - start - kept, late - start - kept)


def _equal_blocks(model: nn.Module) -> nn.ModuleList | None:
    """The list of the model's blocks, where there is one with at least four that are all alike."""
    every = set(map(id, find_blocks(model).values()))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    stacks = [modules for modules in lists if every.intersection(map(id, modules))]
    if len(stacks) != 1 or len(stacks[0]) < 4 or every != set(map(id, stacks[0])):
        return None
    kinds = {_kind(block) for block in stacks[0]}
    attentions = set(getattr(getattr(model, "config", None), "layer_types", None) or ())  # which no repr shows
    return stacks[0] if len(kinds) == 1 and len(attentions) < 2 else None


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks that hold and compute the same."""
    parameters = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())
    return repr(block), parameters


def _step(meter: Meter, optimizer: Optimizer) -> None:
    """One step; a check that a value of 0 fails gets a value of 1."""
    for answer in (False, True):
        meter.answer = answer
        try:
            optimizer.step()
            return
        except Exception:
            if answer:
                raise


def size(values: list[Any]) -> int:
    """Bytes of the tensors among `values`; those that share a storage once."""
    bytes_of: dict[int, int] = {}
    for value in values:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            bytes_of[storage._cdata] = storage.nbytes()
    return sum(bytes_of.values())


def units(model: nn.Module, quantized: str | None = None) -> tuple[tuple[Unit, ...], Unit]:
    """Sizes of the blocks, and of what lies outside them; a shared parameter counts where it comes first.

    Args:
        model: with adapters.
        quantized: format in which frozen linear weights inside blocks would lie (`estimate.PACKED`); None as they are.
    """
    seen: set[int] = set()
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}

    def unit(module: nn.Module, frozen_format: str | None) -> Unit:
        frozen = trained = 0
        for parameter in module.parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if parameter.requires_grad:
                trained += size([parameter])
            elif frozen_format and id(parameter) in linear:
                frozen += quantized_size(parameter.shape, frozen_format)
            else:
                frozen += size([parameter])
        return Unit(frozen, trained)

    found = tuple(unit(block, quantized) for block in find_blocks(model).values())
    return found, unit(model, None)


def largest_linear(model: nn.Module) -> int:
    """Bytes of the largest linear weight inside blocks."""
    largest = 0
    for block in find_blocks(model).values():
        for module in block.modules():
            if isinstance(module, nn.Linear):
                largest = max(largest, size([module.weight]))
    return largest
