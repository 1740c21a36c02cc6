"""Answers while training: the same as outside of it, in files and loggers, and nothing else changes."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from media_models import FAMILIES, picture
from resuming import SaveAt, assert_equal_runs, at_step, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_runs import classification, completion_data, decoder_folder, encoder_folder, labelled_data, trainer

from ll_lora import LoRA
from lora_lightning.callbacks import Samples
from lora_lightning.callbacks.samples import show
from lora_lightning.data import Chat, Completions, MediaChat
from lora_lightning.errors import DataError, SettingsError
from lora_lightning.training.module import AdapterModule

PROMPTS = ["w1 w2 w3", "w4"]


@pytest.fixture
def decoder(tmp_path):
    return decoder_folder(tmp_path / "decoder")


def language_model(folder):
    settings = {"task": "causal-lm", "targets": ["q_proj", "v_proj"], "seed": 1}
    return AdapterModule(str(folder), LoRA(rank=2, dropout=0.2), **settings)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_they_come_before_the_first_step_and_at_steps_as_the_model_answers(decoder, tmp_path):
    module, samples = language_model(decoder), Samples(PROMPTS, every_n_steps=3, max_new_tokens=5)
    fit = trainer(tmp_path, [samples], max_steps=6, logger=TensorBoardLogger(tmp_path, "", ""))
    data = completion_data(decoder)
    fit.fit(module, datamodule=data)
    rows = lines(tmp_path / "samples.jsonl")
    assert [(row["step"], row["number"], row["prompt"]) for row in rows] == [
        (step, number, prompt) for step in (0, 3, 6) for number, prompt in enumerate(PROMPTS)
    ]
    module.eval()
    for row in rows[-2:]:
        ids = data.tokenizer_object(row["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        out = module.model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert row["answer"] == data.tokenizer_object.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    events = EventAccumulator(str(tmp_path)).Reload()
    texts = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("samples/text_summary")]
    assert len(texts) == 3
    assert all("**w1 w2 w3**" in text for text in texts)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_training_is_that_without_them_and_a_resume_writes_the_same(decoder, tmp_path, temperature):
    def samples():
        return Samples(PROMPTS, every_n_steps=2, max_new_tokens=4, temperature=temperature)

    options = {"max_steps": 8, "limit_val_batches": 0}
    plain = run(language_model(decoder), completion_data(decoder), tmp_path / "plain", **options)
    save = SaveAt(tmp_path / "at.ckpt", at_step(5))
    whole = run(language_model(decoder), completion_data(decoder), tmp_path / "whole", [samples(), save], **options)
    assert_equal_runs(plain, whole)
    written = (tmp_path / "whole/samples.jsonl").read_text()
    resumed = run(
        language_model(decoder),
        completion_data(decoder),
        tmp_path / "whole",
        [samples()],
        checkpoint=tmp_path / "at.ckpt",
        **options,
    )
    assert_equal_runs(whole, resumed)
    assert (tmp_path / "whole/samples.jsonl").read_text() == written
    assert {row["step"] for row in lines(tmp_path / "whole/samples.jsonl")} == {0, 2, 4, 6, 8}


def test_a_file_of_conversations_at_validations(decoder, tmp_path):
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": turns}] * 8))
    (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": turns, "more": 1}) + "\n")
    data = Chat(
        train=str(tmp_path / "chat.json"),
        validation=str(tmp_path / "chat.json"),
        tokenizer=str(decoder),
        chat_template="plain",
        batch_size=4,
    )
    samples = Samples(str(tmp_path / "asked.jsonl"), max_new_tokens=3)
    text = Samples(["w1 w2"], max_new_tokens=3, file="texts.jsonl")
    trainer(tmp_path, [samples, text], max_steps=4, val_check_interval=2).fit(language_model(decoder), datamodule=data)
    rows, texts = lines(tmp_path / "samples.jsonl"), lines(tmp_path / "texts.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert [row["answer"] for row in rows] == [row["answer"] for row in texts]  # a text is what the user says


REFUSED = {
    "no prompt": ([], {}, SettingsError, "Samples.prompts is .*; name a file, or give at least one prompt"),
    "steps": (PROMPTS, {"every_n_steps": 0}, SettingsError, "Samples.every_n_steps is 0; it must be at least 1"),
    "length": (PROMPTS, {"max_new_tokens": 0}, SettingsError, "Samples.max_new_tokens is 0"),
    "temperature": (PROMPTS, {"temperature": -1.0}, SettingsError, "Samples.temperature is -1.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_work(case):
    prompts, options, kind, match = REFUSED[case]
    with pytest.raises(kind, match=match):
        Samples(prompts, **options)


def test_prompts_that_cannot_be_used(decoder, tmp_path):
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    for prompts, match in (
        (str(tmp_path / "odd.csv"), r"with the columns a, b; one of them must be called messages"),
        ([" "], r"Samples.prompts: number 0 is empty"),
        ([[{"role": "user", "content": "w1"}]], r"number 0 holds turns; .*has no template"),
    ):
        with pytest.raises(DataError, match=match):
            trainer(tmp_path, [Samples(prompts)], max_steps=1).fit(
                language_model(decoder), datamodule=completion_data(decoder)
            )
    folder = encoder_folder(tmp_path / "encoder")
    with pytest.raises(SettingsError, match=r"BertForSequenceClassification does not generate texts"):
        trainer(tmp_path, [Samples(PROMPTS)], max_steps=1).fit(
            classification(folder, LoRA(rank=2)), datamodule=labelled_data(folder)
        )


def test_the_panels_of_other_loggers():
    rows = [{"step": 4, "number": 0, "prompt": [{"role": "user", "content": "why"}], "answer": "so"}]
    seen = []

    class WandbLogger:
        def log_text(self, **given):
            seen.append(given)

    class Experiment:
        def log_text(self, *given, **named):
            seen.append((given, named))

    class MLFlowLogger:
        experiment, run_id = Experiment(), "r1"

    class CometLogger:
        experiment = Experiment()

    class Own:
        pass

    for logger in (WandbLogger(), MLFlowLogger(), CometLogger(), Own()):
        show(logger, rows, 4)
    assert seen == [
        {"key": "samples", "columns": ["step", "prompt", "answer"], "data": [[4, "why", "so"]], "step": 4},
        (("r1", "**why**\n\nso", "samples/step_00000004.md"), {}),
        (("**why**\n\nso",), {"step": 4}),
    ]


def test_modes_and_random_numbers_come_back(decoder, tmp_path):
    module = language_model(decoder)
    samples = Samples(PROMPTS, every_n_steps=1, max_new_tokens=2, temperature=0.7)
    modes = []

    class Look(Samples):
        def after_step(self, trainer, pl_module, step):
            before, random = {n: m.training for n, m in pl_module.named_modules()}, torch.get_rng_state()
            super().after_step(trainer, pl_module, step)
            modes.append(before == {n: m.training for n, m in pl_module.named_modules()})
            modes.append(torch.equal(random, torch.get_rng_state()))

    look = Look(PROMPTS, every_n_steps=1, max_new_tokens=2, temperature=0.7, file="other.jsonl")
    trainer(tmp_path, [samples, look], max_steps=2).fit(module, datamodule=completion_data(decoder))
    assert modes == [True] * 4


FORMATS = {
    "a template": ({"prompt_template": "w7 {text} w8"}, ["w1 w2", {"text": "w3"}], ["w7 w1 w2 w8", "w7 w3 w8"]),
    "a column of it that a text fills twice": ({"prompt_template": "{text} w8 {text}"}, ["w1"], ["w1 w8 w1"]),
    "two columns": ({"prompt_template": "w7 {text} {n}"}, [{"text": "w1", "n": "w2"}], ["w7 w1 w2"]),
    "none": ({}, ["w1 w2"], ["w1 w2"]),
}


@pytest.mark.parametrize("case", FORMATS)
def test_prompts_get_the_format_of_the_data_as_predict_gives_it(decoder, tmp_path, case):
    settings, prompts, expected = FORMATS[case]
    file = tmp_path / "rows.csv"
    file.write_text("text,prompt,n,completion\n" + "w1 w2,w1 w2,w3,w4 w5\n" * 8)
    samples = Samples(prompts, every_n_steps=9, max_new_tokens=5)
    module, data = (
        language_model(decoder),
        Completions(train=str(file), validation=str(file), tokenizer=str(decoder), batch_size=4, **settings),
    )
    trainer(tmp_path, [samples], max_steps=1).fit(module, datamodule=data)
    asked = [data.tokenizer_object.decode(asked.ids) for _, asked in samples._asked]
    assert asked == expected
    assert [row["prompt"] for row in lines(tmp_path / "samples.jsonl")] == prompts
    rows = tmp_path / "asked.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"text": "w9", "prompt": "w9", "n": "w2", **p}) + "\n" for p in prompts if isinstance(p, dict)
        )
    )
    if rows.read_text():
        asked_of_file = Samples(str(rows), every_n_steps=9, max_new_tokens=2, file="more.jsonl")
        trainer(tmp_path, [asked_of_file], max_steps=1).fit(language_model(decoder), datamodule=data)
        assert data.tokenizer_object.decode(asked_of_file._asked[0][1].ids) == expected[-1]


def test_rows_that_do_not_fit_the_format(decoder, tmp_path):
    for settings, prompt, match in (
        ({"prompt_template": "{prompt} {n}"}, "w1", r"number 0 is a text, and the prompts .* built from prompt and n"),
        ({"prompt_template": "{prompt} {n}"}, {"n": "w1"}, r"number 0 lacks prompt; .* built from prompt, n"),
        ({}, {"n": "w1"}, r"number 0 is a row with n; the data build no prompts from columns"),
    ):
        file = tmp_path / "rows.csv"
        file.write_text("prompt,n,completion\n" + "w1 w2,w3,w4 w5\n" * 8)
        data = Completions(train=str(file), validation=str(file), tokenizer=str(decoder), **settings)
        fit, module = trainer(tmp_path, [Samples([prompt])], max_steps=1), language_model(decoder)
        with pytest.raises(DataError, match=match):
            fit.fit(module, datamodule=data)


@pytest.mark.parametrize("family", ["smolvlm", "qwen2.5-vl", "gemma3"])
def test_questions_about_images_are_answered_as_the_model_answers_them(tmp_path, family):
    processor, base = FAMILIES[family].processor(), FAMILIES[family].save(tmp_path / "base")
    picture(0).save(tmp_path / "0.png")
    turns = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps({"messages": turns, "image": "0.png"})] * 2))
    asked = [{"prompt": "what?", "image": "0.png"}, {"prompt": "what?"}, {"messages": turns, "images": ["0.png"]}]
    outs = {}
    for number, row in enumerate(asked):
        (tmp_path / f"asked{number}.jsonl").write_text(json.dumps(row))
        data = MediaChat(
            train=str(tmp_path / "rows.jsonl"), validation=str(tmp_path / "rows.jsonl"), processor=base, batch_size=2
        )
        module = AdapterModule(base, LoRA(rank=2), task="image-text-to-text", targets=["q_proj"])
        samples = Samples(str(tmp_path / f"asked{number}.jsonl"), every_n_steps=1, max_new_tokens=5)
        folder = tmp_path / str(number)
        trainer(folder, [samples], max_steps=1).fit(module, datamodule=data)
        out = lines(folder / "samples.jsonl")
        assert [line["step"] for line in out] == [0, 1]
        named = {"image": "0.png"} if number == 0 else {"images": ["0.png"]}
        assert out[0]["prompt"] == "what?" if number == 1 else named.items() <= out[0]["prompt"].items()
        text = processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [*([{"type": "image"}] if number != 1 else []), {"type": "text", "text": "what?"}],
                }
            ],
            tokenize=False,
            add_generation_prompt=True,
        )
        images = {} if number == 1 else {"images": [[picture(0)]]}
        inputs = processor(text=[text], **images, add_special_tokens=False, return_tensors="pt")
        ends = [2, processor.tokenizer.convert_tokens_to_ids(FAMILIES[family].end)]
        written = module.model.eval().generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=ends)
        answer = processor.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        outs[number] = out[-1]["answer"]
        assert outs[number] == answer.strip()
    assert outs[0] == outs[2]
