"""Every callback of Lightning beside adapters: it works, or one line refuses it and says what to use."""

from __future__ import annotations

import lightning.pytorch.callbacks
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from projects import Plain, loader
from toy_runs import classification, encoder_folder, labelled_data, trainer

from ll_lora import LoRA
from lora_lightning.callbacks import InjectAdapters
from lora_lightning.errors import SettingsError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    pytest.mark.filterwarnings(
        "ignore:`.fit.ckpt_path=None.` was called without a model"
    ),  # OnExceptionCheckpoint asks
    pytest.mark.filterwarnings("ignore:.*is set, but there is no last checkpoint"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists"),
]


class Nothing(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        """Nothing."""

    def finetune_function(self, pl_module, epoch, optimizer):
        """Nothing."""


PRUNING = "callbacks: ModelPruning takes weights .*; the callbacks RankPruning and SparsitySchedule prune adapters"
BATCHES = "callbacks: BatchSizeFinder trains the adapters in trial runs .* lora_lightning estimate"
RATES = r"callbacks: LearningRateFinder trains .*; `model\.optimizer\.lr: auto` on the command line runs it apart"
BACKBONE = "callbacks: BackboneFinetuning thaws the module's `backbone`, and .* has none: .*; also_train names"
MASKS = "WeightAveraging.use_buffers is True, and the mean would be taken of masks"
REFUSED = {
    "BackboneFinetuning": (lambda _: BackboneFinetuning(1), BACKBONE),
    "BatchSizeFinder": (lambda _: BatchSizeFinder(max_trials=1), BATCHES),
    "LearningRateFinder": (lambda _: LearningRateFinder(num_training_steps=2), RATES),
    "ModelPruning": (lambda _: ModelPruning("l1_unstructured", amount=0.5), PRUNING),
    "WeightAveraging": (lambda _: WeightAveraging(), MASKS),
}
WORKING = {
    "BaseFinetuning": lambda _: Nothing(),
    "BasePredictionWriter": lambda _: BasePredictionWriter(),
    "Callback": lambda _: lightning.pytorch.callbacks.Callback(),
    "Checkpoint": lambda _: lightning.pytorch.callbacks.Checkpoint(),
    "DeviceStatsMonitor": lambda _: DeviceStatsMonitor(),
    "EMAWeightAveraging": lambda _: EMAWeightAveraging(),
    "EarlyStopping": lambda _: EarlyStopping("loss", check_on_train_epoch_end=True),
    "GradientAccumulationScheduler": lambda _: GradientAccumulationScheduler({0: 1, 1: 2}),
    "LambdaCallback": lambda _: LambdaCallback(on_train_start=lambda trainer, module: None),
    "LearningRateMonitor": lambda _: LearningRateMonitor(),
    "ModelCheckpoint": lambda folder: ModelCheckpoint(folder, every_n_train_steps=2),
    "ModelSummary": lambda _: lightning.pytorch.callbacks.ModelSummary(),
    "OnExceptionCheckpoint": lambda folder: OnExceptionCheckpoint(folder),
    "ProgressBar": lambda _: lightning.pytorch.callbacks.ProgressBar(),
    "RichModelSummary": lambda _: lightning.pytorch.callbacks.RichModelSummary(),
    "RichProgressBar": lambda _: lightning.pytorch.callbacks.RichProgressBar(),
    "SpikeDetection": lambda _: lightning.pytorch.callbacks.SpikeDetection(),
    "StochasticWeightAveraging": lambda _: StochasticWeightAveraging(0.01, swa_epoch_start=1),
    "TQDMProgressBar": lambda _: lightning.pytorch.callbacks.TQDMProgressBar(),
    "ThroughputMonitor": lambda _: ThroughputMonitor(batch_size_fn=len, window_size=2),
    "Timer": lambda _: Timer("00:01:00:00"),
    "WeightAveraging": lambda _: WeightAveraging(use_buffers=False),
}
LOUD = ("BackboneFinetuning",)
"""Those that say by themselves what is wrong where they are asked first."""
NAMES = sorted(lightning.pytorch.callbacks.__all__)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("model"), dropout=0.0)


def options(name, folder):
    return {
        "logger": CSVLogger(folder, "", ""),
        "log_every_n_steps": 1,
        "max_steps": -1,
        "max_epochs": 3,
        "limit_train_batches": 3,
        "limit_val_batches": 0,
        "enable_checkpointing": "heckpoint" in name,
        "enable_progress_bar": name.endswith("Bar"),
        "enable_model_summary": name.endswith("Summary"),
    }


class Logging(Plain):
    batch_size = flops_per_batch = 2

    def train_dataloader(self):
        return loader()

    def training_step(self, batch):
        loss = super().training_step(batch)
        self.log("loss", loss)
        return loss


def test_every_one_is_tried():
    assert REFUSED.keys() | WORKING.keys() == set(NAMES)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_trained(name, tmp_path, encoder):
    make, message = REFUSED[name]
    ours = classification(encoder, LoRA(rank=2))
    with pytest.raises(SettingsError, match=message):
        trainer(tmp_path, [make(tmp_path)], **options(name, tmp_path)).fit(ours, labelled_data(encoder))
    assert ours.net is None
    for first in (True,) if name in LOUD else (True, False):
        inject = InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"])
        both = [inject, make(tmp_path)] if first else [make(tmp_path), inject]
        found = message if first or name != "WeightAveraging" else "stands before InjectAdapters"
        with pytest.raises(SettingsError, match=found):
            trainer(tmp_path, both, **options(name, tmp_path)).fit(Logging())


def test_doctor_is_told(tmp_path, encoder):
    module = classification(encoder, LoRA(rank=2))
    module.trainer = trainer(tmp_path, [ModelPruning("l1_unstructured", amount=0.5)])
    assert any("RankPruning and SparsitySchedule" in str(error) for error in module.refusals())


@pytest.mark.parametrize("name", WORKING)
def test_the_others_leave_base_and_adapters_right(name, tmp_path):
    torch.manual_seed(0)
    module, folder = Logging(), tmp_path / "adapter"
    base = module.used.weight.detach().clone()
    inject = InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"], seed=0, directory=folder)
    run = trainer(tmp_path, [inject, WORKING[name](tmp_path)], **options(name, tmp_path))
    run.fit(module)
    assert run.global_step >= 5
    assert torch.equal(module.used.base.weight, base)
    assert module.used.adapters["default"].lora_B.any()
    assert (folder / "adapter.safetensors").is_file()
