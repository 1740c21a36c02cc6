"""Files of peft's ADALORA format: whole, pruned, with a layer that lost everything, damaged, and pruned again here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exported_models import llama, logits
from safetensors.torch import load_file, save_file
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError
from lora_lightning.exporters.peft.triplets import alpha_of, at_least_one, in_lora_terms, scaling_of
from lora_lightning.injection.records import adapters_named

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft's call
    # peft takes a layer without components for a sharded one
    "ignore:Adapter 'default'. .*LoRA tensor.s. have invalid shape:peft.utils.warning.PeftWarning",
)

TARGETS = ["q_proj", "v_proj", "down_proj"]


def theirs(model: nn.Module, targets: list[str] = TARGETS) -> nn.Module:
    """peft's model with random triplets."""
    from peft import AdaLoraConfig, get_peft_model

    schedule = {"tinit": 1, "tfinal": 3, "deltaT": 1, "total_step": 8}
    made = get_peft_model(model, AdaLoraConfig(init_r=4, target_r=2, target_modules=targets, lora_alpha=6, **schedule))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return made.eval()


def save(model: nn.Module, folder: Path, kept: dict[str, list[bool]] | None = None) -> Path:
    """A folder of peft's, with the triplets that `kept` leaves of the layers it names (others keep theirs)."""
    if kept is not None:
        names = [name for name, _ in model.base_model.model.named_parameters() if "lora_E" in name]
        masks = {name: next((mask for key, mask in kept.items() if key in name), [True] * 4) for name in names}
        model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, masks)
        model.peft_config["default"].rank_pattern = masks
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "kept", [None, {"0.self_attn.q_proj": [True, False, False, True], "1.mlp.down_proj": [False] * 4}]
)
def test_a_folder_of_peft_computes_the_same(tmp_path, kept) -> None:
    model = theirs(llama())
    folder = save(model, tmp_path / "theirs", kept)
    expected, ours = logits(model), llama()
    ll.import_peft(ours, folder)
    torch.testing.assert_close(logits(ours), expected, atol=1e-6, rtol=0)
    ranks = {path: adapter.rank for path, adapter in adapters_named(ours, "default").items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == (2 if kept else 4)
    assert ranks["model.layers.1.mlp.down_proj"] == (1 if kept else 4)
    ll.save_adapter(ours, tmp_path / "ours")
    again = llama()
    ll.load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(ours))


def test_what_was_read_goes_back_to_peft_as_lora(tmp_path) -> None:
    from peft import PeftModel

    model = theirs(llama())
    folder = save(model, tmp_path / "theirs", {"0.self_attn.q_proj": [True, False, False, False]})
    ours = llama()
    ll.import_peft(ours, folder)
    ll.export(ours, tmp_path / "back")
    back = PeftModel.from_pretrained(llama(), tmp_path / "back").eval()
    torch.testing.assert_close(logits(back), logits(model), atol=1e-6, rtol=0)


def test_a_convolution_of_peft_is_read(tmp_path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, (3, 2), padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))

    x = torch.randn(2, 3, 5, 5)
    plain, other = net(), net()
    plain(x), other(x)
    model = theirs(plain, ["0"])
    folder = save(model, tmp_path / "theirs")
    other.load_state_dict(
        {
            key.replace(".base_layer", ""): t
            for key, t in plain.state_dict().items()
            if "lora" not in key and "ranknum" not in key
        }
    )
    ll.import_peft(other, folder)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), atol=1e-5, rtol=0)


def as_lora(config: dict[str, object]) -> None:
    """Leave what a LORA folder has."""
    kept = {key: config[key] for key in ("target_modules", "lora_alpha")}
    config.clear()
    config.update(kept, peft_type="LORA", r=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, config: tensors.pop(next(k for k in tensors if "lora_E" in k)), r"the file has no lora_E"),
        (
            lambda tensors, config: tensors.update({next(k for k in tensors if "lora_E" in k): torch.zeros(3, 1)}),
            r"lora_E of shape \(3, 1\), while adapter_config.json has peft_type 'ADALORA' and the factors rank 4",
        ),
        (lambda tensors, config: as_lora(config), r"lora_E of shape \(4, 1\), while .* has peft_type 'LORA'"),
        (lambda tensors, config: config.update(init_r=5), r"do not fit rank 5, which adapter_config.json states"),
        (lambda tensors, config: config.update(use_dora=True), r"uses use_dora, which no installed method reads"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, change, message) -> None:
    folder = save(theirs(llama(), ["q_proj"]), tmp_path / "theirs")
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    change(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFileError, match=message):
        ll.import_peft(llama(), folder)


def test_a_name_with_the_adapters_in_it_is_read(tmp_path) -> None:
    model = theirs(llama(), ["q_proj"])
    folder = save(model, tmp_path / "theirs")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({f"{key}.default": tensor for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    ours = llama()
    ll.import_peft(ours, folder)
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-6, rtol=0)


def test_settings_are_put_in_the_words_of_the_other_format() -> None:
    config = {
        "peft_type": "ADALORA",
        "init_r": 4,
        "r": 8,
        "lora_alpha": 6,
        "total_step": 9,
        "rank_pattern": {"a.b.lora_E": [True, False]},
    }
    assert in_lora_terms(config) == {"peft_type": "ADALORA", "r": 4, "lora_alpha": 6, "rank_pattern": {r"a\.b": 1}}
    assert in_lora_terms({"peft_type": "LORA", "r": 3}) == {"peft_type": "LORA", "r": 3}
    assert scaling_of({"r": 4}, 6.0) == 6.0 / 4.00001
    assert alpha_of(6.0 / 4.00001, 4) == pytest.approx(6.0, rel=1e-15)


def test_a_layer_without_components_has_one_of_zeros() -> None:
    A, B, weights = at_least_one(torch.ones(0, 5), torch.ones(3, 0), torch.ones(0, 1))
    assert (A.shape, B.shape, weights.shape) == ((1, 5), (3, 1), (1,))
    assert not torch.cat([A.flatten(), B.flatten(), weights]).any()
