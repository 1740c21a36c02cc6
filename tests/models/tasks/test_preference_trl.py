"""The losses of preference and reward, and their gradients, beside trl's own trainers on trl's own batches."""

from __future__ import annotations

import copy
import importlib.util

import datasets
import pytest
import torch
from toy_runs import decoder_folder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lora_lightning.models.tasks import find_task

pytestmark = [
    pytest.mark.slow,  # importing trl takes longer than all of this
    pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="trl is not installed (pip install --no-deps trl)"),
    pytest.mark.filterwarnings("ignore"),  # its own
]

ROWS = [
    {"prompt": "w1 w2 w3", "chosen": " w4 w5", "rejected": " w6 w7 w8 w9"},
    {"prompt": "w1 w3", "chosen": " w4 w5 w9 w2 w2", "rejected": " w6"},
    {"prompt": "w8 w8 w7 w1", "chosen": " w30", "rejected": " w31 w2"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return decoder_folder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def models(folder):
    """A policy, and the reference that it has moved away from."""
    policy = AutoModelForCausalLM.from_pretrained(folder)
    reference = copy.deepcopy(policy)
    moved(policy)
    return policy, reference


def moved(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)


def started(kind, config, tmp_path, folder, model, rows=ROWS, options=None, **settings):
    """A trainer of trl's on these rows, and its first batch."""
    args = config(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=len(rows),
        max_length=32,
        **settings,
    )
    table, tokenizer = datasets.Dataset.from_list(rows), AutoTokenizer.from_pretrained(folder)
    trainer = kind(model=model, args=args, train_dataset=table, processing_class=tokenizer, **(options or {}))
    return trainer, next(iter(trainer.get_train_dataloader()))


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def assert_same(model, theirs, task, batch):
    """Ours has trl's loss and gradients."""
    model.zero_grad()
    theirs.backward()
    expected = gradients(model)
    model.zero_grad()
    loss = task.loss(task.logits(model, batch), batch)
    mean = loss.total / loss.count
    mean.backward()
    torch.testing.assert_close(mean, theirs.reshape(()), atol=1e-5, rtol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in expected) > 1e-4
    for ours, gradient in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, gradient, atol=1e-5, rtol=1e-5)


def sides(ids, mask, completion):
    """Texts of two sides as our batches have them."""
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(completion == 0, -100),
        "sides": torch.tensor(2),
    }


@torch.no_grad()
def with_reference(task, reference, batch):
    return {**batch, "reference": task.reference(task.logits(reference, batch))} if task.needs_reference else batch


DPO = {
    "dpo": ({"loss_type": ["sigmoid"], "beta": 0.3}, {"loss_type": "dpo", "beta": 0.3}, ROWS),
    "dpo, one pair, smoothed": (
        {"loss_type": ["aot_unpaired"], "beta": 0.3, "label_smoothing": 0.1},  # of one pair, the conservative loss
        {"loss_type": "dpo", "beta": 0.3, "label_smoothing": 0.1},
        ROWS[:1],
    ),
    "dpo of means": (
        {"loss_type": ["sigmoid_norm"], "beta": 2.0},
        {"loss_type": "dpo", "beta": 2.0, "average_log_prob": True},
        ROWS,
    ),
    "ipo": ({"loss_type": ["ipo"], "beta": 0.2}, {"loss_type": "ipo", "beta": 0.2}, ROWS),
    "without a reference": (
        {"loss_type": ["sigmoid"], "beta": 0.3},
        {"loss_type": "dpo", "beta": 0.3, "reference_free": True},
        ROWS,
    ),
}


@pytest.mark.parametrize("name", DPO)
def test_losses_with_a_reference(name, folder, models, tmp_path):
    from trl import DPOConfig, DPOTrainer

    theirs, settings, rows = DPO[name]
    policy, reference = models
    trainer, batch = started(
        DPOTrainer, DPOConfig, tmp_path, folder, policy, rows, {"ref_model": copy.deepcopy(reference)}, **theirs
    )
    task = find_task("preference", settings)
    ours = sides(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    if task.reference_free:
        trainer.precompute_ref_logps = True
        batch |= {"ref_chosen_logps": torch.zeros(len(rows)), "ref_rejected_logps": torch.zeros(len(rows))}
    loss = trainer._compute_loss(policy, batch, False)
    assert_same(policy, loss, task, with_reference(task, reference, ours))


@pytest.mark.parametrize("name", ["orpo", "simpo"])
def test_losses_without_a_reference(name, folder, models, tmp_path):
    if name == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer

        theirs = {"beta": 0.4}
        settings = {"loss_type": "orpo", "beta": 0.4, "likelihood": "text"}
    else:
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer

        theirs = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.0, "label_smoothing": 0.1}
        settings = {"loss_type": "simpo", "beta": 2.0, "gamma": 0.7, "label_smoothing": 0.1}
    policy, _ = models
    trainer, batch = started(Trainer, Config, tmp_path, folder, policy, **theirs)
    joined = trainer.concatenated_inputs(batch, padding_value=0)
    ids, labels = joined["concatenated_input_ids"], joined["concatenated_labels"]
    ours = sides(ids, joined["concatenated_attention_mask"], labels != -100)
    loss, _ = trainer.get_batch_loss_metrics(policy, batch)
    assert_same(policy, loss, find_task("preference", settings), ours)


def test_the_loss_of_completions_with_labels(folder, models, tmp_path):
    from trl import KTOConfig, KTOTrainer

    reference, policy = models  # so that the completions are likelier than to the reference
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in ROWS
        for side in ("chosen", "rejected")
    ]
    options = {"ref_model": copy.deepcopy(reference)}
    weights = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    trainer, batch = started(KTOTrainer, KTOConfig, tmp_path, folder, policy, rows[:5], options, **weights)
    width = max(batch["input_ids"].shape[1], batch["KL_input_ids"].shape[1])

    def both(name):
        parts = [
            torch.nn.functional.pad(batch[f"{k}{name}"], (0, width - batch[f"{k}{name}"].shape[1])) for k in ("", "KL_")
        ]
        return torch.cat(parts)

    ours = sides(both("input_ids"), both("attention_mask"), both("completion_mask"))
    ours["desirable"] = torch.as_tensor(batch["label"]).long()
    task = find_task("preference", {"loss_type": "kto", **weights})
    loss = trainer._compute_loss(policy, batch, False)
    assert trainer._metrics["eval"]["kl"][0] > 0.1
    assert_same(policy, loss, task, with_reference(task, reference, ours))


@pytest.mark.parametrize("center", [0.0, 0.01])
def test_the_reward_loss(center, folder, tmp_path):
    from trl import RewardConfig, RewardTrainer

    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    moved(model)
    trainer, batch = started(
        RewardTrainer, RewardConfig, tmp_path, folder, model, center_rewards_coefficient=center or None
    )
    ours = {**batch, "sides": torch.tensor(2)}
    assert_same(model, trainer.compute_loss(model, dict(batch)), find_task("reward", {"center": center}), ours)
