"""What this machine and installation offer: versions, plugins, devices, strategies, quantizations.

Imports neither torch nor Lightning before it is asked for devices or strategies.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import InvalidRequirement, Requirement

from lora_lightning.cli import configs
from lora_lightning.cli.configs import find_config
from lora_lightning.errors import LoraLightningError
from lora_lightning.models import quantized_loading as quantization

PACKAGE = "lora-lightning"
GIB = 2**30


@dataclass(frozen=True)
class Version:
    """A package that this one requires.

    Attributes:
        name: of the package.
        installed: its version, or None.
        allowed: versions that are allowed, as the requirement says.
        extra: the extra that asks for it; empty where it is always needed.
        tested: the version that was tested, where a constraints.txt is at hand.
    """

    name: str
    installed: str | None
    allowed: str
    extra: str = ""
    tested: str | None = None

    @property
    def problem(self) -> str | None:
        """What is wrong, if anything: an extra's package may be missing, but none may be of another version."""
        if self.installed is None:
            return None if self.extra else f"{self.name} is not installed; needed: {self.allowed or 'any version'}."
        if Requirement(f"{self.name}{self.allowed}").specifier.contains(self.installed, prereleases=True):
            return None
        return f"{self.name} is {self.installed}; needed: {self.allowed}."


def versions(extras: tuple[str, ...] = ("demo", "quant")) -> list[Version]:
    """The required packages, and those of some extras."""
    tested, found = _tested(), []
    for line in importlib.metadata.requires(PACKAGE) or ():
        requirement = Requirement(line)
        extra = next((e for e in extras if requirement.marker and requirement.marker.evaluate({"extra": e})), "")
        plain = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if plain or extra:
            name = requirement.name
            found.append(
                Version(name, _installed(name), str(requirement.specifier), "" if plain else extra, tested.get(name))
            )
    return found


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tested() -> dict[str, str]:
    """Versions in the constraints.txt of a checkout."""
    path = Path(__file__).parents[3] / "constraints.txt"
    if not path.is_file() or not (path.parent / "pyproject.toml").is_file():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            requirement = Requirement(line.partition("#")[0])
        except InvalidRequirement:
            continue
        found[requirement.name] = str(requirement.specifier).removeprefix("==")
    return found


def machine(runs: Path = Path("runs")) -> dict[str, str]:
    """Facts by what they are: Python, system, cores, memory, disk where runs are written."""
    folder = runs.absolute()
    while not folder.is_dir():
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "Python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(cores),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        page = os.sysconf("SC_PAGE_SIZE")
        facts["memory"] = f"{page * os.sysconf('SC_PHYS_PAGES') / GIB:.1f} GiB"
    facts["disk"] = f"{disk.free / GIB:.1f} GiB free for {runs}"
    if not os.access(folder, os.W_OK):
        facts["disk"] += f", but {folder} cannot be written"
    return facts


def devices() -> dict[str, str]:
    """The build of torch, and what it can compute on."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA in this build"
    facts = {"torch": f"{torch.__version__} ({build})"}
    names = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    listed = [f"{n}: {each.name}, {each.total_memory / GIB:.0f} GiB" for n, each in enumerate(names)]
    facts["GPUs"] = "; ".join(listed) or "none"
    if torch.backends.mps.is_available():
        facts["GPUs"] = "Apple's, through mps"
    return facts


def strategies() -> dict[str, str]:
    """Why each of the configs `strategies/...` cannot work here, by its name; empty where it can."""
    return {
        name.partition("/")[2]: _why_not(yaml.safe_load(Path(find_config(name)).read_text())["trainer"])
        for name in configs.config_names()
        if name.startswith("strategies/")
    }


def _why_not(settings: Mapping[str, Any]) -> str:
    """What a trainer with these settings says; its strategy is asked by itself, too."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer

    from lora_lightning.cli.hints import hide_hints
    from lora_lightning.training import strategies as ours

    hide_hints()
    strategy, reasons = settings["strategy"], []
    refusals = (MisconfigurationException, ImportError, ValueError, RuntimeError)
    if isinstance(strategy, dict):
        try:
            strategy = getattr(ours, strategy["class_path"])(**strategy.get("init_args", {}))
        except refusals as error:
            reasons.append(_one_line(error))
            strategy = "auto"
    try:
        Trainer(**{**settings, "strategy": strategy}, logger=False, enable_checkpointing=False)
    except refusals as error:
        reasons.append(_one_line(error))
    return " ".join(reasons)


def quantizations() -> dict[tuple[str, str], str]:
    """Why each quantization cannot work on each type of device here; empty where it can."""
    import torch

    found = {}
    for format in quantization.FORMATS:
        for device in quantization.DEVICES:
            try:
                quantization.check_format(format, device=device)
                found[format, device] = "" if device != "cuda" or torch.cuda.is_available() else "no GPU here"
            except LoraLightningError as error:
                found[format, device] = str(error)
    return found


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
