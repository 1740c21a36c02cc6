"""Forgetting: what is measured of sets before, during and after training, and that training does not notice."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from resuming import SaveAt, at_step, run
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError
from toy_comparison import words
from toy_runs import classification, encoder_folder, labelled_data, trainer

from ll_dora import DoRA
from ll_lora import LoRA
from lora_lightning.callbacks import ExactResume, Forgetting, InjectAdapters, KeepBest
from lora_lightning.callbacks.forgetting import FILENAME, read_course
from lora_lightning.cli.main import main
from lora_lightning.errors import DataError, ResumeError, SettingsError


def rows(seed, count=10):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.randn(count, 2, generator=generator))


def loader(seed, count=10):
    return DataLoader(rows(seed, count), batch_size=4)  # the last batch is smaller


class Project(LightningModule):
    """Somebody's module: knows nothing of adapters, and measures with all that Lightning offers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 2))
        self.squares = MeanSquaredError()
        self.seen = []

    def training_step(self, batch, _):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def validation_step(self, batch, _):
        x, y = batch
        out = self.net(x)
        self.squares.update(out, y)
        self.log("val_squares", self.squares)
        self.log_dict({"val_abs": (out - y).abs().mean()})
        self.seen.append(float((out - y).abs().max()))
        return (out - y).square().mean()

    def on_validation_epoch_end(self):
        self.log("val_worst", max(self.seen))
        self.seen.clear()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def reference(module, seed, count=10):
    """The four values over all rows at once."""
    x, y = (part.double() for part in rows(seed, count).tensors)
    with torch.no_grad():
        off = module.eval().double().net(x) - y
    module.float()
    squares = float(off.square().mean())
    worst = float(off.abs().max())
    return {"loss": squares, "val_squares": squares, "val_abs": float(off.abs().mean()), "val_worst": worst}


def fit(folder, callbacks, steps=6, module=None, **options):
    every = {"val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 1.0}
    fitted, module = trainer(folder, callbacks, max_steps=steps, **every), module or Project()
    fitted.fit(module, loader(1, 12), loader(2), **options)
    return fitted, module


def test_a_foreign_project_fully_trained(tmp_path):
    """Sets are measured over all rows, whatever the batches, with the weights of the moment."""
    sources = {"old": loader(3), "older": loader(4, 7)}
    start, (_, module) = Project(), fit(tmp_path, [Forgetting(sources)])
    course = read_course(tmp_path / FILENAME)
    assert (course.label, course.sources, course.target) == ("full fine-tuning", ("old", "older"), "target")
    assert [(one.step, one.when) for one in course.records] == [
        (0, "before"), (2, "during"), (4, "during"), (6, "during"), (6, "after"),
    ]  # fmt: skip
    for when, net in ((0, start), (-1, module)):
        for name, given in {"old": (3,), "older": (4, 7), "target": (2,)}.items():
            expected = reference(net, *given)
            assert course.records[when].sets[name] == pytest.approx(expected, rel=1e-5)
    assert course.changes("old", "loss")[-1][1] == pytest.approx(
        reference(module, 3)["loss"] - reference(start, 3)["loss"], rel=1e-4
    )
    assert course.metrics() == ["loss", "val_abs", "val_worst", "val_squares"]


@pytest.mark.parametrize("options", [{}, {"every_n_steps": 1}])
def test_training_does_not_notice(tmp_path, options):
    """Bit for bit the same weights with dropout, and the same validation values, as without the callback."""
    plain, measured = fit(tmp_path / "a", []), fit(tmp_path / "b", [Forgetting(loader(3), **options)])
    for mine, theirs in zip(measured[1].parameters(), plain[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert measured[0].callback_metrics == plain[0].callback_metrics
    assert not measured[1].seen


def test_before_training_an_adapted_model_is_its_base(tmp_path):
    callbacks = [InjectAdapters(LoRA(rank=2), ["net.0", "net.3"], seed=0), Forgetting(loader(3))]
    fit(tmp_path, callbacks)
    course = read_course(tmp_path / FILENAME)
    assert course.label == "LoRA"
    assert course.records[0].sets["source"] == pytest.approx(reference(Project(), 3), rel=1e-5)
    assert course.changes("source", "loss")[-1][1] != 0


def test_our_own_module_has_all_metrics_of_its_task(tmp_path):
    """After training it is the state that KeepBest has put back which is measured: the worst one, by the metric."""
    folder = encoder_folder(tmp_path / "model")
    module, data = classification(folder, DoRA(rank=2)), labelled_data(folder)
    callbacks = [Forgetting(data), KeepBest("val_loss", "max")]
    every = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    fitted = trainer(tmp_path, callbacks, max_steps=4, **every)
    fitted.fit(module, data)
    course = read_course(tmp_path / FILENAME)
    assert set(course.metrics()) >= {"accuracy", "f1", "loss"}
    validations = {one.step: one.sets["target"]["loss"] for one in course.records if one.when == "during"}
    assert course.records[-1].sets["target"]["loss"] == pytest.approx(max(validations.values()))
    assert validations[4] == pytest.approx(float(fitted.callback_metrics["val_loss"]), rel=1e-6)


@pytest.mark.slow
def test_a_config_names_a_datamodule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = words(tmp_path, steps=2)
    old = {"train": str(tmp_path / "train.csv"), "validation": str(tmp_path / "validation.csv"), "tokenizer": given[1]}
    source = {"class_path": "LabelledText", "init_args": old}
    callback = {"class_path": "Forgetting", "init_args": {"source": source}}
    (tmp_path / "watch.yaml").write_text(json.dumps({"trainer": {"callbacks": [callback]}}))
    assert main(["fit", "--config", "watch.yaml", *given, "--model.linear_baseline", "false"]) == 0
    course = read_course(tmp_path / "runs" / "watch" / "001" / FILENAME)
    last = course.records[-1].sets
    assert last["source"] == pytest.approx(last["target"])


def test_loggers_get_values_and_changes(tmp_path):
    logged = []

    class Logger:
        def log_metrics(self, values, step):
            logged.append((step, values))

    callback = Forgetting(loader(3), target=None)
    callback._records = [{"step": 0, "sets": {"source": {"loss": 2.0}}}, {"step": 5, "sets": {"source": {"loss": 3.0}}}]

    class Run:
        loggers = (Logger(),)

    callback._log(Run(), 5)
    assert logged == [(5, {"source/loss": 3.0, "source/loss_change": 1.0})]


def test_a_resumed_run_keeps_what_was_before_training(tmp_path):
    """Resumed in the middle, the file is the one of a run without a stop."""

    folder, saved = encoder_folder(tmp_path / "model"), tmp_path / "part.ckpt"

    def forgetting(**options):
        return Forgetting(labelled_data(folder), target=None, every_n_steps=1, **options)

    def take(name, *callbacks, checkpoint=None):
        module, data = classification(folder, LoRA(rank=2)), labelled_data(folder)
        run(module, data, tmp_path / name, [*callbacks, ExactResume()], checkpoint, max_steps=4)

    take("whole", forgetting(), SaveAt(saved, at_step(2)))
    take("resumed", forgetting(), checkpoint=saved)
    whole, resumed = (json.loads((tmp_path / name / FILENAME).read_text()) for name in ("whole", "resumed"))
    assert [one["step"] for one in whole["records"]] == [0, 1, 2, 3, 4, 4]
    assert resumed == whole
    with pytest.raises(ResumeError, match=r"goes on from step 2, and its checkpoint does not say what was measured"):
        take("late", forgetting(), forgetting(filename="other.json"), checkpoint=saved)


def test_a_function_and_a_module_of_its_own_say_what_is_measured(tmp_path):
    class Own(Project):
        def measure_batches(self, batches):
            return {"rows": sum(len(x) for x, _ in batches)}

    class Data(LightningDataModule):
        def val_dataloader(self):
            return loader(3, 9)

    fit(tmp_path / "own", [Forgetting(Data())], module=Own())
    assert read_course(tmp_path / "own" / FILENAME).values("source", "rows")[0] == (0, 9.0)
    given = Forgetting(loader(3), measure=lambda module, batches: {"batches": len(list(batches))})
    fit(tmp_path / "given", [given])
    assert read_course(tmp_path / "given" / FILENAME).values("source", "batches")[-1] == (6, 3.0)


class WithoutValidation(Project):
    validation_step = LightningModule.validation_step


class Mute(Project):
    def validation_step(self, batch, _):
        self.seen.append(0.0)

    def on_validation_epoch_end(self):
        self.seen.clear()


def test_a_module_that_says_nothing_is_an_error(tmp_path):
    with pytest.raises(SettingsError, match="WithoutValidation has no validation_step, so nothing says"):
        trainer(tmp_path, [Forgetting(loader(3), target=None)], max_steps=2).fit(WithoutValidation(), loader(1))
    with pytest.raises(SettingsError, match=r"Mute.validation_step neither logs nor returns a number"):
        fit(tmp_path, [Forgetting(loader(3), target=None)], module=Mute())


def test_sets_that_cannot_be_measured(tmp_path):
    with pytest.raises(SettingsError, match=r'target is "validation", and the run has no validation data'):
        trainer(tmp_path, [Forgetting(loader(3))], max_steps=2).fit(WithoutValidation(), loader(1))
    with pytest.raises(DataError, match="the set source has no batches"):
        fit(tmp_path, [Forgetting([], target=None)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": {}}, "name at least one set that may be forgotten"),
        ({"source": {"target": []}}, '"target" is the name of what is learned'),
        ({"source": "pydocs"}, "the set source is 'pydocs'; it must be a datamodule or a loader"),
        ({"source": LightningDataModule()}, "the set source is a datamodule without data"),
        ({"source": iter([1])}, "the set source is .* read again"),
        ({"source": [], "target": 3}, "the set target is 3; it must be"),
        ({"source": [], "every_n_steps": 0}, "Forgetting.every_n_steps is 0; it must be at least 1"),
    ],
)
def test_settings_outside_their_rules(options, message):
    with pytest.raises(SettingsError, match=message):
        Forgetting(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist; Forgetting writes forgetting.json"),
        ("{", "cannot be read"),
        ("{}", 'was not written by Forgetting: it lacks "format"'),
        ('{"format": "lora_lightning forgetting 1"}', "is damaged: KeyError 'records'"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, message):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_course(tmp_path / "a.json")
