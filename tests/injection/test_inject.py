from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import AdapterStateError, SettingsError, TargetError
from lora_lightning.injection.records import adapters_named, injected_root, records, trainable_adapters
from lora_lightning.methods import Method
from lora_lightning.testing import TinyMLP, perturb, tiny_decoder, tiny_encoder

METHOD = LoRA(rank=2, alpha=4.0)
TOKENS = torch.tensor([[1, 5, 7, 2], [1, 9, 2, 0]])
X = torch.linspace(-1, 1, 18).view(3, 6)


def adapted(name: str = "default", model: Any = None, moved: bool = True, **options: Any) -> Any:
    """A TinyMLP with one more adapter, whose update is not zero."""
    model = TinyMLP() if model is None else model
    ll.inject(model, METHOD, name=name, seed=0, **options)
    if moved:
        for i, adapter in enumerate(adapters_named(model, name).values()):
            perturb(adapter, len(name) + i)
    return model


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# -- inject ------------------------------------------------------------------------------------------------------------


def test_inject_freezes_the_rest_and_reports() -> None:
    model = tiny_encoder()
    total = sum(p.numel() for p in model.parameters())
    report = ll.inject(model, METHOD, ["query"])
    own = 2 * (2 * 16 + 16 * 2)
    head = 16 * 16 + 16 + 3 * 16 + 3
    assert report.adapter_parameters == own
    assert report.trained == {
        "bert.pooler.dense.weight": 256,
        "bert.pooler.dense.bias": 16,
        "classifier.weight": 48,
        "classifier.bias": 3,
    }
    assert report.trainable_parameters == own + head
    assert report.total_parameters == total + own
    assert report.layers["bert.encoder.layer.0.attention.self.query"] == ("linear", 16, 16)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == own + head
    text = str(report)
    assert f"LoRA on 2 layers: {own + head:,} of {total + own:,} parameters train" in text
    assert "fully trained: bert.pooler.dense.weight" in text


def test_names_and_shapes_of_parameters() -> None:
    model = adapted()
    assert set(model.state_dict()) == {
        f"{path}.{rest}"
        for path in ("first", "second")
        for rest in (
            "base.weight",
            "base.bias",
            "adapters.default.lora_A",
            "adapters.default.lora_B",
            "adapters.default.rank_mask",
        )
    }
    assert model.first.adapters.default.lora_A.shape == (2, 6)
    assert model.first.adapters.default.lora_B.shape == (8, 2)


def test_adapters_follow_dtype_and_mode_of_their_layer() -> None:
    model = TinyMLP().to(torch.bfloat16).eval()
    ll.inject(model, METHOD)
    assert {p.dtype for p in adapters_named(model, "default")["first"].parameters()} == {torch.float32}
    assert not any(module.training for module in model.modules())
    assert not any(p.dtype == torch.float32 for name, p in model.named_parameters() if ".base." in name)


def test_without_a_hugging_face_model_no_head_is_known_and_that_is_said() -> None:
    report = ll.inject(TinyMLP(), METHOD, ["first"])
    assert any("no head is known: what has no adapter stays frozen" in note for note in report.notes)
    assert ll.inject(TinyMLP(), METHOD, ["first"], also_train=["second"]).notes == ()


def test_seed_decides_the_start_and_none_takes_torchs() -> None:
    torch.manual_seed(5)
    first = TinyMLP()
    ll.inject(first, METHOD)
    torch.rand(3)
    second = TinyMLP()
    ll.inject(second, METHOD)
    third = TinyMLP()
    ll.inject(third, METHOD, seed=6)
    keys = [key for key in first.state_dict() if key.endswith("lora_A")]
    assert all(torch.equal(first.state_dict()[key], second.state_dict()[key]) for key in keys)
    assert not any(torch.equal(first.state_dict()[key], third.state_dict()[key]) for key in keys)
    assert records(first)["default"].seed == 5


def test_settings_a_layer_cannot_have_name_the_layer() -> None:
    with pytest.raises(
        SettingsError, match=r"LoRA on first: rank is 7; a layer of 6 inputs and 8 outputs takes at most 6"
    ):
        ll.inject(TinyMLP(), LoRA(rank=7))
    with pytest.raises(SettingsError, match=r'overrides\["second"\]: LoRA has no "rnk". Did you mean "rank"\?'):
        ll.inject(TinyMLP(), METHOD, overrides={"second": {"rnk": 4}})
    with pytest.raises(SettingsError, match=r"LoRA.rank is 0"):
        ll.inject(TinyMLP(), METHOD, overrides={"second": {"rank": 0}})


def test_a_refused_injection_leaves_the_model_as_it_was() -> None:
    model = adapted(moved=False)
    before, names, active = model.state_dict(), trainable(model), model.first.active
    for options, error in (
        ({"name": "default"}, AdapterStateError),
        ({"name": "b", "targets": ["frist"]}, TargetError),
        ({"name": "b", "overrides": {"second": {"rank": 99}}}, SettingsError),
        ({"name": "a.b"}, SettingsError),
    ):
        with pytest.raises(error):
            ll.inject(model, METHOD, **options)  # type: ignore[arg-type]
    assert model.state_dict().keys() == before.keys()
    assert trainable(model) == names
    assert model.first.active == active
    assert list(records(model)) == ["default"]


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(AdapterStateError, match='has an adapter "default" already; eject it or choose another name'):
        adapted(model=adapted())


def test_a_merged_model_takes_no_further_adapter() -> None:
    model = adapted()
    ll.merge(model)
    with pytest.raises(AdapterStateError, match="first: default is merged; call unmerge first"):
        adapted("b", model)


def test_weights_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(AdapterStateError, match=r"0\.weight is on the meta device, without a value; load the weights"):
        ll.inject(model, METHOD)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_sharded_model_is_refused() -> None:
    model = fully_shard(TinyMLP(), mesh=dist.init_device_mesh("cpu", (1,)))
    with pytest.raises(AdapterStateError, match="the model is sharded already; inject adapters before fully_shard"):
        ll.inject(model, METHOD)


def test_adapters_of_a_part_are_refused_and_found_from_outside() -> None:
    whole = nn.ModuleDict({"net": adapted()})
    assert injected_root(whole) is whole["net"]
    with pytest.raises(AdapterStateError, match=r"net \(TinyMLP\) has adapters of its own; inject into that module"):
        ll.inject(whole, METHOD, name="b")
    assert [path for path, _ in ll.iter_adapters(whole)] == ["net.first", "net.second"]
    with pytest.raises(AdapterStateError, match="Linear has no adapters; call inject or load_adapter first"):
        injected_root(nn.Linear(1, 1))


def test_a_layer_that_trains_in_full_takes_no_adapter() -> None:
    model = TinyMLP()
    ll.inject(model, METHOD, ["first"], also_train=["second"])
    with pytest.raises(TargetError, match='second trains in full with adapter "default"; exclude it'):
        ll.inject(model, METHOD, ["second"], also_train=(), name="b")


def test_two_adapters_that_train_one_head_are_told_so() -> None:
    model = tiny_encoder()
    assert ll.inject(model, METHOD, ["query"]).notes == ()
    report = ll.inject(model, METHOD, ["key"], name="b")
    assert any('trains with adapter "default" too; a model has one set of heads' in note for note in report.notes)


@pytest.mark.timeout(30)
def test_a_thousand_layers() -> None:
    """In time linear in their number, or it would be far above the limit."""
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(1000)])
    report = ll.inject(model, LoRA(rank=1), exclude=["7"])
    assert len(report.layers) == 999
    ll.set_trainable(model, "default")
    ll.merge(model)
    ll.eject(model)
    assert all(type(layer) is nn.Linear for layer in model)


# -- several adapters: active, trainable, merged -----------------------------------------------------------------------


def test_the_newest_adapter_is_the_only_active_and_trainable_one() -> None:
    model = adapted("a")
    adapted("b", model, targets=["first"])
    assert model.first.active == ("b",)
    assert model.second.active == ()
    assert trainable(model) == {f"first.adapters.b.lora_{side}" for side in "AB"}
    alone = adapted("b", targets=["first"])
    assert torch.equal(model(X), alone(X))
    assert list(trainable_adapters(model)) == ["first.adapters.b"]


def test_active_trainable_and_merged_are_three_states() -> None:
    model = adapted("b", adapted("a"))
    ll.set_active(model, "a")
    assert model.first.active == ("a",)
    assert all(".adapters.b." in name for name in trainable(model))
    ll.set_trainable(model, ["a", "b"])
    assert {name.split(".")[2] for name in trainable(model)} == {"a", "b"}
    assert model.first.active == ("a",)
    ll.merge(model)
    assert model.first.merged == ("a",)
    ll.set_trainable(model, [])
    assert trainable(model) == set()
    assert model.first.merged == ("a",)
    ll.unmerge(model)
    assert model.first.active == ("a",)
    assert torch.equal(model(X), adapted("a")(X))


def test_heads_train_with_their_adapter() -> None:
    model = tiny_encoder()
    ll.inject(model, METHOD, ["query"], name="a")
    ll.inject(model, METHOD, ["query"], name="b", also_train=())
    assert not model.classifier.weight.requires_grad
    ll.set_trainable(model, "a")
    assert model.classifier.weight.requires_grad
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad


def test_additive_adapters_sum_in_any_order() -> None:
    model = adapted("b", adapted("a")).double()
    x = X.double()
    base = TinyMLP().double()
    hidden = base.first(x)
    updates = [
        2.0 * x @ model.first.adapters[name].lora_A.T @ model.first.adapters[name].lora_B.T for name in ("a", "b")
    ]
    for names in (["a", "b"], ["b", "a"]):
        ll.set_active(model, names)
        torch.testing.assert_close(model.first(x), hidden + sum(updates))
    ll.set_active(model, [])
    assert torch.equal(model(x), base(x))


class Replaces(Adapter):
    """An update that depends on the weight below it."""

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return base.apply(x, self.merged_weight(base.weight()), base.bias)

    def merged_weight(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def reset(self, generator: torch.Generator) -> None:
        pass


class Doubling(Method):
    def build(self, base: BaseLayer) -> Adapter:
        return Replaces()


def test_what_cannot_be_stacked_is_refused_as_a_whole() -> None:
    model = adapted("a")
    ll.inject(model, Doubling(), ["second"], name="b")
    ll.set_active(model, "a")
    with pytest.raises(AdapterStateError, match=r"a \(LowRankAdapter\), b \(Replaces\) cannot be active together"):
        ll.set_active(model, ["a", "b"])
    assert model.first.active == model.second.active == ("a",)


@pytest.mark.parametrize("switch", [ll.set_active, ll.set_trainable])
def test_unknown_names_are_refused_with_the_nearest(switch: Any) -> None:
    model = adapted("task_one")
    with pytest.raises(AdapterStateError, match=r'no adapter "task_on". Did you mean "task_one"\? Installed: task_one'):
        switch(model, ["task_on"])
    assert model.first.active == ("task_one",)


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(AdapterStateError, match="a, a names an adapter twice"):
        ll.set_active(adapted("a"), ["a", "a"])


def test_another_set_cannot_become_active_while_one_is_merged() -> None:
    model = adapted("b", adapted("a"))
    ll.merge(model)
    with pytest.raises(AdapterStateError, match="b is merged; call unmerge before another set is active"):
        ll.set_active(model, "a")
    ll.set_active(model, "b")


# -- merge -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_merge_is_all_or_nothing(keep: bool, value: float) -> None:
    model = adapted()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.second.adapters.default.lora_B[0, 0] = value
    with pytest.raises(AdapterStateError, match=r'second: adapter "default": lora_B .* not finite. Nothing was merged'):
        ll.merge(model, keep_original=keep)
    assert model.first.merged == ()
    assert torch.equal(model.first.base.weight, before["first.base.weight"])


def test_an_overflow_in_half_precision_merges_nothing() -> None:
    model = TinyMLP().half()
    ll.inject(model, METHOD)
    perturb(model.first.adapters)
    with torch.no_grad():
        for parameter in model.second.adapters.parameters():
            parameter.fill_(1e4)
    before = model.first.base.weight.clone()
    with pytest.raises(AdapterStateError, match=r"second: the merged weight overflows torch\.float16"):
        ll.merge(model, keep_original=False)
    assert torch.equal(model.first.base.weight, before)


def test_merge_twice_and_unmerge_twice_do_nothing_more() -> None:
    model = adapted()
    before, weight = model(X), model.first.base.weight.clone()
    ll.unmerge(model)
    ll.merge(model)
    once = model.first.base.weight.clone()
    ll.merge(model)
    assert torch.equal(model.first.base.weight, once)
    ll.unmerge(model)
    ll.unmerge(model)
    assert torch.equal(model.first.base.weight, weight)
    assert torch.equal(model(X), before)


def test_merge_of_nothing_is_an_error() -> None:
    model = adapted()
    ll.set_active(model, [])
    with pytest.raises(AdapterStateError, match="no adapter is active, so there is nothing to merge"):
        ll.merge(model)


def test_merge_of_a_tied_weight_is_refused_whoever_put_the_adapter_there(tmp_path: Path) -> None:
    model = tiny_decoder(tied=True)
    ll.inject(model, METHOD, ["lm_head", "q_proj"])
    ll.save_adapter(model, tmp_path)
    loaded = tiny_decoder(tied=True)
    ll.load_adapter(loaded, tmp_path)
    for tied in (model, loaded):
        before = tied.lm_head.base.weight.clone()
        with pytest.raises(AdapterStateError, match=r"lm_head shares its weight with model\.embed_tokens, which"):
            ll.merge(tied)
        assert torch.equal(tied.lm_head.base.weight, before)
        assert not any(layer.merged for _, layer in ll.iter_adapters(tied))


def test_unmerge_without_originals_restores_nothing() -> None:
    model = adapted()
    model.second.merge(keep_original=False)
    model.first.merge()
    merged = model.first.base.weight.clone()
    with pytest.raises(AdapterStateError, match="keep_original=False; the original weights are gone"):
        ll.unmerge(model)
    assert torch.equal(model.first.base.weight, merged)


# -- disable -----------------------------------------------------------------------------------------------------------


def test_disable_gives_the_base_function_even_while_merged() -> None:
    model, base = adapted(), TinyMLP()
    ll.merge(model)
    merged = model(X)
    with ll.disable_adapters(model):
        assert torch.equal(model(X), base(X))
        with ll.disable_adapters(model):
            assert torch.equal(model(X), base(X))
        assert torch.equal(model(X), base(X))
    assert torch.equal(model(X), merged)
    ll.unmerge(model)
    assert torch.equal(model.first.base.weight, base.first.weight)


def test_disable_ends_with_an_error_inside() -> None:
    model = adapted()
    before = model(X)
    with pytest.raises(ZeroDivisionError), ll.disable_adapters(model):
        _ = 1 / 0
    assert torch.equal(model(X), before)


def test_disable_is_refused_where_the_base_is_gone() -> None:
    model = adapted()
    ll.merge(model, keep_original=False)
    with pytest.raises(AdapterStateError, match="the base model's function is gone"), ll.disable_adapters(model):
        pass


# -- eject -------------------------------------------------------------------------------------------------------------


def test_eject_one_of_two() -> None:
    model = adapted("b", adapted("a"))
    ll.merge(model)
    ll.eject(model, "b")
    assert list(records(model)) == ["a"]
    assert model.first.active == ()
    assert torch.equal(model(X), TinyMLP()(X))
    ll.set_active(model, "a")
    assert torch.equal(model(X), adapted("a")(X))
    ll.eject(model, "a")
    assert isinstance(model.first, nn.Linear)
    with pytest.raises(AdapterStateError, match="TinyMLP has no adapters"):
        ll.eject(model)


def test_eject_of_what_is_merged() -> None:
    model = adapted()
    ll.merge(model)
    ll.eject(model)
    assert torch.equal(model(X), TinyMLP()(X))
    model = adapted("b", adapted("a"))
    ll.merge(model, keep_original=False)
    merged = model(X)
    with pytest.raises(AdapterStateError, match="first: merged with keep_original=False; eject all adapters or none"):
        ll.eject(model, "b")
    assert isinstance(model.first, AdaptedLayer)
    ll.eject(model)
    assert torch.equal(model(X), merged)
    assert isinstance(model.first, nn.Linear)


def test_eject_keeps_trained_heads_and_restores_the_structure() -> None:
    model = tiny_encoder()
    names = set(model.state_dict())
    ll.inject(model, METHOD)
    perturb(model.classifier)
    head = model.classifier.weight.clone()
    ll.eject(model)
    assert set(model.state_dict()) == names
    assert torch.equal(model.classifier.weight, head)
    ll.inject(model, METHOD)


def test_a_copy_is_a_model_of_its_own() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    ll.eject(twin)
    assert list(records(model)) == ["default"]
    assert list(ll.iter_adapters(model))


# -- under torch.compile and data parallel wrappers --------------------------------------------------------------------


def test_functions_find_the_adapters_inside_wrappers() -> None:
    model = adapted()
    wrapped = torch.compile(model, backend="eager")
    ll.set_active(wrapped, [])
    assert model.first.active == ()
    ll.set_active(wrapped, "default")
    ll.merge(wrapped)
    assert model.first.merged == ("default",)


def test_a_head_left_frozen_is_said_aloud() -> None:
    report = ll.inject(tiny_encoder(), LoRA(rank=2), ["query"], also_train=["pooler"])
    assert "note: the head classifier stays frozen as it was loaded; also_train does not name it." in str(report)
    assert not ll.inject(tiny_encoder(), LoRA(rank=2), ["query"]).notes
