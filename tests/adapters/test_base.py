from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import (
    Adapter,
    FactorPair,
    RunningSum,
    check_name,
    check_rank,
    pair_groups,
    write_values,
)
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.layers.kinds import LinearBase
from lora_lightning.errors import SettingsError


class Minimal(Adapter):
    """The least an adapter has to be."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4, 2))
        self.gate = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return base(x)

    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight

    def reset(self, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            write_values(parameter, torch.zeros(parameter.shape))

    def factor_pairs(self) -> tuple[FactorPair, ...]:
        return (FactorPair("", self.down, self.up, 1.0),)


def test_every_question_has_an_answer() -> None:
    adapter = Minimal()
    bias = torch.ones(4)
    assert adapter.merged_bias(bias) is bias
    assert adapter.rank_mask is None
    assert adapter.rank_scores() is None
    assert adapter.low_rank() is None
    assert adapter.masks() == ()
    assert adapter.statistics() == {}
    assert adapter.idle() == frozenset()
    assert not adapter.additive
    assert adapter.mergeable
    assert set(adapter.state_dict()) == {"down", "up", "gate"}


def test_groups_follow_the_pairs_not_the_names() -> None:
    adapters = {"a": Minimal(), "b": Minimal()}
    groups = pair_groups(adapters)
    assert list(groups) == ["A", "B", "other"]
    assert [id(p) for p in groups["A"].params] == [id(adapters[path].down) for path in "ab"]
    assert [id(p) for p in groups["B"].params] == [id(adapters[path].up) for path in "ab"]
    assert [id(p) for p in groups["other"].params] == [id(adapters[path].gate) for path in "ab"]
    assert pair_groups({}) == {}


def test_tally_is_a_mean_over_processes_and_empty_afterwards() -> None:
    running_sum = RunningSum()
    assert running_sum.take() is None
    running_sum.add(torch.tensor([2.0, 4.0], requires_grad=True), count=2)
    running_sum.add(torch.tensor([4.0, 8.0]), count=4)
    mean = running_sum.take(lambda total: 3 * total)  # three processes that saw the same
    assert mean is not None
    assert torch.equal(mean, torch.tensor([1.0, 2.0]))
    assert not mean.requires_grad
    assert running_sum.take() is None


def test_tally_does_not_write_into_what_it_was_given() -> None:
    values, running_sum = torch.ones(2), RunningSum()
    running_sum.add(values)
    running_sum.add(values)
    assert torch.equal(values, torch.ones(2))


def test_write_keeps_identity_and_dtype() -> None:
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    pointer = parameter.data_ptr()
    write_values(parameter, torch.tensor([1.0, 1 / 3]))
    assert parameter.data_ptr() == pointer
    assert torch.equal(parameter, torch.tensor([1.0, 1 / 3]).bfloat16())


@pytest.mark.parametrize("name", ["default", "task_2", "7", "fr-en"])
def test_names_that_can_be_module_names(name: str) -> None:
    check_name(name)
    nn.ModuleDict({name: nn.Linear(1, 1)})


@pytest.mark.parametrize("name", ["", "a.b", "a b", "keys", "type", "training", "_modules", "é"])
def test_names_that_cannot(name: str) -> None:
    with pytest.raises(SettingsError, match=f'adapter name is "{name}"; it must be letters'):
        check_name(name)


def test_a_rank_above_the_narrow_side() -> None:
    base = LinearBase(nn.Linear(4, 3))
    check_rank(base, 3)
    with pytest.raises(SettingsError, match="takes at most 3"):
        check_rank(base, 7)
