"""Rows of known tokens: which are named, that they train, and that the base model's come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from resuming import SaveAt, assert_equal_runs, at_step, run
from torch import nn
from toy_runs import completion_data, completion_file, decoder_folder

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.cli.main import main
from lora_lightning.errors import AdapterFileError, AdapterStateError, ResumeError, SettingsError, TargetError
from lora_lightning.models.anatomy import survey
from lora_lightning.models.new_tokens import ExtendedLayer, Vocabulary, add_rows
from lora_lightning.models.token_rows import (
    TokenRows,
    as_ids,
    choose_rows,
    layers_with,
    remove_token_rows,
    room_for_rows,
    row_notes,
    row_parameters,
    rows_at,
)
from lora_lightning.testing import perturb, tiny_decoder

IDS = torch.tensor([[1, 3, 5, 7], [7, 3, 3, 2]])
EMBEDDING = "model.embed_tokens"


def taught(tied: bool = True, name: str = "default", model: Any = None, **options: Any) -> Any:
    """A decoder whose rows 3 and 7 train, with values that training would leave."""
    model = tiny_decoder(tied=tied).double() if model is None else model
    ll.inject(model, LoRA(rank=2), seed=0, name=name, **{"train_tokens": [7, 3], **options})
    randomise(model, name)
    return model


@torch.no_grad()
def randomise(model: nn.Module, name: str) -> None:
    for index, (_, layer) in enumerate(ll.iter_adapters(model)):
        perturb(layer.adapters[name], index)
    torch.manual_seed(sum(map(ord, name)))
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() == 2 and len(parameter) == 2 and parameter.shape[1] == 16:
            parameter.add_(torch.randn_like(parameter))


def written_by_hand(model: Any, tied: bool) -> Any:
    """A plain model whose matrices have the rows, and the same adapter."""
    other = tiny_decoder(tied=tied).double()
    with torch.no_grad():
        other.get_input_embeddings().weight[[3, 7]] = model.get_input_embeddings().token_rows
    ll.inject(other, LoRA(rank=2), seed=0)
    for path, layer in ll.iter_adapters(other):
        layer.load_state_dict(model.get_submodule(path).state_dict())
    return other


@pytest.mark.parametrize("tied", [True, False])
def test_it_computes_what_a_model_with_these_rows_does(tied: bool) -> None:
    model = taught(tied)
    other = written_by_hand(model, tied)
    torch.testing.assert_close(model(IDS).logits, other(IDS).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_have_the_gradient_of_the_matrix(tied: bool) -> None:
    model = taught(tied)
    other = written_by_hand(model, tied)
    weight = other.get_input_embeddings().weight.requires_grad_(True)
    for one in (model, other):
        one(IDS).logits.square().mean().backward()
    torch.testing.assert_close(model.get_input_embeddings().token_rows.grad, weight.grad[[3, 7]], rtol=1e-9, atol=1e-12)
    assert model.get_input_embeddings().base.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_start_is_the_base_model_and_half_precision_trains_in_float32(dtype: torch.dtype) -> None:
    model = tiny_decoder(tied=True).to(dtype)
    base = model(IDS).logits
    report = ll.inject(model, LoRA(rank=2), seed=0, train_tokens=[3])
    assert torch.equal(model(IDS).logits, base)
    assert report.trained == {f"{EMBEDDING}.token_rows": 16}
    assert f"the rows of 1 known token train in {EMBEDDING} and lm_head: 3" in str(report)
    rows = model.get_input_embeddings().token_rows
    assert rows.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    model(IDS).logits.float().square().mean().backward()
    assert rows.grad.abs().min() > 0


def test_the_base_rows_come_back(tmp_path: Path) -> None:
    base = tiny_decoder(tied=True).double()(IDS).logits
    model = taught()
    first = model(IDS).logits
    with ll.disable_adapters(model):
        assert torch.equal(model(IDS).logits, base)
    assert torch.equal(model(IDS).logits, first)
    ll.merge(model)
    torch.testing.assert_close(model(IDS).logits, first)
    ll.unmerge(model)
    assert torch.equal(model(IDS).logits, first)
    ll.eject(model)
    assert torch.equal(model(IDS).logits, base)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert set(model.state_dict()) == set(tiny_decoder(tied=True).state_dict())


def test_adapters_with_rows_of_their_own_and_one_without_are_switched() -> None:
    base = tiny_decoder(tied=True).double()(IDS).logits
    model = taught(name="a")
    first = model(IDS).logits
    taught(name="b", model=model)
    second = model(IDS).logits
    ll.inject(model, LoRA(rank=2), name="c", seed=1)
    assert torch.equal(model(IDS).logits, base)
    for name, expected in (("a", first), ("b", second), ("c", base), ("a", first)):
        ll.set_active(model, name)
        assert torch.equal(model(IDS).logits, expected)
    ll.eject(model, "a")
    ll.set_active(model, "b")
    assert torch.equal(model(IDS).logits, second)
    ll.eject(model, "b")
    assert type(model.get_input_embeddings()) is nn.Embedding
    ll.set_active(model, "c")
    assert torch.equal(model(IDS).logits, base)


@pytest.mark.parametrize("tied", [True, False])
def test_merged_for_good_and_ejected_the_rows_are_the_matrix(tied: bool) -> None:
    model = taught(tied)
    expected = model(IDS).logits
    ll.merge(model, keep_original=False)
    ll.eject(model)
    torch.testing.assert_close(model(IDS).logits, expected)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("options", [{}, {"train_tokens": {"embed_tokens": [3, 7], "lm_head": [2, 3]}}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_saved_and_loaded(options: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = taught(False, model=tiny_decoder().to(dtype), **options)
    ll.save_adapter(model, tmp_path / "a")
    again = tiny_decoder().to(dtype)
    ll.load_adapter(again, tmp_path / "a", name="other")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert [p for p, own in again.named_parameters() if own.requires_grad] == []
    ll.save_adapter(again, tmp_path / "b", name="other")
    ll.load_adapter(model, tmp_path / "b")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_model_that_cannot_have_the_rows_is_left_as_it_was(tmp_path: Path) -> None:
    ll.save_adapter(taught(), tmp_path)
    other = taught(name="b", train_tokens=[5])
    before = other(IDS).logits
    with pytest.raises(AdapterStateError, match=r"trains rows 5 of model\.embed_tokens, this one 3, 7; name the same"):
        ll.load_adapter(other, tmp_path)
    assert torch.equal(other(IDS).logits, before)
    ll.eject(other)
    ll.load_adapter(other, tmp_path)  # the way out
    plain = tiny_decoder(tied=False).double()
    with pytest.raises(AdapterFileError):
        ll.load_adapter(plain, tmp_path)
    assert type(plain.get_input_embeddings()) is nn.Embedding


def test_the_same_rows_of_other_tokens_are_no_place_for_a_file(tmp_path: Path) -> None:
    ll.save_adapter(taught(), tmp_path)
    with pytest.raises(AdapterStateError, match="trains rows 2, 9"):
        ll.load_adapter(taught(train_tokens=[2, 9]), tmp_path)


def test_known_and_new_tokens_together(tmp_path: Path) -> None:
    model = tiny_decoder(tied=True).double()
    add_rows(model, Vocabulary(("<a>", "<b>"), 32, {"tokenizer.json": b"{}"}))
    taught(model=model)
    ids = torch.tensor([[3, 32, 33, 7, 1]])
    ll.save_adapter(model, tmp_path)
    again = tiny_decoder(tied=True).double()
    ll.load_adapter(again, tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    ll.eject(again)
    assert isinstance(again.get_input_embeddings(), ExtendedLayer)  # the new tokens stay
    assert again.get_input_embeddings().token_ids == ()
    late = taught()
    with pytest.raises(AdapterStateError, match="rows of known tokens train in the model already; add new tokens"):
        add_rows(late, Vocabulary(("<a>",), 32))
    with pytest.raises(IndexError):
        model(torch.tensor([[34]]))


class Tokenizer:
    def get_vocab(self) -> dict[str, int]:
        return {"<tool>": 3, "<end>": 7, "<pad>": 0, "5": 11}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        names = {number: text for text, number in self.get_vocab().items()}
        return [names.get(i, f"t{i}") for i in ids]


def test_texts_are_looked_up_and_a_digit_is_a_text_in_quotes() -> None:
    assert as_ids(["<end>", 5, "5"], Tokenizer()) == [7, 5, 11]
    assert as_ids({"lm_head": ["<tool>"]}, Tokenizer()) == {"lm_head": [3]}
    rows = choose_rows(survey(tiny_decoder(tied=True)), ["<end>", 3], Tokenizer())
    assert rows == {EMBEDDING: TokenRows((3, 7), ("<tool>", "<end>"))}
    assert str(rows[EMBEDDING]) == '"<tool>" (3), "<end>" (7)'


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<tol>"], r'"<tol>" is no token of the tokenizer\. Did you mean "<tool>"\?.* new token: add_tokens'),
        ([32], r"model\.embed_tokens has no row 32; ids go from 0 to 31"),
        ([-1], r"model\.embed_tokens has no row -1"),
        ([3, "<tool>"], r"names row 3 of model\.embed_tokens twice"),
        ([True], r"True is no token; name texts or ids"),
        ({"embed_tokens": []}, r"names no row of model\.embed_tokens"),
        ({"embed_tokens": [3], "lm_head": [5]}, r"rows 3 and 5 of layers that share one matrix .*untie=True"),
    ],
)
def test_tokens_that_cannot_be(tokens: Any, message: str) -> None:
    model = tiny_decoder(tied=True)
    with pytest.raises(SettingsError, match=message):
        ll.inject(model, LoRA(rank=2), train_tokens=tokens, tokenizer=Tokenizer())
    assert set(model.state_dict()) == set(tiny_decoder(tied=True).state_dict())


def test_texts_without_a_tokenizer() -> None:
    with pytest.raises(SettingsError, match=r'"<tool>" is a text.*give `tokenizer`, or the token\'s id'):
        ll.inject(tiny_decoder(), LoRA(rank=2), train_tokens=["<tool>"])


def test_a_new_token_trains_already() -> None:
    model = tiny_decoder()
    add_rows(model, Vocabulary(("<a>",), 32))
    with pytest.raises(SettingsError, match="32 is the id of a new token, whose row trains already"):
        ll.inject(model, LoRA(rank=2), train_tokens=[32])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"also_train": ["embed_tokens"]}, r"model\.embed_tokens would train in full, and rows of it besides"),
        ({"train_tokens": {"embed": [3]}}, r'"embed" is no embedding and no linear layer.*It has model\.embed_tokens'),
        ({"targets": ["lm_head"]}, "lm_head"),
    ],
)
def test_a_layer_is_adapted_or_trains_in_full_or_in_rows(options: Any, message: str) -> None:
    model = tiny_decoder(tied=True).double()
    with pytest.raises(TargetError, match=message):
        ll.inject(model, LoRA(rank=2), **{"train_tokens": [3], **options})
    assert torch.equal(model(IDS).logits, tiny_decoder(tied=True).double()(IDS).logits)
    assert set(model.state_dict()) == set(tiny_decoder(tied=True).state_dict())


def test_what_another_adapter_trains_in_full_or_adapts_has_no_rows() -> None:
    model = tiny_decoder(tied=True)
    ll.inject(model, LoRA(rank=2), targets=["q_proj"], also_train=["embed_tokens"], name="a")
    with pytest.raises(
        TargetError, match=r'model\.embed_tokens\.weight trains in full with adapter "a"; eject that one'
    ):
        ll.inject(model, LoRA(rank=2), train_tokens=[3], name="b")
    ll.eject(model)
    ll.inject(model, LoRA(rank=2), train_tokens=[3], name="b")
    with pytest.raises(TargetError, match=r"would train in full, and rows of .* train with another adapter; eject"):
        ll.inject(model, LoRA(rank=2), also_train=["embed_tokens"], name="a")
    ll.eject(model)
    ll.inject(model, LoRA(rank=2), targets=["embed_tokens"], name="a")
    with pytest.raises(TargetError, match="embed_tokens"):
        ll.inject(model, LoRA(rank=2), train_tokens=[3], name="b")


def test_a_padding_row_that_would_get_no_gradient_is_refused() -> None:
    config = transformers.Gemma3TextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config)
    with pytest.raises(TargetError, match=r"0 is the padding token of model\.embed_tokens, whose row gets no gradient"):
        ll.inject(model, LoRA(rank=2), train_tokens=[0])
    base = model(IDS).logits
    ll.inject(model, LoRA(rank=2), train_tokens=[3])
    assert torch.equal(model(IDS).logits, base)
    model(IDS).logits.square().mean().backward()
    assert model.get_input_embeddings().token_rows.grad.abs().min() > 0


def test_a_model_of_ones_own_names_its_layer() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(9, 4), nn.Linear(4, 9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.words(x))

    torch.manual_seed(0)
    model = Own()
    with pytest.raises(TargetError, match=r"does not say which layer embeds its tokens; name it: .* It has words\."):
        ll.inject(model, LoRA(rank=2), targets=["out"], train_tokens=[3])
    ll.inject(model, LoRA(rank=2), targets=["out"], train_tokens={"words": [3]})
    model(torch.tensor([3])).sum().backward()
    assert model.words.token_rows.grad.abs().min() > 0


def test_rows_are_put_in_and_taken_off_again() -> None:
    model = tiny_decoder(tied=True)
    anatomy = survey(model)
    wanted = rows_at(anatomy, {EMBEDDING: TokenRows((3,))})
    with pytest.raises(TargetError, match=r'"?model\.embed_token"? is no embedding and no linear layer here'):
        rows_at(anatomy, {"model.embed_token": TokenRows((3,))})

    def fail_inside() -> None:
        with room_for_rows(anatomy, wanted) as now:
            assert row_parameters(now, wanted) == [f"{EMBEDDING}.token_rows"]
            assert layers_with(now, wanted) == [EMBEDDING, "lm_head"]
            assert row_notes(now, wanted) == [f"the rows of 1 known token train in {EMBEDDING} and lm_head: 3"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert type(model.get_input_embeddings()) is nn.Embedding
    with room_for_rows(anatomy, wanted):
        pass
    remove_token_rows(model, [f"{EMBEDDING}.token_rows"])
    assert type(model.lm_head) is nn.Linear


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return decoder_folder(tmp_path / "decoder")


def fresh(folder: Path, tokens: Any) -> tuple[Any, Any]:
    return ll.AdapterModule(str(folder), LoRA(rank=2), "causal-lm", seed=1, train_tokens=tokens), completion_data(
        folder
    )


def test_resume_equals_uninterrupted_and_other_tokens_are_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    whole = run(*fresh(folder, [5, 9]), tmp_path / "whole", [SaveAt(path, at_step(5))])
    resumed = run(*fresh(folder, [5, 9]), tmp_path / "resumed", checkpoint=path)
    assert "net.model.embed_tokens.token_rows" in whole["state"]
    assert_equal_runs(whole, resumed)
    with pytest.raises(ResumeError, match=r"was trained with other rows of tokens"):
        run(*fresh(folder, [5, 8]), tmp_path / "other", checkpoint=path)


@pytest.mark.slow
def test_a_run_trains_rows_of_tokens_by_their_texts_and_every_verb_knows_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    completion_file(tmp_path / "rows.csv")
    known = sorted(transformers.AutoTokenizer.from_pretrained(folder).get_vocab())
    text = next(token for token in known if token.isalnum() and not token.isdigit())
    words = [
        f"--model.pretrained={folder}", "--model.task=causal-lm", "--model.method=LoRA", "--model.method.rank=2",
        "--data=Completions", f"--data.train={tmp_path / 'rows.csv'}", f"--data.validation={tmp_path / 'rows.csv'}",
        "--data.max_length=16", "--seed_everything=3", "--trainer.max_steps=2", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    assert main(["doctor", *words, f"--model.train_tokens=[{text}x]"]) != 0
    assert f'"{text}x" is no token' in capsys.readouterr().out
    assert main(["fit", *words, f"--model.train_tokens=[{text},5]"]) == 0
    [made] = (tmp_path / "runs").glob("*/001")
    out = capsys.readouterr().out
    assert "fully trained  model.embed_tokens.token_rows" in out
    assert f'"{text}"' in out
    assert main(["predict", "--run", str(made), "--output", str(tmp_path / "out.csv")]) == 0
    assert main(["export", str(made), "--format", "merged", "--output", str(tmp_path / "merged")]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    trained = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = trained.get_input_embeddings().weight.clone()
    ll.load_adapter(trained, made / "adapter")
    differ = (merged.get_input_embeddings().weight != base).any(dim=1).nonzero().flatten().tolist()
    assert differ == list(trained.get_input_embeddings().token_ids)
    torch.testing.assert_close(merged(IDS).logits, trained.eval()(IDS).logits, rtol=1e-5, atol=1e-5)
    assert main(["estimate", *words, "--model.train_tokens=[5]"]) == 0
