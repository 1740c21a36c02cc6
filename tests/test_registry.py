"""Tables of names against what is there, and where the classes and modules of 0.1 are now."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch.callbacks
import lightning.pytorch.strategies
import pytest
import torch
import yaml

import lora_lightning.callbacks
import lora_lightning.data
import lora_lightning.training.strategies
from lora_lightning import plugins, registry
from lora_lightning.registry import FORMER_MODULES, FORMER_PATHS, KNOWN, SETTINGS, Component, Registry, former_homes

OLD_FILES = Path(__file__).parent / "old_files"
BASES = {
    "optimizer": ("Optimizer",),
    "callback": ("Callback", "ScheduleCallback", "StepCallback"),
    "data module": ("ResumableLoader",),
    "strategy": ("ParallelStrategy", "Strategy", "check_strategy"),
}
"""What the packages offer beside classes that a config can name."""
OFFERED = {
    "optimizer": (torch.optim,),
    "callback": (lightning.pytorch.callbacks, lora_lightning.callbacks),
    "data module": (lora_lightning.data,),
    "strategy": (lightning.pytorch.strategies, lora_lightning.training.strategies),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_tables_are_what_the_packages_offer(kind):
    offered = {name for package in OFFERED[kind] for name in package.__all__ if name[0].isupper()}
    assert {name for known, name in KNOWN if known == kind} == offered - set(BASES[kind])


@pytest.mark.parametrize("component", KNOWN.values(), ids=lambda component: component.name)
def test_a_known_class_is_at_its_path(component):
    cls = component.load()
    assert cls.__name__ == component.name
    if component.path.startswith("lora_lightning."):
        assert cls.__module__ == component.path.partition(":")[0]


def test_a_name_means_cores_class_before_a_plugins():
    known = plugins.load()
    assert known.component("KeepBest").class_path == "lora_lightning.callbacks.best.KeepBest"
    assert known.component("LoRAPlus").plugin == "ll_optimizers"
    assert known.component("LoRAPlusPlus") is None
    assert {"AdamW", "LoRAPlus"} <= set(known.component_names("optimizer"))
    assert "KeepBest" not in known.component_names("optimizer")


def test_names_of_a_kind_stand_once():
    known = Registry(components={"AdamW": Component("AdamW", "optimizer", "torch.optim:AdamW", "ll_x")})
    assert known.component_names("optimizer").count("AdamW") == 1


# -- the names of 0.1 --------------------------------------------------------------------------------------------------

PATHS = (OLD_FILES / "class_paths.txt").read_text().split()


def found(path):
    """The class at a path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", PATHS)
def test_every_class_of_0_1_has_a_path(path):
    """It leads to a class of the same name, in a module that is there, and a path of today is left alone."""
    current = plugins.registry().current_class_path(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls = found(current)
    assert inspect.isclass(cls)
    name = path.rpartition(".")[2]
    assert cls.__name__ == {"Knots": "StageEnds"}.get(name, name)
    assert plugins.registry().current_class_path(current) == current


def class_paths(node):
    if isinstance(node, dict):
        if isinstance(node.get("class_path"), str) and "." in node["class_path"]:
            yield node["class_path"]
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            yield from class_paths(value)


CONFIGS = sorted(OLD_FILES.rglob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(OLD_FILES)))
def test_configs_of_0_1_name_classes_that_are_there(config):
    paths = list(class_paths(yaml.safe_load(config.read_text())))
    for path in paths:
        assert inspect.isclass(found(plugins.registry().current_class_path(path))), path


def test_what_has_not_moved_is_left_alone():
    known = plugins.registry()
    for path in (
        "torch.optim.AdamW",
        "ll_lora.LoRA",
        "ll_optimizers.plus.LoRAPlus",
        "lora_lightning.data.LabelledText",
        "lora_lightning.data.NoSuchText",
        "someone.elses.LoRAPlus",
        "LoRAPlus",
        "",
    ):
        assert known.current_class_path(path) == path


def test_a_class_that_moved_to_another_plugin_is_found_by_its_name(monkeypatch):
    """Neither core nor the table spells a plugin's name; a class of the same name that is there stays itself."""
    known = plugins.load()
    assert known.current_class_path("ll_lora.optim.LoRAPlus") == "ll_optimizers.plus.LoRAPlus"
    assert known.current_class_path("lora_lightning.data.PyDocs") != "lora_lightning.data.PyDocs"
    monkeypatch.setattr("ll_lora.method.LoRAPlus", object, raising=False)
    assert known.current_class_path("ll_lora.method.LoRAPlus") == "ll_lora.method.LoRAPlus"


def test_former_tables_name_modules_that_are_gone_and_modules_that_are_there():
    """Where a name of 0.1 is a package or module again today, that one is found and the table would not be asked."""
    root = Path(registry.__file__).parent
    for former, homes in FORMER_MODULES.items():
        place = root.joinpath(*former.split("."))
        assert not place.with_suffix(".py").exists(), former
        assert not place.is_dir(), former
        for home in homes.split():
            importlib.import_module(f"lora_lightning.{home}")
    for path in FORMER_PATHS.values():
        assert inspect.isclass(found(path))


PROMISED = {
    "lora_lightning.adapters.weights": ("BaseLayer", "LinearBase", "StackedBase"),
    "lora_lightning.adapters.packed": ("PackedBase",),
    "lora_lightning.adapters.seeds": ("generator",),
    "lora_lightning.checkpoint": ("save_adapter", "load_adapter"),
    "lora_lightning.exporting": ("export", "import_peft"),
    "lora_lightning.tasks": ("find_task",),
    "lora_lightning.tasks.base": ("Task",),
    "lora_lightning.data.loader": ("ResumableLoader",),
    "lora_lightning.module": ("AdapterModule",),
}


@pytest.mark.slow
def test_modules_of_0_1_can_be_imported():
    """In a new process, where none was imported under its old name; their names are those of today, not copies."""
    script = f"""
import importlib, sys, warnings
from lora_lightning.registry import FORMER_NAMES, former_homes
for module, names in {PROMISED!r}.items():
    assert module not in sys.modules or module == "lora_lightning.tasks", module  # which an earlier one is inside
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        former = importlib.import_module(module)
    told = [warning for warning in said if "0.1" in str(warning.message)]
    assert any(str(w.message).startswith(f"{{module}} is of lora_lightning 0.1; import from ") for w in told), module
    assert all(warning.category is DeprecationWarning for warning in told), module
    homes = [importlib.import_module(home) for home in former_homes(module)]
    for name in names:
        value = getattr(former, name)
        assert any(getattr(home, FORMER_NAMES.get(name, name), None) is value for home in homes), name
    try:
        former.no_such_name
    except AttributeError as error:
        assert str(error) == f"module '{{module}}' has no attribute 'no_such_name'", error
    else:
        raise AssertionError("a name that never was")
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as said:
    del sys.modules["lora_lightning.module"]
    import lora_lightning.module
assert [w.filename for w in said if "0.1" in str(w.message)] == ["<string>"]  # who imports it is told where
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_data_module_that_a_plugin_has_now():
    with pytest.warns(
        DeprecationWarning, match=r"^lora_lightning\.data\.PyDocs is of 0\.1; import ll_demo\.pydocs\.PyDocs$"
    ):
        cls = lora_lightning.data.PyDocs
    assert cls is found("ll_demo.pydocs.PyDocs")
    for name in ("NoSuchText", "LoRAPlus", "nothing"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(lora_lightning.data, name)


def test_a_module_that_never_was_is_still_missing():
    for name in ("lora_lightning.zeros", "lora_lightning.adapters.weight", "lora_lightning.tasksets"):
        with pytest.raises(ModuleNotFoundError, match=re.escape(name.rpartition(".")[2])):
            importlib.import_module(name)
    assert former_homes("torch.tasks") == former_homes("lora_lightning") == []


@pytest.mark.slow
def test_former_names_cost_nothing_where_modules_are_found():
    """The finder stands last, is never asked for a module that is there, and its table is not imported for the root."""
    script = (
        "import sys, lora_lightning\n"
        "assert 'lora_lightning.registry' not in sys.modules\n"
        "assert sys.meta_path[-1].__name__ == '_Former'\n"
        "asked = []\n"
        "find = sys.meta_path[-1].find_spec\n"
        "sys.meta_path[-1].find_spec = staticmethod(lambda name, *a: asked.append(name) or find(name, *a))\n"
        "import lora_lightning.plugins, lora_lightning.adapters.layers.base, lora_lightning.callbacks\n"
        "assert not [name for name in asked if name.startswith('lora_lightning')], asked\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
