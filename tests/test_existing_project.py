"""Adapters in an existing Lightning project, that of examples/existing_project.py, and without Lightning's Trainer."""

from __future__ import annotations

import functools
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback
from peft import LoraConfig, get_peft_model
from projects import Plain, fit
from torch import nn
from torch.utils.data import DataLoader
from toy_runs import trainer

import lora_lightning as ll
from ll_lora import LoRA
from ll_lorasc.optim import SlowFast
from ll_optimizers.riemannian import RiemannianAdamW
from ll_rose import RoseLoRA
from lora_lightning import InjectAdapters, iter_adapters, load_adapter, save_adapter
from lora_lightning.callbacks import Cascade, NoiseInjection, RankPruning, SparsitySchedule
from lora_lightning.callbacks.keep_masks import keep_count, keep_top, kept_density, sensitivity
from lora_lightning.errors import AdapterStateError, NoEffectError, SettingsError, TrainingError
from lora_lightning.injection.records import trainable_adapters
from lora_lightning.optim.groups import build_optimizer, factor_pairs

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "existing_project.py"
STEPS = 8


@functools.cache
def example():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def network(kind):
    torch.manual_seed(0)
    return example().SmallCNN() if kind == "cnn" else example().SmallTransformer()


def run(module, folder, callbacks, **options):
    """A short fit of the project, with few digits to validate on."""
    done = trainer(folder, callbacks, **{"max_steps": STEPS, **options})
    done.fit(module, example().Digits(turns=1))
    return done


def lora(**options):
    settings = {"targets": r"network\.trunk\..*", "also_train": ["network.head"], "seed": 0, **options}
    return InjectAdapters(LoRA(rank=4), **settings)


@pytest.mark.parametrize("kind", ["cnn", "transformer"])
def test_rose_by_two_callbacks_and_nothing_else(tmp_path, capsys, kind):
    module = example().Project(network(kind))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    done = run(module, tmp_path, example().rose(tmp_path))
    adapters = trainable_adapters(module)
    assert len(adapters) == {"cnn": 2, "transformer": 6}[kind]
    for adapter in adapters.values():
        for entry in adapter.masks():
            rows = entry.param if entry.by_row else entry.param.mT
            assert ((rows != 0).sum(-1) <= max(1, rows.shape[-1] // 2)).all()
            assert (rows != 0).any()
    done.save_checkpoint(tmp_path / "own.ckpt")
    saved = torch.load(tmp_path / "own.ckpt", weights_only=True)["state_dict"]
    assert list(saved) == list(before)
    frozen = [name for name in before if not name.startswith("network.head.")]
    assert all(torch.equal(saved[name], before[name]) for name in frozen)
    assert not torch.equal(saved["network.head.weight"], before["network.head.weight"])
    out = capsys.readouterr().out
    assert f"RoseLoRA on {len(adapters)} layers" in out
    assert f"AdamW: {len(frozen)} frozen tensors taken out, {2 + 2 * len(adapters)} train" in out
    assert f"SparsitySchedule: acts on {len(adapters)} adapters (network.trunk." in out
    assert f"TrainingGuard: watches {2 + 2 * len(adapters)} trainable tensors (network." in out
    other = example().Project(network(kind))
    load_adapter(other, tmp_path / "adapter")
    x = torch.randn(3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(other.eval().network(x), module.eval().network(x))


def test_the_projects_own_checkpoint_is_what_it_is_without_callbacks(tmp_path):
    """With a rate of zero nothing moves: keys and tensors are equal, and there is a section more."""
    contents = []
    for callbacks in ([], [lora()]):
        module = example().Project(network("cnn"), lr=0.0)
        done = trainer(tmp_path, callbacks, max_steps=1)
        with pytest.raises(TrainingError, match="nothing was trained") if callbacks else nullcontext():
            done.fit(module, example().Digits())
        done.save_checkpoint(tmp_path / "own.ckpt")
        contents.append(torch.load(tmp_path / "own.ckpt", weights_only=True))
    without, beside = contents
    assert set(beside) == {*without, "lora_lightning"}
    assert list(beside["state_dict"]) == list(without["state_dict"])
    assert all(torch.equal(value, beside["state_dict"][name]) for name, value in without["state_dict"].items())


def test_rank_pruning(tmp_path):
    module = example().Project(network("cnn"))
    run(module, tmp_path, [lora(), RankPruning(final_rank=2)])
    assert [int(adapter.rank_mask.sum()) for adapter in trainable_adapters(module).values()] == [2, 2]


def test_noise_injection_leaves_the_weights_as_they_were(tmp_path, capsys):
    module = example().Project(network("transformer"))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            layers = iter_adapters(pl_module)
            seen.append(all(not torch.equal(layer.base.weight, before[f"{path}.weight"]) for path, layer in layers))

    run(module, tmp_path, [lora(), NoiseInjection(0.2), Look()])
    assert seen == [True] * STEPS
    for path, layer in iter_adapters(module):
        assert torch.equal(layer.base.weight, before[f"{path}.weight"])
    assert (
        "NoiseInjection: acts on 6 adapters (network.trunk.layers.0.self_attn.out_proj, ...)" in capsys.readouterr().out
    )


def test_cascade(tmp_path):
    module = example().Project(network("cnn"))
    stages = Cascade(stage_steps=4)
    run(module, tmp_path, [lora(directory=tmp_path / "adapter"), stages])
    assert stages.stage == 2
    layers = dict(iter_adapters(module))
    assert all("default" in layer.shifts and not layer.adapters["default"].lora_B.any() for layer in layers.values())
    other = example().Project(network("cnn"))
    load_adapter(other, tmp_path / "adapter")
    x = torch.randn(3, 8, 8)
    with torch.no_grad():
        assert not torch.equal(other.network.trunk(x.unsqueeze(1)), network("cnn").trunk(x.unsqueeze(1)))
        torch.testing.assert_close(other.network(x), module.network(x))


@pytest.mark.parametrize("factory", [SlowFast, RiemannianAdamW], ids=lambda factory: factory.__name__)
def test_an_optimizer_of_ours_in_the_projects_configure_optimizers(tmp_path, factory):
    """It is given `self.parameters()`, before anything is frozen out of it, and factor pairs arrive by themselves."""
    project = example().Project

    class Own(project):
        def configure_optimizers(self):
            return factory(self.parameters())

    module = Own(network("cnn"))
    done = run(module, tmp_path, [lora()])
    optimizer = done.optimizers[0]
    trained = [p for p in module.parameters() if p.requires_grad]
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in trained]
    if factory is SlowFast:
        assert all("slow" in optimizer.state[p] for p in trained)
    else:
        assert {pair.name for pair in optimizer.pairs} == {pair.name for pair in factor_pairs(module)}


def test_a_module_that_builds_lazily(tmp_path):
    project = example().Project

    class Lazy(project):
        def __init__(self):
            super().__init__(nn.Identity())

        def configure_model(self):
            if isinstance(self.network, nn.Identity):
                self.network = network("cnn")

    module = Lazy()
    run(module, tmp_path, example().rose(tmp_path))
    assert [path for path, _ in iter_adapters(module)] == ["network.trunk.0", "network.trunk.2"]


class Manual(Plain):
    """Steps its optimizers itself: the trunk's every batch, the head's every batch, or each third one only."""

    def __init__(self, split=False, head_every=1, trunk_every=1):
        super().__init__()
        self.automatic_optimization = False
        self.split, self.every = split, {"head": head_every, "trunk": trunk_every}

    def configure_optimizers(self):
        if not self.split:
            return torch.optim.SGD(self.parameters(), lr=self.lr)
        trunk = [p for name, p in self.named_parameters() if "head" not in name]
        return [torch.optim.SGD(trunk, lr=self.lr), torch.optim.SGD(self.head.parameters(), lr=self.lr)]

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        named = dict(zip(("trunk", "head"), optimizers, strict=True)) if self.split else {"trunk": optimizers}
        for name, optimizer in named.items():
            if batch_idx % self.every[name] == self.every[name] - 1:
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch))
                optimizer.step()


def pruned(module):
    adapter = next(iter(trainable_adapters(module).values()))
    return (adapter.lora_A == 0).sum(1).tolist()


def manual(**options):
    return InjectAdapters(RoseLoRA(rank=2), **{"targets": ["used"], "also_train": ["head"], **options})


def test_manual_optimization(tmp_path):
    module = Manual()
    fit(module, tmp_path, [manual(), SparsitySchedule(sparsity=0.5)], max_steps=8)
    assert pruned(module) == [2, 2]


@pytest.mark.parametrize(("head_every", "trunk_every"), [(1, 1), (1, 2), (3, 1)])
def test_several_optimizers_a_schedule_follows_those_of_its_adapters(tmp_path, head_every, trunk_every):
    """The trunk's gradients enter the average once a step of the trunk's optimizer, with the weights they come from."""
    averages = []

    class Watched(SparsitySchedule):
        def on_gradients(self, step, adapters):
            expected = [sensitivity(e.param, e.param.grad) for a in adapters.values() for e in a.masks()]
            super().on_gradients(step, adapters)
            averages.append((step, expected))

    module = Manual(split=True, head_every=head_every, trunk_every=trunk_every)
    schedule = Watched(sparsity=0.5, beta=0.0, start=2, end=6)
    done = fit(module, tmp_path, [manual(), schedule], max_steps=12)
    steps = sum(
        batch % trunk_every == trunk_every - 1
        for batch in range(done.fit_loop.epoch_loop.batch_progress.total.completed)
    )
    assert len(averages) == steps
    for name, average in schedule.state_dict()["averages"].items():
        index = 0 if name.endswith("lora_A") else 1
        torch.testing.assert_close(average, averages[-1][1][index])
    assert pruned(module) == [2, 2]


def test_steps_that_a_module_takes_itself_are_bounded_by_max_steps_only(tmp_path):
    with pytest.raises(SettingsError, match="a fraction of all steps, but nothing bounds their number; set max_steps"):
        fit(Manual(), tmp_path, [manual(), SparsitySchedule()], max_steps=-1, max_epochs=1)
    with pytest.raises(SettingsError, match=r"Cascade\.stage_steps is None, but the steps of an epoch are not known"):
        fit(Manual(), tmp_path, [InjectAdapters(LoRA(rank=2), ["used"]), Cascade(stage_epochs=1)], max_steps=8)


def test_an_optimizer_left_with_nothing_to_train_is_named(tmp_path):
    with pytest.raises(
        TrainingError, match=r"all 2 parameters of the module's SGD are frozen now; name what .*also_train"
    ):
        fit(Manual(split=True), tmp_path, [manual(also_train=[])])


def test_adapters_of_peft_in_the_trunk_are_refused_and_a_merged_trunk_is_a_trunk(tmp_path):
    module = Plain()
    module.used = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    with pytest.raises(AdapterStateError, match=r"used \(PeftModel\) is peft's, .*frozen.*merge_and_unload"):
        fit(module, tmp_path, [InjectAdapters(LoRA(rank=2), also_train=["head"])])
    module.used = module.used.merge_and_unload()
    fit(module, tmp_path, [InjectAdapters(LoRA(rank=2), targets=["used.0"], also_train=["head"])])
    assert [path for path, _ in iter_adapters(module)] == ["used.0"]


@pytest.mark.parametrize(
    ("callback", "question"),
    [
        (SparsitySchedule(), r"entry masks \(masks\(\)\)"),
        (RankPruning(1), r"a rank mask"),
        (NoiseInjection(), r"a frozen weight beneath"),
        (Cascade(stage_steps=2), r"an update that does not depend on the input"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_callback_without_adapters_to_act_on_is_an_error(tmp_path, callback, question):
    with pytest.raises(NoEffectError, match=f"{type(callback).__name__} found nothing to act on: .*{question}"):
        fit(Plain(), tmp_path, [callback])


# -- without the Trainer ---------------------------------------------------------------------------------------------


def batches(steps):
    images, labels = example().Digits(turns=1).train.tensors
    return [(images[32 * i : 32 * (i + 1)], labels[32 * i : 32 * (i + 1)]) for i in range(steps)]


def test_a_plain_loop_over_the_pure_functions_equals_the_callback(tmp_path):
    """Same batches, same optimizer: the loop that prunes by hand ends with the callback's tensors, bit for bit."""
    data = batches(STEPS)
    project = example().Project

    class Own(project):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    theirs = Own(network("cnn"))
    method = RoseLoRA(rank=2, sparsity=0.5, start=2, end=6)
    options = {"targets": r"network\.trunk\..*", "also_train": ["network.head"], "seed": 3}
    done = trainer(tmp_path, [InjectAdapters(method, **options)], max_steps=STEPS)
    done.fit(theirs, DataLoader(data, batch_size=None), DataLoader(data[:1], batch_size=None))

    model = nn.ModuleDict({"network": network("cnn")})
    ll.inject(model, method, **options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    entries = [entry for adapter in trainable_adapters(model).values() for entry in adapter.masks()]
    average = [torch.zeros_like(entry.param) for entry in entries]
    for step, (x, y) in enumerate(data, 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model["network"](x), y).backward()
        for mean, entry in zip(average, entries, strict=True):
            mean.lerp_(sensitivity(entry.param, entry.param.grad), 1 - method.beta)
        optimizer.step()
        share = kept_density(step, 2, 6, 1 - method.sparsity)
        for mean, entry in zip(average, entries, strict=True) if share < 1 else ():
            rows = mean if entry.by_row else mean.mT
            kept = keep_top(rows, keep_count(share, rows.shape[-1]))
            with torch.no_grad():
                entry.param.mul_(kept if entry.by_row else kept.mT)
    expected = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(found) == list(expected)
    assert all(torch.equal(p, expected[name]) for name, p in found.items())
    assert any((entry.param == 0).any() for entry in entries)


def test_fabric(tmp_path):
    """Adapters are injected before `setup`; save_adapter and Fabric's own checkpoints both hold the wrapped model's."""
    fabric = Fabric(accelerator="cpu", devices=1)
    plain = network("cnn")
    model = network("cnn")
    ll.inject(model, LoRA(rank=2), targets=r"trunk\..*", also_train=["head"], seed=0)
    optimizer = build_optimizer(model, lambda groups: RiemannianAdamW(groups, lr=1e-2))
    wrapped, optimizer = fabric.setup(model, optimizer)
    for x, y in batches(3):
        optimizer.zero_grad()
        fabric.backward(nn.functional.cross_entropy(wrapped(x), y))
        optimizer.step()
    save_adapter(wrapped, tmp_path / "adapter")
    fabric.save(tmp_path / "own.ckpt", {"model": wrapped, "optimizer": optimizer})
    x = torch.randn(3, 8, 8)
    load_adapter(plain, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(plain(x), wrapped(x))

    again = network("cnn")
    ll.inject(again, LoRA(rank=2), targets=r"trunk\..*", also_train=["head"], seed=1)
    again_optimizer = build_optimizer(again, lambda groups: RiemannianAdamW(groups, lr=1e-2))
    again, again_optimizer = fabric.setup(again, again_optimizer)
    fabric.load(tmp_path / "own.ckpt", {"model": again, "optimizer": again_optimizer})
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    for path, value in again_optimizer.state_dict()["state"].items():
        assert torch.equal(value["exp_avg"], optimizer.state_dict()["state"][path]["exp_avg"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", "transformer"])
def test_the_script_runs(tmp_path, monkeypatch, capsys, kind):
    words = ["existing_project.py", "--model", kind, "--epochs", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith(("upright", "turned"))]
    assert len(rows) == 3
    assert all(0 <= float(value) <= 1 for value in rows)
    assert (tmp_path / "rose" / "adapter" / "adapter.safetensors").is_file()
