from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from streams import write_files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_lightning.data import Completions

WORDS = [*"abcdefgh", "good", "bad", "film", "tea", "dog", "cat", "what", "is", "the", "answer", "yes", "no", "it"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>"]
CHAT_MARKERS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SHARED = Path(os.environ.get("LORA_LIGHTNING_TEST_DATA", Path(__file__).parents[3] / "shared"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def save_tokenizer(folder: Path, template: str, **special: Any) -> str:
    """A word-level tokenizer; a word's id is its place in SPECIAL + WORDS."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        tokens = [(word, vocabulary[word]) for word in template.split() if word in vocabulary]
        pair = f"{template} $B:1 [SEP]:1" if "[SEP]" in template else None
        backend.post_processor = processors.TemplateProcessing(single=template, pair=pair, special_tokens=tokens)
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def encoder_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("encoder")
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return save_tokenizer(folder, "[CLS] $A [SEP]", model_input_names=names, **special)


@pytest.fixture(scope="session")
def causal_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("causal"), "<s> $A", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def bare_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Without a start token, as GPT-2's."""
    return save_tokenizer(tmp_path_factory.mktemp("bare"), "", eos_token="</s>")


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"no test data in {SHARED}; set LORA_LIGHTNING_TEST_DATA")
    return SHARED


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], str]:
    """Write text, or rows as JSON, to a file of the test's folder; returns its path."""

    def write(name: str, content: Any) -> str:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def stream_folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "many")


@pytest.fixture
def make_stream(stream_folder, causal_tokenizer):
    def make(workers: int = 0, ranks: tuple[int, int] = (1, 0), window: int = 1, kind=Completions, **settings):
        settings = {"train": str(stream_folder), "batch_size": 2, "shuffle_block": 4, "max_length": 16, **settings}
        common = {"tokenizer": causal_tokenizer, "validation_fraction": 0.0, "num_workers": workers, "streaming": True}
        data = kind(**{**common, **settings})
        data.trainer = SimpleNamespace(
            distributed_sampler_kwargs={"num_replicas": ranks[0], "rank": ranks[1]},
            accumulate_grad_batches=window,
            limit_train_batches=1.0,
            max_steps=100,
        )
        data.setup("fit")
        return data

    return make


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A folder with a tokenizer of one token a byte, and chat markers; `start` puts <s> before every text."""

    def make(start: bool = False, markers: bool = True, template: str | None = None) -> str:
        special = ["<s>", "</s>", *(CHAT_MARKERS if markers else [])]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({letter: n for n, letter in enumerate([*special, *alphabet])}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        if start:
            backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        folder = tmp_path_factory.mktemp("letters")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", extra_special_tokens=special[2:]
        )
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make
