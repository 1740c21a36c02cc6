"""The law: applying an adapter equals the plain layer with the merged weight, from a start at the base's function."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterStateError, SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.merge_model import eject, merge, unmerge
from lora_lightning.injection.records import iter_adapters
from lora_lightning.injection.switches import disable_adapters, set_active
from lora_lightning.testing.method_under_test import MODES, MethodUnderTest
from lora_lightning.testing.toy_models import BASE_KINDS, TinyMLP, perturb, seeded

_LINEAR = ("Linear", "Linear without bias", "Conv1D")


class LawContract(MethodUnderTest):
    """What a method's adapter computes, on every kind of base layer."""

    def test_refuses_other_kinds_of_layer(self) -> None:
        """A base layer that is not among `base_kinds` is refused with a reason, never taken and computed wrong."""
        for kind in set(BASE_KINDS) - set(self.base_kinds):
            with pytest.raises(SettingsError, match=r"\w"):
                self._one_layer(kind)

    # -- the start -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("training", [False, True])
    def test_starts_at_base(self, kind: str, mode: str, training: bool) -> None:
        """Before the first step the output is the base layer's, bit for bit; with `starts_at_base` False it is not."""
        dtype, context = MODES[mode]
        model, layer, _, x = self._one_layer(kind, dtype, perturbed=False)
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
