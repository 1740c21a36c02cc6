"""The weight decomposition analysis: its numbers, the callback that records them, and the verb that draws them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader
from toy_runs import classification, encoder_folder, labelled_data, trainer

import lora_lightning as ll
from ll_dora import DoRA
from ll_lora import LoRA
from ll_weight_change import forgetting_picture, picture, records, spectrum_picture, spectrum_records
from ll_weight_change.callback import WeightDecomposition
from ll_weight_change.spectrum import UpdateSpectrum
from lora_lightning.adapters.folded import DenseUpdate
from lora_lightning.callbacks import Cascade, InjectAdapters
from lora_lightning.callbacks.forgetting import FORMAT, read_course
from lora_lightning.cli.main import main
from lora_lightning.errors import DataError, NoEffectError, ResumeError, SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.records import adapters_named, iter_adapters
from lora_lightning.testing import perturb


def reference(weight, start):
    """dM, dD by the definition."""
    new, old = weight.numpy(), start.numpy()
    a, b = np.linalg.norm(new, axis=1), np.linalg.norm(old, axis=1)
    return np.abs(a - b).mean(), (1 - (new * old).sum(1) / (a * b)).mean()


def test_the_method_reports_its_changes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6)).double()
    method = DoRA(rank=2)
    inject(model, method, ["0", "1"], also_train=())
    adapters = adapters_named(model, "default")
    assert (method.report(adapters)["dM"], method.report(adapters)["dD"]) == (0.0, 0.0)
    for adapter in adapters.values():
        perturb(adapter)
    expected = [
        reference(a.merged_weight(a.base.weight()).detach(), a.base.weight().detach()) for a in adapters.values()
    ]
    report = json.loads(json.dumps(method.report(adapters)))
    assert report["dM"] == pytest.approx(sum(dM for dM, _ in expected) / 2, abs=1e-12)
    assert report["dD"] == pytest.approx(sum(dD for _, dD in expected) / 2, abs=1e-12)
    assert report["zero_rows"] == 0
    for _, layer in iter_adapters(model):  # what a cascade does at the end of a stage, the last one too
        layer.set_folded("default", DenseUpdate(layer.base_layer))
        layer.fold("default")
        layer.adapter("default").reset(torch.Generator().manual_seed(1))
    folded = method.report(adapters)
    assert (folded["dM"], folded["dD"]) == pytest.approx((report["dM"], report["dD"]), rel=1e-5)  # of float32 shifts


# -- recording ---------------------------------------------------------------------------------------------------------


class Project(LightningModule):
    """Somebody's module: knows nothing of adapters."""

    def __init__(self, lazy=False):
        super().__init__()
        self.blocks = None
        if not lazy:
            self.configure_model()

    def configure_model(self):
        if self.blocks is None:
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.ModuleDict({"mix": nn.Linear(4, 4), "out": nn.Linear(4, 4)}) for _ in "ab")

    def training_step(self, batch, _):
        for block in self.blocks:
            batch = block["out"](torch.tanh(block["mix"](batch)))
        return (batch - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def loader():
    return DataLoader(torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), batch_size=4)


def starts():
    return {
        f"blocks.{i}.{name}": block[name].weight.detach() for i, block in enumerate(Project().blocks) for name in block
    }


def content(folder):
    return json.loads((folder / "decomposition.json").read_text())


def test_full_fine_tuning_is_recorded_against_its_start(tmp_path):
    module = Project()
    trainer(tmp_path, [WeightDecomposition(at=[0.25, 3, 1.0])], max_steps=8).fit(module, loader())
    found = content(tmp_path)
    assert (found["label"], found["axis"]) == ("full fine-tuning", "out")
    assert [record["step"] for record in found["records"]] == [2, 3, 8]
    last = found["records"][-1]["layers"]
    assert list(last) == list(starts())
    for path, start in starts().items():
        weight = module.get_submodule(path).weight.detach()
        assert (last[path]["dM"], last[path]["dD"]) == pytest.approx(reference(weight.double(), start.double()))
        assert last[path]["dM"] > 0
        assert last[path]["skipped"] == 0


def test_adapters_in_a_foreign_module_are_recorded_with_their_merged_weight(tmp_path):
    """Whichever of the two callbacks comes first."""
    for i, order in enumerate((1, -1)):
        module = Project()
        callbacks = [InjectAdapters(DoRA(rank=2), seed=0), WeightDecomposition(at=[2], layers=["mix"], axis="in")]
        trainer(tmp_path / str(i), callbacks[::order], max_steps=4).fit(module, loader())
        found = content(tmp_path / str(i))
        assert (found["label"], found["axis"]) == ("DoRA", "in")
        assert [record["step"] for record in found["records"]] == [2, 4]
        assert list(found["records"][0]["layers"]) == ["blocks.0.mix", "blocks.1.mix"]
        ll.merge(module)
        for path, values in found["records"][-1]["layers"].items():
            merged = module.get_submodule(path).base.weight.detach()
            expected = reference(merged.T.double(), starts()[path].T.double())
            assert (values["dM"], values["dD"]) == pytest.approx(expected, rel=1e-3)


def test_noise_of_a_stage_is_no_change(tmp_path):
    """Inside a stage a layer computes with noise that no checkpoint holds; what is recorded is what was learned."""
    module, learned = Project(), {}

    class Learned(Callback):
        phase = 9

        def on_train_batch_end(self, trainer, pl_module, *_):
            for path, layer in ll.iter_adapters(pl_module):
                A, B = (t.double() for t in layer.adapter("default").low_rank())
                folded = layer.shifts["default"].delta.double()
                learned[trainer.global_step, path] = starts()[path].double() + folded + B @ A

    cascade = Cascade(stage_steps=4, blend=0.5, noise=0.5)
    callbacks = [InjectAdapters(LoRA(rank=1), seed=0), cascade, WeightDecomposition(at=[2, 6]), Learned()]
    trainer(tmp_path, callbacks, max_steps=8).fit(module, loader())
    for record in content(tmp_path)["records"]:
        for path, values in record["layers"].items():
            expected = reference(learned[record["step"], path], starts()[path].double())
            assert (values["dM"], values["dD"]) == pytest.approx(expected, rel=1e-3)


def test_our_own_module_is_recorded(tmp_path):
    folder = encoder_folder(tmp_path / "model")
    module = classification(folder, DoRA(rank=2))
    trainer(tmp_path, [WeightDecomposition(at=[0.5])], max_steps=4).fit(module, labelled_data(folder))
    run = records.read(tmp_path)
    assert run.label == "DoRA"
    assert run.kinds() == ["query", "value"]
    assert {(point.step, point.index) for point in run.of("query")} == {(2, 0), (2, 1), (4, 0), (4, 1)}
    assert all(point.magnitude > 0 for point in run.points)


def test_a_resumed_run_goes_on_with_the_same_start(tmp_path):
    def fit(steps, ckpt=None, lazy=False):
        run, module = trainer(tmp_path, [WeightDecomposition(at=[2, 3])], max_steps=steps), Project(lazy)
        run.fit(module, loader(), ckpt_path=ckpt)
        return run, module

    fit(4)[0].save_checkpoint(tmp_path / "part.ckpt")
    before = content(tmp_path)["records"]
    module = fit(6, tmp_path / "part.ckpt")[1]
    after = content(tmp_path)["records"]
    assert [record["step"] for record in after] == [2, 3, 4, 6]
    assert after[:3] == before
    for path, start in starts().items():
        expected = reference(module.get_submodule(path).weight.detach().double(), start.double())
        assert (after[-1]["layers"][path]["dM"], after[-1]["layers"][path]["dD"]) == pytest.approx(expected)
    with pytest.raises(ResumeError, match=r"blocks\.0\.mix was built after the checkpoint was chosen"):
        fit(6, tmp_path / "part.ckpt", lazy=True)


def test_a_model_built_late_is_recorded(tmp_path, capsys):
    trainer(tmp_path, [WeightDecomposition(at=[1.0])], max_steps=2).fit(Project(lazy=True), loader())
    assert list(content(tmp_path)["records"][0]["layers"]) == list(starts())
    assert (
        f"WeightDecomposition: measures {len(starts())} layers ({next(iter(starts()))}, ...)" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": ["nowhere"]}, NoEffectError, "found nothing to measure: .* among paths with one of nowhere"),
        ({"at": [9]}, SettingsError, r"WeightDecomposition.at holds step 9; the run has 4 steps"),
    ],
)
def test_what_cannot_be_recorded_is_an_error(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path, [WeightDecomposition(**options)], max_steps=4).fit(Project(), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": [0.0]}, "WeightDecomposition.at is .* each moment must be above 0"),
        ({"axis": "rows"}, """WeightDecomposition.axis is 'rows'; it must be "out" or "in"."""),
        ({"layers": "query"}, "WeightDecomposition.layers is 'query'; it must be a list"),
        ({"layers": ["("]}, r'WeightDecomposition.layers: "\(" is no regular expression'),
    ],
)
def test_settings_outside_their_rules(options, message):
    with pytest.raises(SettingsError, match=message):
        WeightDecomposition(**options)


# -- spectra -----------------------------------------------------------------------------------------------------------


def rank_of(delta, fraction=0.9):
    """The effective rank by the definition, from numpy's singular values."""
    energies = np.linalg.svd(delta.double().numpy(), compute_uv=False) ** 2
    return int(np.argmax(np.cumsum(energies) >= fraction * energies.sum())) + 1


def spectra(folder):
    return json.loads((folder / "spectrum.json").read_text())


@pytest.mark.parametrize("method", [None, LoRA(rank=3), DoRA(rank=2)])
def test_ranks_of_updates_in_a_foreign_project(tmp_path, method):
    """Full fine-tuning, an update with factors, and one without: all equal the spectrum of the dense update."""
    module = Project()
    inject = [] if method is None else [InjectAdapters(method, seed=0)]
    trainer(tmp_path, [UpdateSpectrum(at=[3], fraction=0.8), *inject], max_steps=6).fit(module, loader())
    found = spectra(tmp_path)
    label = "full fine-tuning" if method is None else type(method).__name__
    assert (found["label"], found["fraction"], [r["step"] for r in found["records"]]) == (label, 0.8, [3, 6])
    if method is not None:
        ll.merge(module)
    for path, start in starts().items():
        layer, values = module.get_submodule(path), found["records"][-1]["layers"][path]
        delta = (layer if method is None else layer.base).weight.detach().double() - start.double()
        assert values["effective_rank"] == rank_of(delta, 0.8)
        assert values["norm"] == pytest.approx(float(delta.norm()), rel=1e-4)
        assert values["stable_rank"] == pytest.approx(float((delta.norm() / torch.linalg.svdvals(delta)[0]) ** 2), 1e-3)
        assert values["largest_rank"] == 4
        if isinstance(method, LoRA):
            assert values["effective_rank"] <= method.rank


def test_ranks_hold_what_stages_have_folded(tmp_path):
    """Three stages of rank 1 are an update of rank 3, none of which the last adapter alone has."""
    module = Project()
    callbacks = [InjectAdapters(LoRA(rank=1), seed=0), Cascade(stage_steps=2, noise=0.0), UpdateSpectrum(fraction=1.0)]
    trainer(tmp_path, callbacks, max_steps=6).fit(module, loader())
    ll.merge(module)
    for path, values in spectra(tmp_path)["records"][-1]["layers"].items():
        delta = module.get_submodule(path).base.weight.detach().double() - starts()[path].double()
        assert values["norm"] == pytest.approx(float(delta.norm()), rel=1e-4)
        assert values["effective_rank"] == 3


def test_a_resumed_run_goes_on_with_its_ranks(tmp_path):
    def fit(steps, ckpt=None):
        run = trainer(tmp_path, [InjectAdapters(LoRA(rank=2), seed=0), UpdateSpectrum(at=[2])], max_steps=steps)
        run.fit(Project(), loader(), ckpt_path=ckpt)
        return run

    fit(4).save_checkpoint(tmp_path / "part.ckpt")
    before = spectra(tmp_path)["records"]
    fit(8, tmp_path / "part.ckpt")
    assert spectra(tmp_path)["records"][:2] == before
    assert [record["step"] for record in spectra(tmp_path)["records"]] == [2, 4, 8]


def test_a_fraction_outside_its_rule():
    with pytest.raises(SettingsError, match=r"UpdateSpectrum.fraction is 1.5; it must lie in \(0, 1\]"):
        UpdateSpectrum(fraction=1.5)


def written(folder, label, ranks=(2, 4), lost=0.1):
    """A run folder with both files, of known numbers."""
    folder.mkdir()
    values = {"stable_rank": 1.5, "norm": 1.0, "largest": 0.5, "largest_rank": 64}
    layers = {f"layers.{i}.{kind}": {"effective_rank": ranks[i], **values} for kind in ("up", "down") for i in (0, 1)}
    steps = [{"step": step, "layers": layers} for step in (5, 10)]
    content = {"format": spectrum_records.FORMAT, "fraction": 0.9, "label": label, "records": steps}
    (folder / "spectrum.json").write_text(json.dumps(content))
    course = [
        {"step": s, "when": w, "sets": {"old": {"loss": 1.0, "accuracy": 0.8 - f * lost}, "target": {"accuracy": f}}}
        for s, w, f in ((0, "before", 0.0), (5, "during", 0.5), (10, "during", 0.9), (10, "after", 1.0))
    ]
    content = {"format": FORMAT, "label": label, "sources": ["old"], "target": "target", "records": course}
    (folder / "forgetting.json").write_text(json.dumps(content))
    return str(folder)


def test_analyse_tells_and_draws_ranks_and_forgetting(tmp_path, capsys):
    folders = [written(tmp_path / "a", "LoRA"), written(tmp_path / "b", "full fine-tuning", (20, 60), 0.3)]
    assert main(["analyse", *folders, "--output", str(tmp_path / "out.png"), "--modules", "up"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["LoRA", "up", "90%", "3", "4", "1.5", "64"] in lines
    assert ["LoRA", "old", "0.8", "0.7", "-0.1"] in lines
    assert ["full", "fine-tuning", "old", "0.8", "0.5", "-0.3"] in lines
    for name in ("out-spectrum.png", "out-forgetting.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert main(["analyse", *folders, "--metric", "acuracy"]) == 2
    assert '--metric is "acuracy". Did you mean "accuracy"?' in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["analyse", str(tmp_path / "empty")]) == 2
    assert "holds none of spectrum.json, forgetting.json, decomposition.json" in capsys.readouterr().err


def test_panels_of_ranks_and_forgetting_hold_every_number(tmp_path, monkeypatch):
    figures = []
    for module in (spectrum_picture, forgetting_picture):
        monkeypatch.setattr(module, "save", lambda figure, path: figures.append(figure))
    runs = [written(tmp_path / "a", "LoRA"), written(tmp_path / "b", "full fine-tuning", (20, 60), 0.3)]
    read = [spectrum_records.read(tmp_path / name / "spectrum.json") for name in "ab"]
    spectrum_picture.draw_spectra(tmp_path / "x.png", read, ["up", "down"])
    assert len(runs) == 2
    top = figures[0].axes[0]
    assert [list(line.get_ydata()) for line in top.lines] == [[2, 4], [20, 60], [64, 64]]
    assert [list(line.get_ydata()) for line in figures[0].axes[1].lines[:2]] == [[3, 3], [40, 40]]
    assert top.get_yscale() == "log"
    courses = [read_course(tmp_path / name / "forgetting.json") for name in "ab"]
    forgetting_picture.draw_forgetting(tmp_path / "y.png", courses, "accuracy")
    drawn = {axes.get_title(): axes for axes in figures[1].axes}
    assert list(drawn["old: forgetting"].lines[1].get_ydata()) == pytest.approx([0, -0.15, -0.27, -0.3])
    assert list(drawn["target: learning"].lines[0].get_ydata()) == [0, 0.5, 0.9, 1]
    line, end = drawn["learned against old"].lines[2:4]
    assert list(line.get_xdata()) == pytest.approx([0, -0.15, -0.27, -0.3])
    assert (end.get_xdata()[0], end.get_ydata()[0]) == pytest.approx((-0.3, 1.0))


# -- drawing -----------------------------------------------------------------------------------------------------------


def write_run(path, label, sign, kinds=("query", "value"), blocks=3, steps=(2, 4)):
    layers = {
        step: {
            f"model.layers.{i}.attn.{kind}": {
                "dM": 1 + sign * 0.5 * (i + step / 10),
                "dD": 0.1 * (i + step / 10),
                "skipped": i,
            }
            for kind in kinds
            for i in range(blocks)
        }
        for step in steps
    }
    found = [{"step": step, "layers": values} for step, values in layers.items()]
    path.write_text(json.dumps({"format": records.FORMAT, "label": label, "axis": "out", "records": found}))
    return path


def test_analyse_prints_the_correlation_and_draws(tmp_path, capsys):
    """Points on a line of slope 5, and of slope -5: correlation +1 and -1, whatever the number of panels."""
    runs = [write_run(tmp_path / "a.json", "LoRA", 1), write_run(tmp_path / "b.json", "full fine-tuning", -1)]
    assert main(["analyse", *map(str, runs), "--output", str(tmp_path / "out.png")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["LoRA", "query", "6", "1", "5"] in [line[:5] for line in lines]
    assert ["full", "fine-tuning", "value", "6", "-1", "-5"] in [line[:6] for line in lines]
    for name in ("out.png", "out-layers.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_panels_hold_every_point_and_the_fitted_line(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(picture, "save", lambda figure, path: figures.append(figure))
    runs = [records.read(write_run(tmp_path / f"{sign}.json", f"run {sign}", sign)) for sign in (1, -1)]
    fits = picture.fits(runs, ["query", "value"])
    picture.draw_scatter(tmp_path / "x.png", fits)
    panels = [axes for axes in figures[0].axes if axes.get_xlabel() == "dD"]
    assert [axes.get_title() for axes in panels] == [
        f"run {sign}, {kind}: r = {sign:+.2f}" for sign in (1, -1) for kind in ("query", "value")
    ]
    for axes, fit in zip(panels, fits, strict=True):
        points = np.concatenate([shades.get_offsets() for shades in axes.collections])
        assert sorted(map(tuple, points.tolist())) == sorted((p.direction, p.magnitude) for p in fit.points)
        (line,) = axes.lines
        assert line.get_ydata() == pytest.approx([fit.intercept + fit.slope * x for x in line.get_xdata()])
    picture.draw_layers(tmp_path / "y.png", fits)
    assert [(axes.get_title(), axes.get_ylabel(), len(axes.lines)) for axes in figures[1].axes] == [
        (kind, name, 2) for name in ("dM", "dD") for kind in ("query", "value")
    ]
    assert figures[1].axes[0].lines[0].get_ydata() == pytest.approx([1 + 0.5 * (i + 0.4) for i in range(3)])


def test_small_numbers_stay_readable(tmp_path, monkeypatch):
    """Labels of ticks are apart, and a marker in the legend is grey: the colour of a point says its layer."""
    figures = []
    monkeypatch.setattr(picture, "save", lambda figure, path: figures.append(figure))
    file = write_run(tmp_path / "a.json", "LoRA", 1)
    content = json.loads(file.read_text())
    for record in content["records"]:
        for values in record["layers"].values():
            values |= {"dM": 3e-4 * values["dM"], "dD": 1.23e-4 * values["dD"]}
    file.write_text(json.dumps(content))
    picture.draw_scatter(tmp_path / "x.png", picture.fits([records.read(file)], ["query", "value"]))
    figures[0].canvas.draw()
    for axes in figures[0].axes:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
        assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
        if axes.get_legend() is not None:
            assert all(len(set(h.get_facecolor()[0][:3])) == 1 for h in axes.get_legend().legend_handles)


def test_a_run_folder_one_module_and_zero_vectors(tmp_path, capsys):
    write_run(tmp_path / "decomposition.json", "DoRA", 1)
    command = ["analyse", str(tmp_path), "--output", str(tmp_path / "o.png"), "--modules", "value"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "query" not in out
    assert "DoRA: 6 zero vectors have no direction and were left out." in out


def test_one_point_has_no_line(tmp_path, capsys):
    file = write_run(tmp_path / "a.json", "DoRA", 1, blocks=1, steps=(4,))
    assert main(["analyse", str(file), "--output", str(tmp_path / "o.png")]) == 0
    assert "nan" in capsys.readouterr().out


def test_layers_without_a_direction_are_no_points(tmp_path):
    content = {"dM": None, "dD": None, "skipped": 4}
    file = tmp_path / "a.json"
    found = [{"step": 1, "layers": {"a": content, "b": content | {"dM": 1.0, "dD": 2.0}}}]
    file.write_text(json.dumps({"format": records.FORMAT, "label": "x", "axis": "out", "records": found}))
    run = records.read(file)
    assert [(p.kind, p.magnitude) for p in run.points] == [("b", 1.0)]
    assert run.skipped == 8


def test_names_and_numbers_of_layers():
    paths = ["layers.3.mlp.0", "embed", "layers.3.attn.out", "layers.4.attn.out", "layers.3.out"]
    kinds = records.kinds_of(paths)
    assert list(kinds.values()) == ["mlp", "embed", "attn.out", "attn.out", "layers.out"]
    assert [records.index_of(path, kinds) for path in paths] == [3, 0, 3, 4, 3]
    assert records.kinds_of(["0", "1"]) == {"0": "layer", "1": "layer"}
    assert records.index_of("embed", kinds) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist; WeightDecomposition writes decomposition.json"),
        ("{", "cannot be read"),
        ("[]", "was not written by WeightDecomposition"),
        (f'{{"format": "{records.FORMAT}"}}', "is damaged: KeyError 'records'"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, message):
    file = tmp_path / "a.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DataError, match=message):
        records.read(file)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "x.pdf"], '--output is "x.pdf"; it must end in .png.'),
        (["--modules", "qery"], '--modules names "qery". Did you mean "query"? The runs have: query, value.'),
    ],
)
def test_flags_outside_their_rules(tmp_path, capsys, flags, message):
    file = write_run(tmp_path / "a.json", "DoRA", 1)
    assert main(["analyse", str(file), *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_verb_is_light_to_import():
    heavy = "{'torch', 'matplotlib', 'lightning'}"
    code = f"import sys, ll_weight_change.verb; sys.exit(' '.join({heavy} & set(sys.modules)) or None)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")
