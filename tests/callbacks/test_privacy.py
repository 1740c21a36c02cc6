"""Private gradients against example after example, and the account against a closed form."""

from __future__ import annotations

import builtins
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from resuming import SaveAt, assert_equal_runs, run
from toy_runs import classification, encoder_folder, labelled_data, trainer

from ll_ffa_lora import FFALoRA
from ll_lora import LoRA
from lora_lightning.callbacks import FederatedRounds, PrivateGradients
from lora_lightning.errors import SettingsError


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder"), dropout=0.0)


def module(encoder, **options):
    optimizer = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    return classification(encoder, LoRA(rank=2, train="B"), **{"optimizer": optimizer, "dtype": "float64", **options})


class Gradients(SaveAt):
    """Keeps the gradients of the first step, and the batches it was taken on."""

    phase = 9

    def __init__(self):
        self.batches, self.found = [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.batches.append(batch)

    def on_train_batch_end(self, *_):
        pass

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.found is None:
            self.found = {name: p.grad.clone() for name, p in pl_module.net.named_parameters() if p.requires_grad}
            self.weights = {name: value.clone() for name, value in pl_module.net.state_dict().items()}


def private_step(encoder, tmp_path, examples=3, **settings):
    watch, own = Gradients(), module(encoder)
    callbacks = [PrivateGradients(**settings), watch]
    run(own, labelled_data(encoder, batch_size=1), tmp_path, callbacks, max_steps=1, accumulate_grad_batches=examples)
    return own, watch


def by_example(own, watch, clip):
    """Mean of clipped gradients, one backward after the other."""
    own.net.load_state_dict(watch.weights)
    trained = {name: p for name, p in own.net.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    norms = []
    for batch in watch.batches:
        own.net.zero_grad()
        logits = own.net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in trained.values() if p.grad is not None))
        norms.append(norm)
        for name, p in trained.items():
            if p.grad is not None:
                total[name] += min(1.0, clip / norm) * p.grad
    return {name: value / len(watch.batches) for name, value in total.items()}, norms


@pytest.mark.parametrize("clip", [0.05, 1e3])
def test_clipped_gradients_equal_dense_float64_ones(clip):
    """Of a linear model on squared loss: g_i = 2 (w x_i + b - y_i) (x_i, 1)."""
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    schedule, open_window = PrivateGradients(clip=clip, noise_multiplier=0.0), [True] * 4 + [False]
    schedule.module = model
    for row in range(5):
        (((model(x[row]) - y[row]) ** 2).sum() / 5).backward()  # as Lightning divides it
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(_should_accumulate=lambda row=row: open_window[row]))
        run = SimpleNamespace(accumulate_grad_batches=5, fit_loop=loop, global_step=0)
        schedule.on_after_backward(run, model)
        assert (model.weight.grad is None) == (row < 4)
    w, b = model.weight.detach()[0], model.bias.detach()
    errors = 2 * (x @ w + b - y)
    each = torch.cat([errors[:, None] * x, errors[:, None]], dim=1)
    each *= (clip / each.norm(dim=1, keepdim=True)).clamp(max=1.0)
    found = torch.cat([model.weight.grad[0], model.bias.grad])
    torch.testing.assert_close(found, each.mean(0), rtol=1e-10, atol=1e-12)
    assert (each.norm(dim=1) < clip * (1 - 1e-9)).any() == (clip > 1)


@pytest.mark.slow
@pytest.mark.parametrize("clip", [0.3, 1e3])
def test_the_gradient_is_the_mean_of_clipped_ones(encoder, tmp_path, clip):
    own, watch = private_step(encoder, tmp_path, clip=clip, noise_multiplier=0.0)
    expected, norms = by_example(own, watch, clip)
    assert len(norms) == 3
    assert (min(norms) > clip) == (clip == 0.3)
    for name, value in expected.items():
        torch.testing.assert_close(watch.found[name], value, rtol=1e-5, atol=1e-8)  # the loss is one in float32


@pytest.mark.slow
def test_noise_has_the_asked_deviation_and_follows_from_the_seed(encoder, tmp_path):
    plain = private_step(encoder, tmp_path, clip=0.5, noise_multiplier=0.0)[1].found
    noisy, again, other = (
        private_step(encoder, tmp_path, clip=0.5, noise_multiplier=2.0, seed=seed)[1].found for seed in (0, 0, 1)
    )
    difference = torch.cat([(noisy[name] - value).flatten() for name, value in plain.items()])
    assert float(difference.std()) == pytest.approx(2.0 * 0.5 / 3, rel=0.1)
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / len(difference) ** 0.5
    assert all(torch.equal(value, again[name]) for name, value in noisy.items())
    assert not any(torch.equal(value, other[name]) for name, value in noisy.items())


def account(schedule, steps, rows=(40,), examples=40, clients=None):
    """A schedule that has seen some steps, without a model."""
    module = torch.nn.Linear(1, 1)
    federated = FederatedRounds(clients, 1) if clients else None
    if federated:
        federated.rows = list(rows)
    schedule.module, schedule.total = module, steps
    schedule.trainer = SimpleNamespace(
        precision_plugin=None,
        world_size=1,
        callbacks=[federated] if federated else [],
        datamodule=SimpleNamespace(examples=lambda split: range(rows[0])),
        accumulate_grad_batches=examples,
        log_every_n_steps=1,
    )
    schedule.on_start(steps, {})
    for step in range(1, steps + 1):
        schedule.on_stepped(step, {})
    return schedule


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning")
def test_with_all_rows_in_a_step_the_account_is_the_closed_form():
    """Renyi divergence of order a of T Gaussian mechanisms: a T / (2 sigma^2); turned into (epsilon, delta)."""
    schedule = account(PrivateGradients(clip=1.0, noise_multiplier=3.0), steps=8)
    orders = [1 + x / 10.0 for x in range(1, 100)] + list(range(12, 64))

    def epsilon(a):
        return a * 8 / (2 * 3.0**2) - (math.log(1e-5) + math.log(a)) / (a - 1) + math.log((a - 1) / a)

    assert schedule.metrics()["epsilon"] == pytest.approx(min(map(epsilon, orders)), rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning")
def test_each_client_has_an_account_and_the_largest_counts():
    schedule = account(PrivateGradients(clip=1.0, noise_multiplier=1.0), 6, rows=(400, 40), examples=4, clients=2)
    opacus = pytest.importorskip("opacus.accountants")
    few, many = (opacus.create_accountant("rdp") for _ in range(2))
    for _ in range(3):
        few.step(noise_multiplier=1.0, sample_rate=0.1)
        many.step(noise_multiplier=1.0, sample_rate=0.01)
    assert schedule.spent == few.get_epsilon(delta=1e-5) > many.get_epsilon(delta=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning")
def test_noise_that_is_found_for_an_epsilon_spends_it():
    schedule = account(PrivateGradients(clip=1.0, epsilon=3.0), steps=20, rows=(400,), examples=20)
    assert 2.9 < schedule.spent <= 3.01
    assert schedule.sigma > 0.5


@pytest.mark.slow
def test_without_noise_nothing_is_private():
    assert account(PrivateGradients(clip=1.0, noise_multiplier=0.0), 2).spent == math.inf


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning")
@pytest.mark.parametrize(("step", "batch"), [(1, 1), (3, 2), (4, 1)])
def test_a_run_of_private_clients_resumes_exactly_inside_a_window(encoder, tmp_path, step, batch):
    saved = tmp_path / "saved.ckpt"
    method = FFALoRA(rank=2, clients=2, local_steps=2, moments="keep", clip=0.5, noise_multiplier=1.0)

    def at(trainer, batch_idx):
        return trainer.global_step == step and (batch_idx + 1) % 3 == batch

    results = []
    for number, (extra, checkpoint) in enumerate([([SaveAt(saved, at)], None), ([], saved)]):
        own, source = classification(encoder, method), labelled_data(encoder, batch_size=1)
        options = {"checkpoint": checkpoint, "seed": 3 if not number else 77, "max_steps": 8}
        results.append(run(own, source, tmp_path / str(number), extra, accumulate_grad_batches=3, **options))
    assert_equal_runs(*results)


@pytest.mark.slow
def test_a_batch_of_several_examples_is_refused(encoder, tmp_path):
    fit = trainer(tmp_path, [PrivateGradients(clip=1.0, noise_multiplier=1.0)], max_steps=1)
    with pytest.raises(SettingsError, match=r"a batch holds 4; set data.batch_size to 1 and trainer.accumulate"):
        fit.fit(module(encoder), datamodule=labelled_data(encoder))


@pytest.mark.slow
def test_scaled_gradients_several_processes_and_unbounded_runs_are_refused():
    schedule = PrivateGradients(clip=1.0, noise_multiplier=1.0)
    account(schedule, 0)
    schedule.trainer.precision_plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(
        SettingsError, match=r'PrivateGradients.clip is 1.0; gradients are scaled under 16-mixed; take "bf'
    ):
        schedule.on_start(4, {})
    schedule.trainer.precision_plugin, schedule.trainer.world_size = None, 2
    with pytest.raises(SettingsError, match=r"gradients of several processes are summed; use one"):
        schedule.on_start(4, {})
    found = PrivateGradients(clip=1.0, epsilon=2.0)
    found.module, found.trainer = schedule.module, schedule.trainer
    found.trainer.world_size = 1
    with pytest.raises(SettingsError, match=r"epsilon is 2.0, but nothing bounds the run; set max_steps"):
        found.on_start(None, {})


def test_without_opacus_the_error_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("opacus"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SettingsError, match=r'with Opacus: pip install "lora-lightning\[federated\]"'):
        PrivateGradients(clip=1.0, noise_multiplier=1.0).check_run(4, [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": 0.0, "noise_multiplier": 1.0}, r"PrivateGradients.clip is 0.0; it must be above 0"),
        ({"clip": 1.0}, r"PrivateGradients.epsilon is None; noise_multiplier is None; give one of the two"),
        ({"clip": 1.0, "noise_multiplier": 1.0, "epsilon": 2.0}, r"epsilon is 2.0; noise_multiplier is 1.0; give one"),
        ({"clip": 1.0, "noise_multiplier": -1.0}, r"noise_multiplier is -1.0; it must be at least 0"),
        ({"clip": 1.0, "epsilon": 0.0}, r"epsilon is 0.0; it must be above 0"),
        ({"clip": 1.0, "epsilon": 1.0, "delta": 1.0}, r"delta is 1.0; it must lie in \(0, 1\)"),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        PrivateGradients(**settings)
