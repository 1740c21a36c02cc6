"""Quantized bases: the same start, the law, merging, compiling and files on layers in every quantized format."""

from __future__ import annotations

from collections.abc import Mapping
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

    def _near(self, found: Tensor, expected: Tensor, kind: str, promise: str) -> None:
        """Equal up to rounding in float32; LLM.int8() rounds the layer's inputs to eight bits as well."""
        allowed = 3e-2 if kind == "int8" else 1e-5
        apart = float((found.detach().double() - expected.detach().double()).norm())
        size = float(expected.detach().double().norm())
        assert apart <= allowed * size, (
            f"{promise} They differ by {apart / size:.3g} of their norm; {allowed:g} is allowed."
        )

    def _equal_plain(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], promise: str) -> None:
        """As `_equal_states`, for tensors of any subclass."""
        numbers = [{name: _plain(value) for name, value in state.items()} for state in (found, expected)]
        self._equal_states(numbers[0], numbers[1], promise)

    @pytest.mark.parametrize("mode", MODES)
    def test_quantized_base_starts_and_trains(self, quantized: str, mode: str) -> None:
        """On a quantized layer: the same start, the base's dtype, gradients for input and trainables, frozen bits."""
        dtype, context = MODES[mode]
        for training in (False, True):
            model, layer, adapter, x = self._quantized(quantized, dtype, perturbed=False)
            model.train(training)
            with context(), torch.no_grad():
                adapted, base = layer(x), layer.base(x)
            on, name = f"{quantized}, {mode}, {'training' if training else 'evaluating'}", type(adapter).__name__
            self._check_start(adapted, base, on, adapter)
            perturb(adapter)
            before = {key: value.clone() for key, value in layer.base.state_dict().items()}
            x.requires_grad_()
            with context():
                loss = layer(x).float().square().sum()
            penalty = self.method.penalty({"0": adapter})
            (loss if penalty is None else loss + penalty).backward()
            reached = x.grad is not None and bool(x.grad.any())
            assert reached, self._broken("the input of the layer has no gradient", on, f"{name}.forward")
            missed = []
            for key, p in adapter.named_parameters():
                create = f"{name}.__init__, and create it by `base.zeros` or in `base.adapter_dtype`"
                narrow = f"{key} is {p.dtype}; on a quantized base it must be torch.float32"
                assert p.dtype == torch.float32, self._broken(narrow, on, create)
                if key not in adapter.idle() and (p.grad is None or not p.grad.any()):
                    missed.append(key)
            without = f"{', '.join(missed)} got no gradient"
            assert not training or not missed, self._broken(without, on, f"{name}.forward, or name it in `idle`")
            frozen = self._broken("the quantized weight must not change", on, f"{name}.forward for writes to the base")
            self._equal_plain(layer.base.state_dict(), before, frozen)

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
        law = "the output must be that of the dequantized weight with the update"
        look = f"{type(adapter).__name__}.forward and {type(adapter).__name__}.merged_weight"
        self._near(layer(x), y, quantized, self._broken(law, quantized, look))
        same = self._broken("the input's gradient must be that of the dequantized weight", quantized, look)
        self._near(cast(Tensor, x.grad), cast(Tensor, wide.grad), quantized, same)

    def test_quantized_base_merges(self, quantized: str, capsys: pytest.CaptureFixture[str]) -> None:
        """A merge puts a plain layer in the place, says how far that is off, and comes off bit for bit."""
        self._needs_merge()
        model, layer, adapter, x = self._quantized(quantized)
        look = f"{type(adapter).__name__}.merged_weight, which must change nothing in place"
        quantized_module, before = layer.base, {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            adapted, base = model(x), layer.base(x)
            merge(model)
            said, rounding = capsys.readouterr().out, "a merge must say how far rounding has moved the outputs"
            assert "outputs differ from the unmerged ones by" in said, self._broken(rounding, quantized, look)
            plain = f"a merge must leave a plain nn.Linear, not {type(layer.base).__name__}"
            assert type(layer.base) is nn.Linear, self._broken(plain, quantized, look)
            law = "a merged model must compute what the adapted one does"
            self._near(model(x), adapted, quantized, self._broken(law, quantized, look))
            shapes, expected = ({k: tuple(_plain(v).shape) for k, v in s.items()} for s in (model.state_dict(), before))
            unlike = f"a merged model holds {shapes}; it must hold {expected}"
            assert shapes == expected, self._broken(unlike, quantized, look)
            with disable_adapters(model):
                off = "a merged model with its adapters disabled must compute what the base does"
                self._equal(layer(x), base, self._broken(off, quantized, look))
            again = "after its adapters were disabled for a moment a merged layer must be a plain nn.Linear again"
            assert type(layer.base) is nn.Linear, self._broken(again, quantized, look)
            unmerge(model)
            back = "an unmerge must put the quantized layer back"
            assert layer.base is quantized_module, self._broken(back, quantized, look)
            self._equal(model(x), adapted, self._broken(f"{back}, and its output", quantized, look))
            self._equal_plain(model.state_dict(), before, self._broken(f"{back} bit for bit", quantized, look))
            merge(model, keep_original=False)
            merged = model(x)
            eject(model)
            left = f"a merge and an eject must leave a plain nn.Linear, not {type(model[0]).__name__}"
            assert type(model[0]) is nn.Linear, self._broken(left, quantized, look)
            self._equal(model(x), merged, self._broken("an eject must leave the merged output", quantized, look))

    # Dynamo itself instantiates autograd.Function when it traces one, which torch warns of
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.slow
    def test_quantized_base_compiles(self, quantized: str) -> None:
        """`torch.compile(fullgraph=True)` computes the same on a quantized layer, gradients included."""
        if self.compile_reason:
            pytest.skip(f"torch.compile: {self.compile_reason}")
        look = "the adapter's `forward`, or give a `compile_reason` on the test class"
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
        except torch._dynamo.exc.TorchDynamoException as error:
            whole = "torch.compile(fullgraph=True) must take the adapter as it is"
            raise AssertionError(f"{self._broken(whole, quantized, look)} It says: {error}") from error
        finally:
            torch._dynamo.reset()
        same = self._broken("a compiled model must give the model's output and gradients", quantized, look)
        eager, traced = found
        assert len(eager) == len(traced), f"{same} It gave {len(traced) - 1} gradients; they must be {len(eager) - 1}."
        for a, b in zip(traced, eager, strict=True):
            self._near(a, b, quantized, same)

    def test_quantized_base_saves_and_loads(self, quantized: str, tmp_path: Path) -> None:
        """An adapter folder fits a base that was quantized anew."""
        model, _, _, x = self._quantized(quantized)
        save_adapter(model, tmp_path / "adapter")
        fresh, _, _, _ = self._quantized(quantized, perturbed=False)
        load_adapter(fresh, tmp_path / "adapter")
        loaded = "an adapter folder must give a base that was quantized anew what was saved"
        promise = self._broken(loaded, quantized, "`build`, which gives a loaded adapter its form")
        self._equal(fresh(x), model(x), promise)
        eject(fresh)
        load_adapter(fresh, tmp_path / "adapter")
        self._equal(fresh(x), model(x), promise)
