"""Factors in one basis, and the line between two adapters: against dense float64 computations with numpy."""

from __future__ import annotations

import json
from contextlib import suppress

import numpy as np
import pytest
import torch
from small_methods import small
from toy_comparison import words

import lora_lightning as ll
from ll_dora import DoRA
from ll_lora import LoRA
from ll_mora import MoRA
from ll_rebasin.adapters import align_adapter, canonicalize
from ll_rebasin.barrier import Barrier, linear_barrier
from ll_rebasin.functional import align, canonical
from ll_rebasin.picture import draw_barrier
from ll_riemannian_moe import MoELoRA
from ll_rose import RoseLoRA
from lora_lightning.cli.main import main
from lora_lightning.errors import AdapterStateError, SettingsError
from lora_lightning.injection.records import adapters_named, iter_adapters
from lora_lightning.plugins import registry
from lora_lightning.testing import TinyMLP, perturb


def drawn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(seed=0, rank=3, lead=()):
    return drawn(*lead, rank, 7, seed=seed), drawn(*lead, 5, rank, seed=seed + 50)


def changed(A, B, seed=9):
    """The same product in another inner basis."""
    G = drawn(*A.shape[:-2], A.shape[-2], A.shape[-2], seed=seed)
    return G @ A, B @ torch.linalg.inv(G)


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_the_canonical_form_is_the_balanced_svd(rank, lead):
    """Of one product one form, whatever the basis it came in; made again, it stays."""
    A, B = pair(rank=rank, lead=lead)
    found = canonical(A, B)
    values = np.linalg.svd((B @ A).numpy(), compute_uv=False)[..., :rank]
    grams = [found[0] @ found[0].mT, found[1].mT @ found[1]]
    diagonal = torch.zeros(*lead, rank, rank, dtype=torch.float64)
    diagonal[..., range(values.shape[-1]), range(values.shape[-1])] = torch.from_numpy(values)
    for gram in grams:
        torch.testing.assert_close(gram, diagonal, rtol=0, atol=1e-10)
    torch.testing.assert_close(found[1] @ found[0], B @ A, rtol=0, atol=1e-10)
    if rank <= 5:
        for mine, theirs in zip(canonical(*changed(A, B)), found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-8)
    for mine, theirs in zip(canonical(*found), found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


def test_means_of_factors_agree_once_both_are_canonical():
    """As they are, the mean of the factors of one update in two bases is far from it."""
    A, B = pair()
    other = changed(A, B)
    mean = (B + other[1]) @ (A + other[0]) / 4
    assert float((mean - B @ A).norm() / (B @ A).norm()) > 0.1
    one, two = canonical(A, B), canonical(*other)
    two = align(*two, one)
    torch.testing.assert_close((one[1] + two[1]) @ (one[0] + two[0]) / 4, B @ A, rtol=0, atol=1e-8)


@pytest.mark.parametrize("side", ["A", "both"])
def test_alignment_is_the_best_rotation(side):
    """No nearer one among many, of both orientations; and a rotated copy comes back."""
    reference, (A, B) = pair(1), pair(2)

    def far(a, b):
        return float((reference[0] - a).norm() ** 2 + (side == "both") * (reference[1] - b).norm() ** 2)

    found = align(A, B, reference, side)
    torch.testing.assert_close(found[1] @ found[0], B @ A, rtol=0, atol=1e-12)
    assert far(*found) <= far(A, B)
    for seed in range(200):
        Q = torch.linalg.qr(drawn(3, 3, seed=seed))[0] * torch.tensor([1.0, 1.0, (-1.0) ** seed])
        assert far(*found) <= far(Q @ A, B @ Q.mT) + 1e-12
    Q = torch.linalg.qr(drawn(3, 3, seed=5))[0]
    for mine, theirs in zip(align(Q @ A, B @ Q.mT, (A, B), side), (A, B), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_what_cannot_be_aligned():
    with pytest.raises(SettingsError, match=r"factors of \(3, 7\) and \(5, 3\) cannot be aligned to \(2, 7\) and"):
        align(*pair(), pair(rank=2))
    with pytest.raises(SettingsError, match=r'side is "B"; it must be "A" or "both"'):
        align(*pair(), pair(1), "B")


# -- in a model --------------------------------------------------------------------------------------------------------

X = drawn(6, 6, seed=3)


def model(a, b=None, targets=(("first", "second"), ("first", "second")), **options):
    """A small model with adapters "a" and "b" whose numbers are no start values."""
    net = TinyMLP().double().eval()
    for i, (name, method, where) in enumerate(zip("ab", (a, b or a), targets, strict=True)):
        ll.inject(net, method, list(where), name=name, seed=i, **{"also_train": (), **options})
        for j, adapter in enumerate(adapters_named(net, name).values()):
            perturb(adapter, seed=10 * i + j)
    return net


def output(net, *names):
    ll.set_active(net, list(names))
    with torch.no_grad():
        return net(X)


@pytest.mark.parametrize("method", [LoRA(rank=2, alpha=3.0), DoRA(rank=2), RoseLoRA(rank=2)])
def test_a_canonical_adapter_computes_the_same(method):
    net = model(method)
    before = output(net, "a"), output(net, "b")
    canonicalize(net, "a")
    canonicalize(net, "b")
    align_adapter(net, "b", "a", "both")
    torch.testing.assert_close(output(net, "a"), before[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(output(net, "b"), before[1], rtol=0, atol=1e-12)
    for adapter in adapters_named(net, "a").values():
        (own,) = adapter.factor_pairs()
        gram = own.lora_A @ own.lora_A.mT
        torch.testing.assert_close(gram, torch.diag(gram.diag()), rtol=0, atol=1e-10)
        torch.testing.assert_close(own.lora_B.mT @ own.lora_B, gram, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", sorted(registry().methods))
def test_every_method_keeps_its_function_or_is_refused(name):
    """What an adapter says of its factor pairs holds: where the product alone counts, another basis changes nothing."""
    net = TinyMLP().double().eval()
    ll.inject(net, small(name), ["first"], name="a", seed=0, also_train=())
    for adapter in adapters_named(net, "a").values():
        perturb(adapter)
    before = output(net, "a")
    with suppress(SettingsError):
        canonicalize(net, "a")
    torch.testing.assert_close(output(net, "a"), before, rtol=0, atol=1e-10)


def test_adapters_whose_basis_is_not_free():
    pruned = model(RoseLoRA(rank=2))
    next(iter(adapters_named(pruned, "a").values())).masks()[0].mask[0, 0] = False
    cases = [
        (pruned, SettingsError, "has removed entries, which another basis would fill"),
        (model(LoRA(rank=2, train="B")), SettingsError, "one of the factors is fixed by the method"),
        (model(MoRA(rank=2)), SettingsError, "MoRAAdapter has no factors of which the product alone counts"),
    ]
    for net, error, message in cases:
        with pytest.raises(error, match=message):
            canonicalize(net, "a")
    with pytest.raises(AdapterStateError, match='no adapter "c"'):
        canonicalize(pruned, "c")


# -- the line ----------------------------------------------------------------------------------------------------------


def weights(net, name):
    """Weight and bias of each layer with one adapter merged."""
    ll.set_active(net, [name])
    found = {path: (layer.weight.detach(), layer.bias) for path, layer in iter_adapters(net)}
    return {path: (w.clone(), None if b is None else b.detach().clone()) for path, (w, b) in found.items()}


@pytest.mark.parametrize(
    ("a", "b", "targets"),
    [
        (LoRA(rank=2), LoRA(rank=3, alpha=1.0), (("first", "second"), ("first", "second"))),
        (DoRA(rank=2), LoRA(rank=1), (("first", "second"), ("first", "second"))),
        (LoRA(rank=2), LoRA(rank=2), (("first",), ("second",))),
    ],
)
def test_losses_are_those_of_a_plain_model_with_the_mixed_weights(a, b, targets):
    """And the model is left as it was: what is active, modes, and every number."""
    net = model(a, b, targets)
    plain = TinyMLP().double().eval()
    for parameter, source in zip(plain.parameters(), TinyMLP().double().parameters(), strict=True):
        parameter.data.copy_(source)
    ends = weights(net, "a"), weights(net, "b")
    ll.set_active(net, ["b"])
    net.train()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    found = linear_barrier(net, lambda: float(net(X).square().mean()), "a", "b", points=5)
    assert found.positions == (0, 0.25, 0.5, 0.75, 1)
    for t, loss in zip(found.positions, found.losses, strict=True):
        for path in ends[0]:
            (W_a, b_a), (W_b, b_b) = ends[0][path], ends[1][path]
            layer = plain.get_submodule(path)
            layer.weight.data.copy_((1 - t) * W_a + t * W_b)
            if b_a is not None:
                layer.bias.data.copy_((1 - t) * b_a + t * b_b)
        assert loss == pytest.approx(float(plain(X).detach().square().mean()), rel=1e-12)
    line = [(1 - t) * found.losses[0] + t * found.losses[-1] for t in found.positions]
    assert found.height == pytest.approx(max(a - b for a, b in zip(found.losses, line, strict=True)))
    after = net.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert after.keys() == state.keys()
    assert net.training
    assert all(layer.active == ("b",) * ("b" in layer.adapters) for _, layer in iter_adapters(net))


def test_factors_of_one_update_in_two_bases_have_a_barrier_until_they_are_aligned():
    """Two adapters that compute the same: no barrier between updates, none between aligned factors, one else."""
    net = model(LoRA(rank=2))
    for path, adapter in adapters_named(net, "b").items():
        (mine,), (theirs,) = adapter.factor_pairs(), adapters_named(net, "a")[path].factor_pairs()
        A, B = changed(theirs.lora_A.detach(), theirs.lora_B.detach())
        mine.lora_A.data.copy_(A)
        mine.lora_B.data.copy_(B)
    target = output(net, "a")
    heights = {}
    for space in ("update", "factors", "aligned"):
        found = linear_barrier(net, lambda: float((net(X) - target).square().mean()), "a", "b", 5, space)
        heights[space] = found.height
    assert heights["update"] == pytest.approx(0, abs=1e-20)
    assert heights["aligned"] == pytest.approx(0, abs=1e-12)
    assert heights["factors"] > 1e-3


def test_factors_of_unequal_ranks_are_mixed_with_zeros():
    net = model(LoRA(rank=2), LoRA(rank=3, alpha=1.0))
    found = linear_barrier(net, lambda: float(net(X).sum()), "a", "b", 3, "factors")
    ends = [float(output(net, name).sum()) for name in "ab"]
    assert (found.losses[0], found.losses[-1]) == pytest.approx(ends)


def test_heads_are_on_the_line_too():
    net = TinyMLP().double().eval()
    for i, name in enumerate("ab"):
        ll.inject(net, LoRA(rank=2), ["first"], name=name, also_train=["second"], seed=i)
        net.second.weight.data.fill_(float(i + 1))
    seen = []
    linear_barrier(net, lambda: seen.append(float(net.second.weight[0, 0])) or 0.0, "a", "b", 5)
    assert seen == pytest.approx([1, 1.25, 1.5, 1.75, 2])
    ll.set_active(net, ["a"])
    assert bool((net.second.weight == 1).all())
    ll.set_active(net, ["b"])
    assert bool((net.second.weight == 2).all())


def test_lines_that_do_not_exist():
    net = model(LoRA(rank=2))
    cases = [
        (net, {"points": 2}, SettingsError, "points is 2; it must be at least 3"),
        (net, {"space": "delta"}, SettingsError, 'space is "delta"; it must be one of update, factors, aligned'),
        (net, {"b": "c"}, AdapterStateError, 'no adapter "c"'),
        (
            model(DoRA(rank=2)),
            {"space": "factors"},
            SettingsError,
            r'product of factors; take the space "update"',
        ),
        (model(MoELoRA(rank=2, experts=2, top_k=2)), {}, SettingsError, "depends on its input, so it has no weight"),
    ]
    for built, options, error, message in cases:
        with pytest.raises(error, match=message):
            linear_barrier(built, lambda: 0.0, **{"a": "a", "b": "b", **options})


def test_the_picture_has_every_space(tmp_path):
    found = [Barrier("update", (0.0, 0.5, 1.0), (1.0, 0.8, 1.2)), Barrier("factors", (0.0, 0.5, 1.0), (1.0, 2.1, 1.2))]
    assert found[0].height == 0
    assert found[1].height == pytest.approx(1.0)
    draw_barrier(tmp_path / "x.png", found, "a", "b")
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# -- the verb ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_and_itself_have_no_barrier(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *words(tmp_path, steps=3), "--model.linear_baseline", "false"]) == 0
    (folder,) = (tmp_path / "runs").glob("*/001")
    value = json.loads((folder / "summary.json").read_text())["values"]["loss"]
    capsys.readouterr()
    assert main(["barrier", str(folder), str(folder / "adapter"), "--points", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"update: barrier 0.0000 (loss {value:.4f} at most, {value:.4f} and {value:.4f} at the ends)" in lines
    assert [line.partition(":")[0] for line in lines[-4:]] == ["update", "factors", "aligned", "barrier.png"]
    assert (tmp_path / "barrier.png").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "x.pdf"], '--output is "x.pdf"; it must end in .png.'),
        (["--batches", "0"], "--batches is 0; it must be at least 1."),
        ([], "holds no config.yaml, so it is no run folder"),
    ],
)
def test_flags_outside_their_rules(tmp_path, capsys, flags, message):
    assert main(["barrier", str(tmp_path), str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_an_adapter(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("{}")
    assert main(["barrier", str(tmp_path), str(tmp_path)]) == 2
    assert "holds no adapter: neither adapter/adapter.json nor adapter.json is there." in capsys.readouterr().err
