"""The contract on methods whose layers share tensors, frozen and trained, and on starts that are subtracted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from miniatures import installed
from miniatures.sharing import TiedLoRA, VeRA
from miniatures.starts import PiSSA

from lora_lightning.testing import BASE_KINDS, MethodContract

WITHOUT_EXPERTS = tuple(kind for kind in BASE_KINDS if not kind.startswith("Experts"))


@pytest.fixture(autouse=True, scope="module")
def _installed() -> Iterator[None]:
    with installed(VeRA, TiedLoRA, PiSSA):
        yield


class TestVeRA(MethodContract):
    method = VeRA(rank=2)
    base_kinds = WITHOUT_EXPERTS
    random_start = False  # a layer's own tensors; the shared ones are drawn


class TestTiedLoRA(MethodContract):
    method = TiedLoRA(rank=2)
    base_kinds = WITHOUT_EXPERTS
    random_start = False


class TestPiSSA(MethodContract):
    method = PiSSA(rank=2, alpha=3.0)
    random_start = False
