"""A file of tensors by layer: what is damaged or another one is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lora_lightning.errors import SettingsError
from lora_lightning.storage.layer_tensors import read_tensors, tensors_digest, write_tensors

TENSORS = {"b": torch.randn(3, 2, dtype=torch.float64), "a.c": torch.ones(2)}


def test_what_is_written_is_read(tmp_path):
    sha256 = write_tensors(tmp_path / "x.safetensors", TENSORS)
    found = read_tensors(tmp_path / "x.safetensors", "here", sha256)
    assert found.keys() == TENSORS.keys()
    assert torch.equal(found["b"], TENSORS["b"].float())
    assert sha256 == tensors_digest(TENSORS) == tensors_digest(dict(reversed(TENSORS.items())))
    assert sha256 != tensors_digest({**TENSORS, "b": TENSORS["b"] + 1e-3})
    assert sha256 != tensors_digest({**TENSORS, "b": TENSORS["b"].T})


def test_another_or_a_damaged_file_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    write_tensors(file, TENSORS)
    with pytest.raises(SettingsError, match=r'here: ".*x.safetensors" has the digest \w{64}, and abc is asked for'):
        read_tensors(file, "here", "abc")
    save_file({"a": torch.zeros(2)}, file, {"sha256": "0"})
    with pytest.raises(SettingsError, match=r"holds tensors of the digest \w{64} and states 0; it is damaged"):
        read_tensors(file, "here")
    file.write_bytes(b"nothing")
    with pytest.raises(SettingsError, match=r'here names ".*x.safetensors", which cannot be read'):
        read_tensors(file, "here")
