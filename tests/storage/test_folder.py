from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from limits import small_files
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import AdapterFileError, AdapterStateError, LoraLightningError, UnknownMethodError
from lora_lightning.injection.records import adapters_named, records
from lora_lightning.models.anatomy import survey
from lora_lightning.models.paths import plain
from lora_lightning.storage import atomic as files
from lora_lightning.storage import folder as checkpoint
from lora_lightning.storage.fingerprint import fingerprint
from lora_lightning.storage.folder import DESCRIPTION, FILE, read_folder
from lora_lightning.storage.state import adapter_keys
from lora_lightning.testing import TinyMLP, perturb, tiny_decoder, tiny_encoder

METHOD = LoRA(rank=2, alpha=4.0)
TOKENS = torch.tensor([[1, 5, 7, 2], [1, 9, 2, 0]])
X = torch.linspace(-1, 1, 18).view(3, 6)


def adapted(model: Any = None, method: LoRA = METHOD, name: str = "default", **options: Any) -> Any:
    model = TinyMLP() if model is None else model
    ll.inject(model, method, name=name, seed=0, **options)
    for i, adapter in enumerate(adapters_named(model, name).values()):
        perturb(adapter, i)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of a TinyMLP."""
    return ll.save_adapter(adapted(), tmp_path / "adapter")


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Change description or tensors of an adapter folder as another program might."""
    tensors = load_file(folder / FILE)
    description = json.loads((folder / DESCRIPTION).read_text())
    change(description, tensors)
    save_file(tensors, folder / FILE, {"format": "lora_lightning", "adapter": json.dumps(description)})


def refused(
    model: nn.Module, folder: Path, message: str, name: str = "default", error: type[Exception] = AdapterFileError
) -> None:
    """Loading raises, and the model is what it was: structure, tensors and what trains."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trains = {key for key, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(error, match=message):
        ll.load_adapter(model, folder, name)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert {key for key, p in model.named_parameters() if p.requires_grad} == trains


# -- save and load -----------------------------------------------------------------------------------------------------


def test_round_trip_with_overrides(tmp_path: Path) -> None:
    model = adapted(overrides={"second": {"rank": 3, "alpha": 1.0}})
    assert ll.save_adapter(model, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    fresh = TinyMLP()
    ll.load_adapter(fresh, tmp_path / "a" / "b")
    assert torch.equal(fresh(X), model(X))
    assert records(fresh) == records(model)
    assert fresh.second.adapters.default.lora_A.shape == (3, 8)


def test_a_folder_holds_two_files_and_says_what_it_is(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [DESCRIPTION, FILE]
    stored = read_folder(folder)
    assert stored.method == "LoRA"
    assert stored.settings["alpha"] == 4.0
    assert stored.layers == {"first": {}, "second": {}}
    assert (stored.name, stored.seed, stored.trained, stored.base) == ("default", 0, (), None)
    assert {"torch", "lora_lightning", "lora-lightning"} <= set(stored.versions)
    assert set(stored.tensors) == set(adapter_keys(adapted()))
    written = json.loads((folder / DESCRIPTION).read_text())
    assert written["layers"] == stored.layers
    assert written["schema_version"] == checkpoint.SCHEMA


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


class WithStatistics(nn.Module):
    """A head with running statistics, which are part of what was trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TinyMLP()
        self.head = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_buffers_of_trained_heads_are_saved(tmp_path: Path) -> None:
    model = adapted(WithStatistics(), also_train=["head"])
    model.train()(X)
    ll.save_adapter(model, tmp_path)
    fresh = WithStatistics()
    ll.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.eval()(X), model.eval()(X))


def test_frozen_sides_and_masks_are_saved(tmp_path: Path) -> None:
    model = adapted(method=LoRA(rank=3, train="B"))
    model.first.adapters.default.rank_mask[1] = False
    ll.save_adapter(model, tmp_path)
    fresh = TinyMLP()
    ll.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(X), model(X))
    assert fresh.first.adapters.default.rank_mask.tolist() == [True, False, True]
    assert "lora_A" not in dict(fresh.first.adapters.default.named_parameters())


def test_a_loaded_adapter_is_active_and_frozen_and_leaves_others_alone(folder: Path) -> None:
    model = adapted(method=LoRA(rank=1), name="mine", targets=["first"])
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    ll.load_adapter(model, folder, "theirs")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    assert model.first.active == model.second.active == ("theirs",)
    assert torch.equal(model(X), adapted()(X))
    ll.set_trainable(model, "theirs")
    assert all(".adapters.theirs." in name for name, p in model.named_parameters() if p.requires_grad)


def test_an_adapter_travels_under_another_name(tmp_path: Path) -> None:
    model = adapted(name="a")
    ll.save_adapter(model, tmp_path, "a")
    fresh = TinyMLP()
    ll.load_adapter(fresh, tmp_path, "b")
    assert list(records(fresh)) == ["b"]
    assert torch.equal(fresh(X), model(X))


def test_each_adapter_is_saved_alone(tmp_path: Path) -> None:
    model = adapted(adapted(), LoRA(rank=1), "second")
    ll.save_adapter(model, tmp_path, "second")
    assert all(".adapters.second." in key for key in read_folder(tmp_path).tensors)
    both = {*adapter_keys(model, "default"), *adapter_keys(model, "second")}
    assert set(adapter_keys(model)) == both
    assert len(adapter_keys(model)) == len(both)
    with pytest.raises(
        AdapterStateError, match=r'no adapter "secnd". Did you mean "second"\? Installed: default, second'
    ):
        ll.save_adapter(model, tmp_path, "secnd")


def test_loading_onto_an_existing_name_replaces_tensors_and_never_wraps_twice(folder: Path) -> None:
    model = TinyMLP()
    ll.inject(model, METHOD, seed=9)
    adapter, trains = model.first.adapters.default, {n for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        ll.load_adapter(model, folder)
    assert model.first.adapters.default is adapter
    assert isinstance(model.first.base, nn.Linear)
    assert torch.equal(model(X), adapted()(X))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (LoRA(rank=2, alpha=8.0), {}, r'has alpha=4.0 on first; adapter "default" has 8.0; load it under another name'),
        (METHOD, {"overrides": {"second": {"dropout": 0.1}}}, r'has dropout=0.0 on second; adapter "default" has 0.1'),
        (METHOD, {"targets": ["first"]}, r'adapts other layers than adapter "default", such as second'),
        (METHOD, {"targets": ["first"], "also_train": ["second"]}, r"adapts other layers|other names"),
    ],
)
def test_an_existing_adapter_takes_only_its_own_kind(folder: Path, method: LoRA, options: Any, message: str) -> None:
    model = TinyMLP()
    ll.inject(model, method, **options)
    refused(model, folder, message)


def test_an_existing_adapter_of_another_method_is_refused(folder: Path) -> None:
    model = TinyMLP()
    ll.inject(model, ll.method("RoseLoRA")(rank=2, alpha=4.0))
    refused(model, folder, r"holds LoRA; adapter 'default' is RoseLoRA; load it under another name, or eject first")


def test_an_existing_adapter_with_other_heads_is_refused(tmp_path: Path) -> None:
    ll.save_adapter(adapted(tiny_encoder(), also_train=["classifier"]), tmp_path)
    model = adapted(tiny_encoder(), also_train=["classifier.weight"])
    refused(model, tmp_path, r'trains other heads than adapter "default", such as classifier.bias')


def test_two_adapters_with_the_same_head_are_refused(tmp_path: Path) -> None:
    ll.save_adapter(adapted(tiny_encoder()), tmp_path)
    model = adapted(tiny_encoder(), name="mine")
    refused(
        model,
        tmp_path,
        r'carries the head bert.pooler.dense.bias, which adapter "mine" of the model has trained',
        "new",
    )


def test_a_merged_model_takes_no_adapter(folder: Path) -> None:
    model = adapted()
    ll.merge(model)
    for name in ("other", "default"):
        refused(model, folder, "first: default is merged; call unmerge first", name, AdapterStateError)


# -- what is no adapter, or not for this model -------------------------------------------------------------------------


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
    refused(TinyMLP(), folder, "has schema version 99; this library reads up to 1. Update it")


def test_a_method_whose_plugin_is_missing(folder: Path) -> None:
    rewrite(folder, lambda description, tensors: description.update(method="LoRAX"))
    refused(
        TinyMLP(), folder, r'adapter": no method "LoRAX". Did you mean "LoRA"\? Installed: ', error=UnknownMethodError
    )


def test_settings_of_a_newer_plugin(folder: Path) -> None:
    rewrite(folder, lambda description, tensors: description["settings"].update(magic=1))
    refused(TinyMLP(), folder, r'adapter": settings: LoRA has no "magic"')
    rewrite(folder, lambda description, tensors: description["settings"].update(rank=0))
    refused(TinyMLP(), folder, r'adapter": LoRA.rank is 0; it must be at least 1')


def test_another_architecture(folder: Path) -> None:
    refused(tiny_encoder(), folder, "was trained on TinyMLP; this model is BertForSequenceClassification")


def test_other_names_or_shapes(folder: Path) -> None:
    model = TinyMLP()
    model.second = nn.Linear(8, 5)
    refused(model, folder, "was trained on a TinyMLP whose parameters have other names or shapes")


def test_other_base_weights(folder: Path) -> None:
    refused(
        TinyMLP(seed=1), folder, "was trained on other base weights than this model has .*; load the same pretrained"
    )


def test_heads_of_another_size(tmp_path: Path) -> None:
    ll.save_adapter(adapted(tiny_encoder(num_labels=3)), tmp_path)
    refused(tiny_encoder(num_labels=4), tmp_path, r"classifier.(weight|bias) has shape \(3.*; the model needs \(4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("first.adapters.default.lora_A"), r"1 tensors missing, 0 unexpected, such as first.adapters"),
        (
            lambda t: t.update({"first.adapters.default.lora_C": torch.zeros(1)}),
            r"0 tensors missing, 1 unexpected, .*lora_C",
        ),
        (
            lambda t: t.update({"third.weight": torch.zeros(1)}),
            r"0 tensors missing, 1 unexpected, such as third.weight",
        ),
        (
            lambda t: t.update({"first.adapters.default.lora_A": torch.zeros(3, 6)}),
            r"first.adapters.default.lora_A has shape \(3, 6\); the model needs \(2, 6\)",
        ),
    ],
)
@pytest.mark.parametrize("present", [False, True])
def test_keys_are_compared_exactly(folder: Path, change: Callable[[Any], None], message: str, present: bool) -> None:
    rewrite(folder, lambda description, tensors: change(tensors))
    refused(adapted() if present else TinyMLP(), folder, message)


def test_a_layer_the_model_lacks(folder: Path) -> None:
    rewrite(folder, lambda description, tensors: description["layers"].update(thrid={}))
    refused(TinyMLP(), folder, "adapts thrid, which this model lacks")


def test_a_missing_head(tmp_path: Path) -> None:
    ll.save_adapter(adapted(tiny_encoder()), tmp_path)
    rewrite(tmp_path, lambda description, tensors: tensors.pop("classifier.bias"))
    refused(tiny_encoder(), tmp_path, "1 tensors missing, 0 unexpected, such as classifier.bias")


# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 1400])
def test_a_full_disk_leaves_the_old_adapter(folder: Path, size: int) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before[FILE]) > 1400
    model = adapted(name="default")
    perturb(model, 3)
    refusal = pytest.raises(AdapterFileError, match=r'cannot write the adapter to ".*": File too large. What was there')
    with refusal, small_files(size):
        ll.save_adapter(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(AdapterFileError, match="File too large"), small_files(size):
        ll.save_adapter(model, folder.parent / "new" / "deep")
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_the_description_that_cannot_be_written_keeps_the_old_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors come first; when the second file fails, the first must not have been replaced."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls, flush = 0, os.fsync

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")
        flush(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(AdapterFileError, match=r"No space left on device\. What was there before is intact"):
        ll.save_adapter(adapted(method=LoRA(rank=1)), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_interrupt_leaves_the_old_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ll.save_adapter(adapted(method=LoRA(rank=1)), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_leftovers_of_a_killed_process_are_overwritten(folder: Path) -> None:
    (folder / f".{FILE}.writing").write_bytes(b"half")
    ll.save_adapter(adapted(), folder)
    assert sorted(path.name for path in folder.iterdir()) == [DESCRIPTION, FILE]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "adapter"):
        with pytest.raises(AdapterFileError, match=r"cannot write the adapter to .*(exists|Not a directory)"):
            ll.save_adapter(adapted(), place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_does_not_read_back_is_not_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / FILE).read_bytes()
    whole = checkpoint.to_bytes

    def damaged(tensors: Any, metadata: Any) -> bytes:
        content = bytearray(whole(tensors, metadata))
        content[-1] ^= 1
        return bytes(content)

    monkeypatch.setattr(checkpoint, "to_bytes", damaged)
    with pytest.raises(AdapterFileError, match=r"does not read back as it is \(.*\); nothing was written"):
        ll.save_adapter(adapted(), folder)
    assert (folder / FILE).read_bytes() == before


def test_not_a_number_travels(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        model.first.adapters.default.lora_B[0, 0] = float("nan")
    ll.save_adapter(model, tmp_path)
    fresh = TinyMLP()
    ll.load_adapter(fresh, tmp_path)
    assert bool(fresh.first.adapters.default.lora_B[0, 0].isnan())


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickle")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    ll.save_adapter(adapted(), tmp_path)
    ll.load_adapter(TinyMLP(), tmp_path)


# -- the base model's fingerprint --------------------------------------------------------------------------------------


def test_adapters_do_not_count_even_merged(tmp_path: Path) -> None:
    bare = fingerprint(survey(TinyMLP()))
    model = adapted(method=LoRA(rank=2, bias=True))
    assert fingerprint(survey(model)) == bare
    ll.merge(model)
    assert fingerprint(survey(model)) == bare
    ll.save_adapter(model, tmp_path)
    ll.unmerge(model)
    fresh = TinyMLP()
    ll.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(X), model(X))
    ll.eject(model)
    assert fingerprint(survey(model)) == bare


def test_a_bias_that_a_merge_made_does_not_count() -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    bare = fingerprint(survey(model))
    adapted(model, LoRA(rank=2, bias=True))
    ll.merge(model)
    assert fingerprint(survey(model)) == bare


def test_merged_for_good_cannot_be_saved(tmp_path: Path) -> None:
    model = adapted()
    ll.merge(model, keep_original=False)
    with pytest.raises(AdapterStateError, match="keep_original=False; the original weight is gone"):
        ll.save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_tied_weights_count_once(tmp_path: Path) -> None:
    bare = fingerprint(survey(tiny_decoder(tied=True)))
    for target in ("lm_head", "embed_tokens"):
        model = adapted(tiny_decoder(tied=True), targets=[target])
        assert fingerprint(survey(model)) == bare
        ll.save_adapter(model, tmp_path / target)
        fresh = tiny_decoder(tied=True)
        ll.load_adapter(fresh, tmp_path / target)
        assert torch.equal(fresh(TOKENS).logits, model(TOKENS).logits)


def test_a_base_in_half_precision_is_recognised(folder: Path) -> None:
    half = TinyMLP().to(torch.bfloat16)
    assert fingerprint(survey(half)) == fingerprint(survey(TinyMLP()))
    ll.load_adapter(half, folder)
    torch.testing.assert_close(half(X.bfloat16()).float(), adapted()(X), rtol=0.1, atol=0.1)


def test_large_weights_are_sampled_within_their_bounds() -> None:
    """Beyond 2^24 entries positions are not exact in float32: the last one, 2^24 + 3, would round past the end."""
    model = nn.Sequential(nn.Embedding.from_pretrained(torch.zeros(2**24 + 4, 1, dtype=torch.bfloat16)))
    before = fingerprint(survey(model))
    with torch.no_grad():
        model[0].weight[-1] = 1
    assert fingerprint(survey(model))["weights"] != before["weights"]


def test_packed_weights_leave_the_hash_out() -> None:
    model = TinyMLP()
    model.third = nn.Linear(2, 2)
    model.third.weight = nn.Parameter(torch.zeros(2, 1, dtype=torch.uint8), requires_grad=False)
    assert fingerprint(survey(model))["weights"] is None
    model.third = nn.Module()
    model.third.empty = nn.Parameter(torch.zeros(0, 3))
    assert fingerprint(survey(model))["weights"] is not None


# -- wrappers ----------------------------------------------------------------------------------------------------------


def test_names_without_wrappers() -> None:
    assert plain("_orig_mod.layers.0.weight") == "layers.0.weight"
    assert plain("layers._orig_mod.0._fsdp_wrapped_module._checkpoint_wrapped_module.q.weight") == "layers.0.q.weight"
    assert plain("layers.my_orig_mod.weight") == "layers.my_orig_mod.weight"
    assert plain("layers.0._orig_mod") == "layers.0"


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


def test_keys_of_a_containing_module_carry_its_prefix() -> None:
    whole = nn.ModuleDict({"net": adapted()})
    assert adapter_keys(whole) == [f"net.{key}" for key in adapter_keys(whole["net"])]
    assert set(adapter_keys(whole)) <= set(whole.state_dict())


class OwnAdapters(nn.Module):
    """A base model with modules of its own called as ours are."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict({"default": nn.Linear(6, 6)})
        self.body = TinyMLP()


def test_a_base_models_own_adapters_are_base() -> None:
    model = nn.ModuleDict({"x": OwnAdapters()})
    ll.inject(model, METHOD, ["first"])
    assert all(key.startswith("x.body.first.adapters.default.") for key in adapter_keys(model))


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
