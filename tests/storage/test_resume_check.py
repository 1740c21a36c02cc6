"""Whether a checkpoint belongs to an adapter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapter_files import METHOD, adapted

from lora_lightning.errors import ResumeError
from lora_lightning.methods import replace
from lora_lightning.models.anatomy import survey
from lora_lightning.storage.description import describe_adapter
from lora_lightning.storage.resume_check import check_fits, check_same
from lora_lightning.storage.state import adapter_state


def described(model: Any) -> dict[str, Any]:
    return copy.deepcopy(describe_adapter(survey(model), "default"))


def test_the_same_adapter_passes_also_by_the_key_of_0_1() -> None:
    model = adapted(overrides={"first": {"rank": 1}})
    theirs = described(model)
    check_same(model, "default", theirs)
    theirs["quantisation"] = theirs.pop("quantization")
    check_same(model, "default", theirs)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (adapted(method=replace(METHOD, "test", {"alpha": 3.0})), r"LoRA.alpha is 4.0; .* was trained with 3.0"),
        (adapted(targets=["first"]), "trained with other layers"),
        (adapted(overrides={"first": {"rank": 1}}), "trained with other layers: .*rank"),
    ],
)
def test_what_differs_is_named(other: Any, message: str) -> None:
    with pytest.raises(ResumeError, match=message):
        check_same(adapted(), "default", described(other))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method", "Other", "trained with Other; the model has LoRA"),
        (
            "fingerprint",
            {"architecture": "TinyMLP", "names": "x", "weights": None},
            r"another base model \(names differ",
        ),
        ("settings", {"width": 3}, r"settings are not those of a LoRA of today: .*width"),
        ("trained", ["head.weight"], "trained with other trained: .*head.weight"),
    ],
)
def test_a_changed_description_is_refused(key: str, value: Any, message: str) -> None:
    model = adapted()
    with pytest.raises(ResumeError, match=message):
        check_same(model, "default", {**described(model), key: value})


def test_names_and_shapes_of_tensors() -> None:
    model = adapted()
    tensors = dict(adapter_state(model))
    check_fits(model, "default", tensors)
    first = next(iter(tensors))
    with pytest.raises(ResumeError, match=rf"{first} is \(2, 6\) in the model and missing in the checkpoint"):
        check_fits(model, "default", {key: value for key, value in tensors.items() if key != first})
    with pytest.raises(ResumeError, match=rf"{first} is \(2, 6\) in the model and \(9,\) in the checkpoint"):
        check_fits(model, "default", {**tensors, first: torch.zeros(9)})


def test_one_frozen_weight_that_changed_is_noticed() -> None:
    """A single entry, whichever it is, as after another version of the base model was put into its folder."""
    theirs = described(adapted())
    for i in range(8 * 6):
        model = adapted()
        with torch.no_grad():
            model.first.base.weight.view(-1)[i] += 1e-6
        with pytest.raises(ResumeError, match=r"trained on another base model \(weights differ\)"):
            check_same(model, "default", theirs)


def test_a_checkpoint_of_0_1_is_compared_at_sampled_places(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    theirs = described(model)
    for part in ("dtypes", "content"):
        del theirs["fingerprint"][part]
    check_same(model, "default", theirs)
    assert "compared at 64 places a tensor only; its file is of an older version" in capsys.readouterr().out
