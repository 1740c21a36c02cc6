"""What was read is looked up in the model again; what differs, or was not used, is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft_models import PEFT_WARNINGS, from_peft, llama

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError
from lora_lightning.exporters.peft import folder as peft_file
from lora_lightning.exporters.peft import read
from lora_lightning.exporters.peft.read_back import check_read_back, rows_once
from lora_lightning.models.anatomy import survey

pytestmark = PEFT_WARNINGS
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def imported(tmp_path: Path) -> tuple[torch.nn.Module, peft_file.PeftFolder]:
    from_peft(llama, tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = llama()
    ll.import_peft(model, tmp_path)
    return model, peft_file.read(tmp_path, {})


@pytest.mark.parametrize("target", [f"{LAYER}.adapters.default.lora_B", "lm_head.weight"])
def test_a_target_with_another_value(target: str, imported: tuple[torch.nn.Module, peft_file.PeftFolder]) -> None:
    model, folder = imported
    check_read_back(survey(model), folder, "default", "it")
    model.get_parameter(target).data[0, 0] += 1e-3
    with pytest.raises(AdapterFileError, match=r"tensor base_model\..* is not what the model holds after the import"):
        check_read_back(survey(model), folder, "default", "it")


def test_a_tensor_that_nothing_took(imported: tuple[torch.nn.Module, peft_file.PeftFolder]) -> None:
    model, folder = imported
    folder.keys[LAYER, "something"] = "base_model.model.x.something"
    with pytest.raises(AdapterFileError, match=r"x\.something was read, but nothing in the model has taken it"):
        check_read_back(survey(model), folder, "default", "it")


def test_a_model_is_as_before_where_it_does_not_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_peft(llama, tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.setattr(read, "_write_heads", lambda *_: None)  # heads that never arrive
    with pytest.raises(AdapterFileError, match=r"lm_head\.weight is not what the model holds"):
        ll.import_peft(model, tmp_path)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_rows_of_one_parameter_must_agree() -> None:
    rows = {"a": torch.ones(1, 2), "b": torch.zeros(1, 2)}
    folder = peft_file.PeftFolder({}, {}, {}, rows, {(path, "rows"): f"{path}.delta" for path in rows})
    rows_once(folder, {"a": 1, "b": 2}, "it")
    with pytest.raises(AdapterFileError, match=r"a\.delta and b\.delta differ, while these layers share their rows"):
        rows_once(folder, {"a": 1, "b": 1}, "it")
