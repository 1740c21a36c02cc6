"""COLA: the contract, and the paper's chain."""

from __future__ import annotations

import pytest
import torch
from staged_projects import staged

from ll_cola import COLA
from ll_dora import DoRA
from ll_lora import LoRA
from ll_riemannian_moe import MoELoRA
from lora_lightning.callbacks import Cascade
from lora_lightning.errors import SettingsError
from lora_lightning.testing import MethodContract


@pytest.mark.slow  # the adapters of TestLoRA
class TestCOLA(MethodContract):
    method = COLA(inner=LoRA(rank=2, alpha=4.0), stage_steps=2, stage_ranks=[2, 1])
    repeated = ("test_compiles",)


def test_its_cascade():
    (cascade,) = COLA(inner=LoRA(), stage_ranks=[8, 4]).callbacks()
    assert isinstance(cascade, Cascade)
    assert (cascade.blend, cascade.noise, cascade.remainder, cascade.moments) == (1.0, 0.0, "restart", "reset")
    assert (cascade.lr, cascade.stage_ranks) == ("continue", [8, 4])


def test_a_chain_of_one_is_its_inner_method_step_for_step(tmp_path):
    _, chained, after = staged(tmp_path, method=COLA(inner=LoRA(rank=2), stage_steps=6), max_steps=6)
    _, plain, _ = staged(tmp_path, method=LoRA(rank=2), max_steps=6)
    for step in range(1, 7):
        assert all(torch.equal(*pair) for pair in zip(chained.weights[step], plain.weights[step], strict=True))
    torch.testing.assert_close(after.weights[6], plain.weights[6], rtol=0, atol=1e-12)


@pytest.mark.parametrize("inner", [LoRA(rank=2), DoRA(rank=2)], ids=["LoRA", "DoRA"])
def test_knots_keep_the_function_and_forget_the_moments(tmp_path, inner):
    module, before, after = staged(tmp_path, method=COLA(inner=inner, stage_steps=2), max_steps=6)
    for step in (2, 4, 6):
        torch.testing.assert_close(after.weights[step], before.weights[step], rtol=0, atol=1e-12)
        assert all(state for states in before.moments[step] for state in states)
        assert not any(state for states in after.moments[step] for state in states)
    if isinstance(inner, LoRA):
        for layer in module.layers:
            change = layer.merged_weight("default", torch.float64) - layer.original_weight()
            assert int(torch.linalg.matrix_rank(change, rtol=1e-9)) == 6


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(SettingsError, match=r"COLA\.inner is MoELoRA, whose update depends on the input"):
        COLA(inner=MoELoRA())
    with pytest.raises(SettingsError, match="stages inside stages would be folded twice"):
        COLA(inner=COLA(inner=LoRA()))
