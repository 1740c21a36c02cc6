"""Write a package with a method to start from: code, card and tests."""

from __future__ import annotations

import argparse
import builtins
import importlib.util
import keyword
import re
from pathlib import Path
from string import Template

from lora_lightning import hookspecs
from lora_lightning.errors import SettingsError
from lora_lightning.plugins import registry
from lora_lightning.storage.atomic import write_all

TEMPLATES = Path(__file__).parent.parent / "templates"
FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "$package/README.md",
    "__init__.py": "$package/__init__.py",
    "method.py": "$package/method.py",
    "adapter.py": "$package/adapter.py",
    "callback.py": "$package/callback.py",
    "test.py": "tests/test_$package.py",
}
"""Where the text of each template goes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The method's name, and where the package goes."""
    parser.add_argument(
        "name", metavar="NAME", help="the method's class name, in the paper's spelling, such as RoseTune"
    )
    parser.add_argument("--output", metavar="DIR", type=Path, help="a new folder (lora-lightning-NAME)")


def run(args: argparse.Namespace) -> int:
    """Write the package and say how to install and test it.

    Raises:
        SettingsError: a name that is no class name or is taken, or a folder that exists.
    """
    package, distribution = f"ll_{args.name.lower()}", f"lora-lightning-{args.name.lower()}"
    check_name(args.name)
    check_free(args.name, package)
    folder = args.output or Path(distribution)
    if folder.exists():
        raise SettingsError(f'new-plugin: "{folder}" exists already; give a new folder with --output.')
    major = int(hookspecs.API.partition(".")[0])
    values = {
        "name": args.name,
        "package": package,
        "distribution": distribution,
        "requires": f">={hookspecs.API},<{major + 1}",
    }
    texts = {
        folder / Template(place).substitute(values): Template(_read(name)).safe_substitute(values)
        for name, place in FILES.items()
    }
    try:
        write_all({path: text.encode() for path, text in texts.items()})
    except OSError as error:
        raise SettingsError(f'new-plugin: "{folder}" cannot be written: {error}.') from error
    print("\n".join(str(path) for path in texts))
    print(f'try next: cd {folder} && pip install -e ".[test]" && python -m pytest')
    print(f"          python -m lora_lightning show {args.name}")
    return 0


def check_name(name: str) -> None:
    """Raise `SettingsError` unless a class can be called `name`, in a file that uses names of its own."""
    if not re.fullmatch(r"[A-Z][A-Za-z0-9]*", name):
        parts = re.findall(r"[A-Za-z][A-Za-z0-9]*|[0-9]+", name)
        near = "".join(part[0].upper() + part[1:] for part in parts).lstrip("0123456789")
        hint = f' Did you mean "{near}"?' if near else ""
        raise SettingsError(
            f'new-plugin: NAME is "{name}"; it must be a class name: a capital letter, then letters and digits.{hint}'
        )
    used = {word for file in FILES if file.endswith(".py") for word in re.findall(r"\w+", _read(file))}
    used -= registry().methods.keys()  # which `check_free` says more of
    if keyword.iskeyword(name) or hasattr(builtins, name) or name in used:
        raise SettingsError(f'new-plugin: NAME is "{name}", which means something else in Python code; take another.')


def check_free(name: str, package: str) -> None:
    """Raise `SettingsError` if a method or a package of that name is installed."""
    known = registry()
    if name in known.duplicates or name in known.methods:
        provider = known.providers[name]
        raise SettingsError(
            f'new-plugin: NAME is "{name}"; {provider.plugin} ({provider.package} {provider.version}) provides that '
            "method. Take another."
        )
    if importlib.util.find_spec(package) is not None:
        raise SettingsError(f'new-plugin: NAME is "{name}"; a package {package} is installed already. Take another.')


def _read(template: str) -> str:
    return (TEMPLATES / f"{template}.tmpl").read_text(encoding="utf-8")
