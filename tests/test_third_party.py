"""Packages of others: one that `new-plugin` wrote and those in examples/, as wheels in a folder, without a network."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_runs import encoder_folder, labelled_file

from lora_lightning.testing import MethodContract

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PACKAGES = ("third_party_plugin", "other_parts_plugin")

pytestmark = pytest.mark.slow


def python(*words, cwd, path=None, timeout=900):
    """Run Python in `cwd`, with `path` in front of what it finds already; returns what it printed."""
    found = [str(path)] if path else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*found, *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the packages' sources, and all of them installed from wheels in its `installed`."""
    place = tmp_path_factory.mktemp("third_party")
    python("-m", "lora_lightning", "new-plugin", "Tilt", "--output", "new_plugin", cwd=place)
    for name in PACKAGES:
        shutil.copytree(EXAMPLES / name, place / name)
    sources = [f"./{name}" for name in ("new_plugin", *PACKAGES)]
    offline = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    python("-m", "pip", "wheel", *offline, "--no-build-isolation", "-w", "wheels", *sources, cwd=place)
    wheels = sorted((place / "wheels").glob("*.whl"))
    assert len(wheels) == len(sources)
    python("-m", "pip", "install", *offline, "--target", "installed", *wheels, cwd=place)
    return place


@pytest.fixture(scope="module")
def run(place):
    """One command line in an empty folder beside a tiny model and data."""
    here = place / "run"
    folder = encoder_folder(here / "model")
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        if name.endswith(".bias"):  # all zero as they are made, which no scale would change
            value.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    labelled_file(folder / "train.csv", rows=40)
    labelled_file(folder / "dev.csv", rows=20, seed=1)

    def run(*words):
        return python("-m", "lora_lightning", *words, cwd=here, path=place / "installed")

    run.folder = here
    return run


FIT = [
    "fit",
    *("--model.pretrained", "model", "--model.targets", "[query, value]", "--model.linear_baseline", "false"),
    *("--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01", "--data", "LabelledText"),
    *("--data.train", "model/train.csv", "--data.validation", "model/dev.csv", "--data.batch_size", "4"),
    *("--trainer.max_steps", "4", "--trainer.max_epochs", "-1", "--trainer.val_check_interval", "2"),
    *("--trainer.check_val_every_n_epoch", "null", "--trainer.log_every_n_steps", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"),
]


def test_they_are_listed_and_shown(run):
    listed = run("methods")
    assert "lora-lightning-ia3" in listed
    assert "lora-lightning-tilt" in listed
    assert "TiltNorm (ll_tilt)" in listed
    assert "datamodules: FewShotText (ll_other_parts)" in listed
    assert "npz" in listed
    assert "failed: " not in listed
    assert "slow: " not in listed
    shown = run("show", "IA3")
    assert "https://arxiv.org/abs/2205.05638" in shown
    assert "plugin     ll_ia3, from lora-lightning-ia3 0.1.0" in shown
    assert "Departs from the paper." in shown
    assert "plugin     ll_tilt, from lora-lightning-tilt 0.1.0" in run("show", "Tilt")
    assert "npz" in run("export", "--help")


def test_the_generated_plugin_trains_with_its_callback(run):
    words = ["--model.method", "Tilt", "--model.method.rank", "2", "--trainer.callbacks", "TiltNorm"]
    out = run(*FIT, *words, "--trainer.default_root_dir", "tilt")
    assert "Tilt: 4 layers adapted" in out
    (metrics,) = (run.folder / "tilt").rglob("metrics.csv")
    with metrics.open() as file:
        norms = [float(row["update_norm"]) for row in csv.DictReader(file) if row.get("update_norm")]
    assert len(norms) == 4
    assert norms[-1] > 0


PYTHON = """
import sys
import torch
import lora_lightning as ll
from lora_lightning.testing import perturb, tiny_encoder
from lora_lightning.injection import adapters_named

for name in ("IA3", "Tilt"):
    model, tokens = tiny_encoder(), torch.tensor([[1, 5, 7, 2]])
    ll.inject(model, ll.method(name)(), targets=["query", "value"], seed=0)
    for i, adapter in enumerate(adapters_named(model, "default").values()):
        perturb(adapter, i)
    with torch.no_grad():
        before, after = tiny_encoder()(tokens).logits, model(tokens).logits
        assert not torch.equal(before, after)
        ll.save_adapter(model, name)
        fresh = tiny_encoder()
        ll.load_adapter(fresh, name)
        assert torch.equal(fresh(tokens).logits, after)
        ll.merge(model)
        torch.testing.assert_close(model(tokens).logits, after)
        ll.unmerge(model)
        assert torch.equal(model(tokens).logits, after)
        ll.eject(model)
        assert torch.equal(model(tokens).logits, before)
for name in ("ll_ia3", "ll_tilt"):
    assert sys.modules[name].__file__.startswith(sys.argv[1]), sys.modules[name].__file__
"""


def test_they_merge_save_and_load_in_python(place, tmp_path):
    python("-c", PYTHON, place / "installed", cwd=tmp_path, path=place / "installed")


def test_the_example_trains_on_its_data_and_leaves_in_its_format(run):
    """IA3 on few-shot text; validated from its run folder, exported as npz and as what to add to the base."""
    words = ["--model.method", "IA3", "--data", "FewShotText", "--data.shots", "4"]
    out = run(*FIT, *words, "--trainer.default_root_dir", "ia3")
    assert "IA3: 4 layers adapted" in out
    (summary,) = (run.folder / "ia3").rglob("summary.json")
    assert json.loads(summary.read_text())["data"]["train"]["examples"] == 12
    folder = summary.parent
    assert "val_accuracy" in run("validate", "--run", folder)
    out = run("export", folder, "--format", "npz", "--output", "as_npz")
    assert "npz (merged weights): 4 layers" in out
    run("export", folder, "--format", "delta", "--output", "as_delta")
    base = load_file(run.folder / "model" / "model.safetensors")
    delta = load_file(run.folder / "as_delta" / "delta.safetensors")
    trained = load_file(folder / "adapter" / "adapter.safetensors")
    with np.load(run.folder / "as_npz" / "merged.npz") as merged:
        for path in [f"bert.encoder.layer.{i}.attention.self.{side}" for i in (0, 1) for side in ("query", "value")]:
            (scale,) = (value for key, value in trained.items() if f"{path.removeprefix('bert.')}." in key)
            assert not bool((scale == 1).all())
            weight, bias = base[f"{path}.weight"], base[f"{path}.bias"]
            np.testing.assert_allclose(merged[f"{path}.weight"], scale[:, None] * weight, rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(merged[f"{path}.bias"], scale * bias, rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(delta[f"{path}.weight"], (scale[:, None] - 1) * weight, rtol=1e-4, atol=1e-8)
            np.testing.assert_allclose(delta[f"{path}.bias"], (scale - 1) * bias, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("package", "contracts"), [("new_plugin", 1), ("third_party_plugin", 2), ("other_parts_plugin", 0)]
)
def test_their_own_tests_pass_on_what_was_installed(place, tmp_path, package, contracts):
    """The whole contract suite among them, once for each set of settings."""
    suite = shutil.copytree(place / package / "tests", tmp_path / "suite")
    words = ["-q", "-p", "no:cacheprovider", "-W", "ignore"]
    out = python(
        "-m",
        "pytest",
        f"--basetemp={tmp_path}/own",
        *words,
        suite,
        cwd=tmp_path,
        path=place / "installed",
        timeout=1100,
    )
    tests = sum(name.startswith("test_") for name in dir(MethodContract))
    assert int(re.search(r"(\d+) passed", out)[1]) > contracts * tests
