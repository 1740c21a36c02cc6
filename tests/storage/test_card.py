"""The card of an adapter folder is derived: the same twice, no part of the adapter, a person's once it is edited."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import transformers
from adapter_files import adapted
from huggingface_hub import ModelCard

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError
from lora_lightning.storage.card import add_measured, card, is_edited, own_loading, sealed_card
from lora_lightning.storage.stored import CARD, read_folder
from lora_lightning.testing import TinyMLP, tiny_encoder

MEASURED = {
    "values": {"accuracy": 0.75, "loss": 0.5},
    "untrained": {"accuracy": 0.5, "loss": 0.7},
    "linear_baseline": None,
    "datasets": ["owner/data"],
    "steps": 20,
    "rate": 0.001,
    "seed": 3,
}


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    model = adapted(tiny_encoder())
    for name in ("a", "b", "a"):
        ll.save_adapter(model, tmp_path / name)
    assert (tmp_path / "a" / CARD).read_bytes() == (tmp_path / "b" / CARD).read_bytes()


def test_an_edited_or_a_missing_card_changes_nothing_about_the_adapter(tmp_path: Path) -> None:
    model = adapted()
    ll.save_adapter(model, tmp_path)
    digest = read_folder(tmp_path).digest
    (tmp_path / CARD).write_text("# My adapter\n")
    ll.load_adapter(TinyMLP(), tmp_path)
    assert read_folder(tmp_path).digest == digest
    (tmp_path / CARD).unlink()
    assert read_folder(tmp_path).digest == digest


def test_a_persons_card_outlives_the_next_save_and_ours_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ll.save_adapter(adapted(), tmp_path)
    first = (tmp_path / CARD).read_text()
    edited = first.replace("# LoRA", "# The best LoRA")
    (tmp_path / CARD).write_text(edited)
    ll.save_adapter(adapted(), tmp_path)
    assert (tmp_path / CARD).read_text() == edited
    assert "was edited, and is left as it is" in capsys.readouterr().out
    (tmp_path / CARD).write_text(first)
    ll.save_adapter(adapted(tiny_encoder()), tmp_path)
    assert (tmp_path / CARD).read_text() != first


@pytest.mark.parametrize(
    "change", [lambda text: text + "x", lambda text: text.replace("adapted", "Adapted"), str.upper]
)
def test_any_change_is_seen(change, tmp_path: Path) -> None:
    ll.save_adapter(adapted(), tmp_path)
    content = (tmp_path / CARD).read_text()
    assert not is_edited(content.encode())
    assert is_edited(change(content).encode())


def test_a_link_in_its_place_is_not_written_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / CARD).symlink_to(target)
    ll.save_adapter(adapted(), tmp_path / "adapter")
    assert target.read_text() == "mine"
    assert "left as it is" in capsys.readouterr().out


def test_what_was_measured_comes_later_and_a_full_disk_leaves_the_adapter_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ll.save_adapter(adapted(), tmp_path)
    add_measured(tmp_path, MEASURED)
    assert "| trained | 0.75 | 0.5 |" in (tmp_path / CARD).read_text()
    assert not is_edited((tmp_path / CARD).read_bytes())

    def fail(files: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lora_lightning.storage.card.write_all", fail)
    with pytest.raises(AdapterFileError, match=r"No space left on device\. The adapter is whole"):
        add_measured(tmp_path, MEASURED)
    ll.load_adapter(TinyMLP(), tmp_path)


def test_the_hub_reads_what_was_measured(tmp_path: Path) -> None:
    ll.save_adapter(adapted(tiny_encoder()), tmp_path)
    description = {**read_folder(tmp_path).description, "base": "owner/encoder"}
    data = ModelCard(card(description, own_loading(description), MEASURED)).data
    assert (data.base_model, data.library_name, data.datasets) == ("owner/encoder", "lora_lightning", ["owner/data"])
    assert data.pipeline_tag == "text-classification"
    assert data.tags == ["base_model:adapter:owner/encoder", "lora", "lora_lightning"]
    found = {one.metric_type: one.metric_value for one in data.eval_results}
    assert found == MEASURED["values"]
    assert {one.dataset_name for one in data.eval_results} == {"owner/data"}
    text = card(description, own_loading(description), MEASURED)
    assert "| trained | 0.75 | 0.5 |" in text
    assert "| before training | 0.5 | 0.7 |" in text
    assert "20 optimizer steps, rate 0.001, seed 3" in text


def test_nothing_is_stated_that_was_not_measured(tmp_path: Path) -> None:
    ll.save_adapter(adapted(tiny_encoder()), tmp_path)
    data = ModelCard.load(tmp_path / CARD).data
    assert data.eval_results is None
    assert data.datasets is None


def test_a_local_base_is_named_without_its_path_and_its_license_is_read(tmp_path: Path) -> None:
    base = tmp_path / "secret" / "encoder"
    tiny_encoder().save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Encoder\n")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    ll.save_adapter(adapted(model), tmp_path / "adapter")
    text = (tmp_path / "adapter" / CARD).read_text()
    assert "secret" not in text
    assert "a local folder called encoder" in text
    data = ModelCard(text).data
    assert (data.license, data.base_model) == ("apache-2.0", None)


def test_the_code_of_a_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "adapter" / "encoder"
    tiny_encoder().save_pretrained(base)
    model = transformers.BertForSequenceClassification.from_pretrained(base)
    ll.save_adapter(adapted(model), tmp_path / "adapter")
    monkeypatch.chdir(tmp_path / "adapter")
    code = Path(CARD).read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(code, names)
    for path, layer in ll.iter_adapters(names["model"]):
        own = model.get_submodule(path).adapter("default").state_dict()
        assert all(value.equal(own[key]) for key, value in layer.adapter("default").state_dict().items())


def test_a_base_without_a_name_gets_no_code_that_cannot_work(tmp_path: Path) -> None:
    ll.save_adapter(adapted(), tmp_path)
    assert "model = ...  # the base model, a model that has no name (TinyMLP)" in (tmp_path / CARD).read_text()
    assert sealed_card("a") != sealed_card("b")
