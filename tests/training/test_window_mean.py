"""The training loss that is logged: the mean of everything since the last time, however it was cut into batches."""

from __future__ import annotations

import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from resuming import SaveAt, run
from toy_runs import classification, completion_data, decoder_folder, encoder_folder, labelled_data

from ll_lora import LoRA
from lora_lightning.callbacks.resume import ExactResume
from lora_lightning.models.tasks.base import Loss
from lora_lightning.training.module import AdapterModule
from lora_lightning.training.window_mean import WindowMean, WindowMeans


def loss(total: float, count: int) -> Loss:
    return Loss(torch.tensor(total), torch.tensor(count))


def same(values: torch.Tensor) -> torch.Tensor:
    return values


def test_tokens_count_once_whatever_batch_they_are_in():
    window = WindowMean()
    window.add(loss(6.0, 2))
    assert float(window.mean(same)) == 3.0
    window.add(loss(2.0, 6))
    assert float(window.mean(same)) == 1.0
    assert float(window.mean(lambda sums: sums * torch.tensor([3.0, 1.0]))) == 3.0  # two others have 16 of nothing more
    window.close()
    assert float(window.mean(same)) == 1.0
    assert window.state() == [0.0, 0.0]
    window.add(loss(5.0, 1))
    assert float(window.mean(same)) == 5.0


def test_a_window_of_nothing_but_padding_is_zero():
    window = WindowMean()
    window.add(loss(0.0, 0))
    assert float(window.mean(same)) == 0.0


@pytest.mark.parametrize("processes", [2, 3])
def test_open_windows_go_on_on_as_many_processes_or_others(processes):
    windows = [WindowMean() for _ in range(processes)]
    for rank, window in enumerate(windows):
        window.load([[1.0, 1.0], [2.0, 3.0]], rank, processes)
        assert window.state() == ([[1.0, 1.0], [2.0, 3.0]] if processes == 2 else [[3.0, 4.0], [0, 0], [0, 0]])[rank]
        window.add(loss(1.0, 1))
    assert sum(window.state()[0] for window in windows) == 3.0 + processes
    assert sum(window.state()[1] for window in windows) == 4.0 + processes


def logged(folder) -> dict[int, float]:
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["train_loss"]) for row in csv.DictReader(file) if row.get("train_loss")}


class Sums:
    """Every training loss that a task gives, in order."""

    def __init__(self, task, monkeypatch) -> None:
        self.all: list[tuple[float, float]] = []
        inner = type(task).loss_of

        def keep(task, model, batch):
            found = inner(task, model, batch)
            if torch.is_grad_enabled():
                self.all.append((float(found.total.detach().double()), float(found.count)))
            return found

        monkeypatch.setattr(type(task), "loss_of", keep)

    def mean(self, start: int, end: int) -> float:
        totals, counts = zip(*self.all[start:end], strict=True)
        return sum(totals) / sum(counts)


@pytest.fixture
def decoder(tmp_path):
    return decoder_folder(tmp_path / "model")


def language(folder, **options):
    return AdapterModule(str(folder), LoRA(rank=2), task="causal-lm", targets=["q_proj"], seed=1, **options)


def fit(module, data, folder, callbacks=(), checkpoint=None, **options):
    settings = {"logger": CSVLogger(folder, "", ""), "log_every_n_steps": 3, "max_epochs": 3, "max_steps": 9, **options}
    run(module, data, folder, callbacks, checkpoint, limit_val_batches=0, **settings)
    return logged(folder)


def test_loggers_get_the_mean_over_the_tokens_of_the_window(decoder, tmp_path, monkeypatch):
    module = language(decoder)
    sums = Sums(module.task, monkeypatch)
    found = fit(module, completion_data(decoder), tmp_path / "run")
    assert found == {step: pytest.approx(sums.mean(step - 2, step + 1), rel=1e-6) for step in (2, 5, 8)}
    assert len({count for _, count in sums.all}) > 1  # batches of unequal numbers of tokens


@pytest.mark.parametrize("kind", ["tokens", "classes"])
def test_it_is_the_same_under_accumulation(decoder, tmp_path, kind):
    found = []
    for batch, windows in ((4, 1), (2, 2), (1, 4)):
        if kind == "tokens":
            module, data = language(decoder), completion_data(decoder, batch_size=batch, group_by_length=False)
        else:
            folder = encoder_folder(tmp_path / "encoder", dropout=0.0)
            module = classification(folder, LoRA(rank=2))
            data = labelled_data(folder, batch_size=batch, group_by_length=False)
        found.append(fit(module, data, tmp_path / str(batch), accumulate_grad_batches=windows))
    assert list(found[0]) == [2, 5, 8]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("batches", [3, 7, 9, 12])
def test_a_resumed_run_logs_what_an_uninterrupted_one_does(decoder, tmp_path, batches):
    """Stopped within a window of accumulation, within one of logging, and at its end."""
    data = completion_data(decoder, batch_size=2)
    options = {"accumulate_grad_batches": 2}
    whole = fit(language(decoder), data, tmp_path / "whole", **options)
    place = tmp_path / "last.ckpt"

    def at(trainer, batch_idx):
        return trainer.fit_loop.total_batch_idx + 1 == batches

    fit(language(decoder), data, tmp_path / "first", [SaveAt(place, at), ExactResume()], **options)
    resumed = fit(language(decoder), data, tmp_path / "second", checkpoint=place, **options)
    assert resumed == {step: value for step, value in whole.items() if step >= batches // 2}
    assert resumed


def test_a_checkpoint_of_an_older_version_begins_a_window(decoder, tmp_path):
    data = completion_data(decoder)
    place = tmp_path / "last.ckpt"
    fit(language(decoder), data, tmp_path / "first", [SaveAt(place, lambda trainer, _: trainer.global_step == 4)])
    checkpoint = torch.load(place, weights_only=True)
    del checkpoint["lora_lightning_loss"]
    torch.save(checkpoint, place)
    assert list(fit(language(decoder), data, tmp_path / "second", checkpoint=place)) == [5, 8]


def test_the_bar_and_the_printed_line_have_the_logged_number(decoder, tmp_path, capsys):
    from lora_lightning.training.run_report import RunReport

    module = language(decoder)
    found = fit(module, completion_data(decoder), tmp_path / "run", [RunReport(tmp_path / "run")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "of 9: train_loss" in line]
    for step, value in found.items():
        assert any(line.startswith(f"step {step + 1} of 9: train_loss {value:.4g}") for line in lines)
    assert module.trainer.progress_bar_metrics["train_loss"] == pytest.approx(found[8])


def test_nothing_is_logged_where_the_trainer_logs_nothing(decoder, tmp_path):
    data = completion_data(decoder)
    module = language(decoder)
    run(module, data, tmp_path, limit_val_batches=0, max_steps=2, log_every_n_steps=0)
    assert float(module.trainer.callback_metrics["train_loss"]) > 0


def test_numbers_beside_the_loss_count_by_what_it_counts_and_a_penalty_once():
    windows = WindowMeans()
    for value, count, penalty in ((1.0, 1, 2.0), (0.5, 3, 4.0)):
        beside = {"margin": torch.tensor(value)}
        windows.add(Loss(torch.tensor(6.0), torch.tensor(count), beside), torch.tensor(penalty))
    assert {name: float(mean) for name, mean in windows.means(same).items()} == {
        "train_loss": 3.0,
        "train_margin": (1.0 + 3 * 0.5) / 4,
        "penalty": 3.0,
    }
    other = WindowMeans()
    other.load([windows.state()], 0, 1)
    assert other.state() == windows.state()
    older = WindowMeans()
    older.load([[12.0, 4.0]], 0, 1)
    assert older.state() == {"train_loss": [12.0, 4.0]}


@pytest.mark.parametrize("stopped", [0, 7])
def test_a_penalty_is_logged_as_the_mean_of_its_window(decoder, tmp_path, monkeypatch, stopped):
    """In a run that was stopped within a window, too."""
    batches = iter(range(100))
    monkeypatch.setattr(LoRA, "penalty", lambda self, adapters: torch.tensor(float(next(batches))))
    data, options = completion_data(decoder, batch_size=2), {"accumulate_grad_batches": 2}
    place = tmp_path / "last.ckpt"
    if stopped:
        at = SaveAt(place, lambda trainer, batch_idx: trainer.fit_loop.total_batch_idx + 1 == stopped)
        fit(language(decoder), data, tmp_path / "first", [at, ExactResume()], **options)
        batches = iter(range(stopped, 100))
    fit(language(decoder), data, tmp_path / "run", checkpoint=place if stopped else None, **options)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        found = {int(row["step"]): float(row["penalty"]) for row in csv.DictReader(file) if row.get("penalty")}
    wanted = {2: 2.5, 5: 8.5, 8: 14.5}
    assert found == {step: value for step, value in wanted.items() if step >= stopped // 2}
