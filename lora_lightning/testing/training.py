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
        assert trainable
        own = (*adapters.values(), *linked_modules(adapters.values()))
        assert {id(p) for p in trainable.values()} == {id(p) for module in own for p in module.parameters()}
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer, reached = build_optimizer(model, None), set()
        for _ in range(2):
            self._step(model.train(), optimizer, x)
            reached |= {name for name, p in trainable.items() if p.grad is not None and p.grad.any()}
        idle = {f"{path}.adapters.default.{name}" for path, adapter in adapters.items() for name in adapter.idle()}
        assert trainable.keys() - idle <= reached
        after = model.state_dict()
        assert trainable.keys() - idle <= {name for name in before if not torch.equal(before[name], after[name])}
        frozen = [name for name in before if "adapters." not in name]
        assert all(torch.equal(before[name], after[name]) for name in frozen)

    def test_param_groups_hold_every_trainable_once(self) -> None:
        """`param_groups` covers the trainables, each exactly once."""
        model, _ = self._mlp()
        adapters = adapters_named(model, "default")
        grouped = [id(p) for spec in self.method.param_groups(adapters).values() for p in spec.params]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)

    def test_penalty_and_report(self) -> None:
        """The penalty is a number or none, the report plain data."""
        adapters = adapters_named(self._mlp()[0], "default")
        penalty = self.method.penalty(adapters)
        assert penalty is None or (penalty.dim() == 0 and bool(torch.isfinite(penalty)))
        json.dumps(self.method.report(adapters))

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
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert len(gradients[0]) == len(gradients[1]) > 0
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

    # Dynamo itself instantiates autograd.Function when it traces one, which torch warns of
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_compiles(self) -> None:
        """`torch.compile(fullgraph=True)` computes the same, gradients included."""
        if self.compile_reason:
            pytest.skip(f"torch.compile: {self.compile_reason}")
        model, x = self._mlp()
        model(x).square().sum().backward()
        expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        torch._dynamo.reset()
        try:
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            y = compiled(x)
            self._close(y, model(x))
            y.square().sum().backward()
            found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            for a, b in zip(found, expected, strict=True):
                self._close(a, b)
            model.train()
            compiled(x).square().sum().backward()
        finally:
            torch._dynamo.reset()
