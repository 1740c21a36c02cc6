from __future__ import annotations

from collections import Counter

import pytest
import torch
from resuming import SaveAt, assert_equal_runs, run
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_runs import WORDS
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from ll_lora import LoRA
from lora_lightning.data import MaskedText
from lora_lightning.data.inspect import show_examples
from lora_lightning.data.masked import Masking
from lora_lightning.errors import DataError, ModelError, SettingsError
from lora_lightning.training.module import AdapterModule

SPECIAL = ["[PAD]", "[UNK]", "[MASK]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random masked language model, its tokenizer, and 30 texts of 2 to 9 words."""
    folder = tmp_path_factory.mktemp("masked")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertForMaskedLM(BertConfig(vocab_size=50, pad_token_id=0, **sizes)).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    texts = [" ".join(WORDS[(row * 5 + i * i) % 40] for i in range(2 + row % 8)) for row in range(30)]
    (folder / "train.txt").write_text("\n".join(texts) + "\n")
    return folder


@pytest.fixture
def make(folder):
    def make(**settings) -> MaskedText:
        train = str(folder / "train.txt")
        options = {"train": train, "validation": train, "tokenizer": str(folder), "batch_size": 5, **settings}
        data = MaskedText(**options)
        data.setup("fit")
        return data

    return make


def epoch_of(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_hidden_tokens_are_drawn_by_the_published_fractions():
    masking = Masking(fraction=0.15, mask_id=2, special=frozenset({0, 1, 2}), vocabulary=1000, seed=0, split="train")
    fates, chosen, total = Counter(), 0, 0
    for index in range(400):
        row = masking({"input_ids": [0, *range(100, 140), 1], "index": index}, epoch=0)
        labels = row["labels"]
        assert labels[0] == labels[-1] == -100  # special tokens
        total += 40
        for place, label in enumerate(labels):
            if label == -100:
                assert row["input_ids"][place] == [0, *range(100, 140), 1][place]
                continue
            chosen += 1
            now = row["input_ids"][place]
            assert label == 99 + place
            fates["mask" if now == 2 else "kept" if now == label else "random"] += 1
    assert chosen / total == pytest.approx(0.15)
    assert fates["mask"] / chosen == pytest.approx(0.8, abs=0.03)
    assert fates["random"] / chosen == pytest.approx(0.1, abs=0.02)


def test_other_tokens_in_every_epoch_and_the_same_ones_in_validation(make):
    data = make()
    first, again, second = epoch_of(data, 0), epoch_of(make(), 0), epoch_of(data, 1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    hidden = [{int(label) for b in batches for label in b["labels"].flatten()} for batches in (first, second)]
    assert hidden[0] != hidden[1]
    one, two = list(data.val_dataloader()), list(data.val_dataloader())
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(one, two, strict=True))
    assert all((batch["labels"] != -100).any(1).all() for batch in one)  # no text without loss


def test_workers_change_nothing(make):
    alone, helped = make(), make(num_workers=2)
    for epoch in (0, 3):
        for one, other in zip(epoch_of(alone, epoch), epoch_of(helped, epoch), strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_windows_count_hidden_tokens(make):
    for batch in make().train_dataloader():
        assert int(batch["window_tokens"]) == int((batch["labels"] != -100).sum()) > 0


def test_texts_to_fill_are_left_as_they_are(make, tmp_path):
    file = tmp_path / "new.txt"
    file.write_text("w1 [MASK] w3\nw4 w5\n")
    data = make(predict=str(file))
    data.setup("predict")
    [batch] = data.predict_dataloader()
    assert batch["input_ids"][0].tolist() == [4, 2, 6]
    assert (batch["labels"][0] == -100).all()
    assert int((batch["labels"][1] != -100).sum()) == 1


def test_inspection_marks_what_is_read(make):
    shown = show_examples(make(), 1)
    assert "--- train example 0: 2 tokens, to be found: w" in shown
    assert "[[w" in shown


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resume_in_the_second_epoch(folder, make, tmp_path, workers):
    saved = tmp_path / "saved.ckpt"

    def fit(callbacks, checkpoint=None, seed=3):
        module = AdapterModule(str(folder), LoRA(rank=2, dropout=0.1), task="masked-lm", seed=1)
        data = make(num_workers=workers)
        return run(module, data, tmp_path, callbacks, checkpoint, seed, accumulate_grad_batches=2, max_steps=5)

    inside = SaveAt(saved, lambda trainer, batch_idx: trainer.current_epoch == 1 and batch_idx == 1)
    assert_equal_runs(fit([inside]), fit([], saved, seed=77))
    assert torch.load(saved, weights_only=True)["epoch"] == 1


def test_a_new_output_layer_must_train(folder, tmp_path):
    model = BertForMaskedLM.from_pretrained(folder)
    weights = {name: value for name, value in model.state_dict().items() if "transform" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ModelError, match=r"lacks 4 weights of BertForMaskedLM, such as cls.* also_train: \[cls\]"):
        AdapterModule(str(tmp_path), LoRA(rank=2), task="masked-lm").configure_model()
    module = AdapterModule(str(tmp_path), LoRA(rank=2), task="masked-lm", also_train=["cls.predictions.transform"])
    module.configure_model()
    training = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert "cls.predictions.transform.dense.weight" in training
    with pytest.raises(ModelError, match="lacks 4 weights"):
        AdapterModule(
            str(tmp_path), LoRA(rank=2), task="masked-lm", also_train=["cls.predictions.bias"]
        ).configure_model()


def test_settings_and_tokenizers_that_do_not_fit(make, encoder_tokenizer):
    with pytest.raises(SettingsError, match=r"MaskedText.mask_fraction is 0; it must lie in \(0, 1\)"):
        make(mask_fraction=0)
    with pytest.raises(DataError, match=r"it has no mask token, which masked-lm data hide"):
        make(tokenizer=encoder_tokenizer)
