"""Five public kinds of Lightning project with two lines more: they train, read their own files, and resume exactly.

The two lines put `InjectAdapters` into the callbacks; under Fabric they inject, and build the optimizer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric import Fabric
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toy_runs import trainer

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.callbacks import InjectAdapters
from lora_lightning.errors import TrainingError
from lora_lightning.optim.groups import build_optimizer

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
ROWS = TensorDataset(X, (X[:, 0] > 0).long())
STEPS, AT = 15, 8


def rows() -> DataLoader[Any]:
    return DataLoader(ROWS, batch_size=3)


def adapters(**options: Any) -> InjectAdapters:
    return InjectAdapters(LoRA(rank=2), **{"targets": ["backbone.0"], "also_train": ["head"], "seed": 1, **options})


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def assert_trained(module: nn.Module, base: dict[str, Tensor]) -> None:
    """Adapters have moved, and what lies under them has not."""
    found = dict(ll.iter_adapters(module))
    assert found
    for path, layer in found.items():
        assert torch.equal(layer.base.weight, base[f"{path}.weight"])
        assert bool(layer.adapter("default").lora_B.any())


def fit(make: Callable[[], LightningModule], folder: Path, parts: Callable[[], list[Callback]], steps: int = 1) -> Any:
    """A run straight to the end, and one from its checkpoint on, which must end alike; the module and the file.

    Args:
        make: the module.
        folder: where checkpoints go.
        parts: the callbacks, but for the one that saves.
        steps: optimizer steps a batch.
    """
    kept = folder / f"step={AT * steps}.ckpt"

    def run(ckpt_path: Path | None = None) -> LightningModule:
        keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=AT * steps, save_top_k=-1)
        module = make()
        done = trainer(folder, [*parts(), keep], max_steps=STEPS * steps, enable_checkpointing=True)
        done.fit(module, rows(), ckpt_path=ckpt_path, weights_only=True)
        return module

    module = run()
    assert_equal(state(run(kept)), state(module))
    return module, torch.load(kept, weights_only=True)


class Classifier(LightningModule):
    """Backbone and head."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def test_step(self, batch: list[Tensor]) -> None:
        self.log("test_loss", self.training_step(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


# -- 1: a classifier by LightningCLI -----------------------------------------------------------------------------------


class FewRows(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return rows()


TWO_LINES = """
trainer:
  callbacks:
    - class_path: lora_lightning.InjectAdapters
      init_args: {method: ll_lora.LoRA, targets: [backbone.0], also_train: [head]}
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's use of jsonargparse
def test_a_classifier_by_lightning_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["project"])
    config = yaml.safe_load(TWO_LINES)
    config["trainer"] |= {"max_steps": STEPS, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    config["trainer"] |= {"default_root_dir": str(tmp_path), "enable_model_summary": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["--config", str(tmp_path / "config.yaml")]
    cli = LightningCLI(Classifier, FewRows, run=False, save_config_callback=None, args=words, seed_everything_default=3)
    base = state(cli.model)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert_trained(cli.model, base)
    cli.trainer.save_checkpoint(tmp_path / "own.ckpt")
    plain = Classifier.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    assert torch.equal(plain.head.weight, cli.model.head.weight)
    assert torch.equal(plain.backbone[0].weight, base["backbone.0.weight"])


def test_its_runs_resume_exactly(tmp_path: Path) -> None:
    base = state(Classifier())
    module, saved = fit(Classifier, tmp_path, lambda: [adapters()])
    assert_trained(module, base)
    assert saved["state_dict"].keys() == base.keys()


# -- 2: a fine-tuning callback -----------------------------------------------------------------------------------------


def test_a_fine_tuning_callback_is_refused_before_the_first_step_and_may_go(
    tmp_path: Path,
) -> None:
    """Adapters take the place of thawing; nothing may depend on which of both is listed first."""
    tuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    run = trainer(tmp_path / "both", [adapters(), tuning], max_steps=STEPS)
    with pytest.raises(TrainingError, match=r"was frozen after it had been injected .* BackboneFinetuning freezes and"):
        run.fit(Classifier(), rows())
    assert run.global_step == 0
    module, _ = fit(Classifier, tmp_path / "without", lambda: [adapters()])
    assert_trained(module, state(Classifier()))


# -- 3: a GAN with manual optimization ---------------------------------------------------------------------------------


class GAN(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: list[Tensor]) -> None:
        of_generator, of_discriminator = self.optimizers()
        score = nn.functional.softplus
        made = self.generator(batch[0].flip(0))
        of_discriminator.zero_grad()
        self.manual_backward((score(-self.discriminator(batch[0])) + score(self.discriminator(made.detach()))).mean())
        of_discriminator.step()
        of_generator.zero_grad()
        self.manual_backward(score(-self.discriminator(made)).mean())
        of_generator.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=0.01) for net in (self.generator, self.discriminator)]


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_a_gan_with_manual_optimization(tmp_path: Path) -> None:
    base = state(GAN())
    parts = functools.partial(adapters, targets=[r"generator.0", "generator.2"], also_train=["discriminator"])
    module, saved = fit(GAN, tmp_path, lambda: [parts()], steps=2)
    assert_trained(module, base)
    assert not torch.equal(module.discriminator[0].weight, base["discriminator.0.weight"])
    plain = GAN()
    plain.load_state_dict(saved["state_dict"])
    assert torch.equal(plain.generator[0].weight, base["generator.0.weight"])


# -- 4: an optimizer given as a partial, as Hydra instantiates it ------------------------------------------------------


class Hydra(Classifier):
    """The template's module: net, optimizer and scheduler come as arguments, and the optimizer holds all parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.make = functools.partial(torch.optim.Adam, lr=0.05, weight_decay=0.0)
        self.schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.9)

    def configure_optimizers(self) -> Any:
        optimizer = self.make(params=self.trainer.model.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer=optimizer)}}


def test_a_partial_optimizer_of_a_hydra_template(tmp_path: Path) -> None:
    base = state(Hydra())
    module, saved = fit(Hydra, tmp_path, lambda: [adapters()])
    assert_trained(module, base)
    plain = Hydra()
    plain.load_state_dict(saved["state_dict"])
    assert torch.equal(plain.backbone[0].weight, base["backbone.0.weight"])


# -- 5: a loop under Fabric --------------------------------------------------------------------------------------------


def test_a_loop_under_fabric(tmp_path: Path) -> None:
    def loop(steps: int, begin: int = 0) -> nn.Module:
        fabric = Fabric(accelerator="cpu", devices=1)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        ll.inject(net, LoRA(rank=2), targets=["0"], also_train=["2"], seed=1)  # the two lines
        optimizer = build_optimizer(net, lambda groups: torch.optim.Adam(groups, lr=0.1))
        model, optimizer = fabric.setup(net, optimizer)
        if begin:
            fabric.load(tmp_path / "state", {"model": model, "optimizer": optimizer}, weights_only=True)
        batches = list(fabric.setup_dataloaders(rows())) * 2
        for step in range(begin, steps):
            x, y = batches[step]
            fabric.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
            if step + 1 == AT and not begin:
                fabric.save(tmp_path / "state", {"model": model, "optimizer": optimizer})
        return net

    net = loop(STEPS)
    assert_equal(state(loop(STEPS, begin=AT)), state(net))
    ll.save_adapter(net, tmp_path / "adapter")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    base = state(plain)
    ll.load_adapter(plain, tmp_path / "adapter")
    assert_trained(plain, base)
    assert torch.equal(plain(X), net(X))
