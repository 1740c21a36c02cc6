"""Averages of weights do not move what does not train, not even by rounding."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from projects import Plain, fit
from toy_runs import classification, encoder_folder, labelled_data, trainer

from ll_lora import LoRA
from lora_lightning import load_adapter, save_adapter
from lora_lightning.callbacks import InjectAdapters
from lora_lightning.callbacks.averages import keep_equal_means

THIRDS = {"use_buffers": False, "avg_fn": lambda averaged, current, count: averaged / 3 + current * (2 / 3)}


@pytest.mark.parametrize("averages", [lambda: EMAWeightAveraging(), lambda: WeightAveraging(**THIRDS)])
def test_the_adapter_of_a_project_with_averages_fits_its_base_model(tmp_path, averages):
    torch.manual_seed(0)
    module, fresh = Plain(), Plain()
    fresh.load_state_dict(module.state_dict())
    inject = InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"], directory=tmp_path / "adapter")
    fit(module, tmp_path, [inject, averages()], max_steps=8)
    assert torch.equal(module.used.base.weight, fresh.used.weight)
    assert torch.equal(module.unused.weight, fresh.unused.weight)
    load_adapter(fresh, tmp_path / "adapter")
    x = torch.randn(3, 4)
    assert torch.equal(fresh.head(fresh.used(x)), module.head(module.used(x)))


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_the_adapter_of_our_own_module_with_averages_fits_its_base_model(tmp_path):
    folder = encoder_folder(tmp_path / "model")
    module = classification(folder, LoRA(rank=2))
    trainer(tmp_path, [EMAWeightAveraging()], max_steps=6).fit(module, labelled_data(folder))
    save_adapter(module.model, tmp_path / "adapter")
    fresh = type(module.model).from_pretrained(folder)
    load_adapter(fresh, tmp_path / "adapter")
    batch = {"input_ids": torch.tensor([[3, 4, 5]])}
    assert torch.equal(fresh.eval()(**batch).logits, module.model.eval()(**batch).logits)


def test_a_mean_of_other_numbers_is_what_it_was():
    callback = WeightAveraging(**THIRDS)
    callback._average_model = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 1), avg_fn=THIRDS["avg_fn"])
    keep_equal_means([callback])
    one = callback._average_model.avg_fn
    keep_equal_means([callback])
    assert callback._average_model.avg_fn is one
    old, new = torch.tensor([0.1, 3.0]), torch.tensor([0.1, 6.0])
    assert torch.equal(one(old, new, 1), torch.tensor([0.1, 5.0]))
