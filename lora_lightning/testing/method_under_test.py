"""What the contracts stand on: the method that is tested, small models with it, and comparisons."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

    def _broken(self, promise: str, on: str = "", look: str = "") -> str:
        """What a failed assertion says: which method broke which promise, for what, and where its author looks."""
        place, hint = f" on {on}" if on else "", f" Look at {look}." if look else ""
        return f"{type(self.method).__name__}{place}: {promise}.{hint}"

    def _equal(self, found: Tensor, expected: Tensor, promise: str) -> None:
        """Two tensors have one dtype and shape and are equal bit for bit."""
        seen, wanted = (f"{str(t.dtype).removeprefix('torch.')} of shape {tuple(t.shape)}" for t in (found, expected))
        assert seen == wanted, f"{promise} It is {seen}, and must be {wanted}."
        assert torch.equal(found, expected), f"{promise} {_difference(found, expected)}"

    def _equal_states(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], promise: str) -> None:
        """Two state dictionaries have the same names, and equal tensors under them."""
        missing, added = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        assert not missing, f"{promise} Missing: {', '.join(missing)}."
        assert not added, f"{promise} Not among the expected: {', '.join(added)}."
        for name, tensor in expected.items():
            self._equal(found[name], tensor, f"{promise} Tensor {name}:")

    def _close(self, found: Tensor, expected: Tensor, promise: str) -> None:
        """Two tensors have one shape and differ by no more than `tolerance`."""
        shapes = f"The shape is {tuple(found.shape)}, and must be {tuple(expected.shape)}."
        assert found.shape == expected.shape, f"{promise} {shapes}"
        worst = float((found - expected).detach().abs().max()) if found.numel() else 0.0
        assert worst <= self.tolerance, f"{promise} They differ by {worst:.3g}; {self.tolerance:g} is allowed."

    def _check_start(self, adapted: Tensor, base: Tensor, on: str, adapter: Adapter) -> None:
        """The first output is the base layer's or, with `starts_at_base` False, another one of the same dtype."""
        name = type(adapter).__name__
        dtypes = f"the output is {adapted.dtype} and must be {base.dtype}, as the base layer's is"
        assert adapted.dtype == base.dtype, self._broken(dtypes, on, f"{name}.forward")
        if self.method.starts_at_base:
            start = "`starts_at_base` is True, so the first output must be the base layer's bit for bit"
            look = f"{name}.reset and {name}.forward, or declare `starts_at_base = False`"
            self._equal(adapted, base, self._broken(start, on, look))
        else:
            other = "`starts_at_base` is False, and the first output is the base layer's all the same"
            look = f"{name}.reset, or take the declaration off the settings class"
            assert not torch.equal(adapted, base), self._broken(other, on, look)

    @contextmanager
    def _refusing(self, error: type[Exception], rule: str, promise: str) -> Iterator[None]:
        """What runs inside must raise `error` with a text in which the regular expression `rule` is found."""
        try:
            yield
        except error as raised:
            if not re.search(rule, str(raised)):
                raise AssertionError(f'{promise} It says "{raised}", without a match for "{rule}".') from raised
        except Exception as raised:
            kind, cause = type(raised).__name__, " ".join(str(raised).split())
            raise AssertionError(f"{promise} It raised {kind} instead: {cause}") from raised
        else:
            raise AssertionError(f"{promise} Nothing was raised; it must be {error.__name__}.")

    def _needs_merge(self) -> None:
        if not self.method.mergeable:
            pytest.skip(f"{type(self.method).__name__} declares mergeable = False: its update depends on the input")

    def _step(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        reached = "the output does not depend on any parameter that trains"
        assert loss.requires_grad, self._broken(reached, type(model).__name__, "the adapter's `forward`")
        penalty = self.method.penalty(adapters_named(model, "default"))
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()


def _difference(found: Tensor, expected: Tensor) -> str:
    """How two tensors of one shape and dtype differ."""
    apart = (
        (found != expected) & ~(found.isnan() & expected.isnan()) if found.is_floating_point() else found != expected
    )
    worst = (found.detach().double() - expected.detach().double()).abs().max()
    return f"{int(apart.sum())} of {found.numel()} numbers differ, by {float(worst):.3g} at most."
