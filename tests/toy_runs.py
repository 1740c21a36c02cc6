"""Small real trainings: a random BERT with a tokenizer on disk, labelled text in a file, a bare trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from lora_lightning.callbacks.resume import ExactResume  # noqa: F401 - re-exported for tests
from lora_lightning.data import Completions, LabelledText
from lora_lightning.training.module import AdapterModule

WORDS = [f"w{i}" for i in range(40)]


def save_tokenizer(folder: Path, more: int = 0) -> None:
    words = [*WORDS, *(f"x{i}" for i in range(more))]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(folder)


def encoder_folder(folder: Path, labels: int = 3, dropout: float = 0.1) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def decoder_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def experts_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=12,
        num_local_experts=3,
        num_experts_per_tok=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def labelled_file(path: Path, rows: int = 60, labels: int = 3, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    lines = ["text,label"]
    for row in range(rows):
        label = row % labels
        words = [WORDS[int(i)] for i in torch.randint(0, 12, (int(torch.randint(3, 9, (1,), generator=generator)),))]
        lines.append(f"{WORDS[20 + label]} {' '.join(words)},c{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


def completion_file(path: Path, rows: int = 24, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    lines = ["prompt,completion"]
    for _ in range(rows):
        counts = torch.randint(2, 9, (2,), generator=generator).tolist()
        texts = [" ".join(WORDS[int(i)] for i in torch.randint(0, 30, (n,), generator=generator)) for n in counts]
        lines.append(",".join(texts))
    path.write_text("\n".join(lines) + "\n")
    return path


def classification(folder: Path, method: Any, **options: Any) -> AdapterModule:
    settings = {"targets": ["query", "value"], "linear_baseline": False, "seed": 1, **options}
    return AdapterModule(str(folder), method, **settings)


def labelled_data(folder: Path, **options: Any) -> LabelledText:
    file = folder / "train.csv"
    if not file.exists():
        labelled_file(file)
    return LabelledText(train=str(file), validation=str(file), tokenizer=str(folder), **{"batch_size": 4, **options})


def completion_data(folder: Path, **options: Any) -> Completions:
    file = folder / "pairs.csv"
    if not file.exists():
        completion_file(file)
    settings = {"train": str(file), "batch_size": 4, **options}
    return Completions(validation=str(file), tokenizer=str(folder), **settings)


def trainer(folder: Path, callbacks: list[Any] | None = None, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 2,
        "max_steps": 12,
    }
    with warnings.catch_warnings():
        return Trainer(callbacks=callbacks, **{**settings, **options})
