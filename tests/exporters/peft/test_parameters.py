"""Parameters that belong to no layer, through peft's `target_parameters`: recurrent layers, stacks, bare matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_models import PEFT_WARNINGS, LoRA, randomise, seeded
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.errors import ExportError
from lora_lightning.exporters.preview import refusals
from lora_lightning.testing import perturb

pytestmark = PEFT_WARNINGS


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(5, 4, batch_first=True, **options)
        self.out = nn.Linear(self.rnn(torch.zeros(1, 1, 5))[0].shape[-1], 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.last = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x @ self.matrix)


class Owner(nn.Module):
    """Stacks of matrices and a matrix, around layers and another owner."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.one = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(1, 4, 5))
        self.first, self.inner = nn.Linear(5, 4), Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x)) + torch.einsum("eoi,...i->...o", self.stack, x) + x @ self.one[0].T


class Transposed(nn.Module):
    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.one = nn.Parameter(torch.randn(3, 5, 4)), nn.Parameter(torch.randn(1, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eio,...i->...o", self.stack, x) + x @ self.one[0]


X = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
IH, HH = "rnn.weight_ih_l0", "rnn.weight_hh_l0"
CASES: dict[str, tuple[Any, list[str], list[str]]] = {
    "RNN": (lambda: Recurrent(nn.RNN), [IH, HH], ["out"]),
    "LSTM": (lambda: Recurrent(nn.LSTM), [IH], ["out"]),
    "LSTM of two layers and directions": (
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
        [IH, "rnn.weight_hh_l1_reverse", HH],
        ["out"],
    ),
    "GRU": (lambda: Recurrent(nn.GRU), [HH], []),
    "a stack": (lambda: nn.Sequential(Owner()), ["0.stack"], []),
    "a stack of one": (lambda: nn.Sequential(Owner()), ["0.one"], []),
    "stored as (in, out)": (lambda: nn.Sequential(Transposed()), ["0.stack"], []),
    "around layers": (lambda: nn.Sequential(Owner()), ["0.stack", "0.one"], ["first", "last"]),
    "a matrix around a layer": (lambda: nn.Sequential(Owner()), ["inner.matrix"], ["first", "last"]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_peft_trained_is_computed_alike_merged_and_written_again(case: str, tmp_path: Path) -> None:
    build, parameters, layers = CASES[case]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=layers, target_parameters=parameters)
    theirs = peft.get_peft_model(seeded(build), config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected, own = theirs(X).detach(), seeded(build)
    base = own(X).detach()
    report = ll.import_peft(own, tmp_path / "theirs")
    assert len(report.layers) == len(parameters) + len(layers)
    torch.testing.assert_close(own(X), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(base, expected, atol=1e-3)
    written = ll.export(own, tmp_path / "ours")
    assert written.verified_by == "peft 0.21.2, each layer's merged weight alike"
    again = peft.PeftModel.from_pretrained(seeded(build), tmp_path / "ours").eval()
    torch.testing.assert_close(again(X), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own(X), expected, rtol=1e-5, atol=1e-5)
    ll.merge(own)
    torch.testing.assert_close(own(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_peft(case: str, tmp_path: Path) -> None:
    build, parameters, layers = CASES[case]
    config = peft.LoraConfig(r=2, target_modules=layers, target_parameters=parameters)
    theirs = peft.get_peft_model(seeded(build), config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    own = seeded(build)
    ll.import_peft(own, tmp_path)
    for model in (theirs, own):
        model(X).square().sum().backward()
    ours = [p.grad.abs().sum() for _, p in own.named_parameters() if p.requires_grad]
    peers = [p.grad.abs().sum() for _, p in theirs.named_parameters() if p.requires_grad]
    assert len(ours) == len(peers) == 2 * (len(parameters) + len(layers))
    torch.testing.assert_close(sorted(map(float, ours)), sorted(map(float, peers)), rtol=1e-4, atol=1e-4)


REFUSED: dict[str, tuple[Any, list[str], dict[str, Any], str]] = {
    "a parameter of the model itself": (Owner, ["stack"], {}, r"a parameter of the model itself, around which peft"),
    "one matrix, stored as (in, out)": (lambda: nn.Sequential(Transposed()), ["one"], {}, r"holds one matrix, stored"),
    "an owner inside an owner": (
        lambda: nn.Sequential(Owner()),
        ["stack", "matrix"],
        {},
        r"0\.inner lies inside 0, .*Exclude 0\.stack, or use",
    ),
    "a layer that trains in full inside an owner": (
        lambda: nn.Sequential(Owner()),
        ["stack"],
        {"also_train": ["first"]},
        r"0\.first lies inside 0, .*Exclude 0\.stack, or use",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_say_is_refused_before_training(case: str, tmp_path: Path) -> None:
    build, targets, options, message = REFUSED[case]
    model = seeded(build)
    ll.inject(model, LoRA(rank=2), targets, seed=0, **options)
    for _, layer in ll.iter_adapters(model):
        perturb(layer.adapters)
    said = refusals(model)["peft"]
    with pytest.raises(ExportError, match=message) as refused:
        ll.export(model, tmp_path / "peft")
    assert str(refused.value) == said
    ll.save_adapter(model, tmp_path / "own")  # it is kept all the same
    again = seeded(build)
    ll.load_adapter(again, tmp_path / "own")
    assert torch.equal(again(X), model(X))
