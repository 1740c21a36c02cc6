"""CoRA: the contract, the basis against independent computations, and where it comes from."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lora_lightning as ll
from ll_cora import CoRA
from ll_cora.basis import left_basis
from ll_lora import LoRA
from lora_lightning.adapters.base import write_values
from lora_lightning.errors import SettingsError
from lora_lightning.injection.records import adapters_named, records
from lora_lightning.storage.layer_tensors import write_tensors
from lora_lightning.testing import MethodContract, TinyMLP, perturb, tiny_encoder


@pytest.mark.slow  # its layers are those of plain pairs
class TestCoRA(MethodContract):
    method = CoRA(rank=2, alpha=4.0)
    random_start = False
    repeated = ("test_compiles",)


@pytest.mark.slow
class TestCoRAAsAStart(MethodContract):
    method = CoRA(rank=2, alpha=4.0, mode="start")
    random_start = False


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the basis ---------------------------------------------------------------------------------------------------------


def test_the_basis_is_the_left_singular_vectors_of_all_columns_up_to_sign():
    columns = [draw(9, n, seed=n) for n in (4, 7, 30)]
    found = left_basis(columns, 5)
    U = np.linalg.svd(torch.cat(columns, dim=1).numpy(), full_matrices=False)[0][:, :5]
    np.testing.assert_allclose(np.abs(np.sum(found.numpy() * U, axis=0)), np.ones(5), atol=1e-10)
    assert (found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_left_space_that_all_share_is_recovered():
    shared = torch.linalg.qr(draw(20, 3))[0]
    columns = [shared @ draw(3, 12, seed=seed) for seed in range(1, 5)]
    found = left_basis(columns, 3)
    cosines = torch.linalg.svdvals(shared.T @ found).clamp(max=1.0)
    # arccos loses half the digits near 1, so the sine is taken of what lies outside
    sine = torch.linalg.matrix_norm(found - shared @ (shared.T @ found), 2)
    assert float(sine) < 1e-5
    assert float(cosines.min()) > 1 - 1e-10
    with pytest.raises(SettingsError, match=r"rank is 4, and its sources have 3 directions in common"):
        left_basis(columns, 4)


def test_stacked_matrices_have_a_basis_each():
    stacked = [draw(3, 6, 8, seed=seed) for seed in (1, 2)]
    found = left_basis(stacked, 2)
    for number in range(3):
        torch.testing.assert_close(found[number], left_basis([C[number] for C in stacked], 2), atol=1e-12, rtol=0)


# -- adapters ----------------------------------------------------------------------------------------------------------


def mlp(method, **options):
    model = TinyMLP().double()
    ll.inject(model, method, also_train=(), seed=0, **options)
    return model, adapters_named(model, "default")


def train(model, steps=5):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        (model(draw(8, 6, seed=step)) - 1).square().mean().backward()
        optimizer.step()


def test_without_sources_the_weights_own_directions_are_the_basis():
    model, adapters = mlp(CoRA(rank=2, basis_scale=3.0))
    for path, adapter in adapters.items():
        U = torch.linalg.svd(model.get_submodule(path).base.weight.detach())[0][:, :2]
        torch.testing.assert_close(
            (adapter.lora_B.T @ U).abs(), 3 * torch.eye(2, dtype=torch.float64), atol=1e-9, rtol=0
        )
        assert not adapter.lora_A.any()


def test_a_frozen_basis_stays_and_holds_every_update():
    model, adapters = mlp(CoRA(rank=2))
    x, plain = draw(4, 6), TinyMLP().double()
    assert torch.equal(model(x), plain(x))
    before = {path: adapter.lora_B.clone() for path, adapter in adapters.items()}
    train(model)
    for path, adapter in adapters.items():
        assert [name for name, _ in adapter.named_parameters()] == ["lora_A"]
        assert torch.equal(adapter.lora_B, before[path])
        A, B = adapter.low_rank()
        Q = before[path]
        assert (B @ A).abs().max() > 1e-3
        torch.testing.assert_close(Q @ (Q.T @ (B @ A)), B @ A, atol=1e-12, rtol=0)


def test_a_trajectory_equals_a_dense_float64_one():
    """y = W x + b + s B (A x) with B frozen, by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, dtype=torch.float64))
    W, b = (p.detach().clone() for p in model.parameters())
    ll.inject(model, CoRA(rank=2, alpha=6.0), also_train=(), seed=0)
    adapter = adapters_named(model, "default")["0"]
    A, B = adapter.lora_A.detach().clone(), adapter.lora_B.clone()
    optimizer = torch.optim.SGD([adapter.lora_A], lr=0.2)
    for step in range(6):
        x, y = draw(8, 6, seed=step), draw(8, 5, seed=step + 50)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        error = x @ (W + 3 * B @ A).T + b - y
        A -= 0.2 * 3 * B.T @ (2 * error / error.numel()).T @ x
        torch.testing.assert_close(adapter.lora_A.detach(), A, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", ["frozen", "start"])
def test_a_stage_of_a_cascade_begins_on_the_basis(mode):
    model, adapters = mlp(CoRA(rank=2, mode=mode))
    bases = {path: adapter.lora_B.detach().clone() for path, adapter in adapters.items()}
    train(model)
    for path, adapter in adapters.items():
        basis = bases[path]
        adapter.reset(torch.Generator().manual_seed(3))
        assert torch.equal(adapter.lora_B, basis)
        assert not adapter.lora_A.any()


def test_as_a_start_both_train_and_A_starts_at_zero():
    model, adapters = mlp(CoRA(rank=2, mode="start"))
    before = {path: adapter.lora_B.detach().clone() for path, adapter in adapters.items()}
    assert all(not adapter.lora_A.any() for adapter in adapters.values())
    train(model)
    for path, adapter in adapters.items():
        assert adapter.lora_A.any()
        assert not torch.equal(adapter.lora_B, before[path])


def test_adapters_on_one_basis_average_exactly():
    (one, first), (two, second) = mlp(CoRA(rank=2)), mlp(CoRA(rank=2))
    train(one, 5), train(two, 9)
    method = CoRA(rank=2)
    assert method.report(first) == method.report(second)
    products = [{path: B @ A for path, (A, B) in _factors(adapters)} for adapters in (first, second)]
    for path, adapter in first.items():
        write_values(adapter.lora_A, (adapter.lora_A.detach() + second[path].lora_A.detach()) / 2)
        A, B = adapter.low_rank()
        torch.testing.assert_close(B @ A, (products[0][path] + products[1][path]) / 2, atol=1e-12, rtol=1e-12)


def _factors(adapters):
    return [(path, adapter.low_rank()) for path, adapter in adapters.items()]


# -- sources -----------------------------------------------------------------------------------------------------------


def adapter_folder(folder, seed, rank=2):
    model = TinyMLP()
    ll.inject(model, LoRA(rank=rank, alpha=2.0 * rank), also_train=(), seed=seed)
    for number, adapter in enumerate(adapters_named(model, "default").values()):
        perturb(adapter, seed + number)
    ll.save_adapter(model, folder)
    adapters = adapters_named(model, "default")
    return {path: tuple(p.detach().double() for p in (a.lora_A, a.lora_B)) for path, a in adapters.items()}


@pytest.mark.parametrize("by", ["B", "update"])
def test_a_folder_of_adapters_gives_the_basis(by, tmp_path):
    parts = [adapter_folder(tmp_path / f"a{seed}", seed) for seed in (1, 10)]
    _, adapters = mlp(CoRA(rank=3, sources=[str(tmp_path)], basis_of=by))
    for path, adapter in adapters.items():
        stacked = torch.cat([B if by == "B" else B @ A for A, B in (part[path] for part in parts)], dim=1)
        U = torch.linalg.svd(stacked)[0][:, :3]
        torch.testing.assert_close((adapter.lora_B.T @ U).abs(), torch.eye(3, dtype=torch.float64), atol=1e-5, rtol=0)


def test_fine_tuned_models_give_the_basis_of_their_differences(tmp_path):
    path = "bert.encoder.layer.0.attention.self.query"
    shared = torch.linalg.qr(draw(16, 2))[0]
    for number in range(3):
        tuned = tiny_encoder()
        with torch.no_grad():
            tuned.get_submodule(path).weight.add_((shared @ draw(2, 16, seed=number + 5)).float())
        tuned.save_pretrained(tmp_path / str(number))
    model = tiny_encoder().double()
    sources = [str(tmp_path / str(number)) for number in range(3)]
    ll.inject(model, CoRA(rank=2, sources=sources), [f"{path}"], also_train=(), seed=0)
    B = adapters_named(model, "default")[path].lora_B
    assert float(torch.linalg.matrix_norm(B - shared @ (shared.T @ B), 2)) < 1e-5


def test_a_basis_in_a_file_is_read_and_another_one_refused(tmp_path):
    file, basis = tmp_path / "basis.safetensors", {"first": draw(8, 4), "second": draw(4, 2)}
    sha256 = write_tensors(file, basis)
    _, adapters = mlp(CoRA(rank=2, sources=[str(file)], basis_sha256=sha256))
    torch.testing.assert_close(adapters["first"].lora_B, basis["first"][:, :2], atol=1e-6, rtol=0)
    with pytest.raises(SettingsError, match=r"CoRA.sources: .* has the digest \w{64}, and 00 is asked for"):
        mlp(CoRA(rank=2, sources=[str(file)], basis_sha256="00"))
    with pytest.raises(SettingsError, match=r"CoRA on first: .* has shape \(8, 4\); it must have 8 rows and 5 columns"):
        mlp(CoRA(rank=5, sources=[str(file)]))
    write_tensors(file, {"first": draw(7, 4)})
    with pytest.raises(SettingsError, match=r"CoRA on first: .* has shape \(7, 4\); it must have 8 rows"):
        mlp(CoRA(rank=2, sources=[str(file)]))
    write_tensors(file, {"other": draw(8, 4)})
    with pytest.raises(SettingsError, match=r"CoRA on first: the file of the basis has nothing for it"):
        mlp(CoRA(rank=2, sources=[str(file)]))


def test_sources_that_do_not_suffice_are_refused(tmp_path):
    adapter_folder(tmp_path / "a", 1)
    with pytest.raises(SettingsError, match=r"CoRA on first: rank is 3, and its sources have 2 directions in common"):
        mlp(CoRA(rank=3, sources=[str(tmp_path / "a")]))
    model = TinyMLP()
    ll.inject(model, LoRA(rank=2), ["first"], also_train=(), seed=1)
    perturb(adapters_named(model, "default")["first"])
    ll.save_adapter(model, tmp_path / "b" / "one")
    with pytest.raises(SettingsError, match=r"CoRA on second: none of its sources changes it; exclude it"):
        mlp(CoRA(rank=2, sources=[str(tmp_path / "b")]))


def test_a_saved_adapter_needs_its_sources_no_more(tmp_path):
    adapter_folder(tmp_path / "a", 1)
    model, adapters = mlp(CoRA(rank=2, sources=[str(tmp_path / "a")]))
    train(model)
    ll.save_adapter(model, tmp_path / "own")
    (tmp_path / "a" / "adapter.json").unlink()
    other = TinyMLP().double()
    ll.load_adapter(other, tmp_path / "own")
    assert torch.equal(other(draw(4, 6)), model(draw(4, 6)))
    assert records(other)["default"].method.sources == [str(tmp_path / "a")]
    assert copy.deepcopy(adapters["first"].lora_B).shape == (8, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "frost"}, r'CoRA.mode is "frost". It takes: "frozen", "start"|Did you mean "frozen"'),
        ({"sources": []}, r"CoRA.sources is \[\]; it must name one at least, or be null"),
        ({"basis_scale": 0.0}, r"CoRA.basis_scale is 0.0; it must be above 0"),
        ({"basis_sha256": "0"}, r"CoRA.basis_sha256 is '0'; it belongs to sources that are one .safetensors file"),
        ({"rank": 0}, r"CoRA.rank is 0; it must be at least 1"),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        CoRA(**settings)
