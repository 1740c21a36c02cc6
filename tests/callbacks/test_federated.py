"""Federated rounds against clients that are trained by themselves, and resumed anywhere."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from resuming import SaveAt, assert_equal_runs, at_step, run
from torch import nn
from toy_runs import classification, completion_data, decoder_folder, encoder_folder, labelled_data

from ll_lora import LoRA
from lora_lightning.callbacks import Cascade, FederatedRounds
from lora_lightning.data.batches.clients import ClientSampler, client_parts
from lora_lightning.errors import SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.records import trainable_adapters

S, LR, E = 2.0, 0.2, 3


class Loop:
    """One linear layer, driven by hand at the callback's moments."""

    def __init__(self, seed=0, momentum=0.9, rows=(30, 10), saved=None, train="B", **settings):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5, bias=False, dtype=torch.float64))
        inject(self.model, LoRA(rank=2, alpha=4.0, train=train), seed=seed)
        self.adapter = next(iter(trainable_adapters(self.model).values()))
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], LR, momentum)
        self.rounds = FederatedRounds(**{"clients": 2, "local_steps": E, **settings})
        self.rounds.rows, self.rounds.module = list(rows), self.model
        self.rounds.trainer = SimpleNamespace(optimizers=[self.optimizer], global_step=0)
        if saved is not None:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.rounds.load_state_dict(saved["rounds"])
        self.rounds.on_start(None, {})

    def step(self, t, x, y):
        self.optimizer.zero_grad()
        (self.model(x) - y).square().mean().backward()
        self.optimizer.step()
        self.rounds.on_stepped(t, {})

    def saved(self):
        state = {"model": self.model, "optimizer": self.optimizer, "rounds": self.rounds}
        return copy.deepcopy({name: part.state_dict() for name, part in state.items()})


def data(steps=18):
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        yield x, torch.randn(8, 5, generator=generator, dtype=torch.float64)


def reference(W, A, B, weights, moments):
    """Two clients of SGD with momentum on B alone, in numpy float64; the server's B after each step."""
    server, velocity, sums, states = B.copy(), np.zeros_like(B), np.zeros_like(B), [np.zeros_like(B)] * 2
    found = []
    for t, (x, y) in enumerate(((x.numpy(), y.numpy()) for x, y in data()), start=1):
        client = (t - 1) // E % 2
        if (t - 1) % E == 0:
            B, velocity = server.copy(), states[client] if moments == "keep" else np.zeros_like(B)
        error = x @ (W + S * B @ A).T - y
        velocity = 0.9 * velocity + S * (2 * error / error.size).T @ x @ A.T
        B = B - LR * velocity
        if t % E == 0:
            sums, states[client] = sums + weights[client] * B, velocity
            if client == 1:
                server, sums = sums, np.zeros_like(B)
        found.append(server if t % E == 0 else B)
    return found


@pytest.mark.parametrize("moments", ["reset", "keep"])
@pytest.mark.parametrize(("by", "weights"), [("rows", (0.75, 0.25)), ("equal", (0.5, 0.5))])
def test_two_clients_equal_a_dense_float64_reference(by, weights, moments):
    loop = Loop(weights=by, moments=moments)
    layer = loop.model[0].base
    dense = reference(
        *(t.detach().numpy() for t in (layer.weight, loop.adapter.lora_A, loop.adapter.lora_B)), weights, moments
    )
    for t, ((x, y), expected) in enumerate(zip(data(), dense, strict=True), start=1):
        loop.step(t, x, y)
        np.testing.assert_allclose(loop.adapter.lora_B.detach(), expected, atol=1e-12, rtol=0)
        assert loop.rounds.finished(t) == (t % 6 == 0)
    assert loop.rounds.metrics() == {"round": 3.0}


@pytest.mark.parametrize("stop", [2, 3, 5, 6, 7])
@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_resuming_at_any_step_equals_not_having_stopped(stop, moments):
    straight = Loop(moments=moments)
    for t, (x, y) in enumerate(data(), start=1):
        straight.step(t, x, y)
        if t == stop:
            saved = straight.saved()
    resumed = Loop(seed=5, moments=moments, saved=saved)
    for t, (x, y) in list(enumerate(data(), start=1))[stop:]:
        resumed.step(t, x, y)
    assert torch.equal(resumed.adapter.lora_B, straight.adapter.lora_B)


def test_one_client_that_keeps_its_moments_is_ordinary_training_bit_for_bit():
    loop, plain = Loop(clients=1, rows=(40,), moments="keep"), Loop()
    plain.rounds.on_stepped = lambda *_: None
    for t, (x, y) in enumerate(data(), start=1):
        loop.step(t, x, y)
        plain.step(t, x, y)
        assert torch.equal(loop.adapter.lora_B, plain.adapter.lora_B)


@pytest.mark.parametrize(("train", "exact"), [("B", True), ("both", False)])
def test_the_average_merges_to_the_average_of_merged_clients_where_A_is_frozen(train, exact):
    loop = Loop(weights="equal", train=train)
    merged = []
    for t, (x, y) in enumerate(data(6), start=1):
        if t % E == 0:
            end = loop.rounds.on_stepped
            loop.rounds.on_stepped = lambda *_: None
            loop.step(t, x, y)
            merged.append(loop.adapter.merged_weight(loop.model[0].base.weight).detach())
            loop.rounds.on_stepped = end
            end(t, {})
        else:
            loop.step(t, x, y)
    found = loop.adapter.merged_weight(loop.model[0].base.weight).detach()
    assert torch.allclose(found, (merged[0] + merged[1]) / 2, atol=1e-12, rtol=0) == exact


def test_a_step_that_was_skipped_ends_its_turn_too():
    loop = Loop()
    steps = list(data())
    for t in (1, 2):
        loop.step(t, *steps[t])
    client = loop.adapter.lora_B.detach().clone()
    loop.rounds.on_skipped(3)
    assert not loop.adapter.lora_B.any()  # the server's, for the next client
    torch.testing.assert_close(loop.rounds.state_dict()["sum"]["0.adapters.default.lora_B"], 0.75 * client)


def test_a_run_must_end_with_a_round_and_stages_are_refused():
    rounds = FederatedRounds(clients=3, local_steps=4)
    rounds.check_run(24, [])
    with pytest.raises(SettingsError, match=r"25 optimizer steps, and a round takes 12 .*; set max_steps to 24"):
        rounds.check_run(25, [])
    with pytest.raises(SettingsError, match="FederatedRounds and Cascade both end stages"):
        rounds.check_run(24, [Cascade(stage_steps=2)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clients": 0}, r"FederatedRounds.clients is 0; it must be a whole number of at least 1"),
        ({"clients": 2, "local_steps": 0}, r"FederatedRounds.local_steps is 0; it must be at least 1"),
        ({"clients": 2, "skew": 0.0}, r"FederatedRounds.skew is 0.0; it must be above 0"),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        FederatedRounds(**settings)


# -- whole runs --------------------------------------------------------------------------------------------------------


def own(folder, **options):
    optimizer = lambda params: torch.optim.SGD(params, lr=0.05)  # noqa: E731
    settings = {"dtype": "float64", "optimizer": optimizer, "head_lr_ratio": 1.0}
    return classification(folder, LoRA(rank=2, train="B"), lr_scheduler=constant(), **(settings | options))


def constant():
    from lora_lightning.optim.warmup import WarmUp

    return WarmUp(warmup_fraction=0.0, decay="constant")


@pytest.mark.slow
def test_a_run_equals_clients_that_are_trained_by_themselves(tmp_path):
    folder = encoder_folder(tmp_path / "model", dropout=0.0)
    module, source = own(folder), labelled_data(folder)
    rounds = FederatedRounds(clients=3, local_steps=2, skew=2.0)
    starts = []

    class Start(SaveAt):
        def __init__(self):
            pass

        def on_train_batch_end(self, *_):
            pass

        def on_train_start(self, trainer, pl_module):
            starts.append(copy.deepcopy(pl_module.net))

    run(module, source, tmp_path, [rounds, Start()], max_steps=12)
    (server,), examples = starts, source.examples("train")
    parts = client_parts(len(examples), 3, 0, examples["labels"][:], 2.0)
    order = list(ClientSampler(examples, parts, 4, 2, 0, num_replicas=1, rank=0))
    collate = source.collation("train", ("input_ids", "attention_mask", "labels"), None)
    batches = [collate([examples[row] for row in order[start : start + 4]]) for start in range(0, len(order), 4)]
    for number in range(2):
        clients = [copy.deepcopy(server) for _ in range(3)]
        for client, model in enumerate(clients):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
            for batch in batches[6 * number + 2 * client : 6 * number + 2 * client + 2]:
                optimizer.zero_grad()
                logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
                nn.functional.cross_entropy(logits, batch["labels"]).backward()
                optimizer.step()
        with torch.no_grad():
            for name, parameter in server.named_parameters():
                if parameter.requires_grad:
                    values = [dict(model.named_parameters())[name] for model in clients]
                    parameter.copy_(sum(len(p) / len(examples) * v for p, v in zip(parts, values, strict=True)))
    found = dict(module.net.named_parameters())
    for name, parameter in server.named_parameters():
        torch.testing.assert_close(found[name], parameter, atol=1e-8, rtol=0)  # the loss is one in float32


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 4, 6, 7])
def test_a_run_resumes_exactly_at_any_step(step, tmp_path):
    folder = encoder_folder(tmp_path / "model")
    saved = tmp_path / "saved.ckpt"
    one, two = (
        run(
            own(folder, optimizer=None),
            labelled_data(folder),
            tmp_path / str(number),
            [FederatedRounds(clients=3, local_steps=2, moments="keep"), *extra],
            checkpoint=checkpoint,
            seed=3 if not number else 77,
            max_steps=12,
        )
        for number, (extra, checkpoint) in enumerate([([SaveAt(saved, at_step(step))], None), ([], saved)])
    )
    assert_equal_runs(one, two)


@pytest.mark.slow
def test_a_run_that_is_stopped_inside_a_round_keeps_the_average_before_it(tmp_path, capsys):
    folder = encoder_folder(tmp_path / "model")

    class Stop(SaveAt):
        def __init__(self, at):
            self.at = at

        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == self.at

    states = []
    for at in (6, 9):
        module = own(folder)
        states.append(
            run(module, labelled_data(folder), tmp_path, [FederatedRounds(3, 2), Stop(at)], max_steps=12)["state"]
        )
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert "stopped inside a round" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True}, r"data.packing is true; FederatedRounds needs single rows to share out"),
        ({"streaming": True}, r"data.streaming is true; FederatedRounds needs single rows"),
        (None, r"shares out the rows of a data module of lora_lightning; this run has none"),
    ],
)
def test_data_that_cannot_be_shared_out_are_refused(options, message, tmp_path):
    data = None
    if options is not None:
        data = completion_data(decoder_folder(tmp_path / "model"))
        vars(data).update(options)
    run = SimpleNamespace(datamodule=data, callbacks=[])
    with pytest.raises(SettingsError, match=message):
        FederatedRounds(2, 2).setup(run, None, "fit")


def test_data_without_classes_cannot_differ_by_class(tmp_path):
    data = completion_data(decoder_folder(tmp_path / "model"))
    data.setup("fit")
    run = SimpleNamespace(datamodule=data, callbacks=[], accumulate_grad_batches=1)
    rounds = FederatedRounds(2, 2, skew=1.0)
    rounds.setup(run, None, "fit")
    with pytest.raises(SettingsError, match=r"FederatedRounds.skew is 1.0; the data have no classes"):
        data.train_dataloader()
    assert len(data.val_dataloader()) == 6  # other splits keep their order
    rounds.teardown(run, None, "fit")
    assert len(data.train_dataloader()) == 6
