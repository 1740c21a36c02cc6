"""Loggers by short names: with the real packages where they are installed, else with modules that stand for them."""

from __future__ import annotations

import csv
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lora_lightning.cli import loggers
from lora_lightning.cli.main import main
from lora_lightning.cli.preflight.config import check_config
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


@pytest.mark.slow
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


NEEDED = [
    ("wandb", "wandb"),
    ("mlflow", "mlflow"),
    ("comet", "comet-ml"),
    ("WandbLogger", "wandb"),
    ("lightning.pytorch.loggers.MLFlowLogger", "mlflow"),
    ("lightning.pytorch.loggers.comet.CometLogger", "comet-ml"),
]


def said_of(name, package):
    shown = name.rpartition(".")[2]
    return (
        f'trainer.logger is "{shown}", which needs the package {package}, and it is not installed: pip install '
        f"{package}"
    )


@pytest.mark.parametrize(("name", "package"), NEEDED)
def test_a_package_that_is_missing(config, monkeypatch, capsys, name, package):
    monkeypatch.setattr(loggers, "_installed", lambda package: False)
    monkeypatch.setattr(  # nothing of the model is touched before
        "lora_lightning.cli.lightning.resolve", lambda *_: pytest.fail("the model was looked up first")
    )
    config([name, "tensorboard"])
    assert main(["fit", "--config", "tiny.yaml"]) == 2
    assert f"error: {said_of(name, package)}\n" in capsys.readouterr().err
    assert not Path("runs").exists()
    if "Logger" not in name:
        with pytest.raises(SettingsError, match=f"pip install {package}"):
            getattr(loggers, name)()


def test_doctor_names_every_package_that_is_missing_and_what_else_is_wrong(config, monkeypatch):
    monkeypatch.setattr(loggers, "_installed", lambda package: False)
    config([name for name, _ in NEEDED])
    found = check_config(["--config", "tiny.yaml", "--trainer.devices", "0"]).problems
    assert found[: len(NEEDED)] == [said_of(name, package) for name, package in NEEDED]
    assert any("devices" in text for text in found[len(NEEDED) :])


def test_doctor_says_in_one_line_what_a_logger_refuses(config):
    config({"class_path": "CSVLogger", "init_args": {"save_dir": "x", "flush_logs_every_n_steps": 1}})
    assert check_config(["--config", "tiny.yaml"]).problems == []

    class Refuses(CSVLogger):
        def __init__(self):
            raise ValueError("no room")

    globals()["Refuses"] = Refuses
    Refuses.__qualname__ = "Refuses"
    config(f"{__name__}.Refuses")
    (problem,) = check_config(["--config", "tiny.yaml"]).problems
    assert problem == "trainer.logger: Refuses: no room"


def test_a_folder_that_has_the_name_of_a_package_is_none(tmp_path, monkeypatch):
    (tmp_path / "comet_ml").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("comet_ml", None)
    assert not loggers._installed("comet_ml")
    assert loggers._installed("csv")


class Given:
    """Keeps the arguments of a logger of Lightning."""

    def __init__(self, **settings):
        self.settings = settings


@pytest.mark.parametrize(
    ("name", "offline", "expected"),
    [
        ("wandb", False, {"save_dir": Path("r/t/001"), "offline": False}),
        ("wandb", True, {"save_dir": Path("r/t/001"), "offline": True}),
        ("comet", False, {"online": True}),
        ("comet", True, {"online": False, "offline_directory": "r/t/001"}),
    ],
)
def test_a_logger_with_projects_is_given_its_place_and_options(monkeypatch, name, offline, expected):
    monkeypatch.setattr(loggers, "_installed", lambda package: True)
    kind = getattr(loggers, name)
    one = kind(offline=offline, options={"prefix": "p"})
    assert set(expected) <= set(inspect.signature(kind.stands_for).parameters) | {"offline_directory"}
    monkeypatch.setattr(kind, "stands_for", Given)
    settings = one.made(Path("r/t/001"), "t/001").settings
    assert settings == {**expected, "project": "lora_lightning", "name": "t/001", "prefix": "p"}
    assert kind(name="mine").made(Path("r"), "t/001").settings["name"] == "mine"


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
