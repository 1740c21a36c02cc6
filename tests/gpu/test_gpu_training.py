"""Training, saving and merging on a CUDA device: what the CPU computes, and exact where it is exact there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from on_gpu import ACCELERATOR, DEVICE, MERGEABLE, METHODS, MODELS, Losses, adapted, tokens
from resuming import SaveAt, assert_equal_runs, at_step, run
from toy_runs import classification, completion_data, decoder_folder, encoder_folder, labelled_data, trainer

from ll_lora import LoRA
from ll_rose import RoseLoRA
from lora_lightning.injection.merge_model import merge, unmerge
from lora_lightning.injection.records import adapters_named
from lora_lightning.injection.switches import disable_adapters
from lora_lightning.plugins import registry
from lora_lightning.storage.folder import save_adapter
from lora_lightning.storage.load import load_adapter
from lora_lightning.training.assembly import enable_checkpointing
from lora_lightning.training.module import AdapterModule

pytestmark = pytest.mark.gpu

TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 3e-2, "16-mixed": 5e-3}
"""Largest relative difference of a loss from the CPU's in float32."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        "encoder": encoder_folder(tmp_path_factory.mktemp("encoder"), dropout=0.0),
        "decoder": decoder_folder(tmp_path_factory.mktemp("decoder")),
    }


@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("dropping"), dropout=0.1)


def fit(model, folder, work, method, callbacks=(), **options):
    """Three steps on a tiny pretrained model; the module and what `run` says of it."""
    if model == "encoder":
        module, data = classification(folder, method, targets="all-linear"), labelled_data(folder)
    else:
        module = AdapterModule(str(folder), method, task="causal-lm", seed=1)
        data = completion_data(folder)
    return module, run(module, data, work, callbacks, **{"max_steps": 3, "limit_val_batches": 0, **options})


def test_every_registered_method_is_here():
    assert METHODS.keys() == registry().methods.keys()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_three_steps_are_the_ones_of_the_cpu(folders, tmp_path, name, model):
    """In float32, bfloat16 and float16 autocast; trained tensors stay float32 and all of them move."""
    expected = Losses()
    fit(model, folders[model], tmp_path, METHODS[name], [expected], accelerator="cpu")
    assert len(expected.values) == 3
    for precision, tolerance in TOLERANCE.items():
        found = Losses()
        options = {"accelerator": ACCELERATOR, "precision": precision}
        module, _ = fit(model, folders[model], tmp_path, METHODS[name], [found], **options)
        assert found.values == pytest.approx(expected.values, rel=tolerance), precision
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.float32}


@pytest.mark.parametrize("name", METHODS)
def test_resume_is_exact(dropping, tmp_path, name):
    """With dropout, whose random numbers come from the device."""
    saved = tmp_path / "saved.ckpt"
    options = {"accelerator": ACCELERATOR, "deterministic": True, "max_steps": 4}
    method = METHODS[name]
    _, straight = fit("encoder", dropping, tmp_path, method, [SaveAt(saved, at_step(2))], **options)
    _, resumed = fit("encoder", dropping, tmp_path, method, checkpoint=saved, seed=77, **options)
    assert_equal_runs(straight, resumed)


def test_resume_inside_an_accumulation_window(dropping, tmp_path):
    saved = tmp_path / "saved.ckpt"
    options = {"accelerator": ACCELERATOR, "deterministic": True, "max_steps": 4, "accumulate_grad_batches": 3}
    inside = SaveAt(saved, lambda trainer, batch_idx: trainer.global_step == 2 and batch_idx % 3 == 1)
    method = RoseLoRA(rank=2, sparsity=0.5, start=2, end=4, dropout=0.1)
    _, straight = fit("encoder", dropping, tmp_path, method, [inside], **options)
    _, resumed = fit("encoder", dropping, tmp_path, method, checkpoint=saved, seed=77, **options)
    assert_equal_runs(straight, resumed)


class Attempts(Callback):
    """What the schedules see at each attempted step, beside gradients computed anew in float32."""

    phase = -1

    def __init__(self) -> None:
        self.finite: list[bool] = []
        self.moved: list[bool] = []
        self.errors: list[float] = []

    def _state(self, pl_module: Any) -> list[torch.Tensor]:
        return [value.clone() for key, value in pl_module.state_dict().items() if ".adapters." in key]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch, self.before = batch, self._state(pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        trained = [p for p in pl_module.parameters() if p.requires_grad and p.grad is not None]
        seen = torch.cat([p.grad.flatten() for p in trained])
        self.finite.append(bool(seen.isfinite().all()))
        if self.finite[-1]:
            with torch.enable_grad(), torch.autocast(DEVICE, enabled=False):
                loss = pl_module.task.loss(pl_module.task.logits(pl_module.model, self.batch), self.batch)
                grads = torch.autograd.grad(loss.total / loss.count, trained)
            exact = torch.cat([grad.flatten() for grad in grads])
            self.errors.append(float((seen - exact).norm() / exact.norm()))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        after = self._state(pl_module)
        self.moved.append(any(not torch.equal(a, b) for a, b in zip(self.before, after, strict=True)))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # the first steps are skipped
def test_overflowed_steps_are_skipped_and_schedules_read_unscaled_gradients(folders, tmp_path):
    """A scale far too large overflows float16 until it has been halved often enough."""
    attempts = Attempts()
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**24)
    method = RoseLoRA(rank=2, sparsity=0.5, start=16, end=18)
    module = classification(folders["encoder"], method, targets="all-linear")
    options = {"accelerator": ACCELERATOR, "max_steps": 24, "limit_val_batches": 0}
    fit = trainer(tmp_path, [attempts], plugins=[MixedPrecision("16-mixed", DEVICE, scaler)], **options)
    fit.fit(module, datamodule=labelled_data(folders["encoder"]))
    assert 1 <= attempts.finite.count(False) < 16
    skipped = [moved for moved, finite in zip(attempts.moved, attempts.finite, strict=True) if not finite]
    taken = [moved for moved, finite in zip(attempts.moved, attempts.finite, strict=True) if finite]
    assert not any(skipped)
    assert all(taken[:-1])  # the rate of the last step is near zero
    assert max(attempts.errors) < 2e-2
    masks = [entry.mask for adapter in module.adapters().values() for entry in adapter.masks()]
    assert not all(bool(mask.all()) for mask in masks)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_save_and_load(tmp_path, name, model):
    net, ids = adapted(model, METHODS[name]), tokens()
    save_adapter(net, tmp_path / "adapter")
    fresh = MODELS[model]().to(DEVICE)
    load_adapter(fresh, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, net(ids).logits)
    assert {tensor.device.type for tensor in fresh.state_dict().values()} == {DEVICE}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", MERGEABLE)
def test_merge_computes_the_same_and_comes_off_bit_for_bit(name, model, dtype):
    net, ids = adapted(model, METHODS[name], dtype=dtype), tokens()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.no_grad():
        outputs = net(ids).logits
        merge(net)
        merged = net(ids).logits
        unmerge(net)
        assert torch.equal(net(ids).logits, outputs)
        with disable_adapters(net):
            assert not torch.equal(net(ids).logits, outputs)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 5e-2}
    torch.testing.assert_close(merged, outputs, **tolerance)
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("name", METHODS)
def test_recomputed_activations_give_the_same_gradients(name):
    """Dropout included, for methods that have it."""
    gradients = []
    for recompute in (False, True):
        method = LoRA(rank=2, dropout=0.2) if name == "LoRA" else METHODS[name]
        net, ids = adapted("decoder", method).train(), tokens()
        if recompute:
            enable_checkpointing(net)
        torch.manual_seed(4)
        net(ids, labels=ids, use_cache=False).loss.backward()
        trained = [p for a in adapters_named(net, "default").values() for p in a.parameters()]
        gradients.append([p.grad for p in trained if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
