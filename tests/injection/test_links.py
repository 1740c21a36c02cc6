"""Where linked modules are put, what is refused, and how they stand among other adapters."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from miniatures import installed
from miniatures.sharing import SharedFactors, TiedLoRA, VeRA
from torch import nn

from lora_lightning import eject, inject, merge, save_adapter, set_active
from lora_lightning.errors import AdapterStateError, PluginError
from lora_lightning.exporters.export import export
from lora_lightning.injection.inject import ignore_adapter_buffers
from lora_lightning.injection.links import common_owner, earlier_alike
from lora_lightning.injection.records import adapters_named, linked_named
from lora_lightning.models.anatomy import survey
from lora_lightning.storage.fingerprint import fingerprint
from lora_lightning.testing import TinyMLP, perturb, tiny_decoder
from lora_lightning.training.strategies.units import roots


@pytest.fixture(autouse=True, scope="module")
def _installed():
    with installed(VeRA, TiedLoRA):
        yield


def test_the_common_owner_is_a_module_with_a_forward():
    model = tiny_decoder()
    assert common_owner(model, ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]) == "model"
    assert common_owner(model, ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]) == "model.layers.0"
    assert common_owner(model, ["model.layers.0.self_attn.q_proj"]) == "model.layers.0.self_attn"
    assert common_owner(model, ["model.layers.0.mlp.up_proj", "lm_head"]) == ""


def test_shared_tensors_lie_at_the_owner_under_the_adapters_name():
    model = tiny_decoder()
    before = set(model.state_dict())
    known = fingerprint(survey(model))
    report = inject(model, TiedLoRA(rank=2), ["q_proj", "v_proj"], also_train=(), name="mine")
    assert fingerprint(survey(model)) == known
    new = {key for key in model.state_dict() if ".adapters." in key}
    assert {key for key in new if "layers" not in key} == {"model.adapters.mine.lora_A", "model.adapters.mine.lora_B"}
    assert report.adapter_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    eject(model)
    assert set(model.state_dict()) == before
    assert not hasattr(model.model, "adapters")


def test_two_adapters_have_shared_tensors_of_their_own():
    model = TinyMLP().double().eval()
    x = torch.randn(3, 6, dtype=torch.float64)
    for name in ("one", "two"):
        inject(model, TiedLoRA(), ["first", "second"], also_train=(), name=name, seed=len(name))
        for module in (*adapters_named(model, name).values(), *linked_named(model, name).values()):
            perturb(module, seed=ord(name[0]))
    outputs = []
    for names in (["one"], ["two"]):
        set_active(model, names)
        outputs.append(model(x))
    eject(model, "two")
    set_active(model, ["one"])
    assert torch.equal(model(x), outputs[0])
    assert list(model.adapters) == ["one"]
    assert not torch.equal(*outputs)


def test_frozen_shared_tensors_are_not_broadcast_before_each_forward():
    model = TinyMLP()
    inject(model, VeRA(), ["first", "second"], also_train=())
    ignore_adapter_buffers(model)
    assert {"adapters.default.lora_A", "adapters.default.lora_B"} <= set(model._ddp_params_and_buffers_to_ignore)


def test_what_shares_tensors_merges_and_exports(tmp_path):
    model = tiny_decoder().double()
    tokens = torch.tensor([[1, 5, 7, 2]])
    inject(model, VeRA(rank=2), ["q_proj", "v_proj"], also_train=())
    for i, adapter in enumerate(adapters_named(model, "default").values()):
        perturb(adapter, i)
    adapted = model(tokens).logits
    export(model, tmp_path / "merged", "merged")
    export(model, tmp_path / "peft", "peft")  # the written files are read back and compared
    assert not [key for key in (tmp_path / "merged").iterdir() if "adapter" in key.name]
    merge(model)
    torch.testing.assert_close(model(tokens).logits, adapted, rtol=0, atol=1e-12)


def test_a_failed_save_names_no_shared_tensor_twice(tmp_path):
    model = TinyMLP()
    inject(model, VeRA(), ["first", "second"], also_train=())
    assert save_adapter(model, tmp_path / "a") == tmp_path / "a"


def test_sharding_refuses_what_no_unit_would_gather():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    inject(model, TiedLoRA(), ["a", "b"], also_train=())
    with pytest.raises(AdapterStateError, match="share tensors above several modules of ModuleDict"):
        roots(model)


@dataclass(frozen=True, kw_only=True)
class Unread(VeRA):
    """Returns a module that nobody reads."""

    def link(self, model, adapters):
        return {"": SharedFactors(torch.zeros(1), 2, 6, 8, trains=True)}


@dataclass(frozen=True, kw_only=True)
class Unreturned(VeRA):
    """Reads a module that it does not return."""

    def link(self, model, adapters):
        super().link(model, adapters)
        return {}


@pytest.mark.parametrize(("method", "message"), [(Unread(), "no adapter reads"), (Unreturned(), "would be lost")])
def test_a_module_that_would_be_lost_is_refused(method, message):
    model = TinyMLP()
    with pytest.raises(PluginError, match=message):
        inject(model, method, ["first", "second"], also_train=())
    assert list(model.state_dict()) == list(TinyMLP().state_dict())


def test_an_owner_with_an_attribute_of_that_name_is_refused():
    model = TinyMLP()
    model.adapters = nn.Linear(1, 1)
    with pytest.raises(AdapterStateError, match='attribute "adapters" already'):
        inject(model, VeRA(), ["first", "second"], also_train=())


def test_adapters_before_at_the_same_place_are_found_as_far_back_as_asked():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(2, 2)}) for _ in range(4))
    widths = dict(zip([f"layers.{n}.a" for n in range(4)], (1, 2, 1, 1), strict=True))
    every = earlier_alike(model, widths, lambda width: width, -1)
    assert every == {"layers.0.a": (), "layers.1.a": (), "layers.2.a": (1,), "layers.3.a": (1, 1)}
    assert earlier_alike(model, widths, lambda width: width, 1)["layers.3.a"] == (1,)
    assert not any(earlier_alike(model, widths, lambda width: width, 0).values())
