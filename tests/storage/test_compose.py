"""Sums of adapter folders against dense sums in float64, and against the model with several adapters active."""

from __future__ import annotations

import json

import pytest
import torch
from miniatures import installed
from miniatures.sharing import VeRA
from miniatures.starts import PiSSA

from ll_dora import DoRA
from ll_lora import LoRA
from ll_rose import RoseLoRA
from lora_lightning import inject, load_adapter, save_adapter, set_active
from lora_lightning.adapters.folded import FactoredUpdate
from lora_lightning.errors import AdapterFileError, SettingsError
from lora_lightning.injection.records import adapters_named, iter_adapters
from lora_lightning.storage.compose import compose, truncated, updates, weighted_sum
from lora_lightning.storage.stored import FILE, read_folder
from lora_lightning.testing import TinyMLP, perturb, tiny_decoder, tiny_encoder


@pytest.fixture(autouse=True, scope="module")
def _installed():
    with installed(VeRA, PiSSA):
        yield


def saved(folder, method, seed=0, targets=("first", "second"), **options):
    model = TinyMLP().double().eval()
    inject(model, method, list(targets), also_train=(), seed=seed, **options)
    for i, adapter in enumerate(adapters_named(model, "default").values()):
        perturb(adapter, seed=10 * seed + i)
    save_adapter(model, folder)
    return {path: layer.low_rank("default") for path, layer in iter_adapters(model)}


def dense(factors):
    A, B = factors
    return B @ A


def applied(folder):
    model = TinyMLP().double().eval()
    load_adapter(model, folder)
    return model


X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 0.7), (2.0, -1.0)])
def test_a_sum_is_the_dense_sum(tmp_path, weights):
    one = saved(tmp_path / "one", LoRA(rank=2, alpha=3.0))
    two = saved(tmp_path / "two", RoseLoRA(rank=1, alpha=5.0), seed=1)
    done = compose([tmp_path / "one", tmp_path / "two"], tmp_path / "both", weights)
    assert done.ranks == {"first": 3, "second": 3}
    model = applied(done.folder)
    for path, layer in iter_adapters(model):
        expected = weights[0] * dense(one[path]) + weights[1] * dense(two[path])
        torch.testing.assert_close(dense(layer.low_rank("default")), expected, rtol=0, atol=1e-14)
    assert json.loads((done.folder / "adapter.json").read_text())["composed"] == {
        str(tmp_path / "one"): weights[0],
        str(tmp_path / "two"): weights[1],
    }


def test_a_sum_computes_what_both_adapters_active_do(tmp_path):
    saved(tmp_path / "one", LoRA(rank=2))
    saved(tmp_path / "two", LoRA(rank=1, scaling_rule="alpha/sqrt(r)"), seed=1)
    compose([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    model = TinyMLP().double().eval()
    load_adapter(model, tmp_path / "one", "one")
    load_adapter(model, tmp_path / "two", "two")
    set_active(model, ["one", "two"])
    torch.testing.assert_close(applied(tmp_path / "both")(X), model(X), rtol=0, atol=1e-12)


def test_one_adapter_stays_what_it_is_and_order_does_not_matter(tmp_path):
    saved(tmp_path / "one", PiSSA(rank=2))
    saved(tmp_path / "two", LoRA(rank=1), seed=1)
    compose([tmp_path / "one"], tmp_path / "same")
    torch.testing.assert_close(applied(tmp_path / "same")(X), applied(tmp_path / "one")(X), rtol=0, atol=1e-12)
    compose([tmp_path / "one", tmp_path / "two"], tmp_path / "a", [0.5, 2.0])
    compose([tmp_path / "two", tmp_path / "one"], tmp_path / "b", [2.0, 0.5])
    torch.testing.assert_close(applied(tmp_path / "a")(X), applied(tmp_path / "b")(X), rtol=0, atol=1e-12)


def test_a_layer_need_not_be_in_every_folder_and_ranks_may_differ(tmp_path):
    one = saved(tmp_path / "one", LoRA(rank=2), targets=["first"])
    saved(tmp_path / "two", LoRA(rank=1), seed=1, overrides={"second": {"rank": 3}})
    done = compose([tmp_path / "one", tmp_path / "two"], tmp_path / "both", [1.0, 0.0])
    assert done.ranks == {"first": 3, "second": 3}
    found = updates(read_folder(done.folder), done.folder)
    torch.testing.assert_close(dense(found["first"]), dense(one["first"]), rtol=0, atol=1e-14)
    assert not dense(found["second"]).any()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_limited_rank_is_the_best_approximation(tmp_path, rank):
    one, two = saved(tmp_path / "one", LoRA(rank=2)), saved(tmp_path / "two", LoRA(rank=2), seed=1)
    done = compose([tmp_path / "one", tmp_path / "two"], tmp_path / "both", rank=rank)
    found = updates(read_folder(done.folder), done.folder)
    for path in one:
        total = dense(one[path]) + dense(two[path])
        U, S, Vh = torch.linalg.svd(total, full_matrices=False)
        torch.testing.assert_close(dense(found[path]), U[:, :rank] * S[:rank] @ Vh[:rank], rtol=0, atol=1e-10)
        assert done.ranks[path] == rank
        assert done.discarded[path] == pytest.approx(float(S[rank:].square().sum() / S.square().sum()))


def test_ranks_beyond_the_layer_lose_nothing(tmp_path):
    folders = [tmp_path / str(i) for i in range(3)]
    parts = [saved(folder, LoRA(rank=3), seed=i) for i, folder in enumerate(folders)]
    done = compose(folders, tmp_path / "all")
    assert done.ranks == {"first": 6, "second": 4}
    found = updates(read_folder(done.folder), done.folder)
    for path in found:
        torch.testing.assert_close(dense(found[path]), sum(dense(p[path]) for p in parts), rtol=0, atol=1e-12)
        assert done.discarded[path] < 1e-20


def test_another_basis_of_the_factors_changes_nothing():
    g = torch.Generator().manual_seed(3)
    A, B, Q = (torch.randn(*size, generator=g, dtype=torch.float64) for size in ((3, 7), (5, 3), (3, 3)))
    other = torch.randn(2, 7, generator=g, dtype=torch.float64), torch.randn(5, 2, generator=g, dtype=torch.float64)
    one = truncated(*weighted_sum([((A, B), 1.0), (other, 0.5)]), 2)[0]
    two = truncated(*weighted_sum([((Q @ A, B @ torch.linalg.inv(Q)), 1.0), (other, 0.5)]), 2)[0]
    torch.testing.assert_close(dense(one), dense(two), rtol=0, atol=1e-10)


def test_what_has_been_folded_is_in_the_sum(tmp_path):
    model = TinyMLP().double().eval()
    inject(model, LoRA(rank=2), ["first"], also_train=())
    layer = model.first
    perturb(layer.adapter("default"))
    layer.set_folded("default", FactoredUpdate(layer.base_layer))
    layer.fold("default", blend=0.5)
    perturb(layer.adapter("default"), seed=4)
    save_adapter(model, tmp_path / "staged")
    compose([tmp_path / "staged"], tmp_path / "plain")
    torch.testing.assert_close(applied(tmp_path / "plain")(X), model(X), rtol=0, atol=1e-12)


def test_heads_are_refused_or_the_first_ones(tmp_path):
    tokens = torch.tensor([[1, 5, 7, 2]])
    for i, name in enumerate(("one", "two")):
        model = tiny_encoder()
        inject(model, LoRA(rank=1), ["query"], seed=i)
        perturb(model.classifier, seed=i)
        for adapter in adapters_named(model, "default").values():
            perturb(adapter, seed=i)
        save_adapter(model, tmp_path / name)
    folders = [tmp_path / "one", tmp_path / "two"]
    with pytest.raises(AdapterFileError, match="which trained in full, and heads do not add up"):
        compose(folders, tmp_path / "both")
    compose(folders, tmp_path / "both", [1.0, 0.0], heads="first")
    one, both = tiny_encoder(), tiny_encoder()
    load_adapter(one, tmp_path / "one")
    load_adapter(both, tmp_path / "both")
    torch.testing.assert_close(both(tokens).logits, one(tokens).logits, rtol=0, atol=1e-6)


def test_rows_of_known_tokens_are_refused_or_the_first_ones(tmp_path):
    tokens = torch.tensor([[1, 5, 7, 2]])
    for i, name in enumerate(("one", "two")):
        model = tiny_decoder()
        inject(model, LoRA(rank=1), ["q_proj"], train_tokens=[5], seed=i)
        with torch.no_grad():
            model.model.embed_tokens.token_rows.add_(i + 1.0)
        for adapter in adapters_named(model, "default").values():
            perturb(adapter, seed=i)
        save_adapter(model, tmp_path / name)
    folders = [tmp_path / "one", tmp_path / "two"]
    with pytest.raises(AdapterFileError, match=r'which trained in full, and heads do not add up; heads="first" takes'):
        compose(folders, tmp_path / "both")
    compose(folders, tmp_path / "both", [1.0, 0.0], heads="first")
    one, both = tiny_decoder(), tiny_decoder()
    load_adapter(one, tmp_path / "one")
    load_adapter(both, tmp_path / "both")
    torch.testing.assert_close(both(tokens).logits, one(tokens).logits, rtol=0, atol=1e-6)
    assert not torch.allclose(both(tokens).logits, tiny_decoder()(tokens).logits)


def test_what_does_not_add_up_is_refused_and_nothing_is_written(tmp_path):
    saved(tmp_path / "lora", LoRA(rank=1))
    saved(tmp_path / "dora", DoRA(rank=1))
    saved(tmp_path / "vera", VeRA(rank=1))
    saved(tmp_path / "bias", LoRA(rank=1, bias=True))
    other = TinyMLP(seed=5).double()
    inject(other, LoRA(rank=1), ["first"], also_train=())
    save_adapter(other, tmp_path / "elsewhere")
    for name, message in {
        "dora": "DoRA on first is no product",
        "vera": "VeRA|shapes|product",
        "bias": "no product of two factors",
        "elsewhere": r"another base model than .*\(weights\)",
    }.items():
        with pytest.raises(AdapterFileError, match=message):
            compose([tmp_path / "lora", tmp_path / name], tmp_path / "out")
    with pytest.raises(SettingsError, match="1 folders and 2 weights"):
        compose([tmp_path / "lora"], tmp_path / "out", [1.0, 2.0])
    with pytest.raises(SettingsError, match="rank is 0"):
        compose([tmp_path / "lora"], tmp_path / "out", rank=0)
    assert not (tmp_path / "out" / FILE).exists()
