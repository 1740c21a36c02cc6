"""Two processes train what one does on the joint batch, and resume exactly: one launch for each strategy.

And what can be done with a model sharded between steps, in another launch.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from sharded_cases import CASES, folder_of, record, take
from test_processes import free_port

from lora_lightning import save_adapter
from lora_lightning.callbacks import Cascade
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.errors import ResumeError, SettingsError
from lora_lightning.storage.state import adapter_state
from lora_lightning.training.strategies.fsdp2 import FSDP2

pytestmark = [
    pytest.mark.multi,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:.*so near singular that its damping was raised:UserWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for case in CASES.values():
        folder_of(folder, case)
    for name, case in CASES.items():  # the files of data are written here, before any process reads them
        out = folder / "one" / name
        record(take(case, folder / case.model, 4, [], default_root_dir=out), out)
    return folder


def launch(script: str, *words: str) -> None:
    """A script beside this file, on two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*launcher, str(Path(__file__).with_name(script)), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module", params=["ddp", "fsdp2", "fsdp"])
def launched(request, base):
    """The strategy's name, once it has taken all cases."""
    launch("sharded_cases.py", request.param, str(base))
    return request.param


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_a_case(base, launched, name):
    if launched == "fsdp" and (CASES[name].reads_base or CASES[name].module.get("checkpoint") == "full"):
        return  # the launch has seen it refused
    one, straight = adapter(base / "one" / name), adapter(base / launched / name / "straight")
    resumed = adapter(base / launched / name / "resumed")
    assert one.keys() == straight.keys() == resumed.keys()
    for key, tensor in one.items():
        far = 1e-6 if tensor.dtype == torch.float32 else 1e-10
        torch.testing.assert_close(straight[key], tensor, rtol=0, atol=far, msg=lambda text, key=key: f"{key}: {text}")
        assert torch.equal(resumed[key], straight[key]), key
    for file in (base / "one" / name).glob("*.json"):
        for kind in ("straight", "resumed"):
            found = json.loads((base / launched / name / kind / file.name).read_text())
            if file.name != "adapter.json":
                assert_close(found, json.loads(file.read_text()))


class Loaded(Callback):
    """What a run holds when it goes on, before it has moved."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if hasattr(self, "adapters"):
            return
        self.adapters = {key: tensor.clone() for key, tensor in adapter_state(pl_module).items()}
        self.optimizer = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])
        self.schedules = {
            callback.state_key: copy.deepcopy(callback.state_dict())
            for callback in trainer.callbacks
            if isinstance(callback, ScheduleCallback)
        }


@pytest.mark.parametrize(
    "name", ["LoRA", "RoseLoRA, RiemannianAdamW", "LoRA, SlowFast", "MoELoRA, RiemannianAdamW, clipped"]
)
def test_a_checkpoint_of_two_processes_goes_on_on_one(base, launched, name):
    """Each number of it is there bit for bit, and what follows is what two processes make of it."""
    case, saved, loaded = CASES[name], base / launched / name / "saved.ckpt", Loaded()
    module = take(case, base / case.model, 4, [loaded], checkpoint=saved, default_root_dir=base / "other" / name)
    written = torch.load(saved, weights_only=True)
    equal(loaded.adapters, {key: written["state_dict"][key] for key in loaded.adapters})
    assert loaded.adapters
    equal(loaded.optimizer, written["optimizer_states"][0]["state"])
    equal(loaded.schedules, {key: written["callbacks"][key] for key in loaded.schedules})
    straight = adapter(base / launched / name / "straight")
    save_adapter(module, base / "other" / name / launched)
    for key, tensor in adapter(base / "other" / name / launched).items():
        torch.testing.assert_close(
            tensor, straight[key], rtol=0, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_fewer_processes_need_larger_batches(base, launched):
    case, saved = CASES["LoRA"], base / launched / "LoRA" / "saved.ckpt"
    with pytest.raises(ResumeError, match="on 1 in place of 2 processes batch_size must be 2 times what it was"):
        take(case, base / case.model, 2, [], checkpoint=saved, default_root_dir=base / "smaller")


def equal(found, expected):
    """Nested values, tensors among them, to the bit."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            equal(found[key], value)
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            equal(one, other)
    else:
        assert found == expected


def assert_close(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value)
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    else:
        assert found == (pytest.approx(expected, abs=1e-10, rel=1e-6) if isinstance(expected, float) else expected)


def test_frozen_weights_that_wait_on_the_cpu_are_not_read_between_steps():
    trainer = SimpleNamespace(callbacks=[Cascade(stage_steps=2)])
    with pytest.raises(SettingsError, match=r"FSDP2 with cpu_offload, but Cascade .* Set cpu_offload to false"):
        FSDP2(cpu_offload=True).setup(trainer)


def test_merging_folding_saving_and_loading_sharded(tmp_path):
    launch("sharded_operations.py", str(tmp_path))
