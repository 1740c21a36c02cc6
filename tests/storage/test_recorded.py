from __future__ import annotations

import pytest

from lora_lightning.errors import DataError
from lora_lightning.storage.recorded import content_of


def test_a_file_of_its_format_is_parsed(tmp_path):
    file = tmp_path / "ranks.json"
    file.write_text('{"format": "ranks 1", "label": "LoRA"}')
    assert content_of(file, "ranks 1", "Ranks", "ranks.json", lambda content: content["label"]) == "LoRA"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not exist; Ranks writes ranks.json into a run folder"),
        ("{", "cannot be read"),
        ('{"format": "ranks 2"}', 'was not written by Ranks: it lacks "format": "ranks 1"'),
        ('{"format": "ranks 1"}', "is damaged: KeyError 'label'"),
    ],
)
def test_what_is_no_such_file(tmp_path, text, said):
    file = tmp_path / "other.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DataError, match=said):
        content_of(file, "ranks 1", "Ranks", "ranks.json", lambda content: content["label"])
