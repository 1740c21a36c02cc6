"""Probe: what a method may learn from a model and some batches before its adapters are built or started.

    inputs(paths)        what modules were called with, batch by batch
    around(paths, f)     what f makes of what enters and leaves modules, a row an example
    covariances(paths)   mean of x x^T over the tokens that reached a layer, (d_in, d_in)
    gradients(paths)     mean over batches of dL/dW, (d_out, d_in)
    losses()             one number a batch

Each is one pass over the batches, in eval mode, with a bar where it takes long. A pass leaves nothing behind: training
mode, `requires_grad`, gradients, hooks, random numbers and the model's device are as they were. Only the model's
forward is run, before anything is sharded, so one process can ask while others wait.

The gradient of a weight is read where the layer is called: of y = W x with g = dL/dy it is g x^T. No weight needs
`requires_grad`, quantized ones have gradients too, and one (d_out, d_in) matrix lies on the device at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import SettingsError, did_you_mean
from lora_lightning.injection.answers import Remember, asked_anew

PART = 2**28
"""Numbers of the matrices that are held at once where a start is computed from all layers: 2 GiB of float64."""
Hook = Callable[[str, Tensor, Any], Tensor | None]
"""Called with a module's path, its first input and its output; what it returns takes the output's place."""
SILENT = 3.0
"""Seconds of a pass without a bar."""


def loss_of_output(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a Hugging Face model gives when it is called with a batch that has labels."""
    return cast(Tensor, model(**batch).loss)


class Probe:
    """Calibration batches and a loss, for `inject(..., probe=Probe(batches, loss))`.

    Args:
        batches: few batches; they are kept, and walked through once a pass.
        loss: called with the model and a batch; by default that of a Hugging Face model's output.
        device: where the model goes for a pass; None leaves it where it is. Batches follow it.
        remember: finds an earlier answer of the method on the same model and batches; by default every one is new.

    Attributes:
        passes: how often the batches have been walked through.
        model: the plain model, while its adapters are built.
        layers: its matched layers by path, at the same time.
    """

    def __init__(
        self,
        batches: Iterable[Any] = (),
        loss: Callable[[nn.Module, Any], Tensor] = loss_of_output,
        device: torch.device | str | None = None,
        remember: Remember = asked_anew,
    ) -> None:
        self.batches, self.loss, self.device, self.remember = list(batches), loss, device, remember
        self.passes = 0
        self._watching = True
        self._mask: Tensor | None = None
        self.model: nn.Module = nn.Identity()
        self.layers: Mapping[str, BaseLayer] = {}

    @contextmanager
    def on(self, model: nn.Module, layers: Mapping[str, BaseLayer]) -> Iterator[Probe]:
        """Bind the probe to a model and its matched layers inside the block."""
        self.model, self.layers = model, layers
        try:
            yield self
        finally:
            self.model, self.layers = nn.Identity(), {}

    # -- what can be asked ---------------------------------------------------------------------------------------------

    def inputs(self, paths: Sequence[str] | None = None) -> dict[str, list[Tensor]]:
        """The first input of any modules, one tensor a call as it came, on the CPU; of all matched layers by default.

        Raises:
            SettingsError: there are no batches, or none of them reaches a module.
        """
        found: dict[str, list[Tensor]] = {}

        def keep(path: str, x: Tensor, _: Tensor) -> None:
            found.setdefault(path, []).append(x.to("cpu", copy=True))

        self._run(self._paths(paths), keep)
        return found

    def around(
        self, paths: Sequence[str], reduce: Callable[[str, Tensor, Tensor | None], Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """What enters and what leaves any modules, reduced call by call, all calls joined along the first axis.

        Only what `reduce` keeps is held, on the CPU; what leaves one module and enters the next is held once.

        Args:
            paths: of modules.
            reduce: called with a module's path, its first input or output, and the batch's `attention_mask` or None.

        Raises:
            SettingsError: see `inputs`.
        """
        found: dict[str, tuple[list[Tensor], list[Tensor]]] = {path: ([], []) for path in paths}
        last = torch.empty(0)

        def kept(path: str, x: Tensor) -> Tensor:
            nonlocal last
            new = reduce(path, x.detach(), self._mask).cpu()
            if new.shape != last.shape or new.dtype != last.dtype or not torch.equal(new, last):
                last = new
            return last

        def keep(path: str, x: Tensor, y: Any) -> None:
            before, after = found[path]
            before.append(kept(path, x))
            after.append(kept(path, _first_tensor(y)))

        self._run(paths, keep)
        return {path: (torch.cat(before), torch.cat(after)) for path, (before, after) in found.items()}

    def covariances(
        self,
        paths: Sequence[str] | None = None,
        centred: bool = False,
        scaled: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> dict[str, Tensor]:
        """Mean of x x^T of linear layers' inputs, (d_in, d_in), in float64 on the CPU.

        Positions that the batch's `attention_mask` leaves out do not count. Matrices of all asked layers are held at
        once; `in_parts` asks for some layers at a time.

        Args:
            paths: of the layers; None for all.
            centred: whether the mean of x is taken off.
            scaled: is given the rows (tokens, d_in) of each call, and gives those that count.

        Raises:
            SettingsError: a layer that is not linear; and see `inputs`.
        """
        wanted = self._paths(paths)
        for path in wanted:
            if self._layer(path).kind != "linear":
                raise SettingsError(
                    f"{path} is of kind {self._layer(path).kind}; a covariance of inputs is that of linear layers."
                )
        sums: dict[str, Tensor] = {}
        means: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def add(path: str, x: Tensor, _: Tensor) -> None:
            rows = scaled(self._seen(x).double())
            product, total = (rows.mT @ rows).cpu(), rows.sum(dim=0).cpu()
            sums[path] = sums[path].add_(product) if path in sums else product
            means[path] = means[path].add_(total) if path in means else total
            counts[path] = counts.get(path, 0) + len(rows)

        self._run(wanted, add)
        found = {path: total / max(counts[path], 1) for path, total in sums.items()}
        if centred:
            for path, covariance in found.items():
                mean = means[path] / max(counts[path], 1)
                covariance.sub_(torch.outer(mean, mean))
        return found

    def in_parts(self, paths: Sequence[str], most_numbers: int = PART) -> Iterator[list[str]]:
        """Layers some at a time, so that a matrix (d_in, d_in) or (d_out, d_in) of each has `most_numbers` in all."""
        part, numbers = list[str](), 0
        for path in paths:
            base = self._layer(path)
            own = base.d_in * max(base.d_in, base.d_out)
            if part and numbers + own > most_numbers:
                yield part
                part, numbers = [], 0
            part.append(path)
            numbers += own
        if part:
            yield part

    def gradients(self, paths: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Mean over batches of the loss's gradient by each base weight, (d_out, d_in), on the CPU, float32 at least.

        Raises:
            SettingsError: the loss does not depend on a layer; and see `inputs`.
        """
        sums: dict[str, Tensor] = {}

        def add(path: str, base: BaseLayer, x: Tensor, g: Tensor) -> None:
            self._watching = False  # a convolution is called again to get it
            gradient = _weight_gradient(base, x, g).cpu()
            self._watching = True
            sums[path] = sums[path].add_(gradient) if path in sums else gradient

        def watch(path: str, x: Tensor, y: Tensor) -> Tensor:
            base = self._layer(path)
            if y.requires_grad:
                y.register_hook(partial(add, path, base, x))
                return y
            leaf = y.detach().requires_grad_()  # the first layer that is reached: nothing before it trains
            leaf.register_hook(partial(add, path, base, x))
            return leaf.clone()  # which, unlike a leaf, may be changed in place

        self._run(self._paths(paths), watch, backward=True)
        for path in self._paths(paths):
            if path not in sums:
                raise SettingsError(f"the probe's loss does not depend on {path}, so its weight has no gradient.")
        return {path: total / len(self.batches) for path, total in sums.items()}

    def losses(self) -> list[float]:
        """The loss of each batch."""
        return self._run([], lambda *_: None)

    # -- one pass ------------------------------------------------------------------------------------------------------

    def _run(self, paths: Sequence[str], hook: Hook, backward: bool = False) -> list[float]:
        """Walk through the batches once, with `hook` at each of the modules."""
        if not self.batches:
            raise SettingsError(
                "the method asks for calibration data, and there are none; give inject(..., probe=Probe(batches))."
            )
        self.passes += 1
        reached: set[str] = set()
        losses: list[float] = []
        with self._untouched():
            handles = [
                self._module(path).register_forward_hook(self._at(path, hook, reached), with_kwargs=True)
                for path in paths
            ]
            try:
                told = f"calibration, pass {self.passes}"
                for batch in tqdm(self.batches, delay=SILENT, desc=told, unit=" batches", leave=False):
                    with torch.set_grad_enabled(backward):
                        loss = self._loss(batch)
                        losses.append(float(loss.detach()))
                        if backward and loss.requires_grad:
                            loss.backward()
            finally:
                for handle in handles:
                    handle.remove()
        missed = [path for path in paths if path not in reached]
        if missed:
            raise SettingsError(f"the probe's batches never call {missed[0]}, so nothing is known of it.")
        return losses

    def _at(self, path: str, hook: Hook, reached: set[str]) -> Callable[..., Any]:
        def forward_hook(_: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> Any:
            given = (*inputs, *named.values())
            if not given or not self._watching:
                return None
            reached.add(path)
            return hook(path, _first_tensor(given).detach(), output)

        return forward_hook

    def _loss(self, batch: Any) -> Tensor:
        self._mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        return self.loss(self.model, _moved(batch, next(self.model.parameters()).device))

    def _seen(self, x: Tensor) -> Tensor:
        """(tokens, d_in), without those that the batch's mask leaves out."""
        if self._mask is not None and self._mask.shape == x.shape[:-1]:
            return x[self._mask.to(x.device).bool()]
        return x.reshape(-1, x.shape[-1])

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Eval mode and nothing that trains inside; after it everything is as before."""
        modes = [(module, module.training) for module in self.model.modules()]
        parameters = [(p, p.requires_grad) for p in self.model.parameters()]
        home = next((p.device for p, _ in parameters), torch.device("cpu"))
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            try:
                self.model.eval()
                for parameter, _ in parameters:
                    parameter.requires_grad_(False)
                if self.device is not None:
                    self.model.to(self.device)
                yield
            finally:
                if self.device is not None:
                    self.model.to(home)
                for module, training in modes:
                    module.training = training
                for parameter, trained in parameters:
                    parameter.requires_grad_(trained)

    def _paths(self, paths: Sequence[str] | None) -> list[str]:
        return list(self.layers if paths is None else paths)

    def _layer(self, path: str) -> BaseLayer:
        if path not in self.layers:
            raise SettingsError(f"{path} is none of the matched layers.{did_you_mean(path, self.layers)}")
        return self.layers[path]

    def _module(self, path: str) -> nn.Module:
        return self.layers[path].module if path in self.layers else self.model.get_submodule(path)


def _weight_gradient(base: BaseLayer, x: Tensor, g: Tensor) -> Tensor:
    """dL/dW (d_out, d_in) of one call, for g = dL/dy."""
    dtype = base.adapter_dtype
    if base.kind == "linear":
        return g.reshape(-1, g.shape[-1]).to(dtype).mT @ x.reshape(-1, x.shape[-1]).to(dtype)
    weight = base.weight(dtype).detach().requires_grad_()
    with torch.enable_grad():
        y = base.apply(x.to(dtype) if x.is_floating_point() else x, weight, None)
    return torch.autograd.grad(y, weight, g.to(dtype))[0]


def _first_tensor(values: Any) -> Tensor:
    """The first tensor among a module's inputs or outputs, however these are wrapped."""
    if isinstance(values, Tensor):
        return values
    inside = values.values() if isinstance(values, Mapping) else values
    return next(value for value in inside if isinstance(value, Tensor))


def _moved(batch: Any, device: torch.device | str) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_moved(value, device) for value in batch)
    return batch
