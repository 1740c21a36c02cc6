"""A training run hands its method calibration batches once; a resumed one reads the plan in its checkpoint."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from lightning.pytorch import seed_everything
from miniatures import installed
from miniatures.starts import EVA
from resuming import SaveAt, assert_equal_runs, at_step, run
from toy_runs import classification, encoder_folder, labelled_data, trainer

from ll_lora import LoRA
from lora_lightning.errors import DataError, ResumeError, SettingsError
from lora_lightning.injection.probe import Probe
from lora_lightning.injection.records import records
from lora_lightning.models.loading import load_without_values
from lora_lightning.training.calibration import calibration, planned
from lora_lightning.training.trainer_checkpoints import AtomicCheckpoints


@pytest.fixture(autouse=True, scope="module")
def _installed():
    with installed(EVA):
        yield


@pytest.fixture
def asked(monkeypatch):
    """How often a probe has walked through its batches, by what was asked."""
    count = Counter()
    ask = Probe.covariances

    def counting(self, paths=None):
        count["covariances"] += 1
        return ask(self, paths)

    monkeypatch.setattr(Probe, "covariances", counting)
    return count


@pytest.fixture
def folder(tmp_path):
    return encoder_folder(tmp_path / "model")


def module(folder):
    targets = ["query", "intermediate.dense", "output.dense"]
    return classification(folder, EVA(rank=2, rho=2.0), dtype="float64", targets=targets)


def resumed(module, data, folder, checkpoint, hidden=False):
    seed_everything(3, verbose=False)
    fit = trainer(folder, [], plugins=[AtomicCheckpoints()])
    if not hidden:
        fit.ckpt_path = checkpoint
    fit.fit(module, datamodule=data, ckpt_path=checkpoint if hidden else None, weights_only=True)
    return fit


def test_resuming_asks_nothing_again_and_goes_on_bit_for_bit(folder, tmp_path, asked):
    saved = tmp_path / "saved.ckpt"
    whole = module(folder)
    one = run(whole, labelled_data(folder), tmp_path / "one", [SaveAt(saved, at_step(5))])
    assert asked["covariances"] == 2  # the plan, and the start
    plan = records(whole.model)["default"].plan
    assert len({fields["rank"] for fields in plan.values()}) > 1
    assert sum(fields["rank"] for fields in plan.values()) == 2 * len(plan)

    second = module(folder)
    fit = resumed(second, labelled_data(folder), tmp_path / "two", saved)
    assert asked["covariances"] == 2
    assert records(second.model)["default"].plan == plan
    two = {
        "state": second.state_dict(),
        "optimizer": fit.optimizers[0].state_dict()["state"],
        "rate": fit.optimizers[0].param_groups[0]["lr"],
        "step": fit.global_step,
        "rng": one["rng"],
        "numpy": one["numpy"],
    }
    assert_equal_runs(one, two)


def test_a_hidden_path_asks_again_and_another_plan_is_an_error(folder, tmp_path, asked, monkeypatch):
    saved = tmp_path / "saved.ckpt"
    run(module(folder), labelled_data(folder), tmp_path / "one", [SaveAt(saved, at_step(5))])
    resumed(module(folder), labelled_data(folder), tmp_path / "two", saved, hidden=True)
    assert asked["covariances"] == 4  # asked again, and the same
    monkeypatch.setattr(EVA, "plan", lambda self, model, targets, probe: {min(targets): {"rank": 1, "alpha": 1.0}})
    with pytest.raises(ResumeError, match=r"another plan of EVA: .*trainer\.ckpt_path is set before fit"):
        resumed(module(folder), labelled_data(folder), tmp_path / "three", saved, hidden=True)


def test_batches_are_the_first_of_a_loader_of_their_own(folder):
    data = labelled_data(folder)
    fit = trainer(folder, [])
    fit.datamodule = data
    data.trainer = fit
    data.setup("fit")
    own = classification(folder, EVA(calibration_batches=3))
    before = torch.get_rng_state()
    probe = calibration(own.method, own.task, fit)
    assert torch.equal(torch.get_rng_state(), before)
    assert probe is not None
    assert len(probe.batches) == 3
    assert probe.device == torch.device("cpu")
    assert calibration(LoRA(), own.task, fit) is None


def test_without_data_the_error_says_so(folder):
    own = classification(folder, EVA(), num_labels=3)
    with pytest.raises(SettingsError, match=r"asks for calibration data, .* probe=Probe\(batches\)"):
        own.configure_model()
    with pytest.raises(DataError, match=r"EVA reads 2 batches of training data .* inject in Python with a Probe"):
        calibration(own.method, own.task, trainer(folder, []))
    assert planned(None) is None


def test_a_model_that_is_only_measured_asks_nothing(folder, asked):
    own = classification(folder, EVA(), num_labels=3)
    own.assemble(load_without_values)
    assert not asked
    assert records(own.model)["default"].plan == {}


class Once(torch.utils.data.IterableDataset):
    """Rows that are gone once they have been read."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda rows: iter(rows), r"EVA reads batches .* LabelledText has them only once: .* an iterator \(list_iter"),
        (lambda rows: torch.utils.data.DataLoader(Once(rows)), r"only once: Once.__iter__ gives the same iterator"),
        (lambda rows: {"a": rows}, r"train_dataloader\(\) gives a dict of loaders. Return one loader, or inject in"),
    ],
)
def test_data_that_cannot_be_asked_twice_are_refused(folder, monkeypatch, loader, message):
    data = labelled_data(folder)
    fit = trainer(folder, [])
    fit.datamodule = data
    own = classification(folder, EVA(), num_labels=3)
    rows = [torch.zeros(1)]
    monkeypatch.setattr(data, "train_dataloader", lambda: loader(rows))
    with pytest.raises(DataError, match=message):
        calibration(own.method, own.task, fit)


def test_rows_that_begin_anew_are_read_for_calibration(folder, monkeypatch):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from range(5)

    data, own = labelled_data(folder), classification(folder, EVA(), num_labels=3)
    fit = trainer(folder, [])
    fit.datamodule = data
    stream = torch.utils.data.DataLoader(Stream())
    monkeypatch.setattr(data, "train_dataloader", lambda: stream)
    assert [int(batch) for batch in calibration(own.method, own.task, fit).batches] == [0, 1]
    assert [int(batch) for batch in stream] == [0, 1, 2, 3, 4]
