"""Where generated texts end, with models that write an answer and its end for ever: each token decides the next."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from media_models import FAMILIES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_lightning.cli.main import main
from lora_lightning.data import Chat
from lora_lightning.data.chats.templates import end_of_turn
from lora_lightning.data.media.processors import templated_tokenizer
from lora_lightning.models.generation import before_end, end_ids, end_of_answer, end_text
from lora_lightning.models.tasks import find_task
from lora_lightning.models.tasks.base import PredictContext, evaluate

MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<stop>"]


def template(end: str) -> str:
    return (
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}" + end + "\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )


REFUSING = "{{ raise_exception('turns must begin with system') }}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of one token a byte, with the marks of chat templates, none of which ends its texts."""
    place = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: n for n, letter in enumerate(["<pad>", "</s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(MARKS[:5])
    backend.add_tokens(MARKS[5:])  # a token that is not special, as data.new_tokens adds them
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>").save_pretrained(place)
    return place


def writer(tokenizer, text: str, eos: list[int] | int | None = None) -> LlamaForCausalLM:
    """A model that writes `text` again and again behind a line break: its layers add nothing, its head is a table."""
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size + size % 2,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    ids = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == len(ids)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, config.hidden_size))
        model.lm_head.weight.zero_()
        for now, following in zip(ids, [*ids[1:], ids[0]], strict=True):
            model.lm_head.weight[following, now] = 1.0
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=0)
    return model


CASES = {
    "chatml": ("chatml", "<|im_end|>"),
    "llama-3": ("llama-3", "<|eot_id|>"),
    "the end of text": ("zephyr", "</s>"),
    "the end of text, other template": ("plain", "</s>"),
    "an added token that is not special": (template("<stop>"), "<stop>"),
    "text and then a mark": (template("~#<|im_end|>"), "~#<|im_end|>"),
    "text": (template("~#"), "~#"),
    "text behind a line break": (template("\x0b~#"), "\x0b~#"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_answer_ends_where_its_template_ends_a_turn(folder, tmp_path, case):
    """Also where that is no end of the tokenizer: what is written is the answer alone, and counts as right."""
    chat_template, end = CASES[case]
    rows = [[("user", word), ("assistant", "yes")] for word in ("tea?", "a longer question?", "x")]
    lines = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in rows]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = Chat(validation=f"{tmp_path}/chat.jsonl", tokenizer=str(folder), chat_template=chat_template)
    data.setup("validate")
    data.setup("predict")
    model = writer(data.tokenizer_object, f"yes{end}")
    context = PredictContext(tokenizer=data.tokenizer_object, max_new_tokens=24, in_turns=True)
    values = evaluate(find_task("causal-lm", {"generate_batches": 1}), model, data.val_dataloader(), context)
    assert values["exact_match"] == 1.0
    (batch,) = data.predict_dataloader()
    with torch.no_grad():
        rows = find_task("causal-lm").predict(model, batch, context)
    assert [row["prediction"].rstrip() for row in rows] == ["yes"] * 3


def test_every_end_of_the_models_generation_config_counts(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    im_end, eot, stop = (tokenizer.convert_tokens_to_ids(mark) for mark in ("<|im_end|>", "<|eot_id|>", "<stop>"))
    assert end_ids(writer(tokenizer, "a", [im_end, eot]), tokenizer) == [im_end, eot, tokenizer.eos_token_id]
    assert end_ids(writer(tokenizer, "a", eot), tokenizer) == [eot, tokenizer.eos_token_id]
    assert end_ids(writer(tokenizer, "a"), tokenizer) == [tokenizer.eos_token_id]
    tokenizer.chat_template = template("<stop>")
    assert end_ids(writer(tokenizer, "a", eot), tokenizer) == [eot, tokenizer.eos_token_id, stop]
    tokenizer.chat_template = REFUSING
    assert end_ids(writer(tokenizer, "a", eot), tokenizer) == [eot, tokenizer.eos_token_id]
    assert end_text(tokenizer) == ""
    tokenizer.chat_template, tokenizer.eos_token = None, None
    assert end_ids(writer(tokenizer, "a"), tokenizer) == []


def test_a_model_without_a_generation_config_ends_where_its_config_says(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = writer(tokenizer, "a")
    model.generation_config, model.config.eos_token_id = None, 7
    assert end_ids(model, tokenizer) == [7, tokenizer.eos_token_id]


@pytest.mark.parametrize("family", ["qwen2.5-vl", "smolvlm", "gemma3", "qwen2-audio"])
def test_a_template_that_takes_parts_alone_ends_its_turns_too(family):
    tokenizer = templated_tokenizer(FAMILIES[family].processor())
    end = tokenizer.convert_tokens_to_ids(FAMILIES[family].end)
    assert end_of_answer(tokenizer) == end_of_turn(tokenizer) == end
    assert end_text(tokenizer) == ""
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=2))
    assert end_ids(model, tokenizer) == [2, end]


def test_a_template_that_leaves_answers_out_ends_nothing():
    tokenizer = templated_tokenizer(FAMILIES["gemma3"].processor())
    tokenizer.chat_template = "{% for m in messages %}<start_of_turn>{{ m.role }}{% endfor %}"
    assert end_of_answer(tokenizer) is None
    assert end_of_turn(tokenizer) is None


def test_before_end():
    assert before_end([5, 6, 1, 7, 2], [2, 1]) == [5, 6]
    assert before_end([5, 6], [1]) == [5, 6]
    assert before_end([1], [1]) == []


def test_predict_of_a_run_ends_with_the_turn(folder, tmp_path, monkeypatch):
    """A base whose tokenizer and config end with other tokens than the template, trained and asked by commands."""
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    writer(tokenizer, "yes<|im_end|>", tokenizer.eos_token_id).save_pretrained("model")
    tokenizer.save_pretrained("model")
    turns = [{"role": "user", "content": "tea?"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 6)
    words = ["--model.pretrained=model", "--model.task=causal-lm", "--model.method=LoRA", "--data=Chat"]
    words += ["--data.train=chat.jsonl", "--data.validation=chat.jsonl", "--data.chat_template=chatml"]
    words += ["--model.task_settings={generate_batches: 1}", "--model.max_new_tokens=16", "--trainer.max_steps=4"]
    words += ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    assert main(["fit", *words]) == 0
    assert json.loads((tmp_path / "runs/run/001/summary.json").read_text())["values"]["exact_match"] == 1.0
    assert main(["predict", "--run", "runs/run/001", "--output", "p.jsonl"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert {row["prediction"] for row in rows} == {"yes"}
