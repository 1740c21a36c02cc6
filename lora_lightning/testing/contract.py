"""The conformance suite for adapter methods, and models small enough for milliseconds. Public API.

A plugin's test file is one class:

    from lora_lightning.testing import MethodContract

    class TestMine(MethodContract):
        method = Mine(rank=2, alpha=4.0)

Needs pytest, which is all it imports beside this library and what that needs.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.base import Adapter, linked_modules
from lora_lightning.cli.parser import method_from_yaml
from lora_lightning.errors import AdapterStateError, SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.merge import eject, merge, unmerge
from lora_lightning.injection.records import adapters_named, iter_adapters
from lora_lightning.injection.switches import disable_adapters, set_active
from lora_lightning.methods import Method, plain_settings
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.plugins import restore_settings
from lora_lightning.storage.folder import save_adapter
from lora_lightning.storage.load import load_adapter
from lora_lightning.storage.state import adapter_keys
from lora_lightning.testing.sharing import SharingContract
from lora_lightning.testing.toy_models import (
    BASE_KINDS,
    LAYERS,
    QUANTIZED,
    TinyMLP,
    perturb,
    seeded,
    tiny_encoder,
)

_LINEAR = ("Linear", "Linear without bias", "Conv1D")
_EXPORTS = ("native", "exact LoRA", "merged only", "not expressible")


def _autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


_MODES: dict[str, tuple[torch.dtype, Callable[[], AbstractContextManager[Any]]]] = {
    "float32": (torch.float32, nullcontext),
    "autocast to bfloat16": (torch.float32, _autocast),
    "bfloat16 base": (torch.bfloat16, nullcontext),
}


def _plain(value: Tensor) -> Tensor:
    """A tensor's numbers, whatever subclass holds them."""
    return value if type(value.data) in (Tensor, nn.Parameter) else cast(Any, value).dequantize()


class MethodContract(SharingContract):
    """What every adapter method keeps to. Subclass it, name the subclass `Test...`, set `method`.

    It never branches on a method's name. What a method does otherwise it declares: `starts_at_base` and `mergeable` on
    its settings class, `additive` and `mergeable` on its adapter, and here:

    Attributes:
        method: settings to test, small enough for layers of 4 to 6 outputs; its class must be installed as a plugin.
        base_kinds: base layers that the method takes, of `BASE_KINDS`; `build` must refuse the others with a
            `SettingsError`. `DROPPING_KINDS` are those with an input to drop entries of.
        compile_reason: why the method does not work under `torch.compile(fullgraph=True)`; empty where it does.
        random_start: False where start values do not depend on the seed.
        tolerance: largest difference between two orders of computation in float64.

    Example:
        >>> from ll_lora import LoRA
        >>> from lora_lightning.testing import DROPPING_KINDS, MethodContract
        >>> class TestLoRAWithDropout(MethodContract):
        ...     method = LoRA(rank=2, alpha=4.0, dropout=0.1)
        ...     base_kinds = DROPPING_KINDS  # token ids cannot be dropped, nor the inputs of stacked experts
    """

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

    # -- what the tests stand on ---------------------------------------------------------------------------------------

    def _one_layer(
        self, kind: str, dtype: torch.dtype = torch.float64, moved: bool = True
    ) -> tuple[nn.Sequential, AdaptedLayer, Adapter, Tensor]:
        """A model of one adapted layer in eval mode, that layer, its adapter, and an input."""
        make_layer, make_input = LAYERS[kind]
        with seeded(1):
            model, x = nn.Sequential(make_layer()).to(dtype).eval(), make_input()
        inject(model, self.method, ["0"], also_train=(), seed=0)
        layer = cast(AdaptedLayer, model[0])
        adapter = layer.adapter("default")
        if moved:
            perturb(adapter)
        return model, layer, adapter, x.to(dtype) if x.is_floating_point() else x

    def _mlp(self, dtype: torch.dtype = torch.float64, moved: bool = True, seed: int = 0) -> tuple[TinyMLP, Tensor]:
        """An adapted TinyMLP in eval mode, and an input."""
        model = TinyMLP().to(dtype).eval()
        inject(model, self.method, ["first", "second"], also_train=(), seed=seed)
        if moved:
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

    # -- settings ------------------------------------------------------------------------------------------------------

    def test_settings_round_trip_as_plain_data(self) -> None:
        """Settings -> plain data -> JSON -> settings gives equal settings, as the adapter file needs."""
        plain = json.loads(json.dumps(plain_settings(self.method)))
        assert restore_settings(type(self.method), "settings", plain) == self.method

    def test_settings_round_trip_through_yaml(self) -> None:
        """Written as YAML under the class's short name, the command line's parser makes equal settings of them."""
        given = {"class_path": type(self.method).__name__, "init_args": plain_settings(self.method)}
        assert method_from_yaml(yaml.safe_dump({"method": given})) == self.method

    def test_class_facts(self) -> None:
        """The method says what it is: a docstring, a documented way to travel, a citation for a paper."""
        assert type(self.method).__doc__
        assert self.method.export in _EXPORTS
        assert not self.method.paper or self.method.paper in self.method.bibtex
        assert self.method.mergeable or self.method.export == "not expressible"

    def test_refuses_other_kinds_of_layer(self) -> None:
        """A base layer that is not among `base_kinds` is refused with a reason, never taken and computed wrong."""
        for kind in set(BASE_KINDS) - set(self.base_kinds):
            with pytest.raises(SettingsError, match=r"\w"):
                self._one_layer(kind)

    # -- the start -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("mode", _MODES)
    @pytest.mark.parametrize("training", [False, True])
    def test_starts_at_base(self, kind: str, mode: str, training: bool) -> None:
        """Before the first step the output is the base layer's, bit for bit; with `starts_at_base` False it is not."""
        dtype, context = _MODES[mode]
        model, layer, _, x = self._one_layer(kind, dtype, moved=False)
        model.train(training)
        with context(), torch.no_grad():
            adapted, base = model(x), layer.base(x)
        assert adapted.dtype == base.dtype
        assert torch.equal(adapted, base) == self.method.starts_at_base

    def test_reset(self, kind: str) -> None:
        """`reset` writes the start in place, a function of the generator alone."""
        _, layer, adapter, x = self._one_layer(kind, torch.float32)
        before = {name: (p, p.requires_grad) for name, p in adapter.named_parameters()}
        starts = []
        for seed in (1, 1, 2):
            perturb(adapter, seed=3)
            adapter.reset(torch.Generator().manual_seed(seed))
            starts.append({name: tensor.clone() for name, tensor in adapter.state_dict().items()})
        for name, parameter in adapter.named_parameters():
            assert parameter is before[name][0], f"{name} is another Parameter than before"
            assert parameter.requires_grad == before[name][1]
        assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
        differ = not all(torch.equal(starts[0][name], starts[2][name]) for name in starts[0])
        assert differ == self.random_start
        if self.method.starts_at_base:
            assert torch.equal(layer(x), layer.base(x))
            if self.method.mergeable:
                weight = layer.base_layer.weight()
                assert torch.equal(adapter.merged_weight(weight), weight)

    def test_start_is_a_function_of_seed_and_path(self) -> None:
        """The same seed gives the same start, whatever was drawn before and whatever torch's default device is.

        Layers of one shape start differently.
        """

        def starts(seed: int, draws: int = 0, device: str = "cpu") -> dict[str, Tensor]:
            with seeded(1):  # a start may depend on the base weight
                model = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(6, 5)})
            torch.rand(draws)
            with torch.device(device):  # Lightning builds a module with its device as the default one
                inject(model, self.method, ["a", "b"], also_train=(), seed=seed)
            return {key: value for key, value in model.state_dict().items() if ".adapters." in key}

        first, again, elsewhere, other = starts(1), starts(1, draws=7), starts(1, device="meta"), starts(2)
        for key, value in first.items():
            assert torch.equal(value, again[key])
            if not elsewhere[key].is_meta:  # what is made on the default device has no value here
                assert torch.equal(value, elsewhere[key])
        if self.random_start:
            assert any(not torch.equal(first[key], other[key]) for key in first)
            own = [key for key in first if key.startswith("a.")]
            assert any(not torch.equal(first[key], first[f"b{key[1:]}"]) for key in own)

    # -- the law -------------------------------------------------------------------------------------------------------

    def test_forward_equals_merged_weight(self, kind: str) -> None:
        """Applying the adapter equals the plain layer with the merged weight and bias."""
        self._needs_merge()
        _, layer, adapter, x = self._one_layer(kind)
        base = layer.base_layer
        weight, bias = adapter.merged_weight(base.weight()), adapter.merged_bias(base.bias)
        assert not torch.equal(weight, base.weight())
        self._close(adapter(x, base), base.apply(x, weight, bias))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_merge_and_unmerge(self, kind: str, dtype: torch.dtype) -> None:
        """A merged model computes the same; unmerging restores every tensor bit for bit."""
        self._needs_merge()
        model, layer, _, x = self._one_layer(kind, dtype)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            adapted, base = model(x), layer.base(x)
            merge(model)
            merged = model(x)
            with disable_adapters(model):
                assert torch.equal(model(x), base)
            assert torch.equal(model(x), merged)
            unmerge(model)
            assert torch.equal(model(x), adapted)
        if dtype == torch.float64:
            self._close(adapted, merged)
        if dtype == torch.float32:
            torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-5)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)

    def test_unmergeable_refuses_to_merge(self) -> None:
        """An input-routed method refuses a merge, and its adapters say so as the settings do."""
        model, _, adapter, _ = self._one_layer(self.base_kinds[0])
        assert adapter.mergeable == self.method.mergeable
        if not self.method.mergeable:
            with pytest.raises(AdapterStateError, match="depends on its input"):
                merge(model)

    def test_low_rank(self, kind: str) -> None:
        """`low_rank` multiplies to exactly what the merged weight adds."""
        self._needs_merge()
        _, layer, adapter, _ = self._one_layer(kind)
        factors = adapter.low_rank()
        if factors is not None:
            A, B = factors
            assert not A.requires_grad
            assert not B.requires_grad
            weight = layer.base_layer.weight()
            self._close(B @ A, adapter.merged_weight(weight) - weight)

    def test_factor_pairs_depend_on_the_product_alone(self, kind: str) -> None:
        """(Q A, B Q^-1) changes nothing, for any invertible Q: the law of `factor_pairs`."""
        _, layer, adapter, x = self._one_layer(kind)
        before = layer(x)
        for i, pair in enumerate(adapter.factor_pairs()):
            rank = pair.lora_A.shape[-2]
            noise = torch.randn(rank, rank, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            Q = noise + 3 * torch.eye(rank, dtype=torch.float64)
            with torch.no_grad():
                pair.lora_A.copy_(Q @ pair.lora_A)
                pair.lora_B.copy_(pair.lora_B @ torch.linalg.inv(Q))
        self._close(layer(x), before)

    def test_rank_mask_removes_components(self, kind: str) -> None:
        """A component whose `rank_mask` is off is in neither output, merged weight, closed form nor gradient."""
        _, layer, adapter, x = self._one_layer(kind)
        scores = adapter.rank_scores()
        if adapter.rank_mask is None:
            assert scores is None
            return
        assert scores is not None
        assert scores.shape == adapter.rank_mask.shape
        assert bool((scores >= 0).all())
        before = layer(x)
        adapter.rank_mask[0] = False
        layer(x).square().sum().backward()
        assert not torch.equal(layer(x), before)
        pairs = adapter.factor_pairs()
        for pair in pairs if len(pairs) == 1 else ():
            assert pair.lora_A.grad is None or not pair.lora_A.grad[..., 0, :].any()
            assert pair.lora_B.grad is None or not pair.lora_B.grad[..., 0].any()
        factors = adapter.low_rank()
        if factors is not None:
            assert factors[0].shape[-2] == int(adapter.rank_mask.sum())
        if self.method.mergeable:
            base = layer.base_layer
            merged = base.apply(x, adapter.merged_weight(base.weight()), adapter.merged_bias(base.bias))
            self._close(layer(x), merged)

    def test_entry_masks_fit_their_parameters(self, kind: str) -> None:
        """`masks` gives bool masks like their parameters, part of the state, with an axis that exists."""
        _, _, adapter, _ = self._one_layer(kind)
        own, state = {id(p) for p in adapter.parameters()}, adapter.state_dict(keep_vars=True)
        for entry in adapter.masks():
            assert id(entry.param) in own
            assert entry.mask.shape == entry.param.shape
            assert entry.mask.dtype == torch.bool
            assert entry.along in range(-entry.param.dim(), entry.param.dim())
            assert entry.effect in ("zero", "mask", "hold")
            assert any(tensor is entry.mask for tensor in state.values())

    # -- shapes, dtypes, modes -----------------------------------------------------------------------------------------

    @pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6)])
    @pytest.mark.parametrize("training", [False, True])
    def test_batch_shapes(self, shape: tuple[int, ...], training: bool) -> None:
        """A linear layer takes any leading axes; in eval mode each row is computed on its own."""
        for kind in set(self.base_kinds) & set(_LINEAR):
            model, _, _, _ = self._one_layer(kind)
            model.train(training)
            x = torch.randn(shape, dtype=torch.float64)
            y = model(x)
            assert y.shape == (*shape[:-1], 5)
            if not training and x.numel():
                self._close(y.view(-1, 5), torch.stack([model(row) for row in x.view(-1, 6)]))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_dtypes(self, kind: str, dtype: torch.dtype) -> None:
        """Outputs and input gradients have the base's dtype, trained tensors float32 at least."""
        model, layer, adapter, x = self._one_layer(kind, dtype)
        x.requires_grad_(x.is_floating_point())
        y = model.train()(x)
        y.square().sum().backward()
        assert y.dtype == layer.base(x).dtype == dtype
        assert x.grad is None or x.grad.dtype == dtype
        for parameter in adapter.parameters():
            assert parameter.dtype == torch.promote_types(dtype, torch.float32)
            assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all())

    def test_several_adapters(self) -> None:
        """Additive adapters sum on one layer, in the merged weight too; others refuse to be active together."""
        model, layer, first, x = self._one_layer(self.base_kinds[0])
        inject(model, self.method, ["0"], also_train=(), name="second", seed=1)
        second = layer.adapter("second")
        perturb(second, seed=5)
        if not (first.additive and second.additive):
            with pytest.raises(AdapterStateError, match="cannot be active together"):
                set_active(model, ["default", "second"])
            return
        base, outputs = layer.base(x), []
        for names in (["default"], ["second"], ["default", "second"]):
            set_active(model, names)
            outputs.append(model(x))
        self._close(outputs[2] - base, (outputs[0] - base) + (outputs[1] - base))
        if self.method.mergeable:
            merge(model)
            self._close(model(x), outputs[2])
            unmerge(model)

    def test_disable(self) -> None:
        """Inside `disable_adapters` the model is the base model, bit for bit; after it, adapted again."""
        model, x = self._mlp()
        adapted = model(x)
        with disable_adapters(model):
            assert torch.equal(model(x), TinyMLP().double()(x))
        assert torch.equal(model(x), adapted)

    def test_eject(self) -> None:
        """Ejecting leaves the plain layers with their weights."""
        model, x = self._mlp()
        eject(model)
        assert not list(iter_adapters(model))
        assert model.state_dict().keys() == TinyMLP().state_dict().keys()
        assert torch.equal(model(x), TinyMLP().double()(x))

    def test_deepcopy(self) -> None:
        """A copy computes the same and shares nothing."""
        model, x = self._mlp()
        twin = copy.deepcopy(model)
        before = model(x)
        assert torch.equal(twin(x), before)
        for _, layer in iter_adapters(twin):
            assert layer.base_layer.module is layer.base
            perturb(layer, seed=9)
        assert torch.equal(model(x), before)
        assert not torch.equal(twin(x), before)

    # -- quantized bases -----------------------------------------------------------------------------------------------

    def _quantized(
        self, kind: str, dtype: torch.dtype = torch.float32, moved: bool = True
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
        if moved:
            perturb(adapter)
        return model, layer, adapter, x

    def _near(self, a: Tensor, b: Tensor, kind: str) -> None:
        """Equal up to rounding in float32; LLM.int8() rounds the layer's inputs to eight bits as well."""
        allowed = 3e-2 if kind == "int8" else 1e-5
        a, b = a.detach().double(), b.detach().double()
        assert float((a - b).norm()) <= allowed * float(b.norm())

    @pytest.mark.parametrize("mode", _MODES)
    def test_quantized_base_starts_and_trains(self, quantized: str, mode: str) -> None:
        """On a quantized layer: the same start, the base's dtype, gradients for input and trainables, frozen bits."""
        dtype, context = _MODES[mode]
        for training in (False, True):
            model, layer, adapter, x = self._quantized(quantized, dtype, moved=False)
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
        packed, before = layer.base, {key: value.clone() for key, value in model.state_dict().items()}
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
            assert layer.base is packed
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
        fresh, _, _, _ = self._quantized(quantized, moved=False)
        load_adapter(fresh, tmp_path / "adapter")
        assert torch.equal(fresh(x), model(x))
        eject(fresh)
        load_adapter(fresh, tmp_path / "adapter")
        assert torch.equal(fresh(x), model(x))

    # -- training ------------------------------------------------------------------------------------------------------

    def test_only_declared_parameters_train(self) -> None:
        """In two steps every trainable that is not idle gets a gradient and moves; nothing else does."""
        model, x = self._mlp(torch.float32, moved=False)
        adapters = adapters_named(model, "default")
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert trainable
        own = (*adapters.values(), *linked_modules(adapters.values()))
        assert {id(p) for p in trainable.values()} == {id(p) for module in own for p in module.parameters()}
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer, reached = build_optimizer(model, None), set()
        for _ in range(2):
            self._step(model.train(), optimizer, x)
            reached |= {name for name, p in trainable.items() if p.grad is not None and p.grad.any()}
        idle = {f"{path}.adapters.default.{name}" for path, adapter in adapters.items() for name in adapter.idle()}
        assert trainable.keys() - idle <= reached
        after = model.state_dict()
        assert trainable.keys() - idle <= {name for name in before if not torch.equal(before[name], after[name])}
        frozen = [name for name in before if "adapters." not in name]
        assert all(torch.equal(before[name], after[name]) for name in frozen)

    def _step(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        penalty = self.method.penalty(adapters_named(model, "default"))
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()

    def test_param_groups_hold_every_trainable_once(self) -> None:
        """`param_groups` covers the trainables, each exactly once."""
        model, _ = self._mlp()
        adapters = adapters_named(model, "default")
        grouped = [id(p) for spec in self.method.param_groups(adapters).values() for p in spec.params]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)

    def test_penalty_and_report(self) -> None:
        """The penalty is a number or none, the report plain data."""
        adapters = adapters_named(self._mlp()[0], "default")
        penalty = self.method.penalty(adapters)
        assert penalty is None or (penalty.dim() == 0 and bool(torch.isfinite(penalty)))
        json.dumps(self.method.report(adapters))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, reentrant: bool) -> None:
        """Recomputing activations, in either form, gives the same gradients, dropout included."""
        gradients = []
        for recompute in (False, True):
            model, x = self._mlp()
            model.train()
            x.requires_grad_()  # without which the reentrant form has no backward at all
            with seeded(4):
                y = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
                cast(Tensor, y).square().sum().backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert len(gradients[0]) == len(gradients[1]) > 0
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

    # Dynamo itself instantiates autograd.Function when it traces one, which torch warns of
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_compiles(self) -> None:
        """`torch.compile(fullgraph=True)` computes the same, gradients included."""
        if self.compile_reason:
            pytest.skip(f"torch.compile: {self.compile_reason}")
        model, x = self._mlp()
        model(x).square().sum().backward()
        expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        torch._dynamo.reset()
        try:
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            y = compiled(x)
            self._close(y, model(x))
            y.square().sum().backward()
            found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            for a, b in zip(found, expected, strict=True):
                self._close(a, b)
            model.train()
            compiled(x).square().sum().backward()
        finally:
            torch._dynamo.reset()

    # -- state ---------------------------------------------------------------------------------------------------------

    def test_state_dict_round_trip(self, kind: str) -> None:
        """The tensors below the adapter are all of its state."""
        model, _, _, x = self._one_layer(kind)
        fresh, _, other, _ = self._one_layer(kind, moved=False)
        other.reset(torch.Generator().manual_seed(5))
        perturb(other, seed=8)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(x), model(x))

    def test_save_and_load(self, tmp_path: Path) -> None:
        """An adapter folder gives a fresh copy of the base model the same function, trained head included."""
        model, tokens = tiny_encoder(), torch.tensor([[1, 5, 7, 2], [1, 9, 2, 0]])
        inject(model, self.method, seed=0)
        for i, adapter in enumerate(adapters_named(model, "default").values()):
            perturb(adapter, i, size=0.05)
        perturb(model.classifier, seed=3)
        save_adapter(model, tmp_path / "adapter")
        fresh = tiny_encoder()
        load_adapter(fresh, tmp_path / "adapter")
        with torch.no_grad():
            assert torch.equal(fresh(tokens).logits, model(tokens).logits)
        own, theirs = model.state_dict(), fresh.state_dict()
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[key], theirs[key]) for key in own)

    def test_resume_equals_uninterrupted(self) -> None:
        """Four steps equal two, a checkpoint of adapter and optimizer, and two more in a new process's objects."""
        whole, x = self._mlp(torch.float32, moved=False)
        self._train(whole, build_optimizer(whole, None), x, range(4))
        first, _ = self._mlp(torch.float32, moved=False)
        optimizer = build_optimizer(first, None)
        self._train(first, optimizer, x, range(2))
        file = io.BytesIO()
        state = first.state_dict()
        torch.save([{key: state[key] for key in adapter_keys(first)}, optimizer.state_dict()], file)
        file.seek(0)
        tensors, moments = torch.load(file, weights_only=True)
        second, _ = self._mlp(torch.float32, moved=False, seed=1)
        second.load_state_dict(tensors, strict=False)
        optimizer = build_optimizer(second, None)
        optimizer.load_state_dict(moments)
        self._train(second, optimizer, x, range(2, 4))
        expected, found = whole.state_dict(), second.state_dict()
        assert all(torch.equal(expected[key], found[key]) for key in expected)

    def _train(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: range) -> None:
        model.train()
        for step in steps:
            with seeded(step):
                self._step(model, optimizer, x)
