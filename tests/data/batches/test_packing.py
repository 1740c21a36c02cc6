"""Packing: full rows, every example once, and losses and gradients of unpacked examples."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lora_lightning.data import Completions, PlainText
from lora_lightning.data.batches.packing import PackSampler, best_fit
from lora_lightning.errors import SettingsError
from lora_lightning.models.tasks import find_task

LENGTHS = torch.randint(2, 33, (301,), generator=torch.Generator().manual_seed(0)).tolist()
ROOM = 32


def sampler(epoch: int = 0, rank: int = 0, ranks: int = 1, seed: int = 0, shuffle: bool = True) -> PackSampler:
    made = PackSampler(LENGTHS, ROOM, num_replicas=ranks, rank=rank, seed=seed, shuffle=shuffle)
    made.set_epoch(epoch)
    return made


def flat(packs) -> list[int]:
    return [row for pack in packs for row in pack]


def test_best_fit_by_hand():
    assert best_fit([7, 5, 4, 3, 1], 8) == [[0, 4], [1, 3], [2]]
    assert best_fit([8, 8], 8) == [[0], [1]]
    assert best_fit([], 8) == []


def test_rows_are_never_too_long_and_nearly_full():
    rows = list(sampler())
    assert sorted(flat(rows)) == list(range(301))
    sums = [sum(LENGTHS[example] for example in row) for row in rows]
    assert max(sums) <= ROOM
    assert len(rows) <= 1.02 * math.ceil(sum(LENGTHS) / ROOM)


def test_order_is_a_function_of_seed_and_epoch_and_every_epoch_is_as_long():
    assert list(sampler()) == list(sampler())
    orders = [list(sampler(epoch, seed=seed)) for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    assert {len(order) for order in orders} == {len(sampler())}
    assert {tuple(sorted(row)) for row in orders[0]} != {tuple(sorted(row)) for row in orders[1]}


def test_processes_have_as_many_rows_and_all_examples():
    rows = [list(sampler(3, rank, 2)) for rank in range(2)]
    assert len(rows[0]) == len(rows[1])
    whole = list(sampler(3))
    assert [row for pair in zip(*rows, strict=True) for row in pair][: len(whole)] == whole  # an odd number: one twice


def test_unshuffled_order_is_the_same_in_every_epoch():
    assert list(sampler(0, shuffle=False)) == list(sampler(1, shuffle=False))


# -- batches -----------------------------------------------------------------------------------------------------------

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "good", "bad", "film", "tea", "dog", "cat", "what", "is", "the"]


def words(n: int, seed: int) -> str:
    chosen = torch.randint(len(WORDS), (n,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[int(i)] for i in chosen)


@pytest.fixture
def make(write, causal_tokenizer):
    rows = [{"prompt": words(1 + n % 7, n), "completion": words(1 + n % 4, n + 100)} for n in range(24)]

    def make(**settings) -> Completions:
        settings = {"max_length": 24, "batch_size": 4, "packing": True, "validation_fraction": 0.0, **settings}
        data = Completions(train=write("train.json", rows), tokenizer=causal_tokenizer, **settings)
        data.setup("fit")
        return data

    return make


def test_a_packed_batch(make):
    data = make()
    batches = list(data.train_dataloader())
    batch = batches[0]
    assert set(batch) == {"input_ids", "position_ids", "labels", "window_tokens"}
    starts = batch["position_ids"] == 0
    assert (batch["labels"][starts] == -100).all()
    assert (starts.sum(1) > 1).all()
    unpacked = make(packing=False)
    assert sum(int(one["window_tokens"]) for one in batches) == sum(
        int(one["window_tokens"]) for one in unpacked.train_dataloader()
    )
    assert len(batches) < len(list(unpacked.train_dataloader()))


def test_padding_is_no_part_of_an_example(make):
    batch = torch.nn.utils.rnn.pad_sequence([torch.arange(3), torch.arange(5)], batch_first=True)
    assert batch.tolist()[0] == [0, 1, 2, 0, 0]  # each padding token a text of its own, as position 0 says
    for one in make().train_dataloader():
        padding = (one["position_ids"] == 0) & (one["position_ids"].roll(-1, 1) == 0)
        assert (one["labels"][padding] == -100).all()


def test_validation_is_not_packed(make, write):
    rows = [{"prompt": "a b", "completion": "c"}, {"prompt": "d", "completion": "e"}]
    data = make(validation=write("dev.json", rows))
    batch = next(iter(data.val_dataloader()))
    assert len(batch["input_ids"]) == 2
    assert "position_ids" not in batch


def test_plain_text_is_packed_without_its_first_tokens(write, causal_tokenizer):
    file = write("train.txt", "\n".join(words(2 + n % 9, n) for n in range(20)))
    data = PlainText(train=file, tokenizer=causal_tokenizer, block=False, packing=True, max_length=16)
    data.setup("fit")
    for batch in data.train_dataloader():
        assert (batch["labels"][batch["position_ids"] == 0] == -100).all()
        later = batch["position_ids"] > 0
        assert (batch["labels"][later] == batch["input_ids"][later]).all()


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resume_goes_on_as_if_never_stopped(make, stop):
    def loader():
        made = make(batch_size=1).train_dataloader()
        made.sampler.set_epoch(2)
        return made

    whole = [batch["input_ids"].tolist() for batch in loader()]
    stopped = loader()
    batches = iter(stopped)
    for _ in range(stop):
        next(batches)
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    assert [batch["input_ids"].tolist() for batch in resumed] == whole[stop:]


def test_settings_that_exclude_one_another(write, causal_tokenizer):
    with pytest.raises(SettingsError, match=r"Completions\.packing is True; it leaves nothing to group_by_length"):
        Completions(packing=True, group_by_length=True)
    with pytest.raises(SettingsError, match=r"PlainText\.packing is True; documents must stay whole .* block to false"):
        PlainText(packing=True)


# -- losses ------------------------------------------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 40,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": SHAPE,
    "llama tied": {**SHAPE, "tie_word_embeddings": True},
    "gpt2": GPT2,  # learned absolute positions
    "mistral": {**SHAPE, "sliding_window": 4},
    "gemma3_text": {**SHAPE, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}


def model(name: str, attention: str):
    config = CONFIG_MAPPING[name.split()[0]](**MODELS[name])
    made = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    for parameter in made.parameters():  # at their usual size, attention hardly matters in so small a model
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def loss_and_gradients(net, batches) -> tuple[float, dict[str, torch.Tensor]]:
    task = find_task("causal-lm")
    net.zero_grad()
    losses = [task.loss(task.logits(net, batch), batch) for batch in batches]
    total = sum(loss.total for loss in losses) / sum(int(loss.count) for loss in losses)
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


EAGER = [pytest.param(name, "eager", marks=() if name == "llama" else pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize(("name", "attention"), [*((name, "sdpa") for name in MODELS), *EAGER])
def test_losses_and_gradients_are_those_of_unpacked_examples(make, name, attention):
    net = model(name, attention)
    packed, gradients = loss_and_gradients(net, make().train_dataloader())
    unpacked, expected = loss_and_gradients(net, make(packing=False, batch_size=1).train_dataloader())
    assert packed == pytest.approx(unpacked, abs=1e-5)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=0, atol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-2
