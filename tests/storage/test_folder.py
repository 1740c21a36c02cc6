from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from adapter_files import TOKENS, X, adapted, refused, rewrite
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError, AdapterStateError, LoraLightningError
from lora_lightning.injection.records import adapters_named, records
from lora_lightning.storage import folder as checkpoint
from lora_lightning.storage.sealed import SCHEMA
from lora_lightning.storage.state import adapter_keys
from lora_lightning.storage.stored import CARD, DESCRIPTION, FILE, read_folder
from lora_lightning.testing import TinyMLP, perturb, tiny_encoder


def test_round_trip_with_overrides(tmp_path: Path) -> None:
    model = adapted(overrides={"second": {"rank": 3, "alpha": 1.0}})
    assert ll.save_adapter(model, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    fresh = TinyMLP()
    ll.load_adapter(fresh, tmp_path / "a" / "b")
    assert torch.equal(fresh(X), model(X))
    assert records(fresh) == records(model)
    assert fresh.second.adapters.default.lora_A.shape == (3, 8)


def test_a_folder_holds_two_files_and_says_what_it_is(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [CARD, DESCRIPTION, FILE]
    stored = read_folder(folder)
    assert stored.method == "LoRA"
    assert stored.settings["alpha"] == 4.0
    assert stored.layers == {"first": {}, "second": {}}
    assert (stored.name, stored.seed, stored.trained, stored.base) == ("default", 0, (), None)
    assert {"torch", "lora_lightning", "lora-lightning"} <= set(stored.versions)
    assert set(stored.tensors) == set(adapter_keys(adapted()))
    written = json.loads((folder / DESCRIPTION).read_text())
    assert written["layers"] == stored.layers
    assert written["schema_version"] == SCHEMA


def test_trained_heads_are_saved_with_the_adapter(tmp_path: Path) -> None:
    model = adapted(tiny_encoder())
    perturb(model.classifier)
    perturb(model.bert.pooler, 1)
    ll.save_adapter(model, tmp_path)
    fresh = tiny_encoder()
    perturb(fresh.classifier, 7)  # a new head starts at other numbers
    ll.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(TOKENS).logits, model(TOKENS).logits)
    assert torch.equal(fresh.classifier.weight, model.classifier.weight)


def test_missing_folders_say_what_is_near(folder: Path) -> None:
    refused(TinyMLP(), folder.with_name("adaptre"), r'adaptre" holds no adapter.safetensors. Nearest: adapter\.')
    refused(TinyMLP(), folder / "x" / "y", r'y" holds no adapter.safetensors\.$')


def test_a_run_folder_names_its_adapter(folder: Path) -> None:
    refused(TinyMLP(), folder.parent, r'is a run folder; its adapter is ".*/adapter"')


def test_a_peft_folder_names_the_reader(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(TinyMLP(), tmp_path, r"holds an adapter in peft's format; read it with import_peft")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_truncated_files(folder: Path, share: float) -> None:
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: int(share * len(content))])
    refused(TinyMLP(), folder, "is truncated or damaged: .*. Save the adapter again")


def test_foreign_files(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / FILE)
    refused(TinyMLP(), folder, "was not written by this library: its metadata lacks the format")
    save_file({"x": torch.zeros(1)}, folder / FILE, {"format": "lora_lightning", "adapter": "{"})
    refused(TinyMLP(), folder, "is truncated or damaged")
    save_file({"x": torch.zeros(1)}, folder / FILE, {"format": "lora_lightning"})
    refused(TinyMLP(), folder, "'adapter' is missing")
    (folder / FILE).write_bytes(pickle.dumps({"a": 1}))
    refused(TinyMLP(), folder, "is truncated or damaged")


@pytest.mark.parametrize("key", ["schema_version", "method", "layers", "trained", "fingerprint"])
def test_a_description_without_a_field(folder: Path, key: str) -> None:
    rewrite(folder, lambda description, tensors: description.pop(key))
    refused(TinyMLP(), folder, f"truncated or damaged: '{key}' is missing")


def test_a_newer_schema(folder: Path) -> None:
    rewrite(folder, lambda description, tensors: description.update(schema_version=99))
    refused(TinyMLP(), folder, "has schema version 99; this library reads up to 3. Update it")


def test_what_does_not_read_back_is_not_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / FILE).read_bytes()
    whole = checkpoint.seal

    def damaged(*args: Any) -> bytes:
        content = bytearray(whole(*args))
        content[-1] ^= 1
        return bytes(content)

    monkeypatch.setattr(checkpoint, "seal", damaged)
    said = (
        r"does not read back as it is; nothing was written\. .*/adapter/adapter.safetensors\" .*tensor second.adapters"
    )
    with pytest.raises(AdapterFileError, match=said):
        ll.save_adapter(adapted(), folder)
    assert (folder / FILE).read_bytes() == before
    assert len(list(folder.iterdir())) == 3


def test_what_no_plain_model_could_load_is_not_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that a project has put in the place of another after `inject` is in no plain model."""
    before = (folder / FILE).read_bytes()
    described = checkpoint.describe_adapter

    def other_names(*args: Any) -> dict[str, Any]:
        description = described(*args)
        return {**description, "fingerprint": {**description["fingerprint"], "names": "0"}}

    monkeypatch.setattr(checkpoint, "describe_adapter", other_names)
    with pytest.raises(AdapterFileError, match=r"nothing was written.* parameters have other names or shapes"):
        ll.save_adapter(adapted(), folder)
    assert (folder / FILE).read_bytes() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_neither_written_nor_read(folder: Path, value: float) -> None:
    model = adapted()
    with torch.no_grad():
        model.first.adapters.default.lora_B[0, 0] = value
    said = r"holds a value that is NaN or infinite in first\.adapters\.default\.lora_B"
    with pytest.raises(AdapterFileError, match=said + ".*Nothing was written"):
        ll.save_adapter(model, folder)
    ll.load_adapter(TinyMLP(), folder)
    tensors = load_file(folder / FILE)
    description = json.loads((folder / DESCRIPTION).read_text()) | {"schema_version": 1}
    (folder / DESCRIPTION).unlink()
    tensors["first.adapters.default.lora_B"][0, 0] = value
    save_file(tensors, folder / FILE, {"format": "lora_lightning", "adapter": json.dumps(description)})
    refused(TinyMLP(), folder, f'adapter.safetensors" {said}')


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickle")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    ll.save_adapter(adapted(), tmp_path)
    ll.load_adapter(TinyMLP(), tmp_path)


def test_merged_for_good_cannot_be_saved(tmp_path: Path) -> None:
    model = adapted()
    ll.merge(model, keep_original=False)
    with pytest.raises(AdapterStateError, match="keep_original=False; the original weight is gone"):
        ll.save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_compiled_model_and_compiled_blocks_share_files_with_plain_ones(tmp_path: Path) -> None:
    plain_model = adapted(nn.Sequential(TinyMLP(), nn.Linear(4, 2)), also_train=())
    blocks = nn.Sequential(torch.compile(TinyMLP(), backend="eager"), nn.Linear(4, 2))
    blocks[1].load_state_dict(plain_model[1].base.state_dict())
    ll.save_adapter(torch.compile(plain_model, backend="eager"), tmp_path / "plain")
    ll.load_adapter(blocks, tmp_path / "plain")
    assert list(adapters_named(blocks, "default")) == ["0._orig_mod.first", "0._orig_mod.second", "1"]
    assert torch.equal(blocks(X), plain_model(X))
    ll.save_adapter(blocks, tmp_path / "blocks")
    assert read_folder(tmp_path / "blocks").tensors.keys() == read_folder(tmp_path / "plain").tensors.keys()
    fresh = nn.Sequential(TinyMLP(), nn.Linear(4, 2))
    fresh[1].load_state_dict(plain_model[1].base.state_dict())
    ll.load_adapter(torch.compile(fresh, backend="eager"), tmp_path / "blocks")
    assert torch.equal(fresh(X), plain_model(X))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_sharded_model_is_saved_whole(tmp_path: Path) -> None:
    model = adapted()
    before, whole = model(X), copy.deepcopy(model)
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    torch.testing.assert_close(model(X), before)
    model.reshard()
    ll.save_adapter(model, tmp_path / "adapter")
    fresh = TinyMLP()
    ll.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(X), whole(X))


def test_every_error_of_this_file_is_ours() -> None:
    assert issubclass(AdapterFileError, LoraLightningError)
