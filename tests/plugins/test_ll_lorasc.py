"""LoRASC around other methods, and SlowFast around other optimizers."""

from __future__ import annotations

import io
import json

import pytest
import torch
from resuming import SaveAt, assert_equal_runs, at_step, run
from safetensors.torch import load_file
from toy_runs import classification, encoder_folder, labelled_data, labelled_file

import lora_lightning as ll
from ll_dora import DoRA
from ll_lora import LoRA
from ll_lorasc import LoRASC
from ll_lorasc.optim import SlowFast
from ll_riemannian_moe import MoELoRA
from lora_lightning.adapters.folded import DenseUpdate, FactoredUpdate
from lora_lightning.callbacks import Cascade
from lora_lightning.cli.main import main
from lora_lightning.errors import ExportError, SettingsError
from lora_lightning.injection.probe import Probe
from lora_lightning.injection.records import adapters_named, iter_adapters
from lora_lightning.methods import Method, plain_settings, replace
from lora_lightning.optim.warmup import StageEnds, WarmUp, factor
from lora_lightning.plugins import registry, restore_settings
from lora_lightning.storage.stored import read_folder
from lora_lightning.testing import MethodContract, TinyMLP, tiny_encoder

TOKENS = torch.tensor([[1, 5, 7, 2], [1, 9, 2, 0]])


class TestLoRASCOfLoRA(MethodContract):
    method = LoRASC(inner=LoRA(rank=2, alpha=4.0), stage_steps=2)
    repeated = ("test_compiles",)


@pytest.mark.slow  # DoRA's adapters, as TestDoRA has them
class TestLoRASCOfDoRA(MethodContract):
    method = LoRASC(inner=DoRA(rank=2, alpha=4.0), blend=1.0, noise=0.0)


def test_provided_by_its_plugin():
    assert registry().providers["LoRASC"].plugin == "ll_lorasc"


# -- the wrapper -------------------------------------------------------------------------------------------------------


def test_every_question_goes_to_the_method_inside():
    """A question added to Method must be handed on, unless the wrapper answers it itself."""
    asked = []

    class Inside(LoRA):
        def __getattribute__(self, name):
            asked.append(name)
            return super().__getattribute__(name)

    questions = [name for name in vars(Method) if callable(getattr(Method, name)) and not name.startswith("_")]
    assert {"build", "param_groups", "optimizer", "callbacks", "penalty", "report"} <= set(questions)
    method = LoRASC(inner=Inside(rank=2))
    model = TinyMLP()
    ll.inject(model, method, also_train=())
    adapters = adapters_named(model, "default")
    for name in set(questions) - {"report"}:  # answered by itself
        asked.clear()
        arguments = {
            "build": [next(iter_adapters(model))[1].base_layer],
            "plan": [model, {}, Probe()],
            "initialize": [adapters, Probe()],
            "link": [model, adapters],
            **{question: [] for question in ("optimizer", "callbacks", "probe_batches")},
        }.get(name, [adapters])
        getattr(method, name)(*arguments)
        assert name in asked, name


def test_settings_inside_settings_travel_as_plain_data():
    method = LoRASC(inner=DoRA(rank=3), stage_steps=4)
    plain = plain_settings(method)
    assert plain["inner"] == {"class_path": "DoRA", "init_args": plain_settings(DoRA(rank=3))}
    assert restore_settings(LoRASC, "settings", plain) == method
    assert replace(method, "overrides", {"inner": {"rank": 1}}).inner == DoRA(rank=1)
    with pytest.raises(SettingsError, match=r'overrides\.inner: DoRA has no "rnak"\. Did you mean "rank"\?'):
        replace(method, "overrides", {"inner": {"rnak": 1}})


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(SettingsError, match=r"LoRASC\.inner is MoELoRA, whose update depends on the input"):
        LoRASC(inner=MoELoRA())
    with pytest.raises(SettingsError, match=r"blend is 1\.5; it must lie in \(0, 1\]"):
        LoRASC(inner=LoRA(), blend=1.5)
    with pytest.raises(SettingsError, match='rule is "ema"'):
        LoRASC(inner=LoRA(), rule="ema")  # type: ignore[arg-type]


def test_its_callback_is_a_cascade_with_its_settings():
    method = LoRASC(inner=LoRA(), blend=0.3, rule="outer_step", noise=0.2, stage_steps=7, lr="rewarm", rewarm_steps=3)
    [cascade] = method.callbacks()
    assert isinstance(cascade, Cascade)
    for field in ("blend", "rule", "noise", "noise_mode", "stage_steps", "stage_epochs", "lr", "rewarm_steps"):
        assert getattr(cascade, field) == getattr(method, field)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder"), dropout=0.1)


METHODS = {
    "LoRA, factors": lambda: LoRASC(inner=LoRA(rank=1), noise=0.0, stage_steps=4, blend=0.5),
    "LoRA, noise": lambda: LoRASC(inner=LoRA(rank=1), noise=0.2, stage_steps=4),
    "LoRA, noise stays": lambda: LoRASC(inner=LoRA(rank=1), noise=0.2, noise_mode="persist", stage_steps=4),
    "DoRA": lambda: LoRASC(inner=DoRA(rank=2), noise=0.1, stage_steps=4, rule="outer_step"),
}


@pytest.mark.parametrize(("name", "step"), [*((name, 6) for name in METHODS), ("LoRA, noise", 4), ("DoRA", 8)])
def test_resume_in_the_middle_of_a_stage_and_at_a_stage_end(encoder, tmp_path, name, step):
    """Stages of 4 steps: every tensor, base weights included, equals the uninterrupted run."""
    saved, make = tmp_path / "saved.ckpt", METHODS[name]
    data = labelled_data(encoder)
    straight = run(classification(encoder, make()), data, tmp_path, [SaveAt(saved, at_step(step))], max_steps=10)
    module = classification(encoder, make())
    resumed = run(module, labelled_data(encoder), tmp_path, (), saved, seed=77, max_steps=10)
    assert_equal_runs(straight, resumed)
    layers = [layer for _, layer in iter_adapters(module)]
    kinds = {"LoRA, factors": FactoredUpdate, "LoRA, noise": FactoredUpdate}
    assert all(isinstance(layer.shifts["default"], kinds.get(name, DenseUpdate)) for layer in layers)
    ll.save_adapter(module.model, tmp_path / "adapter")
    assert any(".shifts.default." in key for key in read_folder(tmp_path / "adapter").tensors)
    module.model.eval()
    batch = next(iter(labelled_loader(encoder)))
    with torch.no_grad():
        expected = module.task.logits(module.model, batch)
        ll.merge(module.model)
        torch.testing.assert_close(module.task.logits(module.model, batch), expected, rtol=1e-4, atol=1e-5)


def labelled_loader(encoder):
    data = labelled_data(encoder)
    data.setup("validate")
    return data.val_dataloader()


@pytest.mark.parametrize("lr", ["continue", "rewarm", "restart"])
def test_the_rate_over_stages(encoder, tmp_path, lr):
    rates = []

    class Rates(SaveAt):
        phase = 0

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    method = LoRASC(inner=LoRA(rank=1), noise=0.0, stage_steps=4, lr=lr, rewarm_steps=2)
    module = classification(encoder, method, lr_scheduler=WarmUp(warmup_fraction=0.25, decay="linear"))
    run(module, labelled_data(encoder), tmp_path, [Rates(tmp_path / "no", lambda *_: False)], max_steps=12)
    whole = [factor(step, 12, 3, "linear") for step in range(12)]
    expected = {
        "continue": whole,
        "rewarm": [f * (1 if s < 4 else min(1.0, 0.1 + 0.9 * (s % 4) / 2)) for s, f in enumerate(whole)],
        "restart": [factor(step % 4, 4, 1, "linear") for step in range(12)],
    }[lr]
    assert rates == pytest.approx([1e-3 * f for f in expected])


def test_a_short_last_stage_restarts_over_its_own_length():
    stage_ends = StageEnds(4, "restart", 1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = WarmUp(warmup_fraction=0.0).schedule(optimizer, 6, stage_ends)
    rates = []
    for _ in range(6):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1, 0.75, 0.5, 0.25, 1, 0.5])


# -- export ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
def test_exports(tmp_path, dense):
    model = tiny_encoder()
    method = LoRASC(inner=LoRA(rank=1))
    ll.inject(model, method, ["query"], also_train=(), seed=0)
    generator = torch.Generator().manual_seed(0)
    layers = dict(iter_adapters(model))
    for layer in layers.values():
        layer.set_folded("default", (DenseUpdate if dense else FactoredUpdate)(layer.base_layer))
        for _ in range(3):
            for parameter in layer.adapter("default").parameters():
                parameter.data.normal_(0, 0.1, generator=generator)
            layer.fold("default", 0.5, "figure_ema")
        layer.adapter("default").reset(generator)
    expected = model(TOKENS).logits
    deltas = {
        path: layer.merged_weight("default", torch.float64) - layer.original_weight() for path, layer in layers.items()
    }
    if dense:
        with pytest.raises(ExportError, match="no exact low-rank form"):
            ll.export(model, tmp_path / "peft")
        report = ll.export(model, tmp_path / "peft", rank=2)
        for path, delta in deltas.items():
            energy = torch.linalg.svdvals(delta).square()
            assert report.discarded[path] == pytest.approx(float(energy[2:].sum() / energy.sum()), rel=1e-4)
    else:
        report = ll.export(model, tmp_path / "peft")
        assert not report.discarded
        fresh = tiny_encoder()
        ll.import_peft(fresh, tmp_path / "peft")
        torch.testing.assert_close(fresh(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    ll.export(model, tmp_path / "delta", format="delta")
    stored = load_file(tmp_path / "delta" / "delta.safetensors")
    for path, delta in deltas.items():
        torch.testing.assert_close(stored[f"{path}.weight"].double(), delta, rtol=0, atol=1e-6)
    ll.export(model, tmp_path / "merged", format="merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["log", "dense"])
def test_small_folded_updates_of_large_weights_are_exported_whole(tmp_path, form):
    """As after few steps: an update whose digits float32 would lose beside the weight. The reference is in float64."""
    model = tiny_encoder()
    ll.inject(model, LoRASC(inner=LoRA(rank=2, alpha=2.0)), ["query"], also_train=(), seed=0)
    updates = {}
    for path, layer in iter_adapters(model):
        with torch.no_grad():
            layer.base_layer.stored.normal_(generator=torch.Generator().manual_seed(1))
        adapter = layer.adapter("default")
        layer.set_folded("default", (FactoredUpdate if form == "log" else DenseUpdate)(layer.base_layer))
        total = torch.zeros(16, 16, dtype=torch.float64)
        for stage in range(2):
            for parameter in adapter.parameters():
                parameter.data.normal_(0, 1e-3, generator=torch.Generator().manual_seed(7 + stage))
            layer.fold("default", 0.5)
            total += 0.5 * adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
        adapter.reset(torch.Generator())
        updates[path] = total
    ll.export(model, tmp_path / "delta", format="delta")
    stored = load_file(tmp_path / "delta" / "delta.safetensors")
    report = ll.export(model, tmp_path / "peft", rank=None if form == "log" else 4)
    assert report.kind == ("exact LoRA" if form == "log" else "truncated SVD")
    for path, update in updates.items():
        found = stored[f"{path}.weight"].double()
        torch.testing.assert_close(found, update, rtol=0, atol=1e-6 * float(update.abs().max()))


# -- through the command line ------------------------------------------------------------------------------------------

PARTS = """
model:
  pretrained: {folder}
  method: {{class_path: {method}, init_args: {{rank: 2}}}}
  targets: [query, value]
  linear_baseline: false
  optimizer:
    class_path: SlowFast
    init_args:
      blend: 0.3
      every_n_steps: 2
      inner: {{class_path: LoRAPlus, init_args: {{ratio: 4, inner: {{class_path: AdamW, init_args: {{lr: 1.0e-3}}}}}}}}
data:
  class_path: LabelledText
  init_args: {{train: {folder}/train.csv, validation: {folder}/train.csv, batch_size: 4}}
trainer:
  max_steps: 6
  accelerator: cpu
  enable_progress_bar: false
  callbacks: [{{class_path: {callback}, init_args: {options}}}]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "callback", "options"),
    [
        ("DoRA", "Cascade", {"stage_steps": 3, "blend": 0.5, "rule": "figure_ema", "noise": 0.1}),
        ("LoRA", "NoiseInjection", {"strength": 0.1, "mode": "persist"}),
    ],
)
def test_each_part_from_yaml(encoder, tmp_path, monkeypatch, method, callback, options):
    """SlowFast around LoRAPlus around AdamW, and a part of LoRASC beside a method of another plugin, by short names."""
    monkeypatch.chdir(tmp_path)
    labelled_file(encoder / "train.csv")
    text = PARTS.format(folder=encoder, method=method, callback=callback, options=json.dumps(options))
    (tmp_path / "parts.yaml").write_text(text)
    assert main(["fit", "--config", "parts.yaml"]) == 0
    saved = torch.load(tmp_path / "runs" / "parts" / "001" / "last.ckpt", weights_only=True)
    [optimizer] = saved["optimizer_states"]
    rates = {group["name"]: (group["initial_lr"], group["fast_steps"]) for group in optimizer["param_groups"]}
    assert rates.items() >= {"A": (1e-3, 6), "B": (4e-3, 6), "head": (3e-3, 6)}.items()
    states = list(optimizer["state"].values())
    assert any({"slow", "exp_avg"} <= set(state) for state in states)
    assert any(name.startswith(callback) for name in saved["callbacks"])
    assert any(".shifts.default." in key and bool(value.any()) for key, value in saved["state_dict"].items())


# -- SlowFast ----------------------------------------------------------------------------------------------------------

INNER = {
    "AdamW": torch.optim.AdamW,
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
}


def gradients(steps):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(steps)]


@pytest.mark.parametrize("inner", INNER)
def test_slow_fast_equals_a_loop_written_out(inner):
    pace, every = 0.3, 2
    p, q = (torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64)) for _ in range(2))
    wrapped, plain = SlowFast([p], INNER[inner], pace, every), INNER[inner]([q])
    slow = q.detach().clone()
    for step, gradient in enumerate(gradients(7), 1):
        p.grad, q.grad = gradient.clone(), gradient.clone()
        wrapped.step()
        plain.step()
        if step % every == 0:
            slow = slow + pace * (q.detach() - slow)
            q.data.copy_(slow)
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


def test_a_blend_of_one_changes_nothing():
    p, q = (torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64)) for _ in range(2))
    wrapped, plain = SlowFast([p], torch.optim.AdamW, blend=1.0, every_n_steps=1), torch.optim.AdamW([q])
    for gradient in gradients(5):
        p.grad, q.grad = gradient.clone(), gradient.clone()
        wrapped.step()
        plain.step()
    assert torch.equal(p, q)


def test_a_closure_runs_once_with_gradients_on():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer, calls = SlowFast([p]), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert calls == [True]
    assert p[0].item() < 1


def test_slow_fast_resumes_exactly():
    def make():
        p = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
        return p, SlowFast([p], every_n_steps=3)

    def steps(p, optimizer, some):
        for gradient in some:
            p.grad = gradient.clone()
            optimizer.step()

    whole, optimizer = make()
    steps(whole, optimizer, gradients(8))
    first, optimizer = make()
    steps(first, optimizer, gradients(8)[:4])
    file = io.BytesIO()
    torch.save([first.detach(), optimizer.state_dict()], file)
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    second, optimizer = make()
    second.data.copy_(values)
    optimizer.load_state_dict(state)
    steps(second, optimizer, gradients(8)[4:])
    assert torch.equal(second, whole)


def test_a_parameter_without_a_gradient_is_left_alone():
    p, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = SlowFast([p, idle], every_n_steps=1)
    p.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(idle, torch.ones(2))
    idle.grad = torch.ones(2)
    optimizer.step()
    assert not torch.equal(idle, torch.ones(2))


def test_slow_fast_refuses_values_outside_its_rules():
    p = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(SettingsError, match=r"SlowFast\.blend is 0; it must lie in \(0, 1\]"):
        SlowFast([p], blend=0)
    with pytest.raises(SettingsError, match=r"SlowFast\.every_n_steps is 0; it must be at least 1"):
        SlowFast([p], every_n_steps=0)
