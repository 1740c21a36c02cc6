"""A run that goes on from a trained adapter, or trains a new one on top of others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from resuming import SaveAt, assert_equal_runs, at_step, run
from torch import Tensor
from toy_runs import (
    classification,
    completion_data,
    decoder_folder,
    encoder_folder,
    labelled_data,
    labelled_file,
    trainer,
)
from transformers import AutoModelForSequenceClassification

import lora_lightning as ll
from ll_ce_lora import CELoRA
from ll_dora import DoRA
from ll_lora import LoRA
from ll_lorasc import LoRASC
from ll_riemannian_moe import MoELoRA
from ll_rose import RoseLoRA
from lora_lightning.callbacks import RankPruning
from lora_lightning.errors import AdapterFileError, AdapterStateError, ExportError, ResumeError, SettingsError
from lora_lightning.exporters.from_folder import export_folder
from lora_lightning.exporters.trained_adapter import find_adapter
from lora_lightning.injection.records import records
from lora_lightning.optim.warmup import WarmUp
from lora_lightning.training.module import AdapterModule

METHODS = {
    "lora": LoRA(rank=4, bias=True),
    "dora": DoRA(rank=3),
    "rose": RoseLoRA(rank=4, sparsity=0.5),
    "ce-lora": CELoRA(rank=4, svd_rank=2, every_n_steps=3),
    "moe-lora": MoELoRA(rank=2, experts=4, top_k=2, router_lr_ratio=1.0),
    "lorasc": LoRASC(inner=LoRA(rank=2), stage_steps=4, noise=0.0),
    "lorasc-dora": LoRASC(inner=DoRA(rank=2), stage_steps=4, noise=0.0),
}
IDS = torch.tensor([[5, 9, 12, 3, 20], [31, 7, 7, 8, 41]])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folder(tmp_path_factory.mktemp("encoder"))


def trained(encoder: Path, folder: Path, method: Any, callbacks: Any = (), **options: Any) -> Path:
    module = classification(encoder, method, **options)
    trainer(folder, list(callbacks), max_steps=10).fit(module, datamodule=labelled_data(encoder))
    return ll.save_adapter(module, folder / "adapter")


@pytest.fixture(scope="module")
def adapters(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder for each method, of which the first is trained at once and the others when they are asked for."""

    class Lazy(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = trained(encoder, tmp_path_factory.mktemp(name), METHODS[name])
            return self[name]

    return Lazy()


@pytest.fixture(scope="module")
def second(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another LoRA without a head of its own."""
    return trained(encoder, tmp_path_factory.mktemp("second"), LoRA(rank=2), also_train=[], seed=7)


def base(encoder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(encoder).eval()


def outputs(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


def continued(encoder: Path, adapter: Any, method: Any = None, **options: Any) -> AdapterModule:
    settings = {"linear_baseline": False, "seed": 2, **options}
    return AdapterModule(str(encoder), method, adapter=adapter, **settings)


@pytest.mark.parametrize(
    "name", [name if name in ("lora", "rose") else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_before_its_first_step_a_continued_run_computes_what_the_loaded_adapter_does(
    encoder: Path, adapters: dict[str, Path], name: str, tmp_path: Path
) -> None:
    module = continued(encoder, str(adapters[name]))
    module.configure_model()
    model = base(encoder)
    ll.load_adapter(model, adapters[name])
    assert torch.equal(outputs(module.model), outputs(model))
    assert module.method == METHODS[name]
    assert module.injection is not None
    assert module.injection.layers.keys() == records(model)["default"].layers.keys()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    first: list[Tensor] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if not first:
                first.append(outputs(pl_module.model))
                pl_module.train()

    trainer(tmp_path, [Look()], max_steps=10).fit(module, datamodule=labelled_data(encoder))
    assert torch.equal(first[0], outputs(model))  # whatever a schedule does when training starts
    changed = [
        key for key, value in module.state_dict().items() if key in before and not torch.equal(value, before[key])
    ]
    assert any("classifier" in key for key in changed)
    assert any(".adapters." in key or ".shifts." in key for key in changed)
    ll.load_adapter(base(encoder), ll.save_adapter(module, tmp_path / "again"))


def test_a_finished_sparsity_schedule_begins_anew(
    encoder: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = continued(encoder, str(adapters["rose"]), RoseLoRA(rank=4, sparsity=0.25))  # another schedule
    trainer(tmp_path, max_steps=10).fit(module, datamodule=labelled_data(encoder))
    said = capsys.readouterr().out
    assert "SparsitySchedule: an earlier run has removed" in said
    zeros = {float((a.lora_B == 0).float().mean()) for a in module.adapters().values()}
    assert max(zeros) <= 0.26  # half of them were zero
    assert records(module.model)["default"].method.sparsity == 0.25


@pytest.mark.slow
def test_components_that_an_earlier_run_has_pruned_begin_at_zero(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(encoder, tmp_path / "a", LoRA(rank=4), [RankPruning(2)])
    module = continued(encoder, str(folder))
    module.configure_model()
    before = outputs(module.model)
    seen: list[Tensor] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if not seen:
                seen.append(outputs(pl_module.model))
                pl_module.train()

    trainer(tmp_path, [Look(), RankPruning(3)], max_steps=10).fit(module, datamodule=labelled_data(encoder))
    assert torch.equal(seen[0], before)
    assert "RankPruning: an earlier run has removed 8 rank components" in capsys.readouterr().out
    assert all(int(a.rank_mask.sum()) == 3 for a in module.adapters().values())  # type: ignore[union-attr]


def test_folded_updates_stay_and_new_stages_are_folded_on_top(
    encoder: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = continued(encoder, str(adapters["lorasc"]))
    module.configure_model()
    layer = next(iter(dict(ll.iter_adapters(module.model)).values()))
    kept = layer.shifts["default"].log_A.clone()
    trainer(tmp_path, max_steps=8).fit(module, datamodule=labelled_data(encoder))
    assert "Cascade: an earlier run has folded updates of 4 layers; they stay" in capsys.readouterr().out
    update = layer.shifts["default"]
    assert torch.equal(update.log_A[: len(kept)], kept)
    assert len(update.log_A) == len(kept) + 4  # two stages of rank 2
    assert not update.slow_weight[: len(kept)].any()  # the average of the earlier run is not added once more


@pytest.mark.parametrize("name", ["lora", "rose", "lorasc", "moe-lora"])
@pytest.mark.slow
def test_a_continued_run_resumes_exactly(encoder: Path, adapters: dict[str, Path], name: str, tmp_path: Path) -> None:
    def module() -> AdapterModule:
        return continued(encoder, str(adapters[name]))

    data = labelled_data(encoder)
    whole = run(module(), data, tmp_path, max_steps=12)
    path = tmp_path / "half.ckpt"
    run(module(), labelled_data(encoder), tmp_path, [SaveAt(path, at_step(6))], max_steps=12)
    assert_equal_runs(whole, run(module(), labelled_data(encoder), tmp_path, checkpoint=str(path), max_steps=12))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
@pytest.mark.slow
def test_peft_adapter_with_a_head_trains_on(encoder: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    export_folder(adapters["dora"], tmp_path / "peft", "peft")
    module = continued(encoder, str(tmp_path / "peft"), num_labels=3)
    assert module.method == DoRA(rank=3)
    module.configure_model()
    model = base(encoder)
    ll.import_peft(model, tmp_path / "peft")
    assert torch.equal(outputs(module.model), outputs(model))
    theirs = peft.PeftModel.from_pretrained(base(encoder).double(), tmp_path / "peft")
    assert torch.allclose(outputs(module.model.double()), outputs(theirs.double()), atol=1e-12, rtol=0)
    module.model.float()
    trainer(tmp_path, max_steps=4).fit(module, datamodule=labelled_data(encoder))


def test_an_adapter_in_the_cache_of_the_hub(
    encoder: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--someone--adapter"
    commit = "0" * 40
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (repo / "blobs").mkdir()
    for file in adapters["lora"].iterdir():
        shutil.copy(file, repo / "blobs" / file.name)
        (snapshot / file.name).symlink_to(repo / "blobs" / file.name)
    found = find_adapter("someone/adapter")
    assert found.digest == find_adapter(str(adapters["lora"])).digest
    module = continued(encoder, "someone/adapter")
    module.configure_model()
    with pytest.raises(Exception, match=r'model.adapter is "someone/other"; there is no such folder, and the hub gave'):
        continued(encoder, "someone/other")


def test_a_run_folder_names_its_adapter(adapters: dict[str, Path]) -> None:
    assert find_adapter(str(adapters["lora"].parent)).folder == adapters["lora"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": DoRA()}, r"model.method is DoRA, but model.adapter names .*, which is LoRA. Leave it null"),
        ({"method": LoRA(rank=8, bias=True)}, r"model.method.rank is 8, but model.adapter names .*, which has 4"),
        ({"targets": "all-linear"}, r"model.targets means 12 layers, but model.adapter names .*, which has 4"),
        ({"targets": ["query"]}, r"which has 4: .*value is only in those of the adapter"),
        ({"exclude": ["layer.0"]}, r"model.exclude is \['layer.0'\], but .*layers are taken from there"),
        ({"also_train": ["classifier.bias"]}, r"model.also_train means 1 parameters, .*which has"),
        ({"overrides": {"layer.0": {"rank": 2}}}, r'model.overrides\["layer.0"\] is .* has LoRA\(rank=4'),
    ],
)
def test_settings_that_say_something_else_than_the_folder_are_refused(
    encoder: Path, adapters: dict[str, Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        continued(encoder, str(adapters["lora"]), **options).configure_model()


def test_settings_that_say_the_same_are_taken(encoder: Path, adapters: dict[str, Path]) -> None:
    same = {"targets": ["query", "value"], "also_train": "heads", "overrides": {"layer.0": {"rank": 4}}}
    continued(encoder, str(adapters["lora"]), METHODS["lora"], **same).configure_model()


def test_a_wrapped_methods_own_fields_must_agree_and_its_stages_need_not(
    encoder: Path, adapters: dict[str, Path]
) -> None:
    module = continued(encoder, str(adapters["lorasc"]), LoRASC(inner=LoRA(rank=2), stage_steps=9, noise=0.0))
    assert module.method.stage_steps == 9
    with pytest.raises(SettingsError, match=r"model.method.inner.rank is 8"):
        continued(encoder, str(adapters["lorasc"]), LoRASC(inner=LoRA(), noise=0.0))


@pytest.mark.parametrize(
    ("adapter", "method", "message"),
    [
        (None, None, r"model.method is null; name a method"),
        ([], LoRA(), r"model.adapter is \[\]; it must name an adapter"),
        ("nowhere/at/all", None, r'model.adapter is "nowhere/at/all"; no such folder'),
        ("a b", None, r"that is no folder and no hub id"),
    ],
)
def test_adapters_that_are_none(adapter: Any, method: Any, message: str, encoder: Path) -> None:
    with pytest.raises(Exception, match=message):
        AdapterModule(str(encoder), method, adapter=adapter)


def test_a_folder_that_holds_no_adapter(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"holds neither adapter.safetensors nor adapter_config.json"):
        continued(encoder, str(tmp_path))
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(AdapterFileError, match=r"a run without adapter/, which a fit writes when it has finished"):
        continued(encoder, str(tmp_path))


# -- classes of the data -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_other_classes_than_the_heads_are_refused_with_a_way_out_that_works(
    encoder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    file = labelled_file(tmp_path / "five.csv", labels=5)
    data = {"train": str(file), "validation": str(file)}

    def five(module: AdapterModule) -> None:
        trainer(tmp_path, max_steps=3).fit(module, datamodule=labelled_data_of(encoder, **data))

    with pytest.raises(SettingsError, match=r"has c0, c1, c2. A head of other classes starts anew: export it merged"):
        five(continued(encoder, str(adapters["lora"])))
    export_folder(adapters["rose"], tmp_path / "merged", "merged")
    five(AdapterModule(str(tmp_path / "merged"), LoRA(), targets=["query"], linear_baseline=False))


def labelled_data_of(encoder: Path, **options: Any) -> Any:
    from lora_lightning.data import LabelledText

    return LabelledText(tokenizer=str(encoder), batch_size=4, **options)


def test_fewer_classes_than_the_heads_are_given_its_names(
    encoder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    file = labelled_file(tmp_path / "two.csv", labels=2)
    data = {"train": str(file), "validation": str(file)}
    with pytest.raises(
        SettingsError, match=r"Give the data its classes in its order: data.labels: \['c0', 'c1', 'c2'\]"
    ):
        trainer(tmp_path).fit(continued(encoder, str(adapters["lora"])), datamodule=labelled_data_of(encoder, **data))
    named = labelled_data_of(encoder, labels=["c0", "c1", "c2"], **data)
    trainer(tmp_path, max_steps=3).fit(continued(encoder, str(adapters["lora"])), datamodule=named)


# -- a new adapter on top of others ------------------------------------------------------------------------------------


def stacked(encoder: Path, below: list[Path], method: Any = None, **options: Any) -> AdapterModule:
    method = method or LoRA(rank=2)
    return continued(encoder, [str(one) for one in below], method, targets=["query", "key"], **options)


def test_only_the_new_adapter_trains_and_the_first_step_computes_what_those_below_do(
    encoder: Path, adapters: dict[str, Path], second: Path, tmp_path: Path
) -> None:
    module = stacked(encoder, [adapters["lora"], second])
    module.configure_model()
    model = base(encoder)
    ll.load_adapter(model, adapters["lora"], "one")
    ll.load_adapter(model, second, "two")
    ll.set_active(model, ["one", "two"])
    assert torch.equal(outputs(module.model), outputs(model))  # the head is the first one's
    trains = {name for name, p in module.model.named_parameters() if p.requires_grad}
    assert trains
    assert all(".adapters.default." in name or name.startswith(("classifier", "bert.pooler")) for name in trains)
    before = {name: p.clone() for name, p in module.model.named_parameters() if "below" in name}
    trainer(tmp_path, max_steps=6).fit(module, datamodule=labelled_data(encoder))
    for name, parameter in module.model.named_parameters():
        if "below" in name:
            assert torch.equal(parameter, before[name])
    expected = outputs(module.model)

    folder = ll.save_adapter(module, tmp_path / "top")
    written = json.loads((folder / "adapter.json").read_text())
    assert [one["source"] for one in written["below"]] == [str(adapters["lora"]), str(second)]
    found = find_adapter(str(folder))
    assert not any("below" in key for key in found.stored.tensors)  # type: ignore[union-attr]

    with pytest.raises(
        AdapterFileError, match=rf'was trained on top of "{adapters["lora"]}" \(sha256 [0-9a-f]{{12}}\)'
    ):
        ll.load_adapter(base(encoder), folder)
    ll.load_adapter(model, folder, "three")
    assert torch.equal(outputs(model), expected)
    fresh = base(encoder)
    found.load(fresh, "top")
    assert torch.equal(outputs(fresh), expected)
    with pytest.raises(AdapterStateError, match=r'"top" was trained on top of "top_below_1"; eject "top" first'):
        ll.eject(fresh, "top_below_1")

    again = continued(encoder, str(folder))  # the stack trains on
    again.configure_model()
    assert torch.equal(outputs(again.model), expected)
    assert {n for n, p in again.model.named_parameters() if p.requires_grad} == trains
    third = continued(encoder, [str(folder)], LoRA(rank=1), targets=["value"])  # and bears another one
    trainer(tmp_path, max_steps=2).fit(third, datamodule=labelled_data(encoder))
    after = outputs(third.model)
    bare = base(encoder)
    find_adapter(str(ll.save_adapter(third, tmp_path / "third"))).load(bare)
    assert torch.equal(outputs(bare), after)


@pytest.mark.slow
def test_a_stack_resumes_exactly_and_not_on_other_adapters(
    encoder: Path, adapters: dict[str, Path], second: Path, tmp_path: Path
) -> None:
    below = [adapters["lora"], second]
    whole = run(stacked(encoder, below), labelled_data(encoder), tmp_path, max_steps=10)
    path = tmp_path / "half.ckpt"
    run(stacked(encoder, below), labelled_data(encoder), tmp_path, [SaveAt(path, at_step(5))], max_steps=10)
    again = run(stacked(encoder, below), labelled_data(encoder), tmp_path, checkpoint=str(path), max_steps=10)
    assert_equal_runs(whole, again)
    with pytest.raises(ResumeError, match="trained on top of other adapters"):
        run(stacked(encoder, below[::-1]), labelled_data(encoder), tmp_path, checkpoint=str(path), max_steps=10)


def test_a_stack_is_merged_and_exported_as_a_whole_or_not_at_all(
    encoder: Path, adapters: dict[str, Path], second: Path, tmp_path: Path
) -> None:
    module = stacked(encoder, [adapters["lora"], second], also_train=[])
    trainer(tmp_path, max_steps=6).fit(module, datamodule=labelled_data(encoder))
    expected = outputs(module.model)
    folder = ll.save_adapter(module, tmp_path / "top")
    export_folder(folder, tmp_path / "merged", "merged", pretrained=str(encoder))
    assert torch.allclose(outputs(base(tmp_path / "merged")), expected, atol=1e-6)
    for form in ("peft", "delta"):
        with pytest.raises(
            ExportError, match=r"was trained on top of .*, and would be loaded without. --format merged"
        ):
            ll.export(module.model, tmp_path / form, form)
    ll.merge(module.model)
    assert torch.allclose(outputs(module.model), expected, atol=1e-6)


@pytest.mark.slow
def test_a_sum_of_all_folders_of_a_stack_is_the_stack(encoder: Path, tmp_path: Path) -> None:
    low = trained(encoder, tmp_path / "low", LoRA(rank=2), also_train=[])
    module = stacked(encoder, [low], also_train=[])
    trainer(tmp_path, max_steps=4).fit(module, datamodule=labelled_data(encoder))
    top = ll.save_adapter(module, tmp_path / "top")
    with pytest.raises(AdapterFileError, match=r"was trained on top of .*, which is not among the folders; add it"):
        ll.compose([top], tmp_path / "sum")
    ll.compose([low, top], tmp_path / "sum")
    model = base(encoder)
    ll.load_adapter(model, tmp_path / "sum")
    assert torch.allclose(outputs(model), outputs(module.model), atol=1e-6)


def test_adapters_that_cannot_be_active_together_are_refused(encoder: Path, adapters: dict[str, Path]) -> None:
    with pytest.raises(AdapterStateError, match="only additive updates sum on one layer"):
        stacked(encoder, [adapters["dora"]]).configure_model()


def test_one_adapter_twice_or_a_stack_without_a_method(encoder: Path, second: Path) -> None:
    with pytest.raises(SettingsError, match="twice; its update would be applied twice"):
        stacked(encoder, [second, second])
    with pytest.raises(SettingsError, match=r"a new adapter trains on top, but model.method is null"):
        continued(encoder, [str(second)])


def test_what_lay_below_is_another_one_now(
    encoder: Path, second: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    low = tmp_path / "low"
    shutil.copytree(second, low)
    module = stacked(encoder, [low])
    trainer(tmp_path, max_steps=2).fit(module, datamodule=labelled_data(encoder))
    top = find_adapter(str(ll.save_adapter(module, tmp_path / "top")))
    shutil.rmtree(low)
    with pytest.raises(AdapterFileError, match=r"which is not there: .* Put it back"):
        top.load(base(encoder))
    shutil.copytree(adapters["lora"], low)
    with pytest.raises(AdapterFileError, match=r"what lies there now has sha256 .* Put back what it was trained on"):
        top.load(base(encoder))


# -- texts -------------------------------------------------------------------------------------------------------------


def test_new_tokens_come_from_the_folder_and_the_data_must_know_them(tmp_path: Path) -> None:
    decoder = decoder_folder(tmp_path / "decoder")
    options = {"task": "causal-lm", "linear_baseline": False, "lr_scheduler": WarmUp(warmup_fraction=0.0)}
    data = completion_data(decoder, new_tokens=["<tool>"])
    module = AdapterModule(str(decoder), LoRA(rank=2), **options)
    trainer(tmp_path, max_steps=3).fit(module, datamodule=data)
    folder = ll.save_adapter(module, tmp_path / "adapter")
    one = find_adapter(str(folder))
    assert one.new_tokens == ("<tool>",)
    ids = torch.tensor([[5, 6, len(data.tokenizer_object) - 1]])
    with torch.no_grad():
        expected = module.model.eval()(input_ids=ids).logits

    def go_on(**settings: Any) -> AdapterModule:
        again = AdapterModule(str(decoder), adapter=str(folder), **options)
        tokenizer = settings.pop("tokenizer", str(decoder))
        other = completion_data(decoder, **settings)
        other.tokenizer = tokenizer
        again.trainer = trainer(tmp_path, max_steps=3)
        again.trainer.datamodule = other  # type: ignore[attr-defined]
        again.configure_model()
        return again

    with pytest.raises(SettingsError, match=rf"trained with the token <tool>, .*Set data.tokenizer: {one.tokenizer}"):
        go_on()
    with pytest.raises(SettingsError, match=r"data.new_tokens is \['<x>'\], but .* was trained with \['<tool>'\]"):
        go_on(new_tokens=["<x>"])
    for settings in ({"new_tokens": ["<tool>"]}, {"tokenizer": str(one.tokenizer)}):
        with torch.no_grad():
            again = go_on(**settings).model.eval()(input_ids=ids).logits
        assert torch.equal(again, expected)
