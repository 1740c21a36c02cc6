"""Gates of blocks and the context of a forward, on LoRA-Flow in miniature."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from miniatures import installed
from miniatures.gating import BankAdapter, FlowGate, LoRAFlow
from torch import Tensor

from lora_lightning import disable_adapters, eject, inject, load_adapter, merge, save_adapter
from lora_lightning.errors import AdapterStateError
from lora_lightning.injection.gates import ForwardContext, _current, context, current, recomputation
from lora_lightning.injection.records import adapters_named, linked_named
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.testing import perturb, tiny_decoder

TOKENS = torch.tensor([[1, 5, 7, 2, 9], [1, 9, 2, 3, 4]])
BLOCKS = ["model.layers.0", "model.layers.1"]


@pytest.fixture(autouse=True, scope="module")
def _installed():
    with installed(LoRAFlow):
        yield


def gated(moved: bool = True, **settings: int) -> Any:
    model = tiny_decoder().double()
    inject(model, LoRAFlow(**settings), ["q_proj", "v_proj", "up_proj"], also_train=(), seed=0)
    if moved:
        for i, gate in enumerate(linked_named(model, "default").values()):
            perturb(gate, seed=i)
    return model


def by_hand(model: Any, tokens: Tensor) -> Tensor:
    """The same function: each layer's weighted experts, one dense product at a time, weights from hooks of its own."""
    gates, handles, weights = linked_named(model, "default"), [], {}

    def keep(block: str):
        gate = gates[block]

        def hook(_module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            weights[block] = torch.softmax(hidden @ gate.weight.mT, -1) + gate.bias

        return hook

    def dense(block: str, adapter: BankAdapter):
        def hook(module, args, output):
            r, total = adapter.rank, output
            for i in range(len(gates[block].bias)):
                delta = adapter.bank_B[:, i * r : (i + 1) * r] @ adapter.bank_A[i * r : (i + 1) * r]
                total = total + weights[block][..., i : i + 1] * (args[0] @ delta.mT)
            return total

        return hook

    for path, adapter in adapters_named(model, "default").items():
        block = next(block for block in BLOCKS if path.startswith(f"{block}."))
        handles.append(model.get_submodule(path).base.register_forward_hook(dense(block, adapter)))
    handles += [model.get_submodule(b).register_forward_pre_hook(keep(b), with_kwargs=True) for b in BLOCKS]
    try:
        with disable_adapters(model):
            return model(tokens).logits
    finally:
        for handle in handles:
            handle.remove()


def test_a_gate_weights_all_layers_of_its_block():
    model = gated(experts=3)
    assert list(linked_named(model, "default")) == BLOCKS
    torch.testing.assert_close(model(TOKENS).logits, by_hand(model, TOKENS), rtol=0, atol=1e-12)
    with pytest.raises(AdapterStateError, match="depends on its input"):
        merge(model)


def test_the_start_is_the_last_adapter_alone():
    model = gated(moved=False)
    gate = linked_named(model, "default")[BLOCKS[0]]
    weights = gate(torch.randn(2, 3, 16, dtype=torch.float64), ForwardContext())
    torch.testing.assert_close(weights, torch.tensor([0.0, 1.0], dtype=torch.float64).expand(2, 3, 2))


def test_only_gates_train_and_they_have_their_group():
    model = gated(moved=False)
    optimizer = build_optimizer(model, None)
    (group,) = optimizer.param_groups
    assert group["name"] == "gate"
    own = [p for gate in linked_named(model, "default").values() for p in gate.parameters()]
    assert [id(p) for p in group["params"]] == [id(p) for p in own]
    model(TOKENS).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in own)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"{block}.adapters.default.{name}" for block in BLOCKS for name in ("weight", "bias")
    }


def gradients(model: Any, losses: Any) -> list[Tensor]:
    model.zero_grad()
    losses(model).backward()
    return [p.grad.clone() for gate in linked_named(model, "default").values() for p in gate.parameters()]


def recompute(model: Any, options: dict[str, Any]) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def one(model: Any) -> Tensor:
    return model(TOKENS).logits.square().sum()


def two(model: Any) -> Tensor:
    """Two forwards before one backward: each recomputation needs the context of its own."""
    return model(TOKENS).logits.square().sum() + 3 * model(TOKENS.flip(1)).logits.sin().sum()


@pytest.mark.parametrize("losses", [one, two])
def test_recomputation_gives_the_same_gradients(losses):
    model = gated()
    model.train()
    expected = gradients(model, losses)
    recompute(model, {"use_reentrant": False, "context_fn": recomputation})
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, losses), expected, strict=True))


def test_recomputation_in_another_thread_gives_the_same_gradients():
    """Autograd runs backward on an accelerator in a thread of its own, which inherits no context."""
    model = gated()
    model.train()
    expected = gradients(model, one)
    recompute(model, {"use_reentrant": False, "context_fn": recomputation})
    model.zero_grad()
    loss = one(model)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    found = [p.grad for gate in linked_named(model, "default").values() for p in gate.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_recomputation_without_its_context_is_an_error():
    model = gated()
    model.train()
    recompute(model, {"use_reentrant": False})
    loss = one(model)
    with pytest.raises(AdapterStateError, match=r"context_fn=lora_lightning\.injection\.gates\.recomputation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpointing_is_refused_by_name():
    model = gated()
    model.train()
    recompute(model, {"use_reentrant": True})
    with pytest.raises(AdapterStateError, match="FlowGate trains, but its block runs without gradients"):
        one(model)
    assert _current.get() is None  # an error in a forward closes its context
    with torch.no_grad():
        one(model)  # nobody wants gradients here


def test_decoding_with_a_cache_agrees_with_whole_texts():
    model = gated()
    seen = []
    gate = linked_named(model, "default")[BLOCKS[0]]
    gate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].phase))
    with torch.no_grad():
        cached = model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False, use_cache=True)
        assert seen == ["prefill", "decode", "decode", "decode"]
        seen.clear()
        assert torch.equal(model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False, use_cache=False), cached)
        assert set(seen) == {"full"}


def test_sample_weights_reach_the_gates_of_forwards_inside():
    model = gated()
    weights = torch.tensor([[1.0, 0.0], [0.25, 0.5]], dtype=torch.float64)
    mask = torch.ones(2, 5, dtype=torch.bool)
    seen = []
    gate = linked_named(model, "default")[BLOCKS[0]]
    gate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].prompt_mask))
    with torch.no_grad():
        plain = model(TOKENS).logits
        with context(sample_weights=weights, prompt_mask=mask):
            both = model(TOKENS).logits
        for row in range(2):
            with context(sample_weights=weights[row : row + 1]):
                torch.testing.assert_close(model(TOKENS[row : row + 1]).logits[0], both[row], rtol=0, atol=1e-12)
        assert torch.equal(model(TOKENS).logits, plain)
    assert seen[0] is None
    assert seen[1] is mask


def test_a_forward_inside_a_forward_has_a_context_of_its_own():
    model, other = gated(), gated(moved=False)
    expected = model(TOKENS).logits
    contexts = []

    def run_other(*_: Any) -> None:
        contexts.append(current())
        other(TOKENS)
        contexts.append(current())

    model.model.layers[1].register_forward_pre_hook(run_other)
    assert torch.equal(model(TOKENS).logits, expected)
    assert contexts[0] is contexts[1]
    assert _current.get() is None


def test_threads_do_not_see_each_others_contexts():
    model = gated()
    expected = [model(TOKENS[row : row + 1]).logits for row in range(2)]
    found: dict[int, list[bool]] = {0: [], 1: []}

    def run(row: int) -> None:
        for _ in range(20):
            found[row].append(torch.equal(model(TOKENS[row : row + 1]).logits, expected[row]))

    threads = [threading.Thread(target=run, args=(row,)) for row in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[0] + found[1])
    assert len(found[0]) == len(found[1]) == 20


def test_a_copy_has_gates_of_its_own():
    model = gated()
    twin = copy.deepcopy(model)
    expected = model(TOKENS).logits
    assert torch.equal(twin(TOKENS).logits, expected)
    for gate in linked_named(twin, "default").values():
        perturb(gate, seed=9)
    assert torch.equal(model(TOKENS).logits, expected)
    assert not torch.equal(twin(TOKENS).logits, expected)


def test_gates_are_saved_loaded_and_ejected(tmp_path):
    model = gated()
    save_adapter(model, tmp_path / "adapter")
    fresh = tiny_decoder().double()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(TOKENS).logits, model(TOKENS).logits)
    eject(model)
    plain = tiny_decoder().double()
    assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not model._forward_hooks


def test_a_block_called_alone_is_an_error():
    model = gated()
    with pytest.raises(AdapterStateError, match="outside a forward of the model"):
        model.model(TOKENS)


def test_the_gate_is_a_module_of_its_block():
    model = gated()
    assert isinstance(model.model.layers[0].adapters["default"], FlowGate)
