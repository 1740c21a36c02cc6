"""What methods keep to whose layers share tensors: stored once, saved once, one thing under every move of the model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_lightning.adapters.base import linked_modules
from lora_lightning.adapters.linked import Linked
from lora_lightning.injection.merge_model import eject
from lora_lightning.injection.records import adapters_named, linked_named
from lora_lightning.injection.switches import set_trainable
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.storage.folder import save_adapter
from lora_lightning.storage.load import load_adapter
from lora_lightning.storage.state import adapter_keys
from lora_lightning.storage.stored import FILE
from lora_lightning.testing.method_under_test import MethodUnderTest
from lora_lightning.testing.toy_models import TinyMLP, perturb


class SharingContract(MethodUnderTest):
    """Tests of `Method.link`. A method that links nothing skips them."""

    def _linked_mlp(self) -> tuple[TinyMLP, Tensor]:
        """As `_mlp`, linked modules changed as well; skips where there are none."""
        model, x = self._mlp()
        linked = linked_named(model, "default")
        if not linked:
            pytest.skip("the method links nothing: no two layers share a tensor")
        for i, module in enumerate(linked.values()):
            perturb(module, seed=7 + i)
        return model, x

    def _check_one_thing(self, model: nn.Module) -> None:
        """What adapters read is what the model holds, and each of its tensors has one name."""
        registered = linked_named(model, "default")
        read: list[Linked] = linked_modules(adapters_named(model, "default").values())
        assert {id(module) for module in read} == {id(module) for module in registered.values()}
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for module in read:
            for tensor in (*module.parameters(), *module.buffers()):
                names = [name for name, other in named if other is tensor]
                assert len(names) == 1, f"one shared tensor under {names}"

    def test_linked_modules_stay_one_thing(self) -> None:
        """Moves, casts, loading and a copy of the model leave one tensor that all layers read; a copy has its own."""
        model, x = self._linked_mlp()
        self._check_one_thing(model)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        before = model(x)
        for move in (torch.float32, torch.float64, "cpu"):
            model.to(move)
            self._check_one_thing(model)
        model.load_state_dict(state)
        self._check_one_thing(model)
        assert torch.equal(model(x), before)
        twin = copy.deepcopy(model)
        self._check_one_thing(twin)
        assert torch.equal(twin(x), before)
        with torch.no_grad():
            for module in linked_named(twin, "default").values():
                for tensor in (*module.parameters(), *module.buffers()):
                    tensor.zero_()
        assert torch.equal(model(x), before)
        assert not torch.equal(twin(x), before)

    def test_linked_start_is_a_function_of_the_seed(self) -> None:
        """The same seed gives shared tensors the same start, whatever was drawn before."""
        starts = []
        for draws in (0, 7):
            torch.rand(draws)
            model, _ = self._mlp(perturbed=False, seed=1)
            starts.append(
                [tensor for m in linked_named(model, "default").values() for tensor in m.state_dict().values()]
            )
        assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))

    def test_linked_tensors_are_saved_once(self, tmp_path: Path) -> None:
        """The adapter file holds each shared tensor under one name, and gives a fresh model the same function."""
        model, x = self._linked_mlp()
        save_adapter(model, tmp_path / "adapter")
        written = load_file(tmp_path / "adapter" / FILE)
        owned = [
            tensor for module in linked_named(model, "default").values() for tensor in module.state_dict().values()
        ]
        for tensor in owned:
            same = [key for key, value in written.items() if value.shape == tensor.shape and torch.equal(value, tensor)]
            assert len(same) == 1, f"one shared tensor in the file as {same}"
        assert set(adapter_keys(model)) == written.keys()
        fresh = TinyMLP().double().eval()
        load_adapter(fresh, tmp_path / "adapter")
        self._check_one_thing(fresh)
        assert torch.equal(fresh(x), model(x))
        other, _ = self._mlp(seed=3)
        load_adapter(other, tmp_path / "adapter")
        assert torch.equal(other(x), model(x))

    def test_linked_parameters_train_once(self) -> None:
        """Each parameter is in one optimizer group, trains with the adapter, and is frozen with it."""
        model, x = self._linked_mlp()
        parameters = [p for module in linked_named(model, "default").values() for p in module.parameters()]
        held = [id(p) for group in build_optimizer(model, None).param_groups for p in group["params"]]
        assert all(held.count(id(p)) == 1 for p in parameters)
        model(x).square().sum().backward()
        assert all(p.grad is not None for p in parameters)
        set_trainable(model, [])
        assert not any(p.requires_grad for p in parameters)

    def test_eject_takes_linked_modules_off(self) -> None:
        """With the adapter goes what its layers shared; the plain model is left."""
        model, x = self._linked_mlp()
        eject(model)
        plain = TinyMLP().double()
        assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
        assert torch.equal(model(x), plain(x))
