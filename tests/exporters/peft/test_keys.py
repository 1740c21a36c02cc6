"""Names of tensors: peft's own, and those that wrappers around a peft model leave in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft_models import PEFT_WARNINGS, Q, change_tensors, from_peft, llama

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError
from lora_lightning.exporters.peft.keys import understand

TOP = "base_model.model."

pytestmark = PEFT_WARNINGS


def test_roles() -> None:
    names = {
        "a.lora_A.weight": ("a", "A"),
        "a.lora_embedding_B": ("a", "B"),
        "a.base_layer.bias": ("a", "base_bias"),
        "a.base_layer.base_layer.lora_A.weight": ("a.base_layer.base_layer", "A"),
        "a.token_adapter.trainable_tokens_delta": ("a", "rows"),
        "a.weight": ("a.weight", "head"),
        "a.bias": ("a.bias", "head"),
    }
    found = understand([f"{TOP}{name}" for name in names], "it")
    assert {one.key.removeprefix(TOP): (one.path, one.role) for one in found} == names


SPELLINGS: dict[str, Callable[[str], str]] = {
    "state dictionary of a peft model": lambda key: (
        key.replace(".weight", ".default.weight")
        .replace("embedding_A", "embedding_A.default")
        .replace("embedding_B", "embedding_B.default")
        .replace("norm.default.weight", "norm.modules_to_save.default.weight")
    ),
    "taken under distributed data parallel": lambda key: f"module.{key}",
    "taken inside torch.compile": lambda key: key.replace(TOP, f"{TOP}_orig_mod."),
    "compiled twice, under data parallel": lambda key: f"module._orig_mod.{key}".replace(
        "layers.0", "layers.0._orig_mod"
    ),
    "checkpointed blocks": lambda key: key.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    "FSDP1": lambda key: key.replace("layers.", "_fsdp_wrapped_module.layers."),
    "without the wrapper": lambda key: key.removeprefix(TOP),
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_other_spellings_are_read(spell: Callable[[str], str], tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["model.norm"]}
    theirs = from_peft(llama, tmp_path, **options)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            if ".base_layer." in key:
                del tensors[key]
            else:
                tensors[spell(key)] = tensors.pop(key)

    change_tensors(tmp_path, change)
    model = llama()
    ll.import_peft(model, tmp_path)
    ids = torch.arange(3, 10)[None]
    torch.testing.assert_close(model.eval()(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["a.lora_A.one.weight", "a.lora_B.two.weight"], r"holds the adapters one, two in one file .*save_pretrained"),
        (["a.lora_A.weight", "a.lora_A.x.weight"], r"lora_A\.weight and .*lora_A\.x\.weight name the same tensor of a"),
        (["a.lora_A.weight", "_orig_mod.a.lora_A.weight"], "name the same tensor of a"),
        (["a.original_module.weight"], "belongs to a variant that is not read here. Load the adapter in peft"),
        (["a.lora_ga_scale"], "belongs to a variant"),
    ],
)
def test_what_could_mean_two_things_is_refused(keys: list[str], message: str) -> None:
    with pytest.raises(AdapterFileError, match=message):
        understand([TOP + key for key in keys], "it")


def test_a_prefix_that_only_some_have_is_refused() -> None:
    with pytest.raises(AdapterFileError, match=r"tensor b\.lora_A\.weight does not start with .*, while others do"):
        understand([f"{Q}.lora_A.weight", "b.lora_A.weight"], "it")
