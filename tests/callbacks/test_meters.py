"""Meters, against norms, rates and counts that the test takes itself."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from projects import Plain, fit, loader
from toy_runs import classification, completion_data, decoder_folder, encoder_folder, labelled_data, trainer

from ll_lora import LoRA
from lora_lightning.callbacks import InjectAdapters, Meters
from lora_lightning.callbacks.meters import gradient_norm, rates, token_counts
from lora_lightning.training.module import AdapterModule


class Look(Callback):
    """Keeps gradients before clipping, rates and padded batches, and what was logged at each step."""

    phase = 9

    def __init__(self):
        self.norms, self.lrs, self.logged, self.masks = {}, {}, {}, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        squares = sum(float(p.grad.double().square().sum()) for p in pl_module.parameters() if p.grad is not None)
        self.norms[trainer.global_step + 1] = squares**0.5
        self.lrs[trainer.global_step + 1] = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.logged[trainer.global_step] = {k: float(v) for k, v in trainer.callback_metrics.items()}
        if "attention_mask" in batch:
            self.masks.append(batch["attention_mask"])


@pytest.fixture
def decoder(tmp_path):
    return decoder_folder(tmp_path / "decoder")


def test_norms_rates_and_padding_of_a_run_that_accumulates_and_clips(decoder, tmp_path):
    look = Look()
    module = AdapterModule(str(decoder), LoRA(rank=2), task="causal-lm", targets=["q_proj"], seed=1)
    run = trainer(
        tmp_path,
        [look],
        max_steps=4,
        log_every_n_steps=2,
        accumulate_grad_batches=2,
        gradient_clip_val=1e-5,
        limit_val_batches=0,
    )
    run.fit(module, datamodule=completion_data(decoder))
    for step in (1, 2, 4):
        assert look.logged[step]["grad_norm"] == pytest.approx(look.norms[step], rel=1e-5)
        assert look.logged[step]["lr"] == pytest.approx(look.lrs[step])
    assert look.norms[2] > 1e-5
    assert look.logged[3]["lr"] == look.logged[2]["lr"]  # between logs nothing is measured
    read = torch.cat([mask.flatten() for mask in look.masks[4:8]])
    assert look.logged[4]["padding"] == pytest.approx(1 - float(read.float().mean()))
    assert look.logged[4]["tokens_per_second"] > 0
    assert "tokens_per_second" not in look.logged[1]


def test_time_that_is_no_training_does_not_count(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("lora_lightning.callbacks.meters.time.monotonic", lambda: now[0])

    class Slow(Callback):
        phase = 6

        def on_train_batch_end(self, *_):
            now[0] += 2.0

        def on_validation_batch_end(self, *_):
            now[0] += 50.0

    class Validated(Plain):
        def validation_step(self, batch):
            pass

        def val_dataloader(self):
            return loader()

    meters, look = Meters(), Look()
    adapters = InjectAdapters(LoRA(rank=2), ["used"])
    fit(Validated(), tmp_path, [adapters, Slow(), meters, look], log_every_n_steps=2, val_check_interval=1)
    assert look.logged[4]["examples_per_second"] == pytest.approx(1.0)  # 4 rows in 4 seconds
    assert not {"padding", "tokens_per_second"} & set(look.logged[4])


def test_groups_with_rates_of_their_own(tmp_path):
    class Groups(Plain):
        def configure_optimizers(self):
            trained = [p for p in self.parameters() if p.requires_grad]
            own = [p for p in trained if p.dim() == 1]
            rest = [p for p in trained if p.dim() > 1]
            return torch.optim.SGD([{"params": own, "lr": 0.3, "name": "own"}, {"params": rest, "lr": 0.1}])

    look = Look()
    adapters = InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"])
    fit(Groups(), tmp_path, [adapters, Meters(), look], max_steps=2, log_every_n_steps=1)
    assert {k: v for k, v in look.logged[2].items() if k.startswith("lr")} == pytest.approx({"lr": 0.3, "lr_1": 0.1})


def test_rates_go_by_the_full_ones():
    one, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([{"params": [one]}, {"params": [other]}], lr=0.1)
    assert rates([optimizer]) == {"lr": 0.1}
    for group, full in zip(optimizer.param_groups, (0.1, 0.2), strict=True):
        group.update(initial_lr=full, lr=0.0, name="same")
    assert rates([optimizer]) == {"lr": 0.0, "lr_same": 0.0}
    assert rates([]) == {}
    assert gradient_norm([one, other]) is None
    one.grad, other.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.0, 4.0])
    assert float(gradient_norm([one, other])) == 5.0


ROW = torch.tensor([[5, 6, 7, 8, 0, 0], [5, 6, 0, 0, 0, 0]])
COUNTS = {
    "a mask": ({"input_ids": ROW, "attention_mask": (ROW > 0).long()}, False, (2, 6, 12)),
    "no mask": ({"input_ids": ROW}, False, (2, 12, 12)),
    "packed": (
        {"input_ids": ROW, "position_ids": torch.tensor([[0, 1, 0, 1, 0, 0], [0, 1, 2, 3, 0, 1]])},
        False,
        (2, 10, 12),
    ),
    "a decoder": (
        {"input_ids": ROW, "attention_mask": (ROW > 0).long(), "labels": torch.tensor([[1, 2, -100], [1, -100, -100]])},
        True,
        (2, 9, 18),
    ),
    "images": ({"pixel_values": torch.zeros(3, 2, 4, 4), "labels": torch.zeros(3)}, False, (3, 0, 0)),
    "a tuple": ((torch.zeros(4, 2), torch.zeros(4)), False, (4, 0, 0)),
    "nothing": ({"text": ["a"]}, False, None),
    "something else": (object(), False, None),
}


@pytest.mark.parametrize("case", COUNTS)
def test_tokens_and_places_of_a_batch(case):
    batch, decodes, expected = COUNTS[case]
    found = token_counts(batch, decodes)
    assert (None if found is None else tuple(map(int, found))) == expected


def test_they_stand_in_the_file_of_the_logger_and_change_no_weight(tmp_path):
    folder = encoder_folder(tmp_path / "encoder")
    states = []
    labelled_data(folder)  # which writes the file, drawing random numbers
    for on in (True, False):
        torch.manual_seed(0)
        module = classification(folder, LoRA(rank=2))
        if not on:
            made = module.configure_callbacks
            module.configure_callbacks = lambda made=made: [c for c in made() if not isinstance(c, Meters)]
        trainer(tmp_path, max_steps=3, limit_val_batches=0, log_every_n_steps=1).fit(
            module, datamodule=labelled_data(folder)
        )
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
