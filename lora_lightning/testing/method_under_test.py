"""What the contracts stand on: the method that is tested, small models with it, and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor, nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.base import Adapter
from lora_lightning.injection.inject import inject
from lora_lightning.injection.records import adapters_named
from lora_lightning.methods import Method
from lora_lightning.testing.toy_models import BASE_KINDS, LAYERS, QUANTIZED, TinyMLP, perturb, seeded


def _autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


MODES: dict[str, tuple[torch.dtype, Callable[[], AbstractContextManager[Any]]]] = {
    "float32": (torch.float32, nullcontext),
    "autocast to bfloat16": (torch.float32, _autocast),
    "bfloat16 base": (torch.bfloat16, nullcontext),
}
"""Data type of the base, and the context that it is called in, by the mode's name."""


class MethodUnderTest:
    """A method's settings and what is declared of it; `MethodContract` says what each attribute means."""

    method: ClassVar[Method]
    base_kinds: ClassVar[Sequence[str]] = BASE_KINDS
    compile_reason: ClassVar[str] = ""
    random_start: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-10

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test for each declared kind of base layer."""
        if "kind" in metafunc.fixturenames:
            metafunc.parametrize("kind", self.base_kinds)
        if "quantized" in metafunc.fixturenames:
            metafunc.parametrize("quantized", QUANTIZED if "Linear" in self.base_kinds else ())

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        """Layers this small gain nothing from a second thread, and wait for it where processors are busy."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    def _one_layer(
        self, kind: str, dtype: torch.dtype = torch.float64, perturbed: bool = True
    ) -> tuple[nn.Sequential, AdaptedLayer, Adapter, Tensor]:
        """A model of one adapted layer in eval mode, that layer, its adapter, and an input."""
        make_layer, make_input = LAYERS[kind]
        with seeded(1):
            model, x = nn.Sequential(make_layer()).to(dtype).eval(), make_input()
        inject(model, self.method, ["0"], also_train=(), seed=0)
        layer = cast(AdaptedLayer, model[0])
        adapter = layer.adapter("default")
        if perturbed:
            perturb(adapter)
        return model, layer, adapter, x.to(dtype) if x.is_floating_point() else x

    def _mlp(self, dtype: torch.dtype = torch.float64, perturbed: bool = True, seed: int = 0) -> tuple[TinyMLP, Tensor]:
        """An adapted TinyMLP in eval mode, and an input."""
        model = TinyMLP().to(dtype).eval()
        inject(model, self.method, ["first", "second"], also_train=(), seed=seed)
        if perturbed:
            for i, adapter in enumerate(adapters_named(model, "default").values()):
                perturb(adapter, i)
        with seeded(2):
            return model, torch.randn(5, 6, dtype=dtype)

    def _close(self, a: Tensor, b: Tensor) -> None:
        assert a.shape == b.shape
        worst = float((a - b).detach().abs().max()) if a.numel() else 0.0
        assert worst <= self.tolerance, f"differ by {worst:.3g}; {self.tolerance:g} is allowed"

    def _needs_merge(self) -> None:
        if not self.method.mergeable:
            pytest.skip(f"{type(self.method).__name__} declares mergeable = False: its update depends on the input")

    def _step(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        penalty = self.method.penalty(adapters_named(model, "default"))
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
