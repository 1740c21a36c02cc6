from __future__ import annotations

import pytest

from lora_lightning.models.paths import plain, within


@pytest.mark.parametrize(
    ("pattern", "path", "inside"),
    [
        ("layer.1", "encoder.layer.1.dense", True),
        ("layer.1", "encoder.layer.11.dense", False),
        ("dense", "encoder.dense_2", False),
        (r".*\.1\..*", "encoder.layer.1.dense", True),
        ("encoder.layer.1.dense", "encoder.layer.1.dense", True),
    ],
)
def test_within_is_about_whole_names(pattern: str, path: str, inside: bool) -> None:
    assert within(pattern, path) == inside


def test_names_without_wrappers() -> None:
    assert plain("_orig_mod.layers.0.weight") == "layers.0.weight"
    assert plain("layers._orig_mod.0._fsdp_wrapped_module._checkpoint_wrapped_module.q.weight") == "layers.0.q.weight"
    assert plain("layers.my_orig_mod.weight") == "layers.my_orig_mod.weight"
    assert plain("layers.0._orig_mod") == "layers.0"
