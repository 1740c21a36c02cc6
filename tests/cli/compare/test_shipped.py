"""The comparisons that are carried: files of arms are sound, the standing table has every method and optimizer."""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lora_lightning import plugins
from lora_lightning.cli.compare.arms import check, from_file
from lora_lightning.cli.compare.plan import planned_arms
from lora_lightning.cli.configs import config_names, find_config
from lora_lightning.cli.verbs.compare import add_arguments, arms_file, with_options

FILES = [name for name in config_names() if name.startswith(("claims/", "comparisons/"))]
FILES = [name for name in FILES if arms_file(["--config", name])]
"""Names of files of arms."""
WITH_FILES = ("methods", "rose_locality", "full_or_lora", "banking77", "sst2", "e2e")
OFFLINE = [name for name in FILES if name.partition("/")[2] not in WITH_FILES]
"""Those whose data every installation has."""


def classes(node: Any) -> set[str]:
    if isinstance(node, dict):
        return set().union(*map(classes, node.values()))
    return {node} if isinstance(node, str) else set()


def read(name: str) -> Any:
    return from_file(Path(find_config(name)), list(plugins.load(()).methods))


@pytest.mark.parametrize("name", FILES)
def test_every_file_can_be_read(name):
    found = read(name)
    check(found.arms)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = with_options(parser.parse_args([]), found.options, Path(name))
    assert options.seeds == 3
    named = [*found.words, *(["--config", options.also] if options.also else [])]
    for flag, word in pairwise(named):
        assert flag != "--config" or Path(find_config(word)).is_file()


def test_the_standing_table_has_every_method_and_optimizer():
    known = plugins.load(())
    optimizers = {one.name for one in known.components.values() if one.kind == "optimizer"}
    starts = {*known.starts} - {"LoftQ"}  # of quantized models
    wanted = {*known.methods, *starts, *optimizers}
    there = set().union(*(classes(dict(arm.settings)) for arm in read("comparisons/methods").arms))
    assert wanted <= there, f"comparisons/methods lacks {wanted - there}"


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLINE)
def test_every_arm_can_be_built_and_has_its_budget(name):
    found = read(name)
    budget = found.options.get("budget")
    arms = planned_arms(found.words, found.arms, budget, print)
    assert len(arms) == len(found.arms) >= 3
    first = {one.arm.name: one.facts.adapter_numbers for one in arms}
    for one in arms:
        other = first[one.arm.against or arms[0].arm.name]
        assert budget is None or not one.facts.adapter_numbers or 0.7 < one.facts.adapter_numbers / other < 1.3
