"""Loggers by short names: `trainer.logger: wandb`, or `[wandb, tensorboard]`, with their files in the run folder.

Each class here stands for a logger of Lightning until the run folder is known. metrics.csv is written beside them.
"""

from __future__ import annotations

import importlib.util
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lora_lightning.errors import SettingsError


def _installed(package: str) -> bool:
    """Whether a package can be imported; a folder that only has its name, as W&B leaves in a project, is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


class NamedLogger(Logger):
    """A logger that is made once there is a run folder.

    Class facts:
        package: what it imports.
        install: the name under which pip knows that.

    Raises:
        SettingsError: the package is missing.
    """

    package: ClassVar[str] = ""
    install: ClassVar[str] = ""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings
        if self.package and not _installed(self.package):
            raise SettingsError(
                f'trainer.logger is "{type(self).__name__}", which needs the package {self.install}, and it is not '
                f"installed: pip install {self.install}"
            )

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


class wandb(NamedLogger):  # noqa: N801
    """Weights & Biases.

    Args:
        project: the project there.
        name: what to call the run; null takes its folder's name.
        offline: write into the run folder alone; `wandb sync` sends it later.
        options: further arguments of Lightning's WandbLogger, such as `{entity: us, tags: [a]}`.
    """

    package, install = "wandb", "wandb"

    def __init__(
        self,
        project: str = "lora_lightning",
        name: str | None = None,
        offline: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(project=project, name=name, offline=offline, **(options or {}))

    def made(self, folder: Path, run: str) -> Logger | None:
        """The logger."""
        return WandbLogger(save_dir=folder, **self.settings | {"name": self.settings["name"] or run})


class mlflow(NamedLogger):  # noqa: N801
    """MLflow.

    Args:
        experiment: the experiment there.
        name: what to call the run; null takes its folder's name.
        tracking_uri: where the server or the database is; null takes MLFLOW_TRACKING_URI, else a database mlflow.db in
            the run folder.
        options: further arguments of Lightning's MLFlowLogger, such as `{tags: {kind: trial}}`.
    """

    package, install = "mlflow", "mlflow"

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


class comet(NamedLogger):  # noqa: N801
    """Comet.

    Args:
        project: the project there.
        name: what to call the run; null takes its folder's name.
        offline: write into the run folder alone; `comet upload` sends it later.
        options: further arguments of Lightning's CometLogger, such as `{workspace: us}`.
    """

    package, install = "comet_ml", "comet-ml"

    def __init__(
        self,
        project: str = "lora_lightning",
        name: str | None = None,
        offline: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(project=project, name=name, online=not offline, **(options or {}))

    def made(self, folder: Path, run: str) -> Logger | None:
        """The logger."""
        offline = {"offline_directory": str(folder)} if not self.settings["online"] else {}
        return CometLogger(**offline | self.settings | {"name": self.settings["name"] or run})


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
