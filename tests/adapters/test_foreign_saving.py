"""Other libraries' ways to save a model never write one whose keys they would not find again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_model, save_model
from torch import nn

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import AdapterStateError
from lora_lightning.models.new_tokens import Vocabulary, add_rows, remove_rows
from lora_lightning.testing import perturb, tiny_decoder, tiny_encoder

IDS = torch.tensor([[1, 5, 7, 2]])
REFUSED = r"would write keys that from_pretrained does not know: .*lora_lightning\.export\(model, folder\)"


def adapted(**options: Any) -> Any:
    model = tiny_decoder()
    ll.inject(model, LoRA(rank=2), seed=0, **options)
    for index, (_, layer) in enumerate(ll.iter_adapters(model)):
        perturb(layer.adapters, index)
    return model


class Hub(nn.Module, PyTorchModelHubMixin):
    """A project's own model that is saved by huggingface_hub."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


def around() -> nn.Module:
    """A model whose backbone alone has adapters."""
    model = tiny_encoder()
    ll.inject(model.bert, LoRA(rank=2))
    return model


def hub_model() -> nn.Module:
    model = Hub()
    ll.inject(model, LoRA(rank=2), targets=["layer"])
    return model


def with_rows() -> nn.Module:
    model = tiny_decoder()
    add_rows(model, Vocabulary(("<tool>",), 32))
    return model


def compiled() -> Any:
    return torch.compile(adapted(), backend="eager")


@pytest.mark.parametrize(
    "make",
    [
        adapted,
        lambda: adapted().model,
        around,
        lambda: copy.deepcopy(adapted()),
        hub_model,
        with_rows,
        compiled,
        lambda: adapted(targets=["lm_head"]),
    ],
    ids=[
        "the model",
        "its backbone",
        "one around it",
        "a copy",
        "huggingface_hub",
        "new rows",
        "compiled",
        "one layer",
    ],
)
@pytest.mark.parametrize("save", ["save_pretrained", "push_to_hub"])
def test_it_is_refused_before_anything_is_written(make: Callable[[], Any], save: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterStateError, match=REFUSED):
        getattr(make(), save)(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_has_no_adapter_is_saved_as_always(tmp_path: Path) -> None:
    model = adapted()
    other = tiny_decoder()
    other.save_pretrained(tmp_path / "other")
    ll.eject(model)
    model.save_pretrained(tmp_path / "ejected")
    rows = with_rows()
    remove_rows(rows)
    rows.save_pretrained(tmp_path / "shrunk")
    for folder in ("other", "ejected", "shrunk"):
        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert torch.equal(loaded(IDS).logits, tiny_decoder()(IDS).logits)


def test_merged_for_good_and_ejected_is_the_adapted_model(tmp_path: Path) -> None:
    model = adapted()
    ll.merge(model, keep_original=False)
    ll.eject(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, adapted()(IDS).logits, rtol=1e-4, atol=1e-5)


def test_signature_and_help_stay() -> None:
    adapted()
    assert transformers.PreTrainedModel.save_pretrained.__doc__.strip().startswith("Save a model and its configuration")
    assert "max_shard_size" in str(__import__("inspect").signature(transformers.PreTrainedModel.save_pretrained))


def test_a_models_own_dictionary_fits_a_model_with_the_same_adapters(tmp_path: Path) -> None:
    """torch.save, safetensors and accelerate write what `state_dict` says; nothing is renamed on the way."""
    from accelerate import Accelerator

    model = adapted()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    save_model(model, tmp_path / "state.safetensors")
    Accelerator(cpu=True).save_model(model, tmp_path / "accelerate")

    def fresh() -> Any:
        other = tiny_decoder()
        ll.inject(other, LoRA(rank=2), seed=9)
        return other

    first, second, third = fresh(), fresh(), fresh()
    first.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    load_model(second, tmp_path / "state.safetensors")
    load_model(third, tmp_path / "accelerate" / "model.safetensors")
    for other in (first, second, third):
        assert torch.equal(other(IDS).logits, model(IDS).logits)


@pytest.mark.filterwarnings("ignore")  # of the trainer's own arguments
def test_the_trainer_of_transformers_says_so_too(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[])
    trainer = transformers.Trainer(adapted(), arguments)
    with pytest.raises(AdapterStateError, match=REFUSED):
        trainer.save_model()
