"""Losses of a language model without all of its logits: labelled tokens alone go through the output layer, in chunks.

    way         what the output layer gets               the largest tensor
    chunks      states of labelled tokens, piecewise     (chunk, vocabulary)
    labelled    states of labelled tokens                (labelled tokens, vocabulary)
    plain       states of all tokens                     (tokens, vocabulary)

Both short ways call the whole model with another forward in the place of its output layer's. With `labelled` it picks
rows and goes on, so that what the model does with its logits (a soft cap, a mask, a scale) happens as always. With
`chunks` it gives the states back in place of logits, and they go through the output layer afterwards; the model's work
on its logits then happens to the states, which is the same where that work is a product with a number, and only there.

No name of a model or setting decides which way is right. `choose` asks the model: what comes out where the output layer
gives known numbers, and whether a few tokens have the log-probabilities that they have the plain way.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lora_lightning.models.heads import output_embeddings

IGNORED = -100
"""Target of a token without loss."""
CHUNK = 2**24
"""Logits of a chunk, at most."""
FEWEST = 128
"""Rows of a chunk, at least, where so many logits are no more than `CHUNK`: products with fewer rows are slow."""
Way = Literal["chunks", "labelled", "plain"]
_KEY = "_lora_lightning_loss_head"
_TOLERANCE = {8: 1e-6, 4: 1e-3, 2: 0.1}
"""Largest difference of log-probabilities that passes, by bytes a number."""


class UnsuitedError(Exception):
    """A model does not use its output layer in the one way that can be shortened; the text says why."""


@dataclass(frozen=True)
class LossHead:
    """Which way a model's losses are computed, and why not a shorter one."""

    way: Way
    reason: str = ""

    def __str__(self) -> str:
        told = {
            "chunks": "labelled tokens alone go through the output layer, in chunks",
            "labelled": "labelled tokens alone go through the output layer, all at once",
            "plain": "plain, logits of all tokens",
        }
        return told[self.way] + (f" ({self.reason})" if self.reason else "")


def loss_head(model: nn.Module) -> LossHead:
    """How losses of this model are computed; the model is asked at the first call, and never again."""
    if not isinstance(model, nn.Module):  # a function has no output layer
        return LossHead("plain")
    known = cast("LossHead | None", model.__dict__.get(_KEY))
    if known is None:
        known = choose(model)
        set_loss_head(model, known)
    return known


def set_loss_head(model: nn.Module, head: LossHead) -> None:
    """Say how losses of this model are computed."""
    model.__dict__[_KEY] = head


def next_tokens(labels: Tensor) -> Tensor:
    """Targets of a causal model, (b, l): at each place the label of the next one, and none at the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def decoder_inputs(model: nn.Module, labels: Tensor) -> dict[str, Tensor]:
    """What a decoder gets to give `labels`, (b, l), as the model itself makes it of them.

    That is the model's own function, else `shift_tokens_right` of the file that its class stands in; `choose` compares
    what comes of it with what the model makes of the labels.

    Raises:
        UnsuitedError: there is no such function.
    """
    if (shift := getattr(model, "prepare_decoder_input_ids_from_labels", None)) is not None:
        return {"decoder_input_ids": shift(labels=labels)}
    config = cast(Any, model).config
    for kind in type(model).__mro__:  # FSDP2 puts a class of its own in front
        shift = getattr(sys.modules.get(kind.__module__), "shift_tokens_right", None)
        if shift is not None and len(inspect.signature(shift).parameters) == 3:
            return {"decoder_input_ids": shift(labels, config.pad_token_id, config.decoder_start_token_id)}
    raise UnsuitedError(f"{type(model).__name__} shifts labels inside its forward only")


def token_log_probs(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
    """Log-probability of each target, (b, l) in float32 at least; 0 where there is none.

    Args:
        model: a language model of transformers, adapted or not.
        inputs: what its forward gets; no labels.
        targets: (b, l), the token that the output at each place is to give, or `IGNORED`; see `next_tokens`.
    """
    chosen, wanted = _chosen(targets)
    values = _by(loss_head(model).way, model, inputs, chosen, wanted, "none")
    found = values.new_zeros(targets.shape)
    return found.masked_scatter(chosen, -values)


def summed_loss(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
    """Cross-entropy summed over the targets, (), in float32 at least; arguments as of `token_log_probs`."""
    chosen, wanted = _chosen(targets)
    return _by(loss_head(model).way, model, inputs, chosen, wanted, "sum")


def _chosen(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Places with a target, and the targets; the first place where there is none, so that gradients are zeros."""
    chosen = targets != IGNORED
    if not chosen.any():
        chosen = torch.zeros_like(chosen)
        chosen[:1, :1] = True
    return chosen, targets[chosen]


def _by(way: Way, model: nn.Module, inputs: Mapping[str, Any], chosen: Tensor, wanted: Tensor, reduce: str) -> Tensor:
    """Cross-entropy of the chosen places, (n,) or summed."""
    if way == "plain":
        logits = cast(Any, model)(**inputs).logits[chosen]
        return _cross_entropy(logits, wanted, reduce)
    if way == "labelled":
        return _cross_entropy(_selected(model, inputs, chosen), wanted, reduce)
    return _in_chunks(_output_layer(model), _states(model, inputs, chosen), wanted, reduce)


def _cross_entropy(logits: Tensor, wanted: Tensor, reduce: str) -> Tensor:
    return F.cross_entropy(_wide(logits), wanted, ignore_index=IGNORED, reduction=reduce)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -- through the model, with another forward in the place of its output layer's ----------------------------------------


def _output_layer(model: nn.Module) -> nn.Module:
    return cast(nn.Module, output_embeddings(model))


@contextmanager
def _standing_in(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    before = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


def _through(model: nn.Module, inputs: Mapping[str, Any], give: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits as the model returns them where its output layer gives `give(states)`; it must be called once."""
    calls = 0

    def forward(states: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return give(states)

    with _standing_in(_output_layer(model), forward):
        logits: Tensor = cast(Any, model)(**inputs).logits
    if calls != 1:
        raise UnsuitedError(f"{type(model).__name__} calls its output layer {calls} times a forward")
    return logits


def _picked(states: Tensor, chosen: Tensor) -> Tensor:
    """States (1, n, width) of the chosen places, of (b, l, width)."""
    if states.shape[:-1] != chosen.shape:
        raise UnsuitedError(f"its output layer gets {tuple(states.shape[:-1])} states for {tuple(chosen.shape)} tokens")
    return states[chosen].unsqueeze(0)


def _selected(model: nn.Module, inputs: Mapping[str, Any], chosen: Tensor) -> Tensor:
    """Logits of the chosen places, (n, vocabulary)."""
    own = _output_layer(model).forward
    return _through(model, inputs, lambda states: own(_picked(states, chosen))).squeeze(0)


def _states(model: nn.Module, inputs: Mapping[str, Any], chosen: Tensor) -> Tensor:
    """What the output layer gets at the chosen places, (n, width), times what the model multiplies logits by."""
    dtype = torch.float32

    def keep(states: Tensor) -> Tensor:
        nonlocal dtype
        dtype = states.dtype
        return _picked(states, chosen)

    return _through(model, inputs, keep).squeeze(0).to(dtype)


# -- in chunks ---------------------------------------------------------------------------------------------------------


def chunk_rows(count: int, vocabulary: int) -> int:
    """Rows of a chunk: a quarter of all, but at least `FEWEST`, and no more than `CHUNK` logits."""
    return max(1, min(CHUNK // vocabulary, max(FEWEST, -(-count // 4))))


def _in_chunks(layer: nn.Module, states: Tensor, wanted: Tensor, reduce: str) -> Tensor:
    """Cross-entropy of states (n, width) through an output layer; no more than `CHUNK` logits at a time."""
    rows = chunk_rows(len(states), int(cast(Any, layer.out_features)))
    if reduce == "sum" and _fused(layer, states):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None, acc_policy="compact")
        weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
        return F.linear_cross_entropy(
            states, weight, wanted, linear_bias=bias, reduction="sum", ignore_index=IGNORED, options=options
        )

    def one(states: Tensor, wanted: Tensor) -> Tensor:
        return _cross_entropy(layer(states), wanted, reduce)

    pieces = [
        cast(Tensor, checkpoint(one, *piece, use_reentrant=False))
        for piece in zip(states.split(rows), wanted.split(rows), strict=True)
    ]
    return torch.cat(pieces) if reduce == "none" else torch.stack(pieces).sum()


def _fused(layer: nn.Module, states: Tensor) -> bool:
    """Whether torch's own chunked loss computes what calling the layer does: a plain matrix, in float32 or float64.

    In half precision it would round the sum; autocast does not reach into it.
    """
    weight = layer._parameters.get("weight")
    return (
        type(layer).forward is nn.Linear.forward
        and weight is not None
        and not is_traceable_wrapper_subclass(weight)
        and states.dtype == weight.dtype
        and states.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(states.device.type)
    )


# -- which way ---------------------------------------------------------------------------------------------------------


def choose(model: nn.Module) -> LossHead:
    """The shortest way that is right for this model, found by trying on 16 tokens; weights and modes stay as they are.

    Under sharding every process has to take part.
    """
    if output_embeddings(model) is None:
        return LossHead("plain", f"{type(model).__name__} does not say which its output layer is")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    device = next(model.parameters()).device.type
    reasons: list[str] = []
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            for way, suits in (("chunks", _check_chunks), ("labelled", _check_labelled)):
                try:
                    suits(model)
                    return LossHead(cast(Way, way), "; ".join(reasons))
                except UnsuitedError as error:
                    reasons.append(str(error))
                except Exception as error:  # whatever a model does with what it does not expect
                    what = " ".join(str(error).split())[:100]
                    reasons.append(f"its forward does not take this: {type(error).__name__}: {what}")
        return LossHead("plain", "; ".join(dict.fromkeys(reasons)))
    finally:
        for module, mode in modes.items():
            module.training = mode


def choose_without_values(model: nn.Module) -> LossHead:
    """What `choose` would find, for a model of fake tensors: by the operations between output layer and logits.

    Products with a number, casts and views leave logits multiples of what the output layer gives.
    """
    if output_embeddings(model) is None:
        return LossHead("plain", f"{type(model).__name__} does not say which its output layer is")
    try:
        with torch.no_grad():
            inputs, targets = _sample(model)
            _selected(model, inputs, torch.ones_like(targets, dtype=torch.bool))
            tail = _Tail()
            size = int(cast(Any, _output_layer(model).out_features))
            with tail:
                found = _through(model, inputs, lambda states: tail.begin(states.new_zeros(*states.shape[:-1], size)))
            return LossHead("chunks" if tail.scales and found.shape[-1] == size else "labelled")
    except Exception as error:  # whatever a model does with what it does not expect
        return LossHead("plain", f"{type(error).__name__}: {' '.join(str(error).split())[:100]}")


class _Tail(TorchDispatchMode):
    """Notes whether what comes of a tensor are multiples of it."""

    _SCALING = frozenset({"_to_copy", "view", "_unsafe_view", "alias", "detach", "slice", "clone", "neg", "mul", "div"})

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scales = True
        self._come: dict[int, Tensor] = {}

    def begin(self, tensor: Tensor) -> Tensor:
        """The tensor, from which on operations are noted."""
        self._come[id(tensor)] = tensor
        return tensor

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ):
        """Run the operation; note one that reads the tensor, or what came of it."""
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(id(tensor) in self._come for tensor in tensors):
            self.scales &= len(tensors) == 1 and func.overloadpacket.__name__ in self._SCALING
            self._come |= {id(leaf): leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        return result


def _check_labelled(model: nn.Module) -> None:
    _check_equal(model, "labelled")


def _check_chunks(model: nn.Module) -> None:
    layer = _output_layer(model)
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise UnsuitedError("its output layer has hooks")
    if any(isinstance(module, FSDPModule) for module in layer.modules()):
        raise UnsuitedError("its output layer has shards of its own, which are gathered inside the model's forward")
    _check_scaled(model)
    _check_equal(model, "chunks")
    if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
        raise UnsuitedError("its output layer is whole inside the model's forward only")


def _check_scaled(model: nn.Module) -> None:
    """Raise `UnsuitedError` unless what comes out of the model is a multiple of what its output layer gives."""
    inputs, targets = _sample(model)
    given: list[Tensor] = []
    size = int(cast(Any, _output_layer(model).out_features))

    def known(states: Tensor) -> Tensor:
        shape = (*states.shape[:-1], size)
        values = torch.linspace(-2000, 2000, targets.numel() * size, device=states.device)
        given.append(values[torch.arange(len(values), device=states.device) * 7919 % len(values)].view(shape))
        given[0] = given[0].to(states.dtype)
        return given[0].clone()

    found = _through(model, inputs, known)
    values, logits = _wide(given[0]), _wide(found)
    if logits.shape != values.shape:
        raise UnsuitedError(f"it cuts logits {tuple(values.shape)} to {tuple(logits.shape)}")
    scale = (logits * values).sum() / values.square().sum()
    far = (logits - scale * values).abs().max() / (scale * values).abs().max().clamp_min(1e-30)
    if not far <= (1e-5 if given[0].element_size() >= 4 else 2e-2):
        raise UnsuitedError("it changes logits by more than a factor, as a soft cap does")


def _check_equal(model: nn.Module, way: Way) -> None:
    """Raise `UnsuitedError` unless a few tokens have the log-probabilities that they have the plain way."""
    inputs, targets = _sample(model)
    chosen, wanted = _chosen(targets)
    whole = dict(inputs)
    if whole.pop("decoder_input_ids", None) is not None:
        whole["labels"] = targets
    plain = _by("plain", model, whole, chosen, wanted, "none")
    found = _by(way, model, inputs, chosen, wanted, "none")
    size = min(p.element_size() for p in model.parameters() if p.is_floating_point())
    far = float(((found - plain).abs() / plain.abs().clamp_min(1)).max())
    if not far <= _TOLERANCE.get(size, 0.1):
        raise UnsuitedError(f"log-probabilities differ by {far:.2g}")


def _sample(model: nn.Module) -> tuple[dict[str, Any], Tensor]:
    """Inputs of two rows of eight tokens, and targets for half of their places."""
    hf_model: Any = model
    rows = getattr(hf_model.get_input_embeddings(), "num_embeddings", 19)
    ids = (torch.arange(3, 19, device=next(model.parameters()).device) % rows).view(2, 8)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "use_cache" in inspect.signature(hf_model.forward).parameters:
        inputs["use_cache"] = False
    targets = ids.flip(1).clone()
    targets[:, ::2] = IGNORED
    if hf_model.config.is_encoder_decoder:
        inputs |= decoder_inputs(model, targets)
    return inputs, targets
