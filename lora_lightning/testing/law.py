"""The law: applying an adapter equals the plain layer with the merged weight, from a start at the base's function."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
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
        for kind in sorted(set(BASE_KINDS) - set(self.base_kinds)):
            promise = "a kind of layer that `base_kinds` leaves out must be refused with a SettingsError that says why"
            with self._refusing(SettingsError, r"\w", self._broken(promise, kind, "`build`, or add the kind")):
                self._one_layer(kind)

    # -- the start -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("training", [False, True])
    def test_starts_at_base(self, kind: str, mode: str, training: bool) -> None:
        """Before the first step the output is the base layer's, bit for bit; with `starts_at_base` False it is not."""
        dtype, context = MODES[mode]
        model, layer, adapter, x = self._one_layer(kind, dtype, perturbed=False)
        model.train(training)
        with context(), torch.no_grad():
            adapted, base = model(x), layer.base(x)
        self._check_start(adapted, base, f"{kind}, {mode}, {'training' if training else 'evaluating'}", adapter)

    def test_reset(self, kind: str) -> None:
        """`reset` writes the start in place, a function of the generator alone."""
        _, layer, adapter, x = self._one_layer(kind, torch.float32)
        look = f"{type(adapter).__name__}.reset"
        before = {name: (p, p.requires_grad) for name, p in adapter.named_parameters()}
        starts = []
        for seed in (1, 1, 2):
            perturb(adapter, seed=3)
            adapter.reset(torch.Generator().manual_seed(seed))
            starts.append({name: tensor.clone() for name, tensor in adapter.state_dict().items()})
        for name, parameter in adapter.named_parameters():
            replaced = f"`reset` has put another Parameter in the place of {name}; it must write values in place"
            assert parameter is before[name][0], self._broken(replaced, kind, f"{look}, and use `write_values`")
            switched = f"`reset` has changed requires_grad of {name}, which was {before[name][1]}"
            assert parameter.requires_grad == before[name][1], self._broken(switched, kind, look)
        alone = "`reset` must be a function of its generator alone; two generators with seed 1 gave different starts"
        self._equal_states(starts[1], starts[0], self._broken(alone, kind, f"{look} for draws without `generator`"))
        differ = not all(torch.equal(starts[0][name], starts[2][name]) for name in starts[0])
        said = f"`random_start` is {self.random_start}, and starts of seeds 1 and 2 are "
        said += "different" if differ else "equal"
        declare = f"{look}, or set `random_start = {not self.random_start}` on the test class"
        assert differ == self.random_start, self._broken(said, kind, declare)
        if self.method.starts_at_base:
            start = "`starts_at_base` is True, so after `reset` the output must be the base layer's bit for bit"
            self._equal(layer(x), layer.base(x), self._broken(start, kind, look))
            if self.method.mergeable:
                weight = layer.base_layer.weight()
                merged = "after `reset` the merged weight must be the base weight bit for bit"
                look = f"{type(adapter).__name__}.merged_weight"
                self._equal(adapter.merged_weight(weight), weight, self._broken(merged, kind, look))

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
            return {key: value.clone() for key, value in model.state_dict().items() if ".adapters." in key}

        first, again, other = starts(1), starts(1, draws=7), starts(2)
        look = "`reset` for draws without its generator"
        try:
            elsewhere = starts(1, device="meta")
        except (NotImplementedError, RuntimeError) as error:
            device = "`build` and `reset` must work whatever torch's default device is, such as meta"
            hint = "what they create: `base.zeros` in `__init__`, and device=generator.device for what `reset` draws"
            raise AssertionError(f"{self._broken(device, 'Linear', hint)} It raised: {error}") from error
        for key, value in first.items():
            drawn = f"{key} must start the same at seed 1, whatever was drawn before"
            self._equal(again[key], value, self._broken(drawn, "Linear", look))
            if not elsewhere[key].is_meta:  # what is made on the default device has no value here
                device = f"{key} must start the same at seed 1, whatever torch's default device is"
                self._equal(elsewhere[key], value, self._broken(device, "Linear", look))
        if self.random_start:
            declare = "`reset`, or set `random_start = False` on the test class"
            seeds = "`random_start` is True, and all tensors start the same at seeds 1 and 2"
            assert any(not torch.equal(first[key], other[key]) for key in first), self._broken(seeds, "Linear", declare)
            own = [key for key in first if key.startswith("a.")]
            paths = f"layers a and b of one shape start the same at seed 1 ({', '.join(own)})"
            declare = "`build` for a tensor that layers share (give it back from `Method.link`), then at " + declare
            differ = any(not torch.equal(first[key], first[f"b{key[1:]}"]) for key in own)
            assert differ, self._broken(paths, "Linear", declare)

    # -- the law -------------------------------------------------------------------------------------------------------

    def test_forward_equals_merged_weight(self, kind: str) -> None:
        """Applying the adapter equals the plain layer with the merged weight and bias."""
        self._needs_merge()
        _, layer, adapter, x = self._one_layer(kind)
        base, name = layer.base_layer, type(adapter).__name__
        weight, bias = adapter.merged_weight(base.weight()), adapter.merged_bias(base.bias)
        still = "`merged_weight` gives the base weight though every parameter has been changed"
        assert not torch.equal(weight, base.weight()), self._broken(still, kind, f"{name}.merged_weight")
        law = "the output must be that of the plain layer with the merged weight and bias"
        look = f"{name}.forward and {name}.merged_weight, which must state one equation"
        self._close(adapter(x, base), base.apply(x, weight, bias), self._broken(law, kind, look))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_merge_and_unmerge(self, kind: str, dtype: torch.dtype) -> None:
        """A merged model computes the same; unmerging restores every tensor bit for bit."""
        self._needs_merge()
        model, layer, adapter, x = self._one_layer(kind, dtype)
        on, name = f"{kind}, {dtype}", type(adapter).__name__
        look = f"{name}.merged_weight, which must change nothing in place"
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            adapted, base = model(x), layer.base(x)
            merge(model)
            merged = model(x)
            with disable_adapters(model):
                disabled = "a merged model with its adapters disabled must compute what the base does"
                self._equal(model(x), base, self._broken(disabled, on, look))
            enabled = "a merged model must compute the same after its adapters were disabled for a moment"
            self._equal(model(x), merged, self._broken(enabled, on, look))
            unmerge(model)
            off = "after a merge and an unmerge the output must be what it was, bit for bit"
            self._equal(model(x), adapted, self._broken(off, on, look))
        law = self._broken("a merged model must compute what the adapted one does", on, f"{name}.merged_weight")
        if dtype == torch.float64:
            self._close(merged, adapted, law)
        if dtype == torch.float32:
            torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-5, msg=lambda text: f"{law} {text}")
        restored = "an unmerge must restore every tensor bit for bit"
        self._equal_states(model.state_dict(), before, self._broken(restored, on, look))

    def test_unmergeable_refuses_to_merge(self) -> None:
        """An input-routed method refuses a merge, and its adapters say so as the settings do."""
        kind = self.base_kinds[0]
        model, _, adapter, _ = self._one_layer(kind)
        name, settings = type(adapter).__name__, type(self.method).__name__
        one = f"{name}.mergeable is {adapter.mergeable}, and {settings}.mergeable {self.method.mergeable}"
        assert adapter.mergeable == self.method.mergeable, self._broken(one, kind, "both; they must be equal")
        if not self.method.mergeable:
            promise = self._broken("`mergeable` is False, so a merge must be refused", kind, f"{name}.mergeable")
            with self._refusing(AdapterStateError, "depends on its input", promise):
                merge(model)

    def test_low_rank(self, kind: str) -> None:
        """`low_rank` multiplies to exactly what the merged weight adds."""
        self._needs_merge()
        _, layer, adapter, _ = self._one_layer(kind)
        look = f"{type(adapter).__name__}.low_rank"
        factors = adapter.low_rank()
        if factors is not None:
            A, B = factors
            for side, factor in (("A", A), ("B", B)):
                attached = f"factor {side} of `low_rank` requires a gradient; it must be detached"
                assert not factor.requires_grad, self._broken(attached, kind, look)
            weight = layer.base_layer.weight()
            law = "B @ A of `low_rank` must be what `merged_weight` adds, scaling included"
            self._close(B @ A, adapter.merged_weight(weight) - weight, self._broken(law, kind, look))

    def test_factor_pairs_depend_on_the_product_alone(self, kind: str) -> None:
        """(Q A, B Q^-1) changes nothing, for any invertible Q: the law of `factor_pairs`."""
        _, layer, adapter, x = self._one_layer(kind)
        before, pairs = layer(x), adapter.factor_pairs()
        for i, pair in enumerate(pairs):
            rank = pair.lora_A.shape[-2]
            noise = torch.randn(rank, rank, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            Q = noise + 3 * torch.eye(rank, dtype=torch.float64)
            with torch.no_grad():
                pair.lora_A.copy_(Q @ pair.lora_A)
                pair.lora_B.copy_(pair.lora_B @ torch.linalg.inv(Q))
            law = f'the output must depend on lora_B @ lora_A alone in factor pair {i} ("{pair.name}"); '
            law += "Q lora_A with lora_B Q^-1 changed it"
            look = f"{type(adapter).__name__}.factor_pairs, which lists only such factors"
            self._close(layer(x), before, self._broken(law, kind, look))

    def test_rank_mask_removes_components(self, kind: str) -> None:
        """A component whose `rank_mask` is off is in neither output, merged weight, closed form nor gradient."""
        _, layer, adapter, x = self._one_layer(kind)
        name, scores = type(adapter).__name__, adapter.rank_scores()
        if adapter.rank_mask is None:
            unmasked = "`rank_scores` answers scores, and there is no `rank_mask`"
            assert scores is None, self._broken(unmasked, kind, f"{name}.__init__ and {name}.rank_scores")
            return
        silent = "there is a `rank_mask`, and `rank_scores` answers None"
        assert scores is not None, self._broken(silent, kind, f"{name}.rank_scores")
        shapes = f"`rank_scores` has shape {tuple(scores.shape)}, and `rank_mask` {tuple(adapter.rank_mask.shape)}"
        assert scores.shape == adapter.rank_mask.shape, self._broken(shapes, kind, f"{name}.rank_scores")
        negative = f"`rank_scores` must be at least 0, not {float(scores.detach().min()):.3g}"
        assert bool((scores >= 0).all()), self._broken(negative, kind, f"{name}.rank_scores")
        before, whole = layer(x), adapter.low_rank()
        adapter.rank_mask[0] = False
        layer(x).square().sum().backward()
        kept = "with entry 0 of `rank_mask` off the output is what it was"
        assert not torch.equal(layer(x), before), self._broken(kept, kind, f"{name}.forward, which multiplies it in")
        pairs = adapter.factor_pairs()
        for pair in pairs if len(pairs) == 1 else ():
            for side, grad in (("lora_A", pair.lora_A.grad), ("lora_B", pair.lora_B.grad)):
                own = None if grad is None else grad[..., 0, :] if side == "lora_A" else grad[..., 0]
                gradient = f"component 0, which `rank_mask` has off, has a gradient in {side}"
                assert own is None or not own.any(), self._broken(gradient, kind, f"{name}.forward")
        factors = adapter.low_rank()
        if factors is not None and whole is not None:
            left, rank = whole[0].shape[-2] - 1, factors[0].shape[-2]
            closed = f"`low_rank` has {rank} components, and `rank_mask` keeps {left}"
            assert rank == left, self._broken(closed, kind, f"{name}.low_rank")
        if self.method.mergeable:
            base = layer.base_layer
            merged = base.apply(x, adapter.merged_weight(base.weight()), adapter.merged_bias(base.bias))
            law = "with entry 0 of `rank_mask` off the output must be that of the plain layer with the merged weight"
            self._close(layer(x), merged, self._broken(law, kind, f"{name}.merged_weight"))

    def test_entry_masks_fit_their_parameters(self, kind: str) -> None:
        """`masks` gives bool masks like their parameters, part of the state, with an axis that exists."""
        _, _, adapter, _ = self._one_layer(kind)
        names = {id(p): name for name, p in adapter.named_parameters()}
        state = adapter.state_dict(keep_vars=True)
        for i, entry in enumerate(adapter.masks()):
            look = f"{type(adapter).__name__}.masks"
            foreign = f"`param` of entry mask {i} is no parameter of the adapter"
            assert id(entry.param) in names, self._broken(foreign, kind, look)
            item = f"the entry mask of {names[id(entry.param)]}"
            shapes = f"{item} has shape {tuple(entry.mask.shape)}, the parameter {tuple(entry.param.shape)}"
            assert entry.mask.shape == entry.param.shape, self._broken(shapes, kind, look)
            kept = f"{item} must be torch.bool, not {entry.mask.dtype}"
            assert entry.mask.dtype == torch.bool, self._broken(kept, kind, look)
            dim = entry.param.dim()
            axis = f"`along` of {item} is {entry.along}; it must be an axis of {dim} dimensions"
            assert entry.along in range(-dim, dim), self._broken(axis, kind, look)
            effects = ("zero", "mask", "hold")
            effect = f'`effect` of {item} is "{entry.effect}"; it must be "zero", "mask" or "hold"'
            assert entry.effect in effects, self._broken(effect, kind, look)
            stored = any(tensor is entry.mask for tensor in state.values())
            buffer = f"{item} is no buffer of the adapter, so it would be in no file"
            assert stored, self._broken(buffer, kind, f"{type(adapter).__name__}.__init__, and use register_buffer")

    # -- shapes, dtypes, modes -----------------------------------------------------------------------------------------

    @pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6)])
    @pytest.mark.parametrize("training", [False, True])
    def test_batch_shapes(self, shape: tuple[int, ...], training: bool) -> None:
        """A linear layer takes any leading axes; in eval mode each row is computed on its own."""
        for kind in sorted(set(self.base_kinds) & set(_LINEAR)):
            model, _, adapter, _ = self._one_layer(kind)
            model.train(training)
            x = torch.randn(shape, dtype=torch.float64)
            y, look = model(x), f"{type(adapter).__name__}.forward"
            wrong = f"an input of shape {shape} gave shape {tuple(y.shape)}; it must be {(*shape[:-1], 5)}"
            assert y.shape == (*shape[:-1], 5), self._broken(wrong, kind, look)
            if not training and x.numel():
                rows = f"each row of an input of shape {shape} must be computed on its own"
                alone = torch.stack([model(row) for row in x.view(-1, 6)])
                self._close(y.view(-1, 5), alone, self._broken(rows, kind, look))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_dtypes(self, kind: str, dtype: torch.dtype) -> None:
        """Outputs and input gradients have the base's dtype, trained tensors float32 at least."""
        model, layer, adapter, x = self._one_layer(kind, dtype)
        x.requires_grad_(x.is_floating_point())
        y, look = model.train()(x), f"{type(adapter).__name__}.forward"
        y.square().sum().backward()
        output = f"the output is {y.dtype} on a base layer in {dtype}, which must be its own dtype"
        assert y.dtype == layer.base(x).dtype == dtype, self._broken(output, kind, look)
        if x.grad is not None:
            inputs = f"the input's gradient is {x.grad.dtype} on a base layer in {dtype}"
            assert x.grad.dtype == dtype, self._broken(inputs, kind, look)
        wide = torch.promote_types(dtype, torch.float32)
        for name, parameter in adapter.named_parameters():
            held = f"{name} is {parameter.dtype} on a base layer in {dtype}; it must be {wide}"
            create = f"{type(adapter).__name__}.__init__, and create it by `base.zeros` or in `base.adapter_dtype`"
            assert parameter.dtype == wide, self._broken(held, kind, create)
            if parameter.grad is not None:
                finite = f"{name} has a gradient with NaN or inf on a base layer in {dtype}"
                assert bool(torch.isfinite(parameter.grad).all()), self._broken(finite, kind, look)

    def test_several_adapters(self) -> None:
        """Additive adapters sum on one layer, merged too; others stack, or refuse to be active together."""
        kind = self.base_kinds[0]
        model, layer, first, x = self._one_layer(kind)
        inject(model, self.method, ["0"], also_train=(), name="second", seed=1)
        second, name = layer.adapter("second"), type(first).__name__
        perturb(second, seed=5)
        if first.stacks and second.stacks:
            self._check_stacked(model, layer, x)
            return
        if not (first.additive and second.additive):
            alone = self._broken("`additive` is False, so two adapters must not be active together", kind, name)
            with self._refusing(AdapterStateError, "cannot be active together", alone):
                set_active(model, ["default", "second"])
            return
        base, outputs = layer.base(x), []
        for names in (["default"], ["second"], ["default", "second"]):
            set_active(model, names)
            outputs.append(model(x))
        total = "`additive` is True, so two adapters must add to the output what each adds alone"
        look = f"{name}.forward, or set `additive = False` where the update depends on the base weight"
        added = (outputs[0] - base) + (outputs[1] - base)
        self._close(outputs[2] - base, added, self._broken(total, kind, look))
        if self.method.mergeable:
            merge(model)
            merged = "`additive` is True, so a merge of two adapters must compute what both do together"
            self._close(model(x), outputs[2], self._broken(merged, kind, f"{name}.merged_weight"))
            unmerge(model)

    def _check_stacked(self, model: nn.Module, layer: AdaptedLayer, x: Tensor) -> None:
        kind, name = self.base_kinds[0], type(layer.adapter("default")).__name__
        weight = layer.base_layer.weight()
        for names in (["default", "second"], ["second", "default"]):
            set_active(model, names)
            below, above = (layer.adapter(adapter) for adapter in names)
            total = above.merged_onto(below.merged_weight(weight), weight)
            bias = above.merged_bias(below.merged_bias(layer.base_layer.bias))
            stacked = self._broken("`stacks` is True, so two adapters must apply `merged_onto` in turn", kind, name)
            self._close(model(x), layer.base_layer.apply(x, total, bias), stacked)
            if self.method.mergeable:
                output = model(x)
                merge(model)
                merged = "`stacks` is True, so a merge of two adapters must compute what both do together"
                self._close(model(x), output, self._broken(merged, kind, f"{name}.merged_onto"))
                unmerge(model)

    def test_disable(self) -> None:
        """Inside `disable_adapters` the model is the base model, bit for bit; after it, adapted again."""
        model, x = self._mlp()
        adapted, look = model(x), "`build`, `reset` and `forward` for what they change outside the adapter"
        with disable_adapters(model):
            off = "with its adapters disabled a model must compute what the base does"
            self._equal(model(x), TinyMLP().double()(x), self._broken(off, "TinyMLP", look))
        again = "after its adapters were disabled for a moment a model must compute what it did"
        self._equal(model(x), adapted, self._broken(again, "TinyMLP", look))

    def test_eject(self) -> None:
        """Ejecting leaves the plain layers with their weights."""
        model, x = self._mlp()
        eject(model)
        look = "`build`, `reset`, `link` and `forward` for what they change outside the adapter"
        left = [path for path, _ in iter_adapters(model)]
        assert not left, self._broken(f"an eject has left adapters at {', '.join(left)}", "TinyMLP", look)
        plain = "after an eject the model must be the plain one again"
        self._equal_states(model.state_dict(), TinyMLP().double().state_dict(), self._broken(plain, "TinyMLP", look))
        self._equal(model(x), TinyMLP().double()(x), self._broken(plain, "TinyMLP", look))

    def test_deepcopy(self) -> None:
        """A copy computes the same and shares nothing."""
        model, x = self._mlp()
        twin = copy.deepcopy(model)
        before, look = model(x), "`__init__` of the adapter for what it holds beside parameters and buffers"
        same = "a deep copy must compute what the model does"
        self._equal(twin(x), before, self._broken(same, "TinyMLP", look))
        for path, layer in iter_adapters(twin):
            shared = f"the copy of {path} reads the base layer of the model it was copied from"
            assert layer.base_layer.module is layer.base, self._broken(shared, "TinyMLP", look)
            perturb(layer, seed=9)
        own = "a change of a deep copy has changed the model"
        self._equal(model(x), before, self._broken(own, "TinyMLP", look))
        still = "a deep copy computes what the model does though every parameter of the copy has been changed"
        assert not torch.equal(twin(x), before), self._broken(still, "TinyMLP", look)
