from __future__ import annotations

import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_lightning.errors import ResumeError
from lora_lightning.storage.checkpoint import check_checkpoint, write_checkpoint


def content() -> dict[str, Any]:
    shared = torch.arange(64.0)
    return {
        "state_dict": OrderedDict(a=torch.arange(32.0).view(4, 8) + 0.5, b=shared[:8], c=shared[8:]),
        "optimizer": [{"state": {0: {"exp_avg": -torch.arange(16.0), "step": torch.tensor(3.0)}}, "lr": 0.1}],
        "epoch": 1,
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint."""
    with (tmp_path / "last.ckpt").open("w+b") as file:
        write_checkpoint(content(), file)
    return tmp_path / "last.ckpt"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """One as version 0.1 wrote it."""
    torch.save(content(), tmp_path / "old.ckpt")
    return tmp_path / "old.ckpt"


def damage(path: Path, tensor: torch.Tensor) -> None:
    """Change the last byte of where a tensor lies in the file."""
    held, whole = tensor.contiguous().numpy().tobytes(), path.read_bytes()
    assert whole.count(held) == 1
    at = whole.index(held) + len(held) - 1
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_it_as_one_of_its_own(mmap: bool, saved: Path) -> None:
    check_checkpoint(saved)
    found = torch.load(saved, weights_only=True, mmap=mmap)
    torch.testing.assert_close(found, content(), rtol=0, atol=0)
    assert found["state_dict"]["b"].untyped_storage()._cdata == found["state_dict"]["c"].untyped_storage()._cdata


@pytest.mark.parametrize("which", ["saved", "old"])
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("state_dict.a", content()["state_dict"]["a"]),
        ("state_dict.b", torch.arange(64.0)),  # the first of two that share their memory
        (r"optimizer\[0\].state.0.exp_avg", -torch.arange(16.0)),
    ],
)
def test_the_tensor_is_named(which: str, name: str, tensor: torch.Tensor, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(which)
    check_checkpoint(path)
    damage(path, tensor)
    said = rf'{path.name}" is truncated or damaged: {name} is not what was saved. Nothing of it was restored'
    with pytest.raises(ResumeError, match=said):
        check_checkpoint(path)


def test_tensors_that_were_exchanged_are_named_with_checksums_that_fit(saved: Path, tmp_path: Path) -> None:
    """As a tool writes it that packs the archive anew."""
    with zipfile.ZipFile(saved) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    one, two = (name for name, held in records.items() if "/data/" in name and len(held) in (128, 64))
    records[one] = records[one][::-1]
    with zipfile.ZipFile(tmp_path / "new.ckpt", "w") as archive:
        for name, held in records.items():
            archive.writestr(name, held)
    with pytest.raises(ResumeError, match=r"damaged: (state_dict\.a|archive/data/0) is not what was saved"):
        check_checkpoint(tmp_path / "new.ckpt")
    assert two != one
    del records[two], records[one]
    with zipfile.ZipFile(tmp_path / "new.ckpt", "w") as archive:
        for name, held in records.items():
            archive.writestr(name, held)
    with pytest.raises(ResumeError, match=f"damaged: ({one}|{two}) is missing"):
        check_checkpoint(tmp_path / "new.ckpt")


@pytest.mark.parametrize("which", ["saved", "old"])
def test_no_damage_goes_unnoticed_or_ends_in_an_error_that_is_not_ours(
    which: str, request: pytest.FixtureRequest
) -> None:
    """What is not noticed lies between records, where nothing is read."""
    path: Path = request.getfixturevalue(which)
    whole, draw, refusals = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        at = draw.randrange(len(whole))
        end = min(len(whole), at + draw.choice([1, 16, 500]))
        made = [
            whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :],
            whole[:at] + bytes(end - at) + whole[end:],
            whole[:at],
            whole[:at] + bytes(len(whole) - at),
            whole[:at] + whole[end:],
        ]
        path.write_bytes(draw.choice(made))
        try:
            check_checkpoint(path)
        except ResumeError as error:
            refusals += 1
            assert "\n" not in str(error)  # noqa: PT017 - of one of several outcomes
            continue
        torch.testing.assert_close(torch.load(path, weights_only=True), content(), rtol=0, atol=0)
    assert refusals > 150


def test_what_is_no_file_here_is_not_judged(tmp_path: Path) -> None:
    check_checkpoint(tmp_path)
    check_checkpoint(tmp_path / "nothing.ckpt")
    check_checkpoint("s3://bucket/last.ckpt")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    with pytest.raises(ResumeError, match=r'empty.ckpt" is truncated or damaged: File is not a zip file'):
        check_checkpoint(tmp_path / "empty.ckpt")
