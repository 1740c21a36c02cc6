"""What an export will be refused is said before training, with the words of the export itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from toy_runs import encoder_folder, labelled_file

import lora_lightning as ll
from lora_lightning import plugins
from lora_lightning.cli.main import main
from lora_lightning.errors import ExportError
from lora_lightning.exporters.preview import refusals
from lora_lightning.testing import perturb, tiny_decoder, tiny_encoder

CELoRA, DoRA, LoRA, LoRASC, MoELoRA, RoseLoRA = (
    plugins.method(name) for name in ("CELoRA", "DoRA", "LoRA", "LoRASC", "MoELoRA", "RoseLoRA")
)
TRAVELS = [LoRA(rank=2), DoRA(rank=2), RoseLoRA(rank=2), CELoRA(rank=2, svd_rank=1), LoRASC(inner=LoRA(rank=2))]


@pytest.mark.parametrize("method", TRAVELS, ids=lambda method: type(method).__name__)
def test_what_travels_is_not_refused(method: Any, tmp_path: Any) -> None:
    model = tiny_encoder()
    ll.inject(model, method, ["query", "value"], seed=0)
    assert refusals(model) == {}
    for form in ("peft", "merged"):
        ll.export(model, tmp_path / form, form)


MOE = MoELoRA(experts=2, top_k=2, rank=2)
BOTH = {"peft", "merged"}
CASES = {
    "an update that depends on its input": (tiny_encoder, MOE, ["query"], BOTH),
    "a tied output layer": (lambda: tiny_decoder(tied=True), LoRA(rank=2), ["lm_head"], {"merged"}),
    "a bias that the architecture lacks": (tiny_decoder, LoRA(rank=2, bias=True), ["q_proj"], {"merged"}),
    "no model of transformers": (lambda: nn.Sequential(nn.Linear(6, 5)), LoRA(rank=2), ["0"], {"merged"}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_refused_later_is_said_now_in_the_same_words(case: str, tmp_path: Any) -> None:
    make, method, targets, formats = CASES[case]
    model = make()
    ll.inject(model, method, targets, seed=0)
    said = refusals(model)
    assert set(said) >= formats
    for _, layer in ll.iter_adapters(model):
        perturb(layer.adapter("default"), size=0.1)
    for form in ("peft", "merged"):
        if form in said:
            with pytest.raises(ExportError) as refused:
                ll.export(model, tmp_path / form, form)
            assert str(refused.value) == said[form]
        else:
            ll.export(model, tmp_path / form, form)


def test_a_model_without_adapters_has_nothing_to_refuse() -> None:
    assert refusals(torch.nn.Linear(2, 2)) == {}


def test_doctor_and_the_head_of_a_run_say_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"--model.pretrained={encoder_folder(tmp_path / 'model')}", "--model.method=MoELoRA"]
    words += [
        "--model.method.experts=2",
        "--model.method.top_k=2",
        "--model.targets=[query]",
        "--data=LabelledText",
        "--trainer.accelerator=cpu",
    ]
    rows = labelled_file(tmp_path / "rows.csv", rows=16)
    words += [f"--data.train={rows}", f"--data.validation={rows}", "--data.batch_size=4", "--trainer.max_steps=2"]
    main(["doctor", *words])
    told = " ".join(capsys.readouterr().out.split())
    assert "export --format peft will be refused: " in told
    assert "export --format merged will be refused: MoELoRA on " in told
    words.append("--serve_with=vllm")
    main(["doctor", *words])
    assert "export --for vllm: vllm serves this adapter in no form: " in " ".join(capsys.readouterr().out.split())
    main(["fit", *words, "--trainer.enable_progress_bar=false", "--model.linear_baseline=false"])
    told = " ".join(capsys.readouterr().out.split())
    assert "export --format merged will be refused: MoELoRA on " in told
    assert "export --for vllm: vllm serves this adapter in no form: " in told
