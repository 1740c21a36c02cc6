"""An output layer with a weight of its own: the start is exact, files and exports know it, and it is tied again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft_models import PEFT_WARNINGS
from resuming import SaveAt, assert_equal_runs, at_step, run
from torch import nn
from toy_runs import completion_data, decoder_folder

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import (
    AdapterFileError,
    AdapterStateError,
    ExportError,
    ModelError,
    ResumeError,
    TargetError,
)
from lora_lightning.models.anatomy import survey
from lora_lightning.models.new_tokens import Vocabulary, add_rows
from lora_lightning.models.untied import apart, forget_untied, retie, say_tied, untie, untied, untied_note
from lora_lightning.testing import tiny_decoder
from lora_lightning.testing.toy_models import seeded

pytestmark = PEFT_WARNINGS
IDS = torch.tensor([[1, 3, 5, 7], [7, 3, 3, 2]])
WAYS: dict[str, dict[str, Any]] = {
    "both adapted": {"targets": ["q_proj", "embed_tokens", "lm_head"]},
    "the output layer adapted": {"targets": ["lm_head"]},
    "the output layer trained": {"targets": ["q_proj"], "also_train": ["lm_head"]},
    "the embedding trained": {"targets": ["q_proj"], "also_train": ["embed_tokens"]},
    "rows trained": {"targets": ["q_proj"], "train_tokens": [3, 7]},
}


def decoder() -> Any:
    return tiny_decoder(tied=True).eval()


def is_tied(model: Any) -> bool:
    return model.lm_head.weight is model.get_input_embeddings().weight


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    with seeded(3):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)


def taught(**options: Any) -> Any:
    model = decoder()
    ll.inject(model, LoRA(rank=2), seed=0, untie=True, **options)
    randomise(model)
    return model


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_each_of_the_two_trains_alone_is_saved_merged_and_tied_again(way: Any, tmp_path: Path) -> None:
    base = decoder()(IDS).logits
    model = decoder()
    report = ll.inject(model, LoRA(rank=2), seed=0, untie=True, **way)
    assert "untied: lm_head has a weight of its own, 512 numbers" in str(report)
    assert report.tied == {}
    assert torch.equal(model(IDS).logits, base)
    randomise(model)
    expected = model(IDS).logits
    ll.save_adapter(model, tmp_path / "a")
    again = decoder()
    ll.load_adapter(again, tmp_path / "a")
    assert torch.equal(again(IDS).logits, expected)
    with ll.disable_adapters(again):
        assert torch.equal(again(IDS).logits, base)
    ll.export(again, tmp_path / "merged", format="merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert merged.config.tie_word_embeddings is False
    ll.merge(again)
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    ll.unmerge(again)
    ll.eject(again)
    assert torch.equal(again(IDS).logits, base)
    assert is_tied(again)
    assert again.config.tie_word_embeddings is True
    assert set(again.state_dict()) == set(decoder().state_dict())


def test_merged_for_good_it_stays_untied() -> None:
    model = taught(targets=["embed_tokens", "lm_head"])
    expected = model(IDS).logits
    ll.merge(model, keep_original=False)
    ll.eject(model)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert not is_tied(model)
    assert untied(model) is None
    ll.inject(model, LoRA(rank=2))  # a base model of its own now
    assert untied_note(model) == []


@pytest.mark.parametrize("way", [w for name, w in WAYS.items() if name != "rows trained"])
def test_peft_computes_the_same_on_the_tied_base_and_import_unties(way: Any, tmp_path: Path) -> None:
    model = taught(**way)
    ll.export(model, tmp_path / "out")
    opened = peft.PeftModel.from_pretrained(decoder(), tmp_path / "out").eval()
    torch.testing.assert_close(opened(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    again = decoder()
    report = ll.import_peft(again, tmp_path / "out", untie=True)
    assert any("untied: lm_head" in note for note in report.notes)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_what_peft_trained_apart_in_a_tied_model_is_read_untied(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        decoder(), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    )
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path)
    again = decoder()
    with pytest.raises(
        AdapterFileError, match=r"which differ, while they are one parameter.*import_peft\(.*untie=True"
    ):
        ll.import_peft(again, tmp_path)
    assert is_tied(again)
    ll.import_peft(again, tmp_path, untie=True)
    torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)


def test_rows_in_an_untied_model_are_no_export_for_peft(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r'rows of tokens of model\.embed_tokens .* peft would tie them.*"merged"'):
        ll.export(taught(train_tokens=[3]), tmp_path / "out")


def test_new_tokens_have_rows_of_their_own_on_both_sides(tmp_path: Path) -> None:
    model = decoder()
    add_rows(model, Vocabulary(("<a>",), 32, {"tokenizer.json": b"{}"}))
    before = model(IDS).logits
    ll.inject(model, LoRA(rank=2), untie=True)
    assert torch.equal(model(IDS).logits, before)
    assert survey(model).row_names == ["model.embed_tokens.new_rows", "lm_head.new_rows"]
    randomise(model)
    ids = torch.tensor([[3, 32, 1]])
    ll.save_adapter(model, tmp_path)
    again = decoder()
    ll.load_adapter(again, tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    ll.eject(again)
    assert again.lm_head.new_rows is again.model.embed_tokens.new_rows


def test_tied_and_untied_adapters_do_not_meet_in_one_model(tmp_path: Path) -> None:
    tied = decoder()
    ll.inject(tied, LoRA(rank=2), seed=0, targets=["q_proj"])
    ll.save_adapter(tied, tmp_path / "tied")
    model = taught(targets=["q_proj"])
    ll.save_adapter(model, tmp_path / "untied")
    expected = model(IDS).logits
    with pytest.raises(AdapterStateError, match=r"was trained with nothing untied; in the model lm_head is"):
        ll.load_adapter(model, tmp_path / "tied", name="b")
    assert torch.equal(model(IDS).logits, expected)
    with pytest.raises(AdapterStateError, match=r"untie: the model has adapters already.*eject them first"):
        ll.load_adapter(tied, tmp_path / "untied", name="b")
    assert is_tied(tied)
    ll.eject(tied)  # the way out
    ll.load_adapter(tied, tmp_path / "untied", name="b")
    ll.inject(tied, LoRA(rank=2), name="c", untie=True)  # it is so already


def test_an_error_ties_again() -> None:
    model = decoder()

    def fail_inside() -> None:
        with apart(survey(model), wanted=True) as now:
            assert not is_tied(model)
            assert untied(now.model).output == "lm_head"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert is_tied(model)
    with apart(survey(model), wanted=False):
        assert is_tied(model)
    found = untie(survey(model))
    say_tied(model, found)
    assert model.config.tie_word_embeddings is True
    retie(model)
    retie(model)  # nothing to do
    untie(survey(model))
    forget_untied(model)
    assert not is_tied(model)


T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
REFUSED = {
    "untied already": (tiny_decoder, "no output layer of LlamaForCausalLM shares the embedding's weight"),
    "no language model": (lambda: nn.Sequential(nn.Linear(2, 2)), "no output layer of Sequential shares"),
    "tied in more places": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        r"T5ForConditionalGeneration cannot be untied here: .* is tied as well.*format=\"peft\"",
    ),
    "a tied bias": (
        lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
            )
        ),
        r"BertForMaskedLM cannot be untied here: .*bias is tied as well",
    ),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_untied(build: Any, message: str) -> None:
    model = build()
    with pytest.raises(ModelError, match=message):
        untie(survey(model))


def test_the_way_out_of_a_merge_that_would_change_two_layers() -> None:
    """A folded update, a merge and an export of it each name `untie`, and it works."""
    tied = decoder()
    ll.inject(tied, LoRA(rank=2), targets=["lm_head"])
    with pytest.raises(AdapterStateError, match="untie=True, which gives the output layer a weight of its own"):
        ll.merge(tied)
    ll.merge(taught(targets=["lm_head"]))


# -- a tied embedding that trained, merged -----------------------------------------------------------------------------

_OPEN = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert model.config.tie_word_embeddings and model.lm_head.weight is model.get_input_embeddings().weight
torch.save(model(torch.tensor([[1, 3, 5, 7], [7, 3, 3, 2]])).logits.detach(), sys.argv[2])
"""


@pytest.mark.parametrize("also", ["embed_tokens", "lm_head"])
def test_a_tied_embedding_that_trained_is_merged_tied(also: str, tmp_path: Path) -> None:
    model = decoder()
    named = "embed_tokens"
    if also == "lm_head":  # its weight has the embedding's name; the error says so
        with pytest.raises(TargetError, match=r"lm_head\.weight, which is model\.embed_tokens\.weight as well"):
            ll.inject(model, LoRA(rank=2), targets=["q_proj"], also_train=[also])
    ll.inject(model, LoRA(rank=2), targets=["q_proj"], also_train=[named])
    randomise(model)
    ll.export(model, tmp_path / "merged", format="merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    assert is_tied(merged)
    assert merged.config.tie_word_embeddings is True


@pytest.mark.slow
def test_a_fresh_process_opens_it(tmp_path: Path) -> None:
    model = decoder()
    ll.inject(model, LoRA(rank=2), targets=["q_proj"], also_train=["embed_tokens"])
    randomise(model)
    ll.export(model, tmp_path / "merged", format="merged")
    done = subprocess.run(
        [sys.executable, "-c", _OPEN, str(tmp_path / "merged"), str(tmp_path / "out.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    opened = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(opened, model(IDS).logits, rtol=1e-4, atol=1e-5)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_resume_equals_uninterrupted_and_tied_is_another_run(tmp_path: Path) -> None:
    folder = decoder_folder(tmp_path / "decoder")

    def fresh(apart: bool) -> tuple[Any, Any]:
        module = ll.AdapterModule(str(folder), LoRA(rank=2), "causal-lm", ["q_proj"], seed=1, untie=apart)
        return module, completion_data(folder)

    path = tmp_path / "middle.ckpt"
    whole = run(*fresh(True), tmp_path / "whole", [SaveAt(path, at_step(5))])
    resumed = run(*fresh(True), tmp_path / "resumed", checkpoint=path)
    assert_equal_runs(whole, resumed)
    with pytest.raises(ResumeError, match=r"was trained with lm_head untied; give model\.untie the same value"):
        run(*fresh(False), tmp_path / "other", checkpoint=path)
