"""Rows of new tokens in peft's format: which are read, and where they go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_lightning.errors import AdapterFileError
from lora_lightning.exporters.peft.folder import PeftFolder
from lora_lightning.exporters.peft.tokens import SETTING, fill_rows, new_tokens, room_for
from lora_lightning.models.anatomy import survey
from lora_lightning.models.new_tokens import Vocabulary, vocabulary
from lora_lightning.testing import tiny_decoder

EMBEDDING = "model.embed_tokens"


def added() -> Vocabulary:
    return Vocabulary(("<a>", "<b>"), len(tiny_decoder().get_input_embeddings().weight))


def folder(indices: Any = None, rows: Any = None) -> PeftFolder:
    return PeftFolder({SETTING: indices} if indices else {}, {}, {}, rows or {})


def test_without_the_setting_there_are_no_new_tokens(tmp_path: Path) -> None:
    assert new_tokens(folder(), tmp_path) is None
    assert fill_rows(survey(tiny_decoder()), folder(), tmp_path) == []


@pytest.mark.parametrize("indices", [[3, 5], {"embed_tokens": [3, 4], "lm_head": [4, 5]}])
def test_scattered_ids_are_refused(indices: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=f"has {SETTING} .*; only new tokens are read: the last ids"):
        new_tokens(folder(indices), tmp_path)


def test_without_a_tokenizer_nobody_knows_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="no tokenizer that says which tokens these are"):
        new_tokens(folder([3, 4]), tmp_path)


def test_room_is_taken_back_after_an_error(tmp_path: Path) -> None:
    model = tiny_decoder()
    before = set(model.state_dict())

    def fail_inside() -> None:
        with room_for(model, added(), tmp_path) as fresh:
            assert fresh
            assert vocabulary(model) == added()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert set(model.state_dict()) == before
    with room_for(model, None, tmp_path) as fresh:
        assert not fresh


def test_rows_are_written_and_shared_ones_need_one_side_only(tmp_path: Path) -> None:
    model = tiny_decoder(tied=True)
    with room_for(model, added(), tmp_path):
        anatomy = survey(model)
    rows = torch.arange(32.0).view(2, 16)
    assert fill_rows(anatomy, folder([40, 41], {EMBEDDING: rows}), tmp_path) == [f"{EMBEDDING}.new_rows"]
    assert torch.equal(model.get_parameter("lm_head.new_rows"), rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"model.embed_token": torch.zeros(2, 16)}, f'which has none here. Did you mean "{EMBEDDING}"'),
        ({EMBEDDING: torch.zeros(3, 16)}, r"the rows of model.embed_tokens are \(3, 16\); the model needs \(2, 16\)"),
        ({EMBEDDING: torch.zeros(2, 16)}, "no rows of new tokens for lm_head, which does not share others"),
    ],
)
def test_rows_that_do_not_fit(rows: Any, message: str, tmp_path: Path) -> None:
    model = tiny_decoder()
    with room_for(model, added(), tmp_path), pytest.raises(AdapterFileError, match=message):
        fill_rows(survey(model), folder([40, 41], rows), tmp_path)
