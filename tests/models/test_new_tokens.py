"""New tokens: rows of their own that train, travel with the tokenizer, and leave tied layers tied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from resuming import SaveAt, assert_equal_runs, at_step, run
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from toy_runs import completion_data, decoder_folder

import lora_lightning as ll
from ll_dora import DoRA
from ll_lora import LoRA
from lora_lightning.cli.main import main
from lora_lightning.errors import AdapterFileError, AdapterStateError, ModelError, SettingsError, TargetError
from lora_lightning.models.anatomy import survey
from lora_lightning.models.new_tokens import (
    ExtendedLayer,
    Vocabulary,
    add_rows,
    plain_vocabulary,
    remove_rows,
    vocabulary,
)
from lora_lightning.optim.groups import build_optimizer, group_specs
from lora_lightning.testing import perturb, tiny_decoder, tiny_encoder
from lora_lightning.testing.toy_models import seeded

ADDED = Vocabulary(("<tool>", "<end>"), 32)
IDS = torch.tensor([[1, 32, 5, 33], [7, 33, 33, 2]])
BUILDS = {
    "tied": lambda: tiny_decoder(tied=True),
    "untied": tiny_decoder,
    "padded": lambda: tiny_decoder(tied=True),
    "encoder": tiny_encoder,
}


def grown(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Vocabulary]:
    """A model with two new tokens; "padded" has one row too many already, so that only one is added."""
    added = Vocabulary(ADDED.tokens, 31) if kind == "padded" else ADDED
    model = BUILDS[kind]().to(dtype)
    add_rows(model, added)
    return model, added


def ids(added: Vocabulary) -> torch.Tensor:
    return torch.where(IDS > 31, IDS - 32 + added.first, IDS)


@pytest.mark.parametrize("kind", BUILDS)
def test_it_computes_what_a_resized_model_does(kind: str) -> None:
    """The reference is transformers' own resizing, its rows written by hand."""
    model, added = grown(kind)
    other = BUILDS[kind]().double()
    other.resize_token_embeddings(added.first + 2, mean_resizing=False)
    with torch.no_grad():
        layer = model.get_input_embeddings()
        other.get_input_embeddings().weight[added.first :] = layer.new_rows
        if kind == "untied":
            other.get_output_embeddings().weight[added.first :] = model.lm_head.new_rows
    torch.testing.assert_close(model(ids(added)).logits, other(ids(added)).logits)
    assert model.config.vocab_size == added.first + 2
    if model.can_generate():
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(ids(added), **options), other.generate(ids(added), **options))


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_rows_have_the_gradient_of_a_resized_matrix(kind: str) -> None:
    model, added = grown(kind)
    ll.inject(model, LoRA(rank=2), seed=0)
    assert [p for p, _ in model.named_parameters() if p.endswith("new_rows")] == survey(model).row_names
    assert len(survey(model).row_names) == {"tied": 1, "untied": 2}[kind]
    loss = model(ids(added)).logits.square().mean()
    loss.backward()
    other = BUILDS[kind]().double()
    add_rows(other, added)
    anatomy = survey(other)
    with plain_vocabulary(list(anatomy.extended.values()), anatomy.places):
        embedding, head = other.get_input_embeddings(), other.get_output_embeddings()
        embedding.weight.requires_grad_()
        head.weight.requires_grad_()
        other(ids(added)).logits.square().mean().backward()
        torch.testing.assert_close(model.model.embed_tokens.new_rows.grad, embedding.weight.grad[added.first :])
        torch.testing.assert_close(model.lm_head.new_rows.grad, head.weight.grad[added.first :])
        assert (embedding.weight is head.weight) == (kind == "tied")


def test_tied_layers_share_their_rows_and_known_tokens_stay() -> None:
    model, _ = grown("tied", torch.float32)
    before = tiny_decoder(tied=True).model.embed_tokens.weight
    ll.inject(model, LoRA(rank=2), seed=0)
    assert model.lm_head.new_rows is model.model.embed_tokens.new_rows
    assert set(group_specs(model)["head"].params) == {model.lm_head.new_rows}
    optimizer = build_optimizer(model, None)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert model.lm_head.new_rows is model.model.embed_tokens.new_rows
    assert torch.equal(model.model.embed_tokens.base.weight, before)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_rows_start_near_the_mean_apart_and_by_seed() -> None:
    model, _ = grown("untied", torch.float32)
    rows, known = model.model.embed_tokens.new_rows, model.model.embed_tokens.base.weight
    assert not torch.equal(rows[0], rows[1])
    torch.testing.assert_close(rows, known.mean(0).expand_as(rows), atol=0.05 * float(known.detach().std()), rtol=0)
    again, _ = grown("untied", torch.float32)
    assert torch.equal(rows, again.model.embed_tokens.new_rows)


def test_half_precision_keeps_rows_in_float32() -> None:
    model, _ = grown("tied", torch.bfloat16)
    assert model.lm_head.new_rows.dtype == torch.float32
    assert model(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", BUILDS)
def test_shrink_gives_the_model_back(kind: str) -> None:
    model, _ = grown(kind)
    remove_rows(model)
    plain = BUILDS[kind]().double()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.config.vocab_size == plain.config.vocab_size
    assert vocabulary(model) is None
    assert torch.equal(model(IDS % 30).logits, plain(IDS % 30).logits)


# -- with a tokenizer, and on the disk ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return decoder_folder(tmp_path / "decoder")


def loaded(folder: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def taught(folder: Path, method: Any = LoRA(rank=2)) -> tuple[Any, Any]:  # noqa: B008 - frozen
    model, tokenizer = loaded(folder)
    ll.add_tokens(model, tokenizer, ["<tool>", "<end>"])
    ll.inject(model, method, seed=0)
    for index, (_, layer) in enumerate(ll.iter_adapters(model)):
        perturb(layer.adapters, index)
    with torch.no_grad(), seeded(3):
        for name in survey(model).row_names:
            model.get_parameter(name).add_(torch.randn(model.get_parameter(name).shape))
    return model, tokenizer


def test_the_adapter_folder_brings_rows_and_tokenizer(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = taught(folder)
    batch = tokenizer("a <tool> b<end>", return_tensors="pt")["input_ids"]
    assert int((batch >= vocabulary(model).first).sum()) == 2
    ll.save_adapter(model, tmp_path / "adapter")
    fresh, _ = loaded(folder)
    ll.load_adapter(fresh, tmp_path / "adapter")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter" / "tokenizer")
    again = theirs("a <tool> b<end>", return_tensors="pt")["input_ids"]
    assert torch.equal(again, batch)
    assert torch.equal(fresh(again).logits, model(batch).logits)
    ll.save_adapter(fresh, tmp_path / "second")
    assert (tmp_path / "second" / "tokenizer" / "tokenizer.json").read_bytes() == (
        tmp_path / "adapter" / "tokenizer" / "tokenizer.json"
    ).read_bytes()


def test_a_merged_model_is_plain_resized_and_brings_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = taught(folder, DoRA(rank=2))
    batch = tokenizer("a <tool> b<end>", return_tensors="pt")["input_ids"]
    expected = model(batch).logits
    ll.export(model, tmp_path / "merged", format="merged")
    plain, theirs = loaded(tmp_path / "merged")
    again = theirs("a <tool> b<end>", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(plain(again).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(batch).logits, expected), "the model is as it was"
    assert plain.get_input_embeddings().num_embeddings == plain.config.vocab_size


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
@pytest.mark.parametrize("tied", [True, False])
def test_peft_computes_the_same_with_new_tokens(tied: bool, tmp_path: Path) -> None:
    model = tiny_decoder(tied=tied)
    add_rows(model, ADDED)
    ll.inject(model, LoRA(rank=2), seed=0)
    for index, (_, layer) in enumerate(ll.iter_adapters(model)):
        perturb(layer.adapters, index)
    report = ll.export(model, tmp_path)
    assert "resize_token_embeddings(34)" in str(report)
    theirs = tiny_decoder(tied=tied)
    theirs.resize_token_embeddings(34, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterFileError, match=r"no row 32 \(it has 32\), and no tokenizer that says which"):
        ll.import_peft(tiny_decoder(tied=tied), tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_come_back_from_peft(tied: bool, tmp_path: Path) -> None:
    """peft itself trains and writes the rows; the tokenizer beside them says which tokens they are."""
    folder = decoder_folder(tmp_path / "decoder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    first = len(tokenizer)

    def base() -> Any:
        with seeded(0):
            config = transformers.LlamaConfig.from_pretrained(folder, vocab_size=first, tie_word_embeddings=tied)
            return transformers.LlamaForCausalLM(config).eval()

    tokenizer.add_tokens(["<tool>", "<end>"])
    theirs = base()
    theirs.resize_token_embeddings(first + 2, mean_resizing=False)
    new = [first, first + 1]
    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    indices = new if tied else {"embed_tokens": new, "lm_head": new}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings, trainable_token_indices=indices)).eval()
    with torch.no_grad(), seeded(1):
        for name, parameter in theirs.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.normal_()
    theirs.save_pretrained(tmp_path / "peft")
    tokenizer.save_pretrained(tmp_path / "peft")
    model = base()
    report = ll.import_peft(model, tmp_path / "peft")
    ids = torch.tensor([[1, first, 5, first + 1], [7, first + 1, 3, 2]])
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert vocabulary(model) == Vocabulary(("<tool>", "<end>"), first)
    assert set(report.trained) == set(survey(model).row_names)
    assert all(model.get_parameter(name).requires_grad for name in survey(model).row_names)
    ll.save_adapter(model, tmp_path / "ours")
    again = base()
    ll.load_adapter(again, tmp_path / "ours")
    assert torch.equal(again(ids).logits, model(ids).logits)
    other = base()
    before = other(ids % first).logits
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(config.read_text().replace('"q_proj"', '"q_proj", "nothing"').replace('"r": 2', '"r": 3'))
    with pytest.raises(AdapterFileError, match="do not fit rank 3"):
        ll.import_peft(other, tmp_path / "peft")
    assert vocabulary(other) is None
    assert torch.equal(other(ids % first).logits, before)


def test_a_failed_load_leaves_the_model_as_it_was(folder: Path, tmp_path: Path) -> None:
    model, _ = taught(folder)
    ll.save_adapter(model, tmp_path / "adapter")
    other, _ = loaded(folder)
    ll.inject(other, LoRA(rank=3), seed=0)
    keys = list(other.state_dict())
    with pytest.raises(AdapterFileError, match="rank=2"):
        ll.load_adapter(other, tmp_path / "adapter")
    assert list(other.state_dict()) == keys
    assert vocabulary(other) is None


def test_other_new_tokens_are_refused(folder: Path, tmp_path: Path) -> None:
    model, _ = taught(folder)
    ll.save_adapter(model, tmp_path / "adapter")
    other, tokenizer = loaded(folder)
    ll.add_tokens(other, tokenizer, ["<tools>", "<end>"])
    with pytest.raises((AdapterStateError, AdapterFileError), match=r"other names or shapes|has the new tokens <tool>"):
        ll.load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([], SettingsError, "new_tokens is empty"),
        (["<x>", "<x>"], SettingsError, '"<x>" is not new; it is named twice'),
        (["[EOS]"], SettingsError, r'"\[EOS\]" is not new; the tokenizer knows it as \d+'),
    ],
)
def test_tokens_that_are_not_new(folder: Path, tokens: list[str], error: Any, message: str) -> None:
    model, tokenizer = loaded(folder)
    size = len(tokenizer)
    with pytest.raises(error, match=message):
        ll.add_tokens(model, tokenizer, tokens)
    assert len(tokenizer) == size
    assert not any(isinstance(module, ExtendedLayer) for module in model.modules())


def test_models_that_cannot_grow(folder: Path) -> None:
    model, tokenizer = loaded(folder)
    with pytest.raises(ModelError, match="Linear is no model of transformers"):
        ll.add_tokens(torch.nn.Linear(2, 2), tokenizer, ["<x>"])
    tokenizer.add_tokens(["<one>", "<two>", *(f"<{i}>" for i in range(64))])
    with pytest.raises(ModelError, match=r"the tokenizer has \d+ tokens, but LlamaForCausalLM only \d+ rows"):
        ll.add_tokens(model, tokenizer, ["<x>"])
    model, tokenizer = loaded(folder)
    ll.add_tokens(model, tokenizer, ["<x>"])
    with pytest.raises(AdapterStateError, match="has new tokens already: <x>"):
        ll.add_tokens(model, tokenizer, ["<y>"])
    model, tokenizer = loaded(folder)
    ll.inject(model, LoRA(rank=2))
    with pytest.raises(AdapterStateError, match="add tokens before inject"):
        ll.add_tokens(model, tokenizer, ["<x>"])


def test_an_embedding_with_new_rows_takes_no_adapter() -> None:
    model, _ = grown("untied", torch.float32)
    with pytest.raises(TargetError, match=r'"embed_tokens" names model.embed_tokens \(ExtendedLayer\)'):
        ll.inject(model, LoRA(rank=2), targets=["embed_tokens"])
    assert "lm_head" not in str(ll.inject(model, LoRA(rank=2)).layers)


def test_scaled_embeddings_and_biases_keep_what_they_do() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    layer = Gemma3TextScaledWordEmbedding(5, 4, 0, embed_scale=3.0).double()
    rows = torch.nn.Parameter(torch.randn(2, 4, dtype=torch.float64))
    both = torch.cat([layer.weight, rows])
    x = torch.tensor([[0, 5, 6, 4]])
    torch.testing.assert_close(ExtendedLayer(layer, rows, 5)(x), 3.0 * both[x])
    head = torch.nn.Linear(4, 5).double()
    h = torch.randn(3, 4, dtype=torch.float64)
    expected = F.linear(h, torch.cat([head.weight, rows]), torch.cat([head.bias, head.bias.new_zeros(2)]))
    torch.testing.assert_close(ExtendedLayer(head, rows, 5)(h), expected)


# -- through the command line ------------------------------------------------------------------------------------------


def words(folder: Path, rows: Path, *more: str) -> list[str]:
    data = ["--data=Completions", f"--data.train={rows}", f"--data.validation={rows}", "--data.max_length=16"]
    trainer = ["--trainer.max_steps=4", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    model = [f"--model.pretrained={folder}", "--model.task=causal-lm", "--model.method=LoRA", "--model.method.rank=2"]
    return ["fit", *model, *data, "--data.new_tokens=[<yes>,<no>]", "--seed_everything=3", *trainer, *more]


@pytest.mark.slow
def test_a_run_trains_its_new_tokens_and_every_verb_knows_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = (f"w{i % 9},w{i % 5} <{'yes' if i % 2 else 'no'}>" for i in range(24))
    rows = tmp_path / "rows.csv"
    rows.write_text("\n".join(["prompt,completion", *lines]))
    assert main(words(folder, rows)) == 0
    [made] = (tmp_path / "runs").glob("*/001")
    assert "fully trained  model.embed_tokens.new_rows" in capsys.readouterr().out
    assert (made / "adapter" / "tokenizer" / "tokenizer.json").is_file()
    assert main(["validate", "--run", str(made)]) == 0
    assert main(["predict", "--run", str(made), "--output", str(tmp_path / "out.csv")]) == 0
    assert main(["export", str(made), "--format", "merged", "--output", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    _, tokenizer = loaded(tmp_path / "merged")
    assert tokenizer.decode(tokenizer("<yes>")["input_ids"]).strip() == "<yes>"
    assert len(tokenizer("<yes>", add_special_tokens=False)["input_ids"]) == 1


def test_resume_equals_uninterrupted(folder: Path, tmp_path: Path) -> None:
    def fresh() -> tuple[Any, Any]:
        data = completion_data(folder, new_tokens=["<yes>"])
        return ll.AdapterModule(str(folder), LoRA(rank=2), "causal-lm", seed=1), data

    path = tmp_path / "middle.ckpt"
    whole = run(*fresh(), tmp_path / "whole", [SaveAt(path, at_step(5))])
    resumed = run(*fresh(), tmp_path / "resumed", checkpoint=path)
    assert "net.model.embed_tokens.new_rows" in whole["state"]
    assert_equal_runs(whole, resumed)
    assert "net.model.embed_tokens.base.weight" not in torch.load(path, weights_only=True)["state_dict"]
