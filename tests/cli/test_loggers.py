"""Loggers by short names: with the real packages where they are installed, else with modules that stand for them."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

from lora_lightning.cli import loggers
from lora_lightning.cli.main import main
from lora_lightning.errors import SettingsError


class Run:
    """What wandb.init gives: keeps what it is given."""

    def __init__(self, **settings):
        self.settings, self.rows, self.config = settings, [], self
        self.name, self.id, self.told = settings["name"], "r1", {}

    def update(self, values, **options):
        self.told.update(values)

    def log(self, values):
        self.rows.append(values)

    def define_metric(self, *names, **options):
        pass


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package wandb that keeps runs in a list."""
    runs: list[Run] = []
    package = tmp_path / "site/wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()

    def init(**settings):
        runs.append(Run(**settings))
        return runs[-1]

    module = ModuleType("wandb")
    module.run, module.init, module.Table = None, init, lambda **given: SimpleNamespace(**given)
    module.__spec__ = SimpleNamespace(name="wandb", origin=str(package / "__init__.py"))
    lib, run = ModuleType("wandb.sdk.lib"), ModuleType("wandb.wandb_run")
    lib.RunDisabled, run.Run = type("RunDisabled", (), {}), Run
    parts = {"wandb": module, "wandb.sdk": ModuleType("wandb.sdk"), "wandb.sdk.lib": lib, "wandb.wandb_run": run}
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, name, part)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    return runs


@pytest.fixture
def config(sound_config, tmp_path, monkeypatch):
    """A function that writes tiny.yaml with a logger."""
    monkeypatch.chdir(tmp_path)

    def write(logger):
        made = sound_config({"trainer.logger": logger, "trainer.log_every_n_steps": 2, "model.linear_baseline": False})
        made["trainer"]["max_steps"] = 4
        made["model"]["method"] = "LoRA"
        Path("tiny.yaml").write_text(yaml.safe_dump(made))

    return write


@pytest.mark.parametrize("logger", ["wandb", {"class_path": "wandb", "init_args": {"project": "mine"}}])
def test_a_run_is_logged_there_and_in_the_run_folder(config, stand_in, logger):
    config(logger)
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    (run,) = stand_in
    assert run.settings["project"] == ("lora_lightning" if logger == "wandb" else "mine")
    assert run.settings["name"] == "tiny/001"
    assert Path(run.settings["dir"]) == Path("runs/tiny/001").absolute()
    assert run.told["rate"] == 1e-2
    logged = {name: row["trainer/global_step"] for row in run.rows for name in row}
    assert {"train_loss", "lr", "grad_norm", "tokens_per_second", "padding"} <= set(logged)
    with Path("runs/tiny/001/metrics.csv").open() as file:
        assert {"lr", "grad_norm", "tokens_per_second", "padding"} <= set(next(csv.reader(file)))
    assert main(["validate", "--run", "runs/tiny/001"]) == 0
    assert len(stand_in) == 1


@pytest.mark.slow
def test_a_list_and_flags(config, stand_in):
    config(["wandb", "tensorboard", "csv"])
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    assert len(stand_in) == 1
    names = {path.name.partition(".")[0] for path in Path("runs/tiny/001").iterdir()}
    assert {"events", "metrics"} <= names
    config(None)
    assert main(["fit", "--config", "tiny.yaml", "--trainer.logger", "wandb", "--trainer.logger.name", "x"]) == 0
    assert stand_in[1].settings["name"] == "x"


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("comet", "comet-ml")])
def test_a_package_that_is_missing(config, monkeypatch, capsys, name, package):
    monkeypatch.setattr(loggers, "_installed", lambda package: False)
    config([name, "tensorboard"])
    assert main(["fit", "--config", "tiny.yaml"]) == 2
    said = f'"{name}", which needs the package {package}, and it is not installed: pip install {package}'
    assert f"error: trainer.logger is {said}\n" in capsys.readouterr().err
    assert not Path("runs").exists()
    with pytest.raises(SettingsError, match=f"pip install {package}"):
        getattr(loggers, name)()


def test_a_folder_that_has_the_name_of_a_package_is_none(tmp_path, monkeypatch):
    (tmp_path / "comet_ml").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("comet_ml", None)
    assert not loggers._installed("comet_ml")
    assert loggers._installed("csv")


def test_what_a_setting_means(tmp_path):
    assert loggers.made(False, tmp_path) == []
    assert [type(one) for one in loggers.made(None, tmp_path)] == [TensorBoardLogger]
    own = TensorBoardLogger(tmp_path)
    assert loggers.made([own, loggers.csv()], tmp_path) == [own]


@pytest.mark.filterwarnings("ignore")  # of the packages that mlflow brings
def test_mlflow_keeps_a_run_in_its_database(config):
    """The real package, without a server."""
    mlflow = pytest.importorskip("mlflow")
    config(["mlflow"])
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    mlflow.set_tracking_uri(f"sqlite:///{Path('runs/tiny/001/mlflow.db').absolute()}")
    (found,) = mlflow.search_runs(experiment_names=["lora_lightning"]).to_dict("records")
    assert found["tags.mlflow.runName"] == "tiny/001"
    assert found["metrics.grad_norm"] > 0


def test_wandb_keeps_a_run_in_the_folder(config, monkeypatch):
    """The real package, offline."""
    pytest.importorskip("wandb")
    config([{"class_path": "wandb", "init_args": {"offline": True}}])
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    assert list(Path("runs/tiny/001/wandb").glob("offline-run-*/run-*.wandb"))
