"""The linear baseline against the same head trained by hand on features, and its silence about the run it sits in."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn
from toy_runs import classification, completion_data, decoder_folder, encoder_folder, labelled_data, trainer

from ll_lora import LoRA
from lora_lightning.injection.also_train import trained_parameters
from lora_lightning.models.anatomy import survey
from lora_lightning.models.loading import load_model
from lora_lightning.models.tasks import find_task
from lora_lightning.optim.warmup import WarmUp
from lora_lightning.training.linear_baseline import RATES, LinearBaseline, fit_baseline
from lora_lightning.training.module import AdapterModule

SCHEDULE = WarmUp(warmup_fraction=0.0, decay="constant")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder"), dropout=0.0)


def batches(encoder):
    data = labelled_data(encoder, batch_size=6)
    data.setup("fit")
    return list(data.train_dataloader()), list(data.val_dataloader())


def test_equals_the_head_trained_by_hand_on_precomputed_features(encoder):
    task = find_task("sequence-classification")
    model = load_model(str(encoder), task, 3).train()
    train, validation = batches(encoder)
    heads = trained_parameters(survey(model), "heads")
    result = fit_baseline(model, heads, task, [[b] for b in train], lambda: validation, len(train), SCHEDULE)

    def accuracy(pooler, classifier):
        right = total = 0
        for batch in validation:
            hidden = model.bert.embeddings(batch["input_ids"], token_type_ids=batch.get("token_type_ids"))
            mask = batch["attention_mask"][:, None, None, :].bool()
            features = model.bert.encoder(hidden, attention_mask=mask).last_hidden_state
            predicted = classifier(torch.tanh(pooler(features[:, 0]))).argmax(-1)
            right, total = right + int((predicted == batch["labels"]).sum()), total + len(predicted)
        return right / total

    by_rate = {}
    model.eval()
    for rate in RATES:
        pooler, classifier = copy.deepcopy(model.bert.pooler.dense), copy.deepcopy(model.classifier)
        optimizer = torch.optim.AdamW([*pooler.parameters(), *classifier.parameters()], lr=rate)
        for batch in train:
            with torch.no_grad():
                hidden = model.bert.embeddings(batch["input_ids"], token_type_ids=batch.get("token_type_ids"))
                mask = batch["attention_mask"][:, None, None, :].bool()
                features = model.bert.encoder(hidden, attention_mask=mask).last_hidden_state
            loss = nn.functional.cross_entropy(classifier(torch.tanh(pooler(features[:, 0]))), batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            by_rate[rate] = accuracy(pooler, classifier)
    assert result.by_rate == pytest.approx(by_rate, abs=1e-6)
    assert result.linear["accuracy"] == pytest.approx(max(by_rate.values()), abs=1e-6)
    with torch.no_grad():
        untrained = accuracy(model.bert.pooler.dense, model.classifier)
    assert result.untrained["accuracy"] == pytest.approx(untrained, abs=1e-6)


def test_leaves_parameters_modes_and_forwards_as_they_were(encoder):
    task = find_task("sequence-classification")
    model = load_model(str(encoder), task, 3).train()
    model.bert.embeddings.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    train, validation = batches(encoder)
    fit_baseline(
        model,
        trained_parameters(survey(model), "heads"),
        task,
        [train[:2], train[2:4]],
        lambda: validation,
        2,
        SCHEDULE,
    )
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_run_is_the_same_with_and_without_it(encoder, tmp_path):
    states, results = [], []
    for enabled in (True, False):
        seed_everything(0, verbose=False)
        module = classification(encoder, LoRA(rank=2, dropout=0.1), linear_baseline=enabled)
        run = trainer(tmp_path, max_steps=5)
        run.fit(module, datamodule=labelled_data(encoder))
        states.append(module.state_dict())
        results.append(next(c.result for c in run.callbacks if isinstance(c, LinearBaseline)))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert results[0].untrained == results[1].untrained
    assert results[0].rate in RATES
    assert results[1].linear is None


def test_a_language_model_has_no_baseline_but_a_loss_before_training(tmp_path):
    folder = decoder_folder(tmp_path)
    module = AdapterModule(str(folder), LoRA(rank=2), task="causal-lm", seed=1)
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, datamodule=completion_data(folder))
    result = next(c.result for c in run.callbacks if isinstance(c, LinearBaseline))
    assert result.linear is None
    assert result.untrained["loss"] == pytest.approx(math.log(50), abs=0.3)


def test_a_resumed_run_keeps_the_result():
    first, second = LinearBaseline(), LinearBaseline()
    from lora_lightning.training.linear_baseline import Baseline

    first.result = Baseline({"loss": 1.0}, {"loss": 0.5}, 1e-3, {1e-3: 0.5})
    second.load_state_dict(first.state_dict())
    assert second.result == first.result
