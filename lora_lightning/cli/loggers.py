"""Loggers by short names: `trainer.logger: wandb`, or `[wandb, tensorboard]`, with their files in the run folder.

Each class here stands for a logger of Lightning until the run folder is known. metrics.csv is written beside them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from jsonargparse import Namespace
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lora_lightning.errors import SettingsError

_NEEDS = {
    WandbLogger: ("wandb", "wandb"),
    MLFlowLogger: ("mlflow", "mlflow"),
    CometLogger: ("comet_ml", "comet-ml"),
}
"""What Lightning's loggers import, and the name under which pip knows it."""


def _installed(package: str) -> bool:
    """Whether a package can be imported; a folder that only has its name, as W&B leaves in a project, is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def problems(given: Any) -> list[str]:
    """One line for each logger of parsed settings whose package is missing.

    Args:
        given: `trainer.logger`: one or several classes with settings, or what needs no package.
    """
    found = []
    for one in given if isinstance(given, list) else [given]:
        if isinstance(one, Namespace) and isinstance(class_path := one.get("class_path"), str):
            module, _, name = class_path.rpartition(".")
            found.append(_missing(getattr(importlib.import_module(module), name, object)))
    return list(dict.fromkeys(text for text in found if text))


def _missing(kind: type) -> str:
    """What is to be said where a logger's class lacks its package; empty where it does not."""
    made_of = kind.stands_for if issubclass(kind, NamedLogger) else kind
    for logger, (package, install) in _NEEDS.items():
        if made_of is not None and issubclass(made_of, logger) and not _installed(package):
            return (
                f'trainer.logger is "{kind.__name__}", which needs the package {install}, and it is not installed: '
                f"pip install {install}"
            )
    return ""


class NamedLogger(Logger):
    """A logger that is made once there is a run folder.

    Class facts:
        stands_for: the class of Lightning that is made.

    Raises:
        SettingsError: its package is missing.
    """

    stands_for: ClassVar[type[Logger] | None] = None

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings
        if text := _missing(type(self)):
            raise SettingsError(text)

    @abstractmethod
    def made(self, folder: Path, run: str) -> Logger | None:
        """The logger.

        Args:
            folder: the run folder.
            run: what to call the run.
        """

    @property
    def name(self) -> str:
        """The short name."""
        return type(self).__name__

    @property
    def version(self) -> str:
        """None yet."""
        return ""

    def log_hyperparams(self, *args: Any, **settings: Any) -> None:
        """Nothing: it is no logger yet."""

    def log_metrics(self, *args: Any, **settings: Any) -> None:
        """Nothing: it is no logger yet."""


class csv(NamedLogger):  # noqa: N801 - a word of configs
    """metrics.csv of the run folder, which is always written."""

    def __init__(self) -> None:
        super().__init__()

    def made(self, folder: Path, run: str) -> Logger | None:  # noqa: ARG002 - the signature of all
        """None: it is there."""
        return None


class tensorboard(NamedLogger):  # noqa: N801
    """TensorBoard, in the run folder."""

    def __init__(self) -> None:
        super().__init__()

    def made(self, folder: Path, run: str) -> Logger | None:  # noqa: ARG002
        """The logger."""
        return TensorBoardLogger(folder, "", "")


class ProjectLogger(NamedLogger):
    """A logger of a service that keeps runs in projects, and can write into the run folder in its place.

    Args:
        project: the project there.
        name: what to call the run; null takes its folder's name.
        offline: write into the run folder alone; `wandb sync` or `comet upload` sends it later.
        options: further arguments of Lightning's logger, such as `{entity: us, tags: [a]}` for W&B.
    """

    def __init__(
        self,
        project: str = "lora_lightning",
        name: str | None = None,
        offline: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(project=project, name=name, **(options or {}))
        self.offline = offline

    def made(self, folder: Path, run: str) -> Logger | None:
        """The logger."""
        assert self.stands_for is not None
        return self.stands_for(**{**self.place(folder), **self.settings, "name": self.settings["name"] or run})

    @abstractmethod
    def place(self, folder: Path) -> dict[str, Any]:
        """Arguments that say where the run is written."""


class wandb(ProjectLogger):  # noqa: N801
    """Weights & Biases."""

    stands_for = WandbLogger

    def place(self, folder: Path) -> dict[str, Any]:
        """Its files lie in the run folder, online too."""
        return {"save_dir": folder, "offline": self.offline}


class comet(ProjectLogger):  # noqa: N801
    """Comet."""

    stands_for = CometLogger

    def place(self, folder: Path) -> dict[str, Any]:
        """Online, nothing is written here."""
        return {"online": False, "offline_directory": str(folder)} if self.offline else {"online": True}


class mlflow(NamedLogger):  # noqa: N801
    """MLflow.

    Args:
        experiment: the experiment there.
        name: what to call the run; null takes its folder's name.
        tracking_uri: where the server or the database is; null takes MLFLOW_TRACKING_URI, else a database mlflow.db in
            the run folder.
        options: further arguments of Lightning's MLFlowLogger, such as `{tags: {kind: trial}}`.
    """

    stands_for = MLFlowLogger

    def __init__(
        self,
        experiment: str = "lora_lightning",
        name: str | None = None,
        tracking_uri: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(experiment_name=experiment, run_name=name, tracking_uri=tracking_uri, **(options or {}))

    def made(self, folder: Path, run: str) -> Logger | None:
        """The logger."""
        given = {**self.settings, "run_name": self.settings["run_name"] or run}
        uri = (
            given["tracking_uri"] or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute()}/mlflow.db"
        )
        return MLFlowLogger(**given | {"tracking_uri": uri})


def made(given: Any, folder: Path) -> list[Logger]:
    """The loggers that a setting means: None and True mean TensorBoard, False none."""
    if given is False:
        return []
    wanted: Sequence[Logger] = (
        [tensorboard()] if given in (None, True) else given if isinstance(given, list) else [given]
    )
    run = "/".join(folder.parts[-2:])
    loggers = [logger.made(folder, run) if isinstance(logger, NamedLogger) else logger for logger in wanted]
    return [logger for logger in loggers if logger is not None]
