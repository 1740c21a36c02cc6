"""ResLoRA: the contract, and every invariant of the paper and of our reading of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ll_lora import LoRA
from ll_reslora import ResLoRA, ResLoRAInputs
from lora_lightning import eject, inject, load_adapter, merge, save_adapter
from lora_lightning.callbacks import Cascade
from lora_lightning.distributed import _with_linked
from lora_lightning.errors import AdapterFileError, AdapterStateError, ExportError, SettingsError
from lora_lightning.exporters.export import export
from lora_lightning.injection.gates import recomputation
from lora_lightning.injection.records import adapters_named
from lora_lightning.storage.compose import compose
from lora_lightning.testing import BASE_KINDS, DROPPING_KINDS, MethodContract, perturb, tiny_decoder

METHOD = ResLoRA(rank=2, alpha=4.0)


class TestResLoRA(MethodContract):
    method = METHOD
    base_kinds = ("Linear",)
    repeated = ("test_compiles",)
    test_refuses_other_kinds_of_layer = None  # they are in the class below, which is slow


@pytest.mark.slow
class TestResLoRAOnEveryKind(MethodContract):
    method = METHOD
    base_kinds = BASE_KINDS


@pytest.mark.slow
class TestResLoRAWithDropout(MethodContract):
    method = ResLoRA(rank=2, alpha=4.0, dropout=0.3)
    base_kinds = DROPPING_KINDS


class Block(nn.Module):
    """Two layers, the second of another shape."""

    def __init__(self, width: int = 6, inner: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Deep(nn.Module):
    """Blocks in a row."""

    def __init__(self, inner=(8, 8, 8, 8)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(inner=width) for width in inner)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def adapted(method=METHOD, moved=True, **options):
    model = Deep().double()
    inject(model, method, ["up", "down"], also_train=(), seed=0, **options)
    adapters = adapters_named(model, "default")
    for i, adapter in enumerate(adapters.values()):
        if moved:
            perturb(adapter, i)
    return model, adapters


def data(n=5):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def written_out(model, factors, m, s, x):
    """The paper's sum, block by block and pair by pair, from factors by (number, place)."""

    def layer(n, place, h):
        plain = getattr(model.blocks[n], place).base
        y = h @ plain.weight.detach().T + plain.bias.detach()
        for k in range(m + 1):
            if n - k >= 0:
                A, B = factors[n - k, place]
                y = y + s * (h @ A.T) @ B.T
        return y

    for n in range(len(model.blocks)):
        x = x + layer(n, "down", torch.tanh(layer(n, "up", x)))
    return x


@pytest.mark.parametrize("previous", [0, 1, 2, -1])
def test_outputs_and_gradients_equal_the_sum_written_out(previous):
    model, adapters = adapted(ResLoRA(rank=2, alpha=4.0, previous=previous))
    factors = {
        (int(path.split(".")[1]), path.rpartition(".")[2]): [
            t.detach().clone().requires_grad_() for t in (adapter.lora_A, adapter.lora_B)
        ]
        for path, adapter in adapters.items()
    }
    expected = written_out(model, factors, 3 if previous < 0 else previous, 2.0, data())
    expected.square().sum().backward()
    y = model(data())
    y.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    for path, adapter in adapters.items():
        for own, leaf in zip(
            (adapter.lora_A, adapter.lora_B), factors[int(path.split(".")[1]), path.rpartition(".")[2]], strict=True
        ):
            torch.testing.assert_close(own.grad, leaf.grad, rtol=1e-9, atol=1e-9)


def test_without_earlier_layers_it_is_lora_bit_for_bit():
    model, adapters = adapted(ResLoRA(rank=2, alpha=4.0, previous=0))
    plain = Deep().double()
    inject(plain, LoRA(rank=2, alpha=4.0), ["up", "down"], also_train=(), seed=0)
    plain.load_state_dict(model.state_dict(), strict=False)
    outputs = []
    for net in (model, plain):
        outputs.append(net(data()))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    for one, other in zip(adapters.values(), adapters_named(plain, "default").values(), strict=True):
        assert torch.equal(one.lora_A.grad, other.lora_A.grad)
        assert not one.peers


def test_the_start_is_the_base_model_bit_for_bit():
    model, _ = adapted(moved=False)
    assert torch.equal(model(data()), Deep().double()(data()))


def test_the_merged_model_computes_the_same():
    model, _ = adapted()
    before = model(data())
    merge(model)
    torch.testing.assert_close(model(data()), before, rtol=0, atol=1e-12)


def test_an_early_pair_gets_a_gradient_through_each_later_layer():
    model, adapters = adapted()
    early = adapters["blocks.0.up"]
    x = data()
    for number in range(4):  # one layer alone, so that no other path leads to the pair
        layer = model.blocks[number].up
        early.lora_A.grad = early.lora_B.grad = None
        layer(x).square().sum().backward()
        assert bool(early.lora_A.grad.any())
        assert bool(early.lora_B.grad.any())


def test_layers_of_other_shapes_are_passed_over_and_scalings_are_their_own():
    model = Deep(inner=(8, 10, 8, 8)).double()
    overrides = {"blocks.0.up": {"alpha": 6.0}, "blocks.2.up": {"rank": 3}}
    report = inject(model, METHOD, ["up"], overrides=overrides, also_train=(), seed=0)
    adapters = adapters_named(model, "default")
    read = {path: [id(peer) for peer in adapter.peers] for path, adapter in adapters.items()}
    ids = {path: id(adapter) for path, adapter in adapters.items()}
    assert read["blocks.1.up"] == []
    assert read["blocks.3.up"] == [ids["blocks.2.up"], ids["blocks.0.up"]]
    for i, adapter in enumerate(adapters.values()):
        perturb(adapter, i)
    layer, x = model.blocks[3].up, data()
    delta = sum(a.scaling * a.lora_B @ a.lora_A for path, a in adapters.items() if path != "blocks.1.up")
    torch.testing.assert_close(layer(x) - layer.base(x), x @ delta.T, rtol=0, atol=1e-12)
    assert METHOD.report(adapters)["without_shortcut"] == 2
    assert report.adapter_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_copy_reads_its_own_tensors_and_a_gather_takes_what_is_read():
    model, adapters = adapted()
    twin = copy.deepcopy(model)
    before = model(data())
    with torch.no_grad():
        for adapter in adapters_named(twin, "default").values():
            adapter.lora_B.zero_()
    assert torch.equal(model(data()), before)
    assert torch.equal(twin(data()), Deep().double()(data()))
    last = adapters["blocks.3.up"]
    assert {id(peer) for peer in last.peers} < {id(module) for module in _with_linked([last])}


def test_a_saved_adapter_computes_the_same_and_cannot_be_added_up(tmp_path):
    model, _ = adapted()
    save_adapter(model, tmp_path / "a")
    fresh = Deep().double()
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(data()), model(data()))
    with pytest.raises(AdapterFileError, match=r"the update of ResLoRA on blocks.0.up is no product of two factors of"):
        compose([tmp_path / "a"], tmp_path / "sum")


def test_an_export_is_a_lora_of_the_joined_rank_and_no_wider_than_the_layer(tmp_path):
    model = tiny_decoder().double()
    inject(model, ResLoRA(rank=9, alpha=9.0), ["q_proj", "v_proj"], also_train=(), seed=0)
    for i, adapter in enumerate(adapters_named(model, "default").values()):
        perturb(adapter, i)
    export(model, tmp_path / "peft", "peft")  # the written files are read back and compared
    first, second = (adapters_named(model, "default")[f"model.layers.{n}.self_attn.q_proj"] for n in (0, 1))
    wide = min(second.lora_A.shape[-1], second.lora_B.shape[-2])
    assert first.stated_pair().lora_A.shape[0] == 9
    assert second.stated_pair().lora_A.shape[0] == min(18, wide)
    A, B = second.low_rank()
    delta = first.lora_B @ first.lora_A + second.lora_B @ second.lora_A
    torch.testing.assert_close(B @ A, delta.detach(), rtol=0, atol=1e-12)


def test_settings_are_checked():
    with pytest.raises(SettingsError, match=r"ResLoRA.previous is -2; it must be at least 0, or -1 for all"):
        ResLoRA(previous=-2)


def test_folding_a_stage_keeps_the_function():
    model, adapters = adapted()
    before = model(data())
    for path in adapters:  # as Cascade does: all layers are folded before any starts again
        layer = model.get_submodule(path)
        Cascade(stage_steps=2)._open(layer, "default", path, adapters[path], 2)
        layer.fold("default", 1.0, "outer_step")
    for adapter in adapters.values():
        adapter.reset(torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(data()), before, rtol=0, atol=1e-12)


# -- values that cross layers ------------------------------------------------------------------------------------------

INPUT = ResLoRAInputs(rank=2, alpha=4.0, shortcut="input")
MIDDLE = ResLoRAInputs(rank=2, alpha=4.0)
FORMS = pytest.mark.parametrize("method", [INPUT, MIDDLE], ids=["input", "middle"])
CROSSING = tuple(kind for kind in DROPPING_KINDS if "mbedding" not in kind and "xpert" not in kind)


class TestMiddleShortcuts(MethodContract):
    method = MIDDLE
    base_kinds = ("Linear",)
    repeated = ("test_compiles",)
    test_refuses_other_kinds_of_layer = None  # they are in the classes below, which are slow


@pytest.mark.slow
class TestMiddleShortcutsOnEveryKind(MethodContract):
    method = ResLoRAInputs(rank=2, alpha=4.0, dropout=0.3)
    base_kinds = CROSSING


@pytest.mark.slow
class TestInputShortcuts(MethodContract):
    method = INPUT
    base_kinds = CROSSING


def crossing_written_out(model, adapters, method, x):
    """The paper's equations, block by block, with the inputs of each place kept in a list."""
    inputs = {"up": [], "down": []}

    def layer(n, place, h):
        adapter = adapters[f"blocks.{n}.{place}"]
        plain, A, B = getattr(model.blocks[n], place).base, adapter.lora_A, adapter.lora_B
        seen = inputs[place]
        seen.append(h)
        if method.shortcut == "input":
            branch = (h + (seen[n - 1] if n else h)) @ A.T
        else:
            branch = sum(seen[n - k] @ adapters[f"blocks.{n - k}.{place}"].lora_A.T for k in range(n + 1))
        return h @ plain.weight.T + plain.bias + 2.0 * branch @ B.T

    for n in range(len(model.blocks)):
        x = x + layer(n, "down", torch.tanh(layer(n, "up", x)))
    return x


def gradients(adapters):
    return {path: [t.grad.clone() for t in (a.lora_A, a.lora_B)] for path, a in adapters.items()}


@FORMS
def test_crossing_outputs_and_gradients_equal_the_equations_written_out(method):
    model, adapters = adapted(method)
    y = model(data())
    y.square().sum().backward()
    found = gradients(adapters)
    model.zero_grad()
    expected = crossing_written_out(model, adapters, method, data())
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    for path, pair in gradients(adapters).items():
        for one, other in zip(found[path], pair, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert torch.equal(adapted(method, moved=False)[0](data()), Deep().double()(data()))


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_without_predecessors_it_is_lora_bit_for_bit(shortcut):
    model, _ = adapted(ResLoRAInputs(rank=2, alpha=4.0, shortcut=shortcut, previous=0))
    plain = Deep().double()
    inject(plain, LoRA(rank=2, alpha=4.0), ["up", "down"], also_train=(), seed=0)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(data()), plain(data()))


def test_the_first_layer_may_read_nothing_and_a_middle_shortcut_may_end_early():
    for method in (replace(INPUT, first="nothing"), replace(MIDDLE, previous=1)):
        model, adapters = adapted(method)
        inputs, outputs = {}, {}
        for n in range(4):
            layer = model.blocks[n].up
            layer.register_forward_pre_hook(lambda _, args, n=n, seen=inputs: seen.__setitem__(n, args[0].detach()))
            layer.register_forward_hook(lambda _, args, output, n=n, seen=outputs: seen.__setitem__(n, output.detach()))
        model(data())
        for n in range(4):
            own, before = adapters[f"blocks.{n}.up"], adapters[f"blocks.{max(n - 1, 0)}.up"]
            factor = own if method.shortcut == "input" else before
            branch = inputs[n] @ own.lora_A.T + (inputs[n - 1] @ factor.lora_A.T if n else 0.0)
            expected = model.blocks[n].up.base(inputs[n]) + 2.0 * branch @ own.lora_B.T
            torch.testing.assert_close(outputs[n], expected.detach(), rtol=0, atol=1e-12)


class Recomputed(Deep):
    """Blocks whose activations are computed again in backward."""

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant, **self.more)
        return x


@FORMS
def test_recomputed_blocks_give_the_same_gradients_and_the_reentrant_form_is_refused(method):
    model, adapters = adapted(method)
    model(data()).square().sum().backward()
    found = gradients(adapters)
    model.zero_grad()
    model.__class__, model.reentrant, model.more = Recomputed, False, {"context_fn": recomputation}
    model(data()).square().sum().backward()
    for path, pair in gradients(adapters).items():
        assert all(torch.equal(one, other) for one, other in zip(found[path], pair, strict=True)), path
    model.more = {}
    with pytest.raises(AdapterStateError, match=r"context_fn=lora_lightning.injection.gates.recomputation"):
        model(data()).square().sum().backward()
    model.reentrant = True
    with pytest.raises(AdapterStateError, match="trains, but its block runs without gradients"):
        model(data().requires_grad_())


@FORMS
def test_two_forwards_of_different_lengths_do_not_know_of_one_another(method):
    model, _ = adapted(method)
    first = model(data(5))
    assert model(data(3)).shape[0] == 3
    assert torch.equal(model(data(5)), first)
    assert torch.equal(copy.deepcopy(model)(data(5)), first)
    model.forward = lambda x: model.blocks[1](x)
    with pytest.raises(AdapterStateError, match="was not called before"):
        model(data())


@FORMS
def test_calls_out_of_order_of_other_shapes_and_outside_a_forward_are_refused(method):
    model, _ = adapted(method)
    with pytest.raises(AdapterStateError, match="an earlier layer's value, outside a forward of the model"):
        model.blocks[0](data())
    model.forward = lambda x: model.blocks[1](x)
    with pytest.raises(AdapterStateError, match="was not called before a layer that reads its values; exclude"):
        model(data())
    model.forward = lambda x: model.blocks[1](model.blocks[0](x)[:2])
    with pytest.raises(AdapterStateError, match=r"given \(2, 6\) and an earlier one of its type had another shape"):
        model(data())


def test_a_layer_called_twice_is_refused_where_it_is_recomputed():
    model, _ = adapted(MIDDLE)
    run = partial(checkpoint, use_reentrant=False, context_fn=recomputation)
    model.forward = lambda x: run(model.blocks[1], run(model.blocks[0], run(model.blocks[0], x)))
    y = model(data())
    with pytest.raises(AdapterStateError, match="is called several times in a forward, and what it left first is gone"):
        y.square().sum().backward()


def test_an_eject_leaves_no_hooks():
    model, _ = adapted(MIDDLE)
    assert len(model._forward_hooks) == 1
    eject(model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


class Scaled(nn.Module):
    """Two layers of one type, the second of which is given a multiple of the first one's input."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ratio = ratio
        self.blocks = nn.ModuleList(nn.Linear(6, 5) for _ in range(2))

    def forward(self, x):
        return torch.cat([self.blocks[0](self.ratio * x), self.blocks[1](x)], dim=-1)


@pytest.mark.parametrize("estimate", ["inputs", "fit"])
@FORMS
def test_an_approximate_merge_is_exact_where_inputs_are_multiples_and_factors_alike(method, estimate, tmp_path):
    model = Scaled(0.7).double()
    inject(model, replace(method, estimate=estimate), ["0", "1"], also_train=(), seed=0)
    first, second = adapters_named(model, "default").values()
    for i, adapter in enumerate((first, second)):
        perturb(adapter, i)
    with torch.no_grad():
        second.lora_A.copy_(first.lora_A)  # what a scalar in front of A n x n stands for
    adapted_output = model.train()(data())
    for adapter in (first, second):
        adapter.path_means.copy_(adapter.statistics()["path_means"].take())
        assert adapter.approximation().error < 1e-3
    save_adapter(model, tmp_path / "a")
    done = compose([tmp_path / "a"], tmp_path / "plain", approximate=True)
    assert done.errors.keys() == {"blocks.0", "blocks.1"}
    assert max(done.errors.values()) < 1e-3
    plain = Scaled(0.7).double()
    load_adapter(plain, tmp_path / "plain")
    torch.testing.assert_close(plain(data()), adapted_output, rtol=0, atol=1e-5)  # sums are in float32
    with pytest.raises(AdapterFileError, match="is no product of two factors of its own"):
        compose([tmp_path / "a"], tmp_path / "not")
    with pytest.raises(ExportError, match=r"Or export lora_lightning.compose\(\[folder\], directory, approximate=True"):
        export(model, tmp_path / "peft", "peft")


@FORMS
def test_the_stated_error_is_that_of_the_branch(method):
    model, adapters = adapted(method)
    model.train()(data())
    seen = {}
    handles = [
        model.blocks[n].up.register_forward_pre_hook(lambda _, args, n=n: seen.__setitem__(n, args[0].detach()))
        for n in range(4)
    ]
    model(data())
    for handle in handles:
        handle.remove()
    A = {n: adapters[f"blocks.{n}.up"].lora_A.detach() for n in range(4)}
    for n in range(1, 4):
        adapter = adapters[f"blocks.{n}.up"]
        adapter.path_means.copy_(adapter.statistics()["path_means"].take())
        sizes = [float(seen[k].norm(dim=-1).mean()) for k in range(4)]
        if method.shortcut == "input":
            u, v, c = seen[n], seen[n - 1], sizes[n - 1] / sizes[n]
        else:
            u, v = seen[n] @ A[n].T, sum(seen[k] @ A[k].T for k in range(n))
            c = sum(sizes[:n]) / sizes[n]
        found = adapter.approximation()
        assert found.error == pytest.approx(float((v - c * u).norm() / (u + v).norm()), rel=1e-4)
        torch.testing.assert_close(found.B, 2.0 * (1 + c) * adapter.lora_B.detach(), rtol=1e-6, atol=0)


def test_nothing_measured_and_settings_outside_their_rules_are_refused():
    _, adapters = adapted(INPUT)
    with pytest.raises(AdapterStateError, match="no training step has been measured"):
        adapters["blocks.1.up"].approximation()
    with pytest.raises(SettingsError, match=r"ResLoRAInputs.previous is -2; it must be at least 0"):
        ResLoRAInputs(previous=-2)
    with pytest.raises(SettingsError, match=r"ResLoRAInputs.window is 0; it must be at least 1"):
        ResLoRAInputs(window=0)
