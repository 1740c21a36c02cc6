"""Runs on images and sounds through the command line: fit, predict, doctor, resume, a merged folder that is whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import wave
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from media_models import FAMILIES, RATE, picture, sound
from peft_models import PEFT_WARNINGS
from safetensors.torch import load_file

from lora_lightning.cli.main import main
from lora_lightning.data.media.processors import load_processor
from lora_lightning.storage.load import load_adapter

pytestmark = PEFT_WARNINGS
QUIET = ["--trainer.enable_progress_bar=false"]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config of four steps on six conversations, for the model of a family."""
    monkeypatch.chdir(tmp_path)

    def make(family: str) -> str:
        one = FAMILIES[family]
        one.save(tmp_path / "base")
        rows = []
        for number in range(6):
            if one.kind == "image":
                picture(number, 16 + 4 * number, 16).save(tmp_path / f"{number}.png")
            else:
                with wave.open(str(tmp_path / f"{number}.wav"), "wb") as file:
                    file.setnchannels(1)
                    file.setsampwidth(2)
                    file.setframerate(RATE)
                    file.writeframes((sound(number, 10000 + 1000 * number) * 2**15).astype("<i2").tobytes())
            turns = [
                {"role": "user", "content": f"<{one.kind}>what?"},
                {"role": "assistant", "content": "ab"[number % 2]},
            ]
            rows.append({"messages": turns, one.kind: f"{number}.{'png' if one.kind == 'image' else 'wav'}"})
        Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        settings = {
            "model": {
                "pretrained": "base",
                "task": f"{one.kind}-text-to-text",
                "method": {"class_path": "LoRA", "init_args": {"rank": 2}},
                "max_new_tokens": 2,
            },
            "data": {
                "class_path": "MediaChat",
                "init_args": {"train": "rows.jsonl", "validation": "rows.jsonl", "batch_size": 2},
            },
            "trainer": {"max_steps": 4, "logger": False, "accelerator": "cpu", "num_sanity_val_steps": 0},
        }
        Path("it.yaml").write_text(yaml.safe_dump(settings))
        return "it.yaml"

    return make


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_fitted_predicts_and_is_exported_with_its_processor(config, family):
    assert main(["fit", "--config", config(family), *QUIET]) == 0
    run = Path("runs/it/001")
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    assert main(["predict", "--run", str(run), *QUIET, "--output", "out.jsonl"]) == 0
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all({"prediction", "loss", "messages"} <= set(row) for row in rows)
    generate = ["generate", str(run), "--input", "rows.jsonl", "--output", "answers.jsonl", "--device", "cpu"]
    assert main([*generate, "--max_new_tokens", "2"]) == 0
    answered = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in answered] == [row["prediction"] for row in rows]
    assert main(["predict", "--run", str(run), *QUIET, "--data.predict", "rows.jsonl", "--output", "more.jsonl"]) == 0
    assert Path("more.jsonl").read_text() == Path("out.jsonl").read_text()
    assert main(["export", str(run), "--format", "merged", "--output", "merged"]) == 0
    auto = getattr(
        transformers, "AutoModelForMultimodalLM" if family == "qwen2-audio" else "AutoModelForImageTextToText"
    )
    merged, base = auto.from_pretrained("merged").eval(), auto.from_pretrained("base").eval()
    processor = load_processor("merged", "data.processor")
    kind, token = FAMILIES[family].kind, FAMILIES[family].processor()
    mark = getattr(token, f"{kind}_token")
    media = {"images": [picture(0)]} if kind == "image" else {"audio": [sound(0, 12000)], "sampling_rate": RATE}
    inputs = processor(text=[f"{mark}hi"], return_tensors="pt", **media)
    with torch.no_grad():
        plain = base(**inputs).logits
        load_adapter(base, str(run / "adapter"))
        adapted, exported = base(**inputs).logits, merged(**inputs).logits
    assert not torch.equal(adapted, plain)
    assert torch.allclose(adapted, exported, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["smolvlm", "qwen2.5-vl"])
def test_peft_reads_back_what_language_model_and_vision_tower_have_learned(config, family):
    name, targets = config(family), ["--model.targets", "[all-linear, vision, projector]"]
    assert (
        main(["fit", "--config", name, *targets, *QUIET, "--model.optimizer=AdamW", "--model.optimizer.lr=0.05"]) == 0
    )
    assert main(["export", "runs/it/001", "--format", "peft", "--output", "exported"]) == 0
    one = transformers.AutoModelForImageTextToText.from_pretrained("base").eval()
    other = transformers.AutoModelForImageTextToText.from_pretrained("base").eval()
    inputs = FAMILIES[family].processor()(
        text=[f"{FAMILIES[family].processor().image_token}hi"], images=[picture(0)], return_tensors="pt"
    )
    with torch.no_grad():
        plain = one(**inputs).logits
        load_adapter(one, "runs/it/001/adapter")
        ours = one(**inputs).logits
        theirs = peft.PeftModel.from_pretrained(other, "exported").eval()
        torch.testing.assert_close(theirs(**inputs).logits, ours, rtol=1e-5, atol=1e-6)
        assert (ours - plain).abs().max() > 1e-3
    adapted = {name for name, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert {any(part in name for part in ("vision", "visual")) for name in adapted} == {True, False}
    assert any(("connector" in name or "merger" in name) for name in adapted)


@pytest.mark.multi
@pytest.mark.timeout(120)
def test_two_processes_learn_from_images_what_one_does(config):
    """Each takes half of the rows of a step."""
    name = config("smolvlm")
    words = ["fit", "--config", name, "--trainer.limit_val_batches=0", *QUIET]
    assert main([*words, "--data.batch_size=2"]) == 0
    two = ["--data.batch_size=1", "--trainer.devices=2", "--trainer.strategy=ddp"]
    done = subprocess.run(
        [sys.executable, "-m", "lora_lightning", *words, *two],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(f"runs/it/00{number}/adapter/adapter.safetensors") for number in (1, 2))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-5)


def test_doctor_reads_a_config_of_images_and_tells_a_missing_processor(config, capsys):
    name = config("gemma3")
    assert main(["doctor", "--config", name]) == 0
    assert main(["doctor", "--config", name, "--data.processor", "./nowhere"]) != 0
    assert "data.processor" in capsys.readouterr().out


@pytest.mark.slow
def test_a_resumed_run_is_refused_where_an_image_has_changed(config, capsys):
    name = config("gemma3")
    assert main(["fit", "--config", name, *QUIET, "--trainer.max_steps=2"]) == 0
    picture(9, 16, 16).save("0.png")
    assert main(["fit", "--resume", "runs/it/001", *QUIET, "--trainer.max_steps=4"]) != 0
    assert "images and sounds" in capsys.readouterr().err
