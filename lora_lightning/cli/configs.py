"""Configs by name: a file, one that this package carries, or one of the checkout."""

from __future__ import annotations

from pathlib import Path

from lora_lightning.errors import SettingsError, did_you_mean

_PACKAGE = Path(__file__).parents[1]


def is_path(value: str) -> bool:
    """Whether a --config value can name a file; the parser also takes YAML itself."""
    return not any(mark in value for mark in "{}\n") and ": " not in value


def find_config(value: str) -> str:
    """The path of a config: `value` itself where it is a file (or YAML), else the one carried under that name.

    Raises:
        SettingsError: neither; names the nearest files or configs.
    """
    if not is_path(value) or Path(value).is_file():
        return value
    for root in config_roots():
        carried = root / f"{value}.yaml"
        if carried.is_file():
            return str(carried)
    asked = Path(value)
    if (asked / "config.yaml").is_file():
        raise SettingsError(f'config "{value}" is a run folder; give {asked / "config.yaml"}, --run or --resume.')
    names = config_names()
    beside = [str(path) for path in asked.parent.glob("*") if path.suffix in (".yaml", ".yml", ".json")]
    raise SettingsError(
        f'config "{value}": no file and no config of that name.{did_you_mean(value, [*beside, *names])} '
        f"Configs: {', '.join(names) or 'none'}."
    )


def has_arms(path: Path) -> bool:
    """Whether a file holds arms of a comparison, which no other verb takes."""
    if not path.is_file():
        return False
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return any(line.startswith("arms:") for line in lines)


def config_roots() -> list[Path]:
    """Folders with configs of this package: its data, and the checkout it runs from."""
    roots = [_PACKAGE / "configs"]
    if (_PACKAGE.parent / "pyproject.toml").is_file():  # in site-packages "../configs" may be anyone's
        roots.append(_PACKAGE.parent / "configs")
    return [root for root in roots if root.is_dir()]


def config_names() -> list[str]:
    """Names that `--config` takes without a path, such as "strategies/ddp"."""
    found = {
        path.relative_to(root).with_suffix("").as_posix() for root in config_roots() for path in root.rglob("*.yaml")
    }
    return sorted(found, key=lambda name: (name.count("/"), name))
