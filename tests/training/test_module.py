"""AdapterModule: train mode, the token-normalised loss, groups and clipping, gradient checkpointing, strict loading."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from toy_runs import (
    classification,
    completion_data,
    decoder_folder,
    encoder_folder,
    labelled_data,
    labelled_file,
    trainer,
)

from ll_ce_lora import CELoRA
from ll_ce_lora.adapter import CELoRAAdapter
from ll_lora import LoRA
from ll_rose import RoseLoRA
from lora_lightning.adapters.base import GroupSpec
from lora_lightning.adapters.folded import DenseUpdate, FactoredUpdate
from lora_lightning.callbacks import SparsitySchedule, TrainingGuard
from lora_lightning.data import LabelledText
from lora_lightning.errors import DataError, SettingsError
from lora_lightning.injection.records import iter_adapters
from lora_lightning.optim.warmup import WarmUp
from lora_lightning.training.module import AdapterModule


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return decoder_folder(tmp_path_factory.mktemp("decoder"))


def test_the_whole_model_is_in_train_mode_during_fit_and_back_after_validation(encoder, tmp_path):
    modes = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            modes.append(all(module.training for module in pl_module.modules() if not isinstance(module, nn.Identity)))

    module = classification(encoder, LoRA(rank=2))
    trainer(tmp_path, [Look()], max_steps=6, val_check_interval=2, check_val_every_n_epoch=None).fit(
        module, datamodule=labelled_data(encoder)
    )
    assert modes == [True] * 6


def causal(decoder, **options):
    torch.manual_seed(0)
    settings = {"task": "causal-lm", "seed": 1, "optimizer": lambda params: torch.optim.SGD(params, lr=0.5), **options}
    return AdapterModule(
        str(decoder), LoRA(rank=2), lr_scheduler=WarmUp(warmup_fraction=0.0, decay="constant"), **settings
    )


def test_accumulated_loss_is_the_mean_over_the_windows_tokens(decoder, tmp_path):
    """Four micro-batches of one give the parameters of one batch of four, though their lengths differ."""
    states = []
    for batch_size, accumulate in ((4, 1), (1, 4), (2, 2)):
        seed_everything(0, verbose=False)
        module = causal(decoder)
        run = trainer(tmp_path, accumulate_grad_batches=accumulate, max_steps=3)
        run.fit(module, datamodule=completion_data(decoder, batch_size=batch_size))
        states.append([p.detach().clone() for p in module.parameters() if p.requires_grad])
    for one, two, four in zip(*states, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(one, four, atol=1e-6, rtol=1e-5)


def test_accumulating_without_token_counts_is_refused_and_names_the_fix(decoder, tmp_path):
    data = completion_data(decoder)
    data.setup("fit")
    batches = [{k: v for k, v in batch.items() if k != "window_tokens"} for batch in data.train_dataloader()]
    plain = DataLoader(batches, batch_size=None)
    with pytest.raises(
        DataError, match=r"accumulate_grad_batches is 2, but .*window_tokens.*ResumableLoader, or set it to 1"
    ):
        trainer(tmp_path, accumulate_grad_batches=2).fit(causal(decoder), plain, plain)
    trainer(tmp_path, max_steps=4).fit(causal(decoder), plain, plain)


def test_validation_loss_is_the_mean_over_tokens(decoder, tmp_path):
    module = causal(decoder)
    data = completion_data(decoder, batch_size=5)
    results = trainer(tmp_path, limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
    total = tokens = 0.0
    module.eval()
    with torch.no_grad():
        for batch in data.val_dataloader():
            logits = module.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
            for row, labels in zip(logits.log_softmax(-1), batch["labels"], strict=True):
                for position in range(1, len(labels)):
                    if labels[position] != -100:
                        total -= float(row[position - 1, labels[position]])
                        tokens += 1
    assert results[0]["val_loss"] == pytest.approx(total / tokens, abs=1e-5)


def test_groups_have_names_ratios_and_decay_of_their_own(encoder, tmp_path, monkeypatch):
    def groups(self, adapters):
        a = [p for adapter in adapters.values() for n, p in adapter.named_parameters() if n == "lora_A"]
        b = [p for adapter in adapters.values() for n, p in adapter.named_parameters() if n == "lora_B"]
        return {"A": GroupSpec(params=a), "B": GroupSpec(params=b, lr_ratio=16.0, weight_decay=0.0, clip=1e-3)}

    monkeypatch.setattr(LoRA, "param_groups", groups)
    norms = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            for group in trainer.optimizers[0].param_groups:
                norms[group["name"]] = float(torch.nn.utils.get_total_norm([p.grad for p in group["params"]]))

    module = classification(
        encoder,
        LoRA(rank=2),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
        lr_scheduler=WarmUp(warmup_fraction=0.0, decay="constant"),
    )
    run = trainer(tmp_path, [Look()], max_steps=3, gradient_clip_val=0.05)
    run.fit(module, datamodule=labelled_data(encoder))
    by_name = {group["name"]: group for group in run.optimizers[0].param_groups}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in by_name.items()} == {
        "A": (1e-2, 0.1),
        "B": (0.16, 0.0),
        "head": (pytest.approx(3e-2), 0.1),
    }
    assert norms["B"] == pytest.approx(1e-3, rel=1e-2)
    assert math.hypot(norms["A"], norms["head"]) == pytest.approx(0.05, rel=1e-2)


def test_optimizers_that_ask_for_pairs_get_them(encoder, tmp_path):
    bound = []

    class Asking(torch.optim.SGD):
        def bind_pairs(self, pairs):
            bound.extend(pairs)

    module = classification(encoder, LoRA(rank=2, alpha=6), optimizer=lambda params: Asking(params, lr=0.1))
    trainer(tmp_path, max_steps=1).fit(module, datamodule=labelled_data(encoder))
    assert len(bound) == 4
    assert {pair.scaling for pair in bound} == {3.0}
    assert all(pair.name.endswith("adapters.default") for pair in bound)


def test_gradient_checkpointing_gives_the_same_training(encoder, tmp_path):
    states = []
    for checkpointing in (False, True):
        seed_everything(0, verbose=False)
        module = classification(encoder, LoRA(rank=2), gradient_checkpointing=checkpointing)
        trainer(tmp_path, max_steps=4).fit(module, datamodule=labelled_data(encoder))
        assert module.model.is_activation_checkpointing == checkpointing
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_callbacks_are_added_unless_the_trainer_has_its_own(encoder, tmp_path, capsys):
    own = SparsitySchedule(sparsity=0.3, start=2, end=6)
    module = classification(encoder, RoseLoRA(rank=2))
    run = trainer(tmp_path, [own, TrainingGuard(patience_steps=2)], max_steps=8)
    run.fit(module, datamodule=labelled_data(encoder))
    assert [c for c in run.callbacks if isinstance(c, SparsitySchedule)] == [own]
    assert sum(isinstance(c, TrainingGuard) for c in run.callbacks) == 1
    printed = capsys.readouterr().out
    assert "SparsitySchedule: the trainer's replaces the method's (sparsity=0.3, start=2, end=6)" in printed
    run.validate(module, datamodule=labelled_data(encoder), verbose=False)
    assert "LinearBaseline" not in capsys.readouterr().out  # the module's own, which has a result by now


@pytest.mark.parametrize(
    ("method", "shift", "found"),
    [
        (RoseLoRA(rank=2), None, {"mask_A", "mask_B"}),
        (CELoRA(rank=2, svd_rank=1, kept=0.5), None, {"index", "row_norms", "A0", "B0"}),
        (LoRA(rank=2), FactoredUpdate, {"rank_mask", "log_A", "log_B", "log_weight", "slow_weight"}),
        (LoRA(rank=2), DenseUpdate, {"rank_mask", "delta", "slow"}),
    ],
    ids=["masks", "derived", "log", "dense"],
)
def test_no_buffer_of_an_adapter_is_sent_before_a_forward(encoder, tmp_path, method, shift, found):
    module = classification(encoder, method, num_labels=3)
    module.configure_model()
    for _, layer in iter_adapters(module):  # made when training is under way, after DDP has wrapped the module
        adapter = layer.adapter("default")
        if isinstance(adapter, CELoRAAdapter):
            adapter.split(layer.base_layer.weight())
            adapter.refresh(torch.ones(adapter.d_out), 1)
        if shift is not None:
            layer.set_folded("default", shift(layer.base_layer))
            layer.fold("default", 0.5, "figure_ema")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(module)
        wrapped._assign_modules_buffers()
    finally:
        dist.destroy_process_group()
    assert wrapped.named_module_buffers  # the model's own
    made = {name for name, _ in module.named_buffers() if ".adapters." in name or ".shifts." in name}
    assert {name.rpartition(".")[2] for name in made} == found
    assert not made & set(wrapped.named_module_buffers)


def test_predictions_carry_row_label_and_probability(encoder, tmp_path):
    module = classification(encoder, LoRA(rank=2))
    data = labelled_data(encoder)
    batches = trainer(tmp_path).predict(module, datamodule=data)
    rows = [row for batch in batches for row in batch]
    assert sorted(row["index"] for row in rows) == list(range(60))
    assert {row["prediction"] for row in rows} <= {"c0", "c1", "c2"}
    assert all(1 / 3 - 1e-6 <= row["probability"] <= 1 for row in rows)


def test_causal_predictions_are_greedy_continuations(decoder, tmp_path):
    module = causal(decoder, max_new_tokens=3)
    data = completion_data(decoder, batch_size=3)
    rows = [row for batch in trainer(tmp_path).predict(module, datamodule=data) for row in batch]
    row = rows[0]
    data.setup("predict")
    inputs = data.inputs("predict")[row["index"]]
    ids = data.tokenizer_object(inputs["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(3):
            ids = torch.cat([ids, module.model(ids).logits[:, -1:].argmax(-1)], 1)
    expected = data.tokenizer_object.decode(ids[0, -3:], skip_special_tokens=True)
    assert row["prediction"] == expected.split("[EOS]")[0].strip() or row["prediction"] == expected
    assert row["tokens"] > 0


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_schedule_that_does_not_fit_the_training(encoder, tmp_path):
    with pytest.raises(
        SettingsError, match=r"in a run of 3 steps, so it does not fit; the smallest run that fits has 4"
    ):
        trainer(tmp_path, max_steps=3).fit(classification(encoder, RoseLoRA(rank=2)), datamodule=labelled_data(encoder))


def test_regression_trains_on_numbers(encoder, tmp_path):
    file = tmp_path / "numbers.csv"
    rows = labelled_file(tmp_path / "labels.csv").read_text().splitlines()[1:]
    file.write_text(
        "text,label\n" + "\n".join(f"{row.rpartition(',')[0]},{0.5 * (i % 3)}" for i, row in enumerate(rows))
    )
    data = LabelledText(train=str(file), validation=str(file), tokenizer=str(encoder), regression=True, batch_size=4)
    module = AdapterModule(str(encoder), LoRA(rank=2), task="regression", seed=1, linear_baseline=False)
    run = trainer(tmp_path, max_steps=8)
    run.fit(module, datamodule=data)
    results = run.validate(module, datamodule=data, verbose=False)[0]
    assert {"val_loss", "val_pearson", "val_spearman", "val_mse"} <= set(results)
    assert module.model.config.num_labels == 1
