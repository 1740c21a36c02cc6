"""Injection of 1,000 layers, and start-up of the light verbs as whole processes. No timed asserts.

The verbs run with the bundled plugins, and with forty more that this file writes: a package with a method, an
optimizer, a callback and a verb, and the dist-info of an installed distribution, each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from ll_lora import LoRA
from lora_lightning import inject

pytestmark = pytest.mark.slow

VERBS = (["--help"], ["methods"], ["show", "LoRA"])

PLUGIN = """
from lora_lightning import hookimpl
from {name}.method import Method{number}

requires_api = ">=2,<3"

@hookimpl
def lora_lightning_methods():
    return [Method{number}]

@hookimpl
def lora_lightning_optimizers():
    return {{"Optimizer{number}": "{name}.optim:Optimizer{number}"}}

@hookimpl
def lora_lightning_callbacks():
    return {{"Callback{number}": "{name}.callback:Callback{number}"}}

@hookimpl
def lora_lightning_commands():
    return {{"verb{number}": "{name}.verb"}}
"""
SETTINGS = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
from lora_lightning.errors import check
from lora_lightning.methods import Method, check_fields

@dataclass(frozen=True, kw_only=True)
class Method{number}(Method):
    \"\"\"Method number {number}.\"\"\"

    paper: ClassVar[str] = "2101.{number:05}"
    rank: int = 8
    \"\"\"Inner width.\"\"\"
    alpha: float = 16.0
    \"\"\"Numerator of the scaling.\"\"\"

    def __post_init__(self):
        check_fields(self)
        check(self.rank >= 1, self, "rank", "it must be at least 1.")

    def build(self, base):
        import torch
        raise NotImplementedError
"""
MODULES = {
    "optim": "import torch\n\nclass Optimizer{number}(torch.optim.SGD):\n    pass\n",
    "callback": "from lightning.pytorch.callbacks import Callback\n\nclass Callback{number}(Callback):\n    pass\n",
    "verb": '"""Verb number {number}."""\n\ndef add_arguments(parser): ...\n\ndef run(args): return 0\n',
}


def write_plugin(folder: Path, number: int) -> None:
    """A package and the dist-info that makes it an installed one."""
    name = f"ll_many_{number}"
    package, info = folder / name, folder / f"{name}-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(PLUGIN.format(name=name, number=number))
    (package / "method.py").write_text(SETTINGS.format(number=number))
    for module, text in MODULES.items():
        (package / f"{module}.py").write_text(text.format(number=number))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lora_lightning]\n{name} = {name}\n")
    (info / "RECORD").write_text("")


@pytest.fixture(scope="module")
def forty(tmp_path_factory) -> dict[str, str]:
    """An environment in which forty more plugins are installed, their byte code written."""
    folder = tmp_path_factory.mktemp("plugins")
    for number in range(40):
        write_plugin(folder, number)
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(folder)], check=True)
    return environment


def test_inject_1000_layers(benchmark):
    def fresh():
        return (nn.Sequential(*[nn.Linear(32, 32) for _ in range(1000)]), LoRA(rank=4)), {"seed": 0}

    report = benchmark.pedantic(inject, setup=fresh, rounds=5)
    assert len(report.layers) == 1000


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_light_verb(benchmark, words):
    command = [sys.executable, "-m", "lora_lightning", *words]
    done = benchmark.pedantic(subprocess.run, (command,), {"capture_output": True, "check": True}, rounds=15)
    assert b"lora" in done.stdout.lower()


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_light_verb_with_forty_plugins_more(benchmark, forty, words):
    command, options = [sys.executable, "-m", "lora_lightning", *words], {"capture_output": True, "check": True}
    done = benchmark.pedantic(subprocess.run, (command,), {**options, "env": forty}, rounds=15)
    assert {"--help": b"verb39", "methods": b"Method39"}.get(words[0], b"LoRA") in done.stdout
    assert b"failed" not in done.stdout.replace(b"plugins that failed", b"")


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_no_light_verb_imports_what_the_plugins_would(forty, words):
    script = (
        "import sys; from lora_lightning.cli.main import main; assert main(sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'lightning', 'jsonargparse', 'numpy', 'll_many_0.optim', 'll_many_0.callback'}\n"
        "assert 'll_many_0.method' in sys.modules\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], env=forty, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
