"""Two processes train methods that plan, share, gate or start from data as one does, and resume exactly."""

from __future__ import annotations

import pytest
import torch
from miniatures import installed
from sharded_cases import folder_of, record, take
from sharded_rooms import CASES, METHODS
from test_sharded_runs import adapter, launch

pytestmark = [pytest.mark.multi, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rooms")
    with installed(*METHODS):
        for name, case in CASES.items():
            folder_of(folder, case)
            out = folder / "one" / name
            record(take(case, folder / case.model, 4, [], default_root_dir=out), out)
    return folder


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def launched(request, base):
    """The strategy's name, once it has taken all cases."""
    launch("sharded_rooms.py", request.param, str(base))
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_a_case(base, launched, name):
    one, straight = adapter(base / "one" / name), adapter(base / launched / name / "straight")
    resumed = adapter(base / launched / name / "resumed")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)
    if CASES[name].method.probe_batches():
        return  # the first process has looked at other rows than one alone does
    assert one.keys() == straight.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(
            straight[key], tensor, rtol=0, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_shared_tensors_are_in_the_file_once(base, launched):
    for name, count in {"VeRA": 2, "TiedLoRA": 2, "LoRAFlow": 4}.items():
        saved = adapter(base / launched / name / "straight")
        above = [key for key in saved if ".adapters.default." in key and key.split(".adapters.")[0].count(".") <= 2]
        assert len(above) == count, above
