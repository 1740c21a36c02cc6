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
        apart = f"adapters read {len(read)} linked modules, and the model holds {', '.join(registered) or 'none'}"
        one = {id(module) for module in read} == {id(module) for module in registered.values()}
        assert one, self._broken(
            f"{apart}; they must be the same modules", look="`link` and what sets `adapter.linked`"
        )
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for module in read:
            for tensor in (*module.parameters(), *module.buffers()):
                names = [name for name, other in named if other is tensor]
                several = f"one shared tensor must have one name, not {len(names)}: {', '.join(names)}"
                look = "`link`; an adapter must not register what it reads from above its layer"
                assert len(names) == 1, self._broken(several, look=look)

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
        look = "the adapter's `forward`, which must read shared tensors through `self.linked`"
        moved = "after casts and load_state_dict of its own state a model must compute what it did"
        self._equal(model(x), before, self._broken(moved, "TinyMLP", look))
        twin = copy.deepcopy(model)
        self._check_one_thing(twin)
        self._equal(twin(x), before, self._broken("a deep copy must compute what the model does", "TinyMLP", look))
        with torch.no_grad():
            for module in linked_named(twin, "default").values():
                for tensor in (*module.parameters(), *module.buffers()):
                    tensor.zero_()
        own = "zeros written into the shared tensors of a deep copy have changed the model"
        self._equal(model(x), before, self._broken(own, "TinyMLP", look))
        unread = "a deep copy computes what it did though its shared tensors are zero"
        assert not torch.equal(twin(x), before), self._broken(unread, "TinyMLP", look)

    def test_linked_start_is_a_function_of_the_seed(self) -> None:
        """The same seed gives shared tensors the same start, whatever was drawn before."""
        starts = []
        for draws in (0, 7):
            torch.rand(draws)
            model, _ = self._mlp(perturbed=False, seed=1)
            linked = linked_named(model, "default").items()
            starts.append({f"{path}: {key}": value for path, m in linked for key, value in m.state_dict().items()})
        drawn = "shared tensors must start the same at seed 1, whatever was drawn before"
        self._equal_states(starts[1], starts[0], self._broken(drawn, "TinyMLP", "`Linked.reset` of the modules"))

    def test_linked_tensors_are_saved_once(self, tmp_path: Path) -> None:
        """The adapter file holds each shared tensor under one name, and gives a fresh model the same function."""
        model, x = self._linked_mlp()
        save_adapter(model, tmp_path / "adapter")
        written = load_file(tmp_path / "adapter" / FILE)
        for path, module in linked_named(model, "default").items():
            for name, tensor in module.state_dict().items():
                alike = [key for key, value in written.items() if value.shape == tensor.shape]
                same = [key for key in alike if torch.equal(written[key], tensor)]
                once = f"shared tensor {path}.{name} must be in the file once, not as {', '.join(same) or 'none'}"
                assert len(same) == 1, self._broken(once, "TinyMLP", "`link`, and at what layers register themselves")
        keys, named = sorted(written), sorted(adapter_keys(model))
        assert keys == named, self._broken(f"the file holds {keys}, and the adapter {named}", "TinyMLP", "`link`")
        loaded = self._broken("an adapter folder must give a model what was saved", "TinyMLP", "`link` and `build`")
        fresh = TinyMLP().double().eval()
        load_adapter(fresh, tmp_path / "adapter")
        self._check_one_thing(fresh)
        self._equal(fresh(x), model(x), loaded)
        other, _ = self._mlp(seed=3)
        load_adapter(other, tmp_path / "adapter")
        self._equal(other(x), model(x), loaded)

    def test_linked_parameters_train_once(self) -> None:
        """Each parameter is in one optimizer group, trains with the adapter, and is frozen with it."""
        model, x = self._linked_mlp()
        linked = linked_named(model, "default").items()
        parameters = {f"{path}.{name}": p for path, module in linked for name, p in module.named_parameters()}
        held = [id(p) for group in build_optimizer(model, None).param_groups for p in group["params"]]
        model(x).square().sum().backward()
        for name, p in parameters.items():
            groups = f"{name} must be in one optimizer group, not in {held.count(id(p))}"
            assert held.count(id(p)) == 1, self._broken(groups, "TinyMLP", "`param_groups`")
            unread = f"{name} has no gradient, so no layer reads it"
            assert p.grad is not None, self._broken(unread, "TinyMLP", "the adapter's `forward`")
        set_trainable(model, [])
        for name, p in parameters.items():
            trains = f"{name} still trains when its adapter is frozen"
            assert not p.requires_grad, self._broken(trains, "TinyMLP", "`requires_grad_` in `link` or `forward`")

    def test_eject_takes_linked_modules_off(self) -> None:
        """With the adapter goes what its layers shared; the plain model is left."""
        model, x = self._linked_mlp()
        eject(model)
        plain = TinyMLP().double()
        left = {name for name, _ in model.named_modules()} ^ {name for name, _ in plain.named_modules()}
        gone = f"after an eject the modules must be the plain model's; they differ in {', '.join(sorted(left))}"
        assert not left, self._broken(gone, "TinyMLP", "`link` for modules that it registers itself")
        self._equal(model(x), plain(x), self._broken("after an eject the model must be the plain one", "TinyMLP"))
