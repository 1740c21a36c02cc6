"""MoRA and ReMoRA: the contract, and every invariant of the paper and of our reading of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from resuming import SaveAt, assert_equal_runs, at_step, run
from torch import nn
from toy_runs import classification, encoder_folder, labelled_data

import lora_lightning as ll
from ll_mora import MoRA
from ll_mora.functional import MAPS, owners, rotated, sources, width
from lora_lightning.callbacks import Cascade
from lora_lightning.errors import ExportError, SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.merge_model import merge
from lora_lightning.testing import BASE_KINDS, DROPPING_KINDS, MethodContract, perturb, tiny_encoder

KINDS = tuple(kind for kind in BASE_KINDS if kind != "Embedding")
ALL = ("rotation", *MAPS)
EVERY = pytest.mark.parametrize("maps", ALL)
SHAPES = [(64, 48), (50, 130), (96, 96), (8, 6), (7, 3), (3, 7), (300, 20)]


class TestMoRA(MethodContract):
    method = MoRA(rank=2)
    base_kinds = ("Linear",)
    random_start = False
    repeated = ("test_compiles",)
    test_refuses_other_kinds_of_layer = None  # they are in the class below, which is slow


@pytest.mark.slow
class TestMoRAOnEveryKind(MethodContract):
    method = MoRA(rank=2)
    base_kinds = KINDS
    random_start = False


@pytest.mark.slow
class TestMoRAWithSharing(MethodContract):
    method = MoRA(rank=1, maps="modulo")
    base_kinds = KINDS
    random_start = False


@pytest.mark.slow
class TestMoRAOfGroupsWithDropout(MethodContract):
    method = MoRA(rank=1, maps="groups", dropout=0.3)
    base_kinds = DROPPING_KINDS
    random_start = False


def adapted(method, layer=None, dtype=torch.float64, moved=True):
    torch.manual_seed(0)
    model = nn.Sequential(layer or nn.Linear(8, 6)).to(dtype).eval()
    inject(model, method, ["0"], also_train=(), seed=0)
    adapter = model[0].adapter("default")
    if moved:
        perturb(adapter)
    return model, adapter


def data(n=5, d_in=8):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# -- an independent reference, entry by entry --------------------------------------------------------------------------


def groups(size: int, k: int) -> list[list[int]]:
    """Neighbours in k groups, the first ones one longer."""
    return [part.tolist() for part in np.array_split(np.arange(size), k)]


def reference_shared(x, M, d_out, maps):
    """Equation 6, and the contiguous groups of the authors' code."""
    k, d_in = M.shape[0], len(x)
    of_inputs, of_outputs = MAPS[maps]
    if of_inputs == "modulo":
        padded = list(x) + list(x)[: -d_in % k]
        z = [sum(padded[j::k]) for j in range(k)]
    else:
        z = [sum(x[i] for i in group) for group in groups(d_in, k)]
    u = M @ np.array(z)
    if of_outputs == "modulo":
        return np.array([u[o % k] for o in range(d_out)])
    return np.concatenate([[u[j]] * len(group) for j, group in enumerate(groups(d_out, k))])


def reference_rotated(x, M, d_out):
    """Equation 9, with complex numbers for the rotations."""
    k, d_in = M.shape[0], len(x)
    padded = list(x) + list(x)[: -d_in % k]
    out = []
    for i in range(len(padded) // k):
        block = np.array(padded[i * k : (i + 1) * k])
        turned = (block[: k // 2] + 1j * block[k // 2 :]) * np.exp(1j * i * 10000.0 ** (-2 * np.arange(k // 2) / k))
        out.extend(M @ np.concatenate([turned.real, turned.imag]))
    return np.array((out * math.ceil(d_out / len(out)))[:d_out])


def reference(x, M, d_out, maps):
    row = reference_rotated if maps == "rotation" else lambda *a: reference_shared(*a, maps)
    return torch.tensor(np.stack([row(own, M, d_out) for own in x.numpy()]))


@EVERY
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_equal_a_float64_reference(maps, shape):
    d_in, d_out = shape
    model, adapter = adapted(MoRA(rank=2, maps=maps), nn.Linear(*shape))
    x = data(3, d_in)
    update = reference(x, adapter.square.detach().numpy(), d_out, maps)
    torch.testing.assert_close(model(x), model[0].base(x) + update, rtol=0, atol=1e-12)


@EVERY
@pytest.mark.parametrize("shape", SHAPES)
def test_the_merged_weight_is_the_branch_of_the_identity(maps, shape):
    d_in, d_out = shape
    model, adapter = adapted(MoRA(rank=2, maps=maps), nn.Linear(*shape, bias=False))
    weight = model[0].base.weight
    branch = reference(torch.eye(d_in, dtype=torch.float64), adapter.square.detach().numpy(), d_out, maps).T
    torch.testing.assert_close(adapter.merged_weight(weight), weight + branch, rtol=0, atol=1e-12)


@EVERY
def test_gradients_equal_those_of_the_merged_weight(maps):
    model, adapter = adapted(MoRA(rank=1, maps=maps), nn.Linear(11, 7))
    x, own = (data(5, 11).requires_grad_() for _ in range(2))
    model(own).square().sum().backward()
    found = adapter.square.grad.clone()
    adapter.square.grad = None
    (x @ adapter.merged_weight(model[0].base.weight).T + model[0].base.bias).square().sum().backward()
    torch.testing.assert_close(found, adapter.square.grad, rtol=0, atol=1e-11)
    torch.testing.assert_close(own.grad, x.grad, rtol=0, atol=1e-11)


@EVERY
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_rank_of_the_update(maps, shape):
    model, adapter = adapted(MoRA(rank=2, maps=maps), nn.Linear(*shape, bias=False))
    weight = model[0].base.weight.detach()
    rank = int(torch.linalg.matrix_rank(adapter.merged_weight(weight).detach() - weight, rtol=1e-10))
    assert rank == (min(shape) if maps == "rotation" else adapter.square.shape[0])


@pytest.mark.parametrize("rank", [1, 8, 256])
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (11008, 4096), (768, 3072)])
def test_the_numbers_are_about_those_of_lora_of_the_rank(rank, shape):
    for even in (False, True):
        k = width(*shape, rank, even)
        budget = rank * sum(shape)
        assert k == min(shape) // (1 + even) * (1 + even) or abs(k * k - budget) <= 0.02 * budget + 2 * k
        assert k <= min(shape)
        assert k % 2 == 0 or not even


@EVERY
def test_the_first_gradient_is_not_zero_and_every_row_has_one(maps):
    for shape in ((6, 20), (20, 6)):
        model, adapter = adapted(MoRA(rank=4, maps=maps), nn.Linear(*shape), moved=False)
        assert torch.equal(model(data(9, shape[0])), model[0].base(data(9, shape[0])))
        (model(data(9, shape[0])) - 1).square().sum().backward()
        assert adapter.square.grad.any(dim=1).all()
        assert adapter.square.grad.any(dim=0).all()


@EVERY
def test_the_branch_is_linear(maps):
    model, _ = adapted(MoRA(rank=1, maps=maps), nn.Linear(11, 7, bias=False))
    x, y = data(4, 11), data(9, 11)[5:]
    torch.testing.assert_close(model(2.5 * x - 3 * y), 2.5 * model(x) - 3 * model(y), rtol=0, atol=1e-12)


def test_angles_are_exact_in_float64():
    """Single-precision angles, which the authors' code ships, are 5.6e-8 off."""
    x = torch.zeros(50, 12, dtype=torch.float64)
    x[:, :6] = 1
    found = rotated(x.flatten(), 12, 50)
    turn = np.arange(50)[:, None] * 10000.0 ** (-2 * np.arange(6) / 12)
    np.testing.assert_allclose(found, np.concatenate([np.cos(turn), np.sin(turn)], axis=1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [5, 6, 7, 12])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_every_position_is_summed_once_and_padding_wraps_around(size, k):
    for kind in ("modulo", "groups"):
        table = sources(size, k, kind)
        counts = torch.bincount(table.flatten(), minlength=size + 1)
        wrapped = -size % k if kind == "modulo" else 0
        assert counts[:size].tolist() == [2] * wrapped + [1] * (size - wrapped)
        assert int(counts[size]) == (0 if kind == "modulo" else -size % k)
        if kind == "groups":
            for j, group in enumerate(groups(size, k)):
                assert [i for i in table[:, j].tolist() if i < size] == group
                assert [i for i, own in enumerate(owners(size, k, kind).tolist()) if own == j] == group


def test_a_merged_model_computes_the_same_where_there_is_one_block():
    model, adapter = adapted(MoRA(rank=8), nn.Linear(6, 20))
    assert adapter.square.shape == (6, 6)
    before = model(data(4, 6))
    merge(model)
    torch.testing.assert_close(model(data(4, 6)), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_near_the_exact_ones(dtype):
    for maps in ALL:
        exact, _ = adapted(MoRA(rank=2, maps=maps), nn.Linear(64, 48))
        model, _ = adapted(MoRA(rank=2, maps=maps), nn.Linear(64, 48), dtype)
        with torch.no_grad():
            y, expected = model(data(4, 64).to(dtype)).double(), exact(data(4, 64))
        assert float((y - expected).norm() / expected.norm()) < 0.02


# -- ReMoRA ------------------------------------------------------------------------------------------------------------


def stages(folder, callbacks=(), total=7, seed=3, checkpoint=None, **settings):
    encoder = encoder_folder(folder / "encoder", dropout=0.1)
    method = MoRA(**{"rank": 1, "maps": "modulo", "fold_every": 2, "rewarm_steps": 1, **settings})
    module = classification(encoder, method)
    found = run(module, labelled_data(encoder), folder, callbacks, checkpoint, seed, max_steps=total)
    return module, found


class Maps(SaveAt):
    """Records which maps are on after each step."""

    def __init__(self, seen) -> None:
        self.seen = seen

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        found = set()
        for _, layer in ll.iter_adapters(pl_module):
            adapter = layer.adapter("default")
            k = adapter.square.shape[0]
            for name, (of_inputs, of_outputs) in MAPS.items():
                same = torch.equal(adapter.inputs, sources(adapter.d_in, k, of_inputs))
                if same and torch.equal(adapter.outputs, owners(adapter.d_out, k, of_outputs)):
                    found.add(name)
        assert len(found) == 1
        self.seen.append(found.pop())


@pytest.mark.slow
def test_stages_take_maps_in_turn_and_the_rank_grows_beyond_one_matrix(tmp_path):
    seen: list[str] = []
    module, _ = stages(tmp_path, [Maps(seen)], total=6, maps="groups")
    assert seen == ["groups", "modulo", "modulo", "groups", "groups", "modulo"]
    for _, layer in ll.iter_adapters(module):
        adapter = layer.adapter("default")
        assert not adapter.square.any()  # folded at the end
        change = layer.merged_weight("default", torch.float64) - layer.pretrained_weight(torch.float64)
        assert int(torch.linalg.matrix_rank(change, rtol=1e-5)) > adapter.square.shape[0]


@pytest.mark.slow
def test_all_maps_are_gone_through_in_the_authors_order(tmp_path):
    seen: list[str] = []
    stages(tmp_path, [Maps(seen)], total=10, all_maps=True, maps="groups-modulo")
    assert seen[::2] == ["groups-modulo", "modulo-groups", "modulo", "groups", "groups-modulo"]


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_run_resumes_exactly_at_and_between_the_ends_of_stages(step, tmp_path):
    saved = tmp_path / "saved.ckpt"
    _, straight = stages(tmp_path, [SaveAt(saved, at_step(step))])
    _, resumed = stages(tmp_path, checkpoint=saved, seed=77)
    assert_equal_runs(straight, resumed)


@pytest.mark.slow
def test_what_was_folded_under_other_maps_is_saved_with_the_adapter(tmp_path):
    encoder = tiny_encoder()
    ll.inject(encoder, MoRA(rank=1, maps="modulo"), ["query"], seed=0)
    for _, layer in ll.iter_adapters(encoder):
        adapter = layer.adapter("default")
        adapter.begin_stage(1)
        perturb(adapter)
    ll.save_adapter(encoder, tmp_path / "adapter")
    fresh = tiny_encoder()
    ll.load_adapter(fresh, tmp_path / "adapter")
    tokens = torch.tensor([[1, 5, 7, 2]])
    assert torch.equal(fresh(tokens).logits, encoder(tokens).logits)


def test_the_cascade_comes_with_fold_every_alone():
    assert MoRA().callbacks() == []
    [stages] = MoRA(maps="modulo", fold_every=2000).callbacks()
    assert isinstance(stages, Cascade)
    assert (stages.stage_steps, stages.blend, stages.lr, stages.rewarm_steps) == (2000, 1.0, "rewarm", 50)


@pytest.mark.parametrize("maps", list(MAPS))
def test_folded_updates_of_two_stages_have_the_rank_of_two_matrices(maps):
    model, adapter = adapted(MoRA(rank=1, maps=maps), nn.Linear(40, 30, bias=False))
    weight, k = model[0].base.weight.detach(), adapter.square.shape[0]
    first = adapter.merged_weight(weight).detach()
    for stage in (0, 1):
        adapter.begin_stage(stage)
        both = adapter.merged_weight(first).detach() - weight
        rank = int(torch.linalg.matrix_rank(both, rtol=1e-10))
        assert rank > k + k // 2 if stage else rank == k
    adapter.begin_stage(2)
    assert torch.equal(adapter.merged_weight(weight).detach(), first)


# -- export ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("maps", list(MAPS))
def test_shared_entries_travel_as_an_exact_lora(maps, tmp_path):
    model = tiny_encoder()
    ll.inject(model, MoRA(rank=1, maps=maps), ["query"], seed=0)
    for _, layer in ll.iter_adapters(model):
        perturb(layer.adapter("default"), size=0.1)
    assert ll.export(model, tmp_path / "out").kind == "exact LoRA"
    again = tiny_encoder()
    ll.import_peft(again, tmp_path / "out")
    tokens = torch.tensor([[1, 5, 7, 2]])
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_rotations_travel_merged_or_truncated(tmp_path):
    model = tiny_encoder()
    ll.inject(model, MoRA(rank=1), ["query"], seed=0)
    for _, layer in ll.iter_adapters(model):
        perturb(layer.adapter("default"), size=0.1)
    with pytest.raises(ExportError, match=r"MoRA on .*query has no exact low-rank form.*Give rank=N for a truncated"):
        ll.export(model, tmp_path / "out")
    report = ll.export(model, tmp_path / "truncated", rank=4)
    assert report.kind == "truncated SVD"
    assert all(0 < share < 1 for share in report.discarded.values())
    ll.export(model, tmp_path / "merged", format="merged")
    plain = type(model).from_pretrained(tmp_path / "merged")
    tokens = torch.tensor([[1, 5, 7, 2]])
    torch.testing.assert_close(plain(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-6)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"MoRA.rank is 0; it must be at least 1"),
        ({"maps": "rotations"}, r'MoRA.maps is "rotations". Did you mean "rotation"\?'),
        ({"dropout": 1.0}, r"MoRA.dropout is 1.0; it must lie in \[0, 1\)"),
        ({"rewarm_steps": 0}, r"MoRA.rewarm_steps is 0; it must be at least 1"),
        (
            {"fold_every": 1, "maps": "modulo"},
            r"MoRA.fold_every is 1; it must be a whole number of at least 2, or null",
        ),
        ({"fold_every": 10}, r"MoRA.fold_every is 10; updates of rotations that are folded add up to one matrix"),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        MoRA(**settings)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Embedding(11, 5), "the tokens of an embedding would share entries.*exclude it"),
        (
            nn.Linear(6, 1),
            r'maps is "rotation"; rotations turn pairs of entries, and the layer.s smaller side has one alone',
        ),
    ],
    ids=["embedding", "one output"],
)
def test_layers_that_it_cannot_adapt_are_refused(layer, message):
    with pytest.raises(SettingsError, match=message):
        adapted(MoRA(rank=1), layer)
