"""Quantized bases: the same start, the law, merging, compiling and files on layers in every quantized format."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.base import Adapter
from lora_lightning.injection.inject import inject
from lora_lightning.injection.merge_model import eject, merge, unmerge
from lora_lightning.injection.switches import disable_adapters
from lora_lightning.storage.folder import save_adapter
from lora_lightning.storage.load import load_adapter
from lora_lightning.testing.method_under_test import MODES, MethodUnderTest
from lora_lightning.testing.toy_models import QUANTIZED, perturb, seeded


def _plain(value: Tensor) -> Tensor:
    """A tensor's numbers, whatever subclass holds them."""
    return value if type(value.data) in (Tensor, nn.Parameter) else cast(Any, value).dequantize()


class QuantizedContract(MethodUnderTest):
    """What a method keeps to on a quantized linear layer; skipped for formats whose package is not installed."""

    def _quantized(
        self, kind: str, dtype: torch.dtype = torch.float32, perturbed: bool = True
    ) -> tuple[nn.Sequential, AdaptedLayer, Adapter, Tensor]:
        """As `_one_layer`, for a linear quantized layer; skips where its package is not installed."""
        package, quantize = QUANTIZED[kind]
        pytest.importorskip(package, reason=f'needs {package}: pip install "lora-lightning[quant]"')
        with seeded(1):
            model, x = nn.Sequential(quantize(nn.Linear(16, 8).to(dtype))).eval(), torch.randn(2, 3, 16, dtype=dtype)
            model.append(nn.LayerNorm(8, elementwise_affine=False))
        model.register_parameter("plain", nn.Parameter(torch.zeros(1, dtype=dtype)))
        inject(model, self.method, ["0"], also_train=(), seed=0)
        layer = cast(AdaptedLayer, model[0])
        adapter = layer.adapter("default")
        if perturbed:
            perturb(adapter)
        return model, layer, adapter, x

    def _near(self, a: Tensor, b: Tensor, kind: str) -> None:
        """Equal up to rounding in float32; LLM.int8() rounds the layer's inputs to eight bits as well."""
        allowed = 3e-2 if kind == "int8" else 1e-5
        a, b = a.detach().double(), b.detach().double()
        assert float((a - b).norm()) <= allowed * float(b.norm())

    @pytest.mark.parametrize("mode", MODES)
    def test_quantized_base_starts_and_trains(self, quantized: str, mode: str) -> None:
        """On a quantized layer: the same start, the base's dtype, gradients for input and trainables, frozen bits."""
        dtype, context = MODES[mode]
        for training in (False, True):
            model, layer, adapter, x = self._quantized(quantized, dtype, perturbed=False)
            model.train(training)
            with context(), torch.no_grad():
                adapted, base = layer(x), layer.base(x)
            assert adapted.dtype == base.dtype
            assert torch.equal(adapted, base) == self.method.starts_at_base
            perturb(adapter)
            before = {key: value.clone() for key, value in layer.base.state_dict().items()}
            x.requires_grad_()
            with context():
                loss = layer(x).float().square().sum()
            penalty = self.method.penalty({"0": adapter})
            (loss if penalty is None else loss + penalty).backward()
            assert x.grad is not None
            assert bool(x.grad.any())
            assert {p.dtype for p in adapter.parameters()} == {torch.float32}
            missed = {name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()}
            assert not training or missed <= adapter.idle()
            after = layer.base.state_dict()
            assert all(torch.equal(_plain(before[key]), _plain(after[key])) for key in before)

    def test_quantized_base_keeps_the_law(self, quantized: str) -> None:
        """The output is that of the dequantized weight with the update, and so are its gradients."""
        self._needs_merge()
        _, layer, adapter, x = self._quantized(quantized)
        base, x = layer.base_layer, x.requires_grad_()
        with torch.no_grad():
            weight = adapter.merged_weight(base.weight(torch.float64))
        layer(x).square().sum().backward()
        wide = x.detach().double().requires_grad_()
        bias = adapter.merged_bias(base.bias)
        y = nn.functional.linear(wide, weight, None if bias is None else bias.double())
        y.square().sum().backward()
        self._near(layer(x), y, quantized)
        self._near(cast(Tensor, x.grad), cast(Tensor, wide.grad), quantized)

    def test_quantized_base_merges(self, quantized: str, capsys: pytest.CaptureFixture[str]) -> None:
        """A merge puts a plain layer in the place, says how far that is off, and comes off bit for bit."""
        self._needs_merge()
        model, layer, _, x = self._quantized(quantized)
        quantized_module, before = layer.base, {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            adapted, base = model(x), layer.base(x)
            merge(model)
            assert "outputs differ from the unmerged ones by" in capsys.readouterr().out
            assert type(layer.base) is nn.Linear
            self._near(model(x), adapted, quantized)
            assert {key: _plain(value).shape for key, value in model.state_dict().items()} == {
                key: _plain(value).shape for key, value in before.items()
            }
            with disable_adapters(model):
                assert torch.equal(layer(x), base)
            assert type(layer.base) is nn.Linear
            unmerge(model)
            assert layer.base is quantized_module
            assert torch.equal(model(x), adapted)
            after = model.state_dict()
            assert before.keys() == after.keys()
            assert all(torch.equal(_plain(before[key]), _plain(after[key])) for key in before)
            merge(model, keep_original=False)
            merged = model(x)
            eject(model)
            assert type(model[0]) is nn.Linear
            assert torch.equal(model(x), merged)

    # Dynamo itself instantiates autograd.Function when it traces one, which torch warns of
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.slow
    def test_quantized_base_compiles(self, quantized: str) -> None:
        """`torch.compile(fullgraph=True)` computes the same on a quantized layer, gradients included."""
        if self.compile_reason:
            pytest.skip(f"torch.compile: {self.compile_reason}")
        model, _, adapter, x = self._quantized(quantized)
        found: list[list[Tensor]] = []
        torch._dynamo.reset()
        try:
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            for run in (model, compiled):
                model.zero_grad()
                inputs = x.clone().requires_grad_()
                y = run(inputs)
                y.square().sum().backward()
                gradients = [inputs.grad, *(p.grad for p in adapter.parameters())]
                found.append([y, *(g.clone() for g in gradients if g is not None)])
            model.train()
            compiled(x.requires_grad_()).square().sum().backward()
        finally:
            torch._dynamo.reset()
        for a, b in zip(*found, strict=True):
            self._near(a, b, quantized)

    def test_quantized_base_saves_and_loads(self, quantized: str, tmp_path: Path) -> None:
        """An adapter folder fits a base that was quantized anew."""
        model, _, _, x = self._quantized(quantized)
        save_adapter(model, tmp_path / "adapter")
        fresh, _, _, _ = self._quantized(quantized, perturbed=False)
        load_adapter(fresh, tmp_path / "adapter")
        assert torch.equal(fresh(x), model(x))
        eject(fresh)
        load_adapter(fresh, tmp_path / "adapter")
        assert torch.equal(fresh(x), model(x))
