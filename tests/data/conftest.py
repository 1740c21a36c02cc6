from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [*"abcdefgh", "good", "bad", "film", "tea", "dog", "cat", "what", "is", "the", "answer", "yes", "no", "it"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>"]
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
