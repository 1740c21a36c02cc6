"""Rows of new tokens in peft's format: which are read, and where they go."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from class_cells import IDS as IDS_OF_CLASSES
from class_cells import scores
from model_classes import model_class
from peft_models import PEFT_WARNINGS, LoRA, llama, randomise, seeded

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError, ExportError
from lora_lightning.exporters.peft.folder import PeftFolder
from lora_lightning.exporters.peft.tokens import SETTING, fill_rows, known_tokens, names_of_rows, new_tokens, room_for
from lora_lightning.exporters.preview import refusals
from lora_lightning.models.anatomy import survey
from lora_lightning.models.new_tokens import Vocabulary, add_rows, tokenizer_files, vocabulary
from lora_lightning.testing import tiny_decoder

pytestmark = PEFT_WARNINGS
EMBEDDING = "model.embed_tokens"
SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tokenizer_of(size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, **{f"w{i}": i for i in range(1, size)}}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def tokenizer() -> Any:
    return tokenizer_of(40)


def added() -> Vocabulary:
    return Vocabulary(("<a>", "<b>"), len(tiny_decoder().get_input_embeddings().weight))


def folder(indices: Any = None, rows: Any = None) -> PeftFolder:
    return PeftFolder({SETTING: indices} if indices else {}, {}, {}, rows or {})


def test_without_the_setting_there_are_no_new_tokens(tmp_path: Path) -> None:
    assert new_tokens(tiny_decoder(), folder(), tmp_path) is None
    assert names_of_rows(survey(tiny_decoder()), folder(), {}) == []


def test_ids_beyond_the_model_need_a_tokenizer_that_has_added_them(tmp_path: Path) -> None:
    rows = {EMBEDDING: torch.zeros(2, 16)}
    with pytest.raises(
        AdapterFileError,
        match=r"no row 33 \(it has 32\), and no tokenizer .*call model\.resize_token_embeddings\(34\) first",
    ):
        new_tokens(tiny_decoder(), folder([3, 33], rows), tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        AdapterFileError, match="its tokenizer, of 40 tokens, has it not among the last that were added"
    ):
        new_tokens(tiny_decoder(), folder([3, 33], rows), tmp_path)


def test_last_tokens_are_new_ones_where_every_layer_has_their_rows(tmp_path: Path) -> None:
    """The last tokens of a pretrained tokenizer are often added ones that nobody uses."""
    reserved = tokenizer()
    reserved.add_tokens(["<a>", "<b>"])
    reserved.save_pretrained(tmp_path)
    rows = torch.zeros(3, 16)
    padded, untied = llama(tie_word_embeddings=True), llama()
    padded.resize_token_embeddings(64)
    untied.resize_token_embeddings(64)
    assert new_tokens(padded, folder([3, 40, 41], {EMBEDDING: rows}), tmp_path) == Vocabulary(("<a>", "<b>"), 40)
    one_side = folder([3, 40, 41], {EMBEDDING: rows})
    assert new_tokens(untied, one_side, tmp_path) is None
    found = known_tokens(survey(untied), one_side, None, tmp_path)
    assert {path: own.ids for path, own in found.items()} == {EMBEDDING: (3, 40, 41)}


def test_room_is_taken_back_after_an_error(tmp_path: Path) -> None:
    model = tiny_decoder()
    before = set(model.state_dict())

    def fail_inside() -> None:
        with room_for(model, added(), tmp_path) as fresh:
            assert fresh
            assert vocabulary(model) == added()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert set(model.state_dict()) == before
    with room_for(model, None, tmp_path) as fresh:
        assert not fresh


def test_rows_are_written_and_shared_ones_need_one_side_only(tmp_path: Path) -> None:
    model = tiny_decoder(tied=True)
    with room_for(model, added(), tmp_path):
        anatomy = survey(model)
    rows = torch.arange(32.0).view(2, 16)
    ids = [added().first, added().first + 1]
    assert names_of_rows(anatomy, folder(ids, {EMBEDDING: rows}), {}) == [f"{EMBEDDING}.new_rows"]
    fill_rows(anatomy, folder(ids, {EMBEDDING: rows}), tmp_path)
    assert torch.equal(model.get_parameter("lm_head.new_rows"), rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"model.embed_token": torch.zeros(2, 16)}, f'which has none here. Did you mean "{EMBEDDING}"'),
        ({EMBEDDING: torch.zeros(3, 16)}, r"the rows of model.embed_tokens are \(3, 16\); the model needs \(2, 16\)"),
        ({EMBEDDING: torch.zeros(2, 16)}, "no rows of new tokens for lm_head, which does not share others"),
    ],
)
def test_rows_that_do_not_fit(rows: Any, message: str, tmp_path: Path) -> None:
    model = tiny_decoder()
    with room_for(model, added(), tmp_path), pytest.raises(AdapterFileError, match=message):
        fill_rows(survey(model), folder([added().first, added().first + 1], rows), tmp_path)


WITH_A_BIAS = {
    "Phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SMALL)),
    "GPT-J": lambda: transformers.GPTJForCausalLM(
        transformers.GPTJConfig(
            vocab_size=40, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=32, bos_token_id=1, eos_token_id=2
        )
    ),
    "ModernBERT": lambda: transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(**SMALL, cls_token_id=1, sep_token_id=2)
    ),
    "BERT": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "ELECTRA": lambda: transformers.ElectraForMaskedLM(transformers.ElectraConfig(**SMALL, embedding_size=16)),
    "RoBERTa": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL)),
    "XLM-R": lambda: transformers.XLMRobertaForMaskedLM(transformers.XLMRobertaConfig(**SMALL)),
    "DeBERTa": lambda: transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(**SMALL)),
}
IDS = torch.tensor([[5, 40, 41, 7, 2]])


def with_biases(build: Any) -> Any:
    """A model whose biases are not the zeros that they start with."""
    model = seeded(build)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


@pytest.mark.parametrize("build", WITH_A_BIAS.values(), ids=WITH_A_BIAS)
def test_new_tokens_on_a_model_whose_output_layer_has_a_bias(build: Any, tmp_path: Path) -> None:
    """Rows of tokens alone would make peft drop that bias, or fail on it."""
    model, theirs, again = with_biases(build), with_biases(build), with_biases(build)
    ll.add_tokens(model, tokenizer(), ["<a>", "<b>"])
    ll.inject(model, LoRA(rank=2))
    randomise(model)
    report = ll.export(model, tmp_path / "out")
    assert report.verified_by.startswith("peft 0.")
    assert "whole matrices of the vocabulary are in the file" in str(report)
    expected = model.eval()(IDS)[0]
    theirs.resize_token_embeddings(42)  # as the note in the report says
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
    torch.testing.assert_close(opened(input_ids=IDS)[0], expected, atol=1e-5, rtol=1e-5)
    ll.import_peft(again, tmp_path / "out")
    assert torch.equal(again.eval()(IDS)[0], expected)


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_beside_an_embedding_that_trains(tied: bool, tmp_path: Path) -> None:
    model, theirs = llama(tie_word_embeddings=tied), llama(tie_word_embeddings=tied)
    ll.add_tokens(model, tokenizer(), ["<a>", "<b>"])
    ll.inject(model, LoRA(rank=2), targets=["q_proj"], also_train=["embed_tokens"])
    randomise(model)
    ll.export(model, tmp_path / "out")
    theirs.resize_token_embeddings(42)
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
    torch.testing.assert_close(opened(input_ids=IDS)[0], model.eval()(IDS)[0], atol=1e-5, rtol=1e-5)
    again = llama(tie_word_embeddings=tied)
    with pytest.raises(AdapterFileError, match=r"call model\.resize_token_embeddings\(42\) first"):
        ll.import_peft(again, tmp_path / "out")
    again.resize_token_embeddings(42)
    report = ll.import_peft(again, tmp_path / "out")
    assert "model.embed_tokens.weight" in report.trained
    assert torch.equal(again.eval()(IDS)[0], model(IDS)[0])


def test_whole_matrices_of_another_base_model_are_refused(tmp_path: Path) -> None:
    model = with_biases(WITH_A_BIAS["Phi"])
    ll.add_tokens(model, tokenizer(), ["<a>"])
    ll.inject(model, LoRA(rank=2))
    ll.export(model, tmp_path / "out")
    other = with_biases(WITH_A_BIAS["Phi"])
    other.lm_head.bias.data[3] += 1
    with pytest.raises(
        AdapterFileError, match=r"carries lm_head\.bias, which differs from the model's own in more than"
    ):
        ll.import_peft(other, tmp_path / "out")
    assert vocabulary(other) is None
    other.model.embed_tokens.weight.data[3] += 1
    with pytest.raises(AdapterFileError, match=r"has shape \(41,.*call model\.resize_token_embeddings\(41\) first"):
        ll.import_peft(other, tmp_path / "out")


# -- known tokens ------------------------------------------------------------------------------------------------------

SOME = torch.tensor([[5, 3, 9, 7, 2]])
ONE_SIDE = {
    "Llama, untied": lambda: llama(),
    "Llama, tied": lambda: llama(tie_word_embeddings=True),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
        )
    ),
    "Phi": WITH_A_BIAS["Phi"],
    "GPT-J": WITH_A_BIAS["GPT-J"],
    "BERT": WITH_A_BIAS["BERT"],
    "RoBERTa": WITH_A_BIAS["RoBERTa"],
}


@pytest.mark.parametrize("build", ONE_SIDE.values(), ids=ONE_SIDE)
def test_rows_of_known_tokens_travel_to_peft_and_back(build: Any, tmp_path: Path) -> None:
    model, again = with_biases(build), with_biases(build)
    ll.inject(model, LoRA(rank=2), train_tokens=[9, 3])
    randomise(model)
    report = ll.export(model, tmp_path / "out")
    assert report.verified_by.startswith("peft 0.")
    assert "resize_token_embeddings" not in str(report)
    expected = model.eval()(SOME)[0]
    opened = peft.PeftModel.from_pretrained(with_biases(build), tmp_path / "out").eval()
    torch.testing.assert_close(opened(input_ids=SOME)[0], expected, atol=1e-5, rtol=1e-5)
    ll.import_peft(again, tmp_path / "out")
    torch.testing.assert_close(again.eval()(SOME)[0], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings(r"ignore:(You have requested .|)ensure_weight_tying:UserWarning")
@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indices", [[7, 3], {"embed_tokens": [3, 7], "lm_head": [3, 7]}, {"embed_tokens": [7]}])
def test_rows_of_known_tokens_that_peft_trained(indices: Any, tied: bool, ensure: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=tied)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=indices, ensure_weight_tying=ensure
    )
    theirs = peft.get_peft_model(model, config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    again = llama(tie_word_embeddings=tied)
    report = ll.import_peft(again, tmp_path)
    assert "model.embed_tokens.token_rows" in report.trained
    torch.testing.assert_close(again.eval()(SOME)[0], theirs(input_ids=SOME)[0], atol=1e-6, rtol=1e-6)
    with ll.disable_adapters(again):
        assert torch.equal(again(SOME)[0], llama(tie_word_embeddings=tied).eval()(SOME)[0])


@pytest.mark.parametrize("indices", [{"lm_head": [5]}, {"embed_tokens": [3], "lm_head": [5]}])
def test_rows_of_one_side_of_a_tied_weight_are_refused_and_untying_is_the_way_out(indices: Any, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices)
    ).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"share.*untie=True"):
        ll.import_peft(llama(tie_word_embeddings=True), tmp_path)
    untied = llama(tie_word_embeddings=True)
    ll.import_peft(untied, tmp_path, untie=True)
    torch.testing.assert_close(untied.eval()(SOME)[0], theirs(input_ids=SOME)[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_new_and_known_tokens_travel_together(tied: bool, tmp_path: Path) -> None:
    model, theirs, again = (llama(tie_word_embeddings=tied) for _ in range(3))
    ll.add_tokens(model, tokenizer(), ["<a>", "<b>"])
    ll.inject(model, LoRA(rank=2), train_tokens=[39, 3])
    randomise(model)
    ll.export(model, tmp_path / "out")
    expected = model.eval()(IDS)[0]
    theirs.resize_token_embeddings(42)
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
    torch.testing.assert_close(opened(input_ids=IDS)[0], expected, atol=1e-5, rtol=1e-5)
    report = ll.import_peft(again, tmp_path / "out")
    assert torch.equal(again.eval()(IDS)[0], expected)
    assert {"model.embed_tokens.new_rows", "model.embed_tokens.token_rows"} <= report.trained.keys()
    assert vocabulary(again) == Vocabulary(("<a>", "<b>"), 40)


def trained_rows(build: Any, indices: Any, folder: Path) -> Any:
    """A peft model with rows that are not the base's, saved to `folder`."""
    theirs = peft.get_peft_model(
        build(), peft.LoraConfig(r=1, target_modules=["fc1"], trainable_token_indices=indices)
    ).eval()
    randomise(theirs)
    theirs.save_pretrained(folder)
    return theirs


EMBEDDINGS = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens")


@pytest.mark.filterwarnings("ignore")  # of the model's own code
def test_rows_that_peft_gives_to_one_of_three_embeddings_of_a_matrix(tmp_path: Path) -> None:
    """The class says nothing of what the model inside it ties, so that peft's rows of `shared` have no effect."""
    found = model_class("BartForSequenceClassification")
    alone = trained_rows(found.build, [5, 9], tmp_path / "alone")
    before = scores(found, alone)
    rows = next(p for name, p in alone.named_parameters() if "trainable_tokens_delta" in name)
    rows.data.zero_()
    assert torch.equal(scores(found, alone), before)
    with pytest.raises(
        AdapterFileError, match=r"model\.shared shares its matrix with model\.encoder.*Name all of them in trainable"
    ):
        ll.import_peft(found.build(), tmp_path / "alone")
    model = found.build()
    ll.inject(model, LoRA(rank=1), targets=["fc1"], train_tokens=[5, 9], seed=0)
    randomise(model)
    report = ll.export(model, tmp_path / "all")
    assert report.verified_by.startswith("peft 0.")
    config = json.loads((tmp_path / "all" / "adapter_config.json").read_text())
    assert config[SETTING] == {path: [5, 9] for path in EMBEDDINGS}
    again = found.build()
    ll.import_peft(again, tmp_path / "all")
    assert torch.equal(scores(found, again), scores(found, model))


@pytest.mark.filterwarnings("ignore")  # of the model's own code
def test_rows_of_all_embeddings_that_peft_trained_are_read_where_they_are_equal(tmp_path: Path) -> None:
    found = model_class("BartForSequenceClassification")
    theirs = trained_rows(found.build, {path: [5, 9] for path in EMBEDDINGS}, tmp_path / "differ")
    with pytest.raises(AdapterFileError, match="differ, while these layers share their rows"):
        ll.import_peft(found.build(), tmp_path / "differ")
    first, *others = [m for m in theirs.modules() if type(m).__name__ == "TrainableTokensLayer"]
    for other in others:
        other.trainable_tokens_delta["default"].data.copy_(first.trainable_tokens_delta["default"])
    theirs.save_pretrained(tmp_path / "equal")
    model = found.build()
    ll.import_peft(model, tmp_path / "equal")
    torch.testing.assert_close(scores(found, model), scores(found, theirs), atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the model's own code
@pytest.mark.parametrize("name", ["T5GemmaForTokenClassification", "xLSTMForCausalLM"])
def test_new_tokens_for_which_transformers_makes_no_room_are_refused_before_training(name: str, tmp_path: Path) -> None:
    model = model_class(name).build()
    add_rows(model, Vocabulary(("<a>",), 71))
    ll.inject(model, LoRA(rank=1), targets="all-linear", seed=0)
    told = refusals(model)
    assert re.search("resize_token_embeddings of transformers, .*makes no room there", told["peft"])
    assert "merged" not in told
    with pytest.raises(ExportError, match="makes no room there"):
        ll.export(model, tmp_path / "out")


@pytest.mark.filterwarnings("ignore")  # of the model's own code
@pytest.mark.parametrize("name", ["RemBertForMaskedLM", "T5Gemma2ForTokenClassification", "MarianMTModel"])
def test_new_tokens_of_embeddings_of_their_own_kind(name: str, tmp_path: Path) -> None:
    """Matrices of two widths, a value beside the matrix, a holder of the matrix that nothing calls."""
    found = model_class(name)
    model, again, ids = found.build(), found.build(), IDS_OF_CLASSES.clone()
    ids[:, 1] = 71
    known = tokenizer_of(71)
    known.add_tokens(["<a>"])
    add_rows(model, Vocabulary(("<a>",), 71, tokenizer_files(known)))
    ll.inject(model, LoRA(rank=1), targets="all-linear", seed=0)
    randomise(model)
    assert ll.export(model, tmp_path / "out").verified_by.startswith("peft 0.")
    ll.import_peft(again, tmp_path / "out")
    assert torch.equal(scores(found, again, ids), scores(found, model, ids))
