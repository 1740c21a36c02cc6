"""A merged folder is whole: tokenizer, chat template, processor, and the token that ends a turn are in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_classes import model_class
from toy_runs import decoder_folder, encoder_folder

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.cli.main import main
from lora_lightning.data.chats.templates import end_of_turn
from lora_lightning.exporters.from_folder import export_folder
from lora_lightning.exporters.trained_adapter import find_adapter
from lora_lightning.testing import perturb

TURNS = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} [TURN] {% endfor %}"
OPENED = """
import json, sys, transformers
found = {}
for task, folder, given in json.loads(sys.argv[1]):
    pipe = transformers.pipeline(task, model=folder)
    found[task] = pipe(given, **({"max_new_tokens": 2} if task == "text-generation" else {}))
print("FOUND" + json.dumps(found))
"""


def chat_folder(folder: Path) -> Path:
    """A decoder whose template ends turns with a token that its configuration does not name as the end."""
    decoder_folder(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TURN]"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def image_folder(folder: Path) -> Path:
    model_class("ViTForImageClassification").build().save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def adapted(auto: Any, folder: Path, **options: Any) -> Any:
    model = auto.from_pretrained(folder, **options).eval()
    ll.inject(model, LoRA(rank=2), seed=0)
    for index, (_, layer) in enumerate(ll.iter_adapters(model)):
        perturb(layer.adapters, index)
    return model


@pytest.mark.slow
def test_pipelines_open_what_python_has_exported_in_a_fresh_process(tmp_path: Path) -> None:
    models = {
        "text-generation": (transformers.AutoModelForCausalLM, chat_folder(tmp_path / "chat"), TURNS[:1]),
        "text-classification": (
            transformers.AutoModelForSequenceClassification,
            encoder_folder(tmp_path / "text"),
            "w1",
        ),
    }
    asked = []
    for task, (auto, folder, given) in models.items():
        model = adapted(auto, folder)
        report = ll.export(model, tmp_path / task, format="merged")
        assert not [note for note in report.notes if "tokenizer" in note]
        asked.append((task, str(tmp_path / task), given))
    done = subprocess.run(
        [sys.executable, "-c", OPENED, json.dumps(asked)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.partition("FOUND")[2])
    assert len(found["text-generation"][0]["generated_text"]) == 2, "the user's turn and an answer"
    expected = adapted(*models["text-classification"][:2])
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["text-classification"][1])
    with torch.no_grad():
        scores = expected(**tokenizer("w1", return_tensors="pt")).logits.softmax(-1)[0]
    assert found["text-classification"][0]["score"] == pytest.approx(float(scores.max()), abs=1e-5)


def test_generation_ends_with_the_turn_and_the_model_is_as_it_was(tmp_path: Path) -> None:
    model = adapted(transformers.AutoModelForCausalLM, chat_folder(tmp_path / "base"))
    before = model.generation_config.to_dict()
    ll.export(model, tmp_path / "merged", format="merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == TEMPLATE
    end = tokenizer.convert_tokens_to_ids("[TURN]")
    assert end_of_turn(tokenizer) == end
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [end, 2]
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("settings", [{"do_sample": False, "temperature": 0.5}, {"top_p": 0.6}, None], ids=str)
def test_a_generation_config_that_transformers_does_not_write_travels_as_it_is(settings: Any, tmp_path: Path) -> None:
    """Published models have sampling settings without sampling; one without any has none in its folder either."""
    model = adapted(transformers.AutoModelForCausalLM, chat_folder(tmp_path / "base"))
    given = None if settings is None else transformers.GenerationConfig(eos_token_id=2, **settings)
    model.generation_config = given
    ll.export(model, tmp_path / "merged", format="merged")
    assert model.generation_config is given
    assert (tmp_path / "merged" / "generation_config.json").is_file() == (given is not None)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config
    assert again.do_sample in (None, False)
    if given is not None:
        assert {name: getattr(again, name) for name in settings} == settings
        assert again.eos_token_id[1:] == [given.eos_token_id] == [2]  # behind the end of a turn


def test_an_image_processor_travels(tmp_path: Path) -> None:
    model = adapted(transformers.AutoModelForImageClassification, image_folder(tmp_path / "base"))
    ll.export(model, tmp_path / "merged", format="merged")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "merged", backend="pil")
    assert processor.size == {"height": 16, "width": 16}
    assert not (tmp_path / "merged" / "tokenizer_config.json").exists()


def test_a_processor_that_is_given_wins_and_an_unknown_source_is_said(tmp_path: Path) -> None:
    model = adapted(transformers.AutoModelForCausalLM, decoder_folder(tmp_path / "base"))
    given = transformers.AutoTokenizer.from_pretrained(chat_folder(tmp_path / "chat"))
    ll.export(model, tmp_path / "given", format="merged", processor=given)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "given").chat_template == TEMPLATE
    model.config._name_or_path = ""
    report = ll.export(model, tmp_path / "none", format="merged")
    assert "no tokenizer and no processor: none lies beside the base model" in str(report)


@pytest.mark.parametrize("inside", ["", "adapter"], ids=["run", "its adapter folder"])
def test_a_run_brings_the_template_that_it_was_trained_with(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model has none: it is the setting of the run's data."""
    monkeypatch.chdir(tmp_path)
    base = decoder_folder(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"messages": TURNS}) for _ in range(8)))
    template = (
        "{% for m in messages %}{{ m.role }} {% generation %}{{ m.content }} [EOS]{% endgeneration %}{% endfor %}"
    )
    data = ["--data=Chat", f"--data.train={rows}", f"--data.validation={rows}", f"--data.chat_template={template}"]
    model = [f"--model.pretrained={base}", "--model.task=causal-lm", "--model.method=LoRA", "--model.method.rank=2"]
    trainer = ["--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *model, *data, *trainer, "--seed_everything=1"]) == 0
    [made] = (tmp_path / "runs").glob("*/001")
    assert main(["export", str(made / inside), "--format", "merged", "--output", str(tmp_path / "merged")]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == template
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == "user w1 w2 [EOS]assistant w3 [EOS]"


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (TEMPLATE, "[TURN]"),
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "[EOS]"),
        ("{% for m in messages %}{{ m.content }} w5{% endfor %}", None),
        ("{{ raise_exception('only tools') }}", None),
        (None, None),
    ],
)
def test_what_ends_a_turn(template: str | None, ends: str | None, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_folder(tmp_path / "chat"))
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == (None if ends is None else tokenizer.convert_tokens_to_ids(ends))


@pytest.mark.slow
@pytest.mark.parametrize("template", ["plain", None])
def test_an_exported_adapter_brings_a_template_that_the_base_model_lacks(tmp_path, template):
    base = decoder_folder(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    ll.inject(model, LoRA(rank=2), seed=0)
    ll.save_adapter(model, tmp_path / "run/adapter")
    data = {"class_path": "Chat", "init_args": {"tokenizer": str(base), "chat_template": template}}
    (tmp_path / "run/config.yaml").write_text(json.dumps({"data": data}))
    export_folder(tmp_path / "run/adapter", tmp_path / "out", "peft", pretrained=str(base))
    brought = find_adapter(str(tmp_path / "out")).tokenizer
    if template is None:
        assert brought is None
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(brought)
        assert tokenizer.apply_chat_template(TURNS[:1], tokenize=False).strip() == "User:\nw1 w2"
        assert tokenizer.get_vocab() == transformers.AutoTokenizer.from_pretrained(base).get_vocab()
