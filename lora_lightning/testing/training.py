"""Training: what gets gradients and changes, parameter groups, penalties, recomputed activations, compiled code."""

from __future__ import annotations

import json
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_lightning.adapters.base import linked_modules
from lora_lightning.injection.records import adapters_named
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.testing.method_under_test import MethodUnderTest
from lora_lightning.testing.toy_models import seeded


class TrainingContract(MethodUnderTest):
    """What happens to a method's parameters in a step."""

    def test_only_declared_parameters_train(self) -> None:
        """In two steps every trainable that is not idle gets a gradient and changes; nothing else does."""
        model, x = self._mlp(torch.float32, perturbed=False)
        adapters = adapters_named(model, "default")
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert trainable, self._broken("no parameter trains", "TinyMLP", "`build` for parameters that are frozen")
        own = (*adapters.values(), *linked_modules(adapters.values()))
        declared = {id(p) for module in own for p in module.parameters()}
        foreign = [name for name, p in trainable.items() if id(p) not in declared]
        base = f"{', '.join(foreign)} must not train; only the adapter's parameters do"
        assert not foreign, self._broken(base, "TinyMLP", "`build` for what it unfreezes outside the adapter")
        held = {id(p) for p in trainable.values()}
        frozen = [name for module in own for name, p in module.named_parameters() if id(p) not in held]
        still = f"{', '.join(sorted(set(frozen)))} is a parameter that does not train"
        assert not frozen, self._broken(still, "TinyMLP", "`__init__` of the adapter, and make it a buffer")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer, reached = build_optimizer(model, None), set()
        for _ in range(2):
            self._step(model.train(), optimizer, x)
            reached |= {name for name, p in trainable.items() if p.grad is not None and p.grad.any()}
        idle = {f"{path}.adapters.default.{name}" for path, adapter in adapters.items() for name in adapter.idle()}
        missed = sorted(trainable.keys() - idle - reached)
        without = f"{', '.join(missed)} got no gradient in two steps"
        look = "the adapter's `forward` for what leaves it out, or name it in `idle`"
        assert not missed, self._broken(without, "TinyMLP", look)
        after = model.state_dict()
        unmoved = sorted(name for name in trainable.keys() - idle if torch.equal(before[name], after[name]))
        stayed = f"{', '.join(unmoved)} did not change in two steps, though it has gradients"
        assert not unmoved, self._broken(stayed, "TinyMLP", "`param_groups`, and at values written in `forward`")
        outside = {name: tensor for name, tensor in before.items() if "adapters." not in name}
        moved = self._broken("frozen tensors must not change in a step", "TinyMLP", "`forward` for writes to the base")
        self._equal_states({name: after[name] for name in outside}, outside, moved)

    def test_param_groups_hold_every_trainable_once(self) -> None:
        """`param_groups` covers the trainables, each exactly once."""
        model, _ = self._mlp()
        adapters = adapters_named(model, "default")
        specs = self.method.param_groups(adapters)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                own = [group for group, spec in specs.items() for p in spec.params if p is parameter]
                once = f"{name} must be in one parameter group once, not in {own or 'none'}"
                look = "`param_groups`; a tensor that several layers share comes from `Method.link`"
                assert len(own) == 1, self._broken(once, "TinyMLP", look)
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        for group, spec in specs.items():
            foreign = sum(id(p) not in trained for p in spec.params)
            extra = f'parameter group "{group}" holds {foreign} parameters that do not train or are not the model\'s'
            assert not foreign, self._broken(extra, "TinyMLP", "`param_groups`")

    def test_penalty_and_report(self) -> None:
        """The penalty is a number or none, the report plain data."""
        adapters = adapters_named(self._mlp()[0], "default")
        penalty = self.method.penalty(adapters)
        if penalty is not None:
            shape = f"the penalty must be one number, a tensor of shape (), not of shape {tuple(penalty.shape)}"
            assert penalty.dim() == 0, self._broken(shape, "TinyMLP", "`penalty`")
            finite = f"the penalty is {float(penalty.detach())}; it must be finite"
            assert bool(torch.isfinite(penalty)), self._broken(finite, "TinyMLP", "`penalty`")
        for name, value in self.method.report(adapters).items():
            plain = f'"{name}" of the report is {value!r}; it must be plain data that JSON can hold'
            assert _is_plain(value), self._broken(plain, "TinyMLP", "`report`")

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, reentrant: bool) -> None:
        """Recomputing activations, in either form, gives the same gradients, dropout included."""
        gradients = []
        for recompute in (False, True):
            model, x = self._mlp()
            model.train()
            x.requires_grad_()  # without which the reentrant form has no backward at all
            with seeded(4):
                y = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
                cast(Tensor, y).square().sum().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        on = f"TinyMLP, use_reentrant={reentrant}"
        assert gradients[0], self._broken("no parameter has a gradient", on, "the adapter's `forward`")
        same = "gradients with recomputed activations must be those without"
        look = "the adapter's `forward` for state that a second call changes, or draws from a generator of its own"
        self._equal_states(gradients[1], gradients[0], self._broken(same, on, look))

    # Dynamo itself instantiates autograd.Function when it traces one, which torch warns of
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_compiles(self) -> None:
        """`torch.compile(fullgraph=True)` computes the same, gradients included."""
        if self.compile_reason:
            pytest.skip(f"torch.compile: {self.compile_reason}")
        look = "the adapter's `forward`, or give a `compile_reason` on the test class"
        model, x = self._mlp()
        model(x).square().sum().backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        torch._dynamo.reset()
        try:
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            y = compiled(x)
            same = self._broken("a compiled model must compute what the model does", "TinyMLP", look)
            self._close(y, model(x), same)
            y.square().sum().backward()
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            lost = sorted(found.keys() ^ expected.keys())
            assert not lost, f"{same} Only one of them has gradients of {', '.join(lost)}."
            for name, gradient in found.items():
                self._close(gradient, expected[name], f"{same} Gradient of {name}:")
            model.train()
            compiled(x).square().sum().backward()
        except torch._dynamo.exc.TorchDynamoException as error:
            whole = "torch.compile(fullgraph=True) must take the adapter as it is"
            raise AssertionError(f"{self._broken(whole, 'TinyMLP', look)} It says: {error}") from error
        finally:
            torch._dynamo.reset()


def _is_plain(value: object) -> bool:
    """Whether JSON can hold it."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
