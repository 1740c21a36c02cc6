"""Wrong command lines and configs with their answers: one line that names what is wrong and what would be right."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from toy_runs import encoder_folder, labelled_file, save_tokenizer

from lora_lightning.cli.main import main

BASE = {
    "model": {"pretrained": "model", "method": "LoRA", "linear_baseline": False},
    "data": {"class_path": "LabelledText", "init_args": {"train": "model/train.csv", "validation_fraction": 0.3}},
    "trainer": {"max_steps": 4, "max_epochs": -1, "accelerator": "cpu", "enable_progress_bar": False},
}

FIT = {
    # words of other tools
    "--model.lr 1e-4": 'no setting "model.lr". Here it is model.optimizer.lr',
    "--learning_rate 1e-4": 'no setting "learning_rate". Here it is model.optimizer.lr',
    "--model.r 8": 'no setting "model.r". Here it is model.method.rank',
    "--model.method.r 8": 'LoRA has no "r". Here it is model.method.rank',
    "--model.method.lora_alpha 8": 'LoRA has no "lora_alpha". Here it is model.method.alpha',
    "--model.method.lora_dropout 0.1": 'LoRA has no "lora_dropout". Here it is model.method.dropout',
    "--model.method.target_modules [q]": 'LoRA has no "target_modules". Here it is model.targets',
    "--model.target_modules [q]": 'no setting "model.target_modules". Here it is model.targets',
    "--model.modules_to_save [q]": "Here it is model.also_train",
    "--model.method.modules_to_save [q]": "Here it is model.also_train",
    "--model.load_in_4bit true": "Here it is model.quantization (nf4)",
    "--model.method QLoRA": 'no method "QLoRA": it is a method on a base of 4 bits: any model.method, with',
    "--num_train_epochs 3": "Here it is trainer.max_epochs",
    "--trainer.epochs 3": "Here it is trainer.max_epochs",
    "--trainer.gradient_accumulation_steps 3": "Here it is trainer.accumulate_grad_batches",
    "--per_device_train_batch_size 3": "Here it is data.batch_size",
    "--output_dir x": "Here it is trainer.default_root_dir",
    "--bf16 true": "Here it is trainer.precision (bf16-true or bf16-mixed)",
    "--seed 3": "Here it is seed_everything",
    "--model.lr_scheduler cosine": "Did you mean model.lr_scheduler.decay cosine?",
    "--model.lr_scheduler ReduceLROnPlateau": "Did you mean model.lr_scheduler.decay plateau?",
    "--model.lr_scheduler step": 'this is "step". It takes: warmup_fraction, decay, monitor, mode, factor, patience',
    "--model.lr_scheduler.decay ReduceLROnPlateau": '"constant" or "plateau". Here it is "plateau"',
    "--model.lr_scheduler.warmup_steps 10": 'Did you mean "model.lr_scheduler.warmup_fraction"?',
    "--model.lr_scheduler.patience 2": 'WarmUp.patience is 2; decay is "linear", which watches nothing',
    "--lr_scheduler_type cosine": "Here it is model.lr_scheduler.decay",
    "--warmup_steps 10": "Here it is model.lr_scheduler.warmup_fraction (of all steps)",
    "--adapter lora": "Here it is model.method",
    "--finetuning_type lora": "Here it is model.method",
    "--use_dora true": "Here it is a method of its own (model.method)",
    "--model.method.use_rslora true": "Here it is model.method.scaling_rule (alpha/sqrt(r))",
    "--lora_target all": "Here it is model.targets",
    "--model.targets all": 'is neither "all-linear" nor a scope',
    "--model.targets q_proj,v_proj": "Several names are a list: [q_proj, v_proj]",
    "--quantization_bit 4": "Here it is model.quantization (nf4 or int8)",
    "--model.quantization 4bit": 'or null. Here it is "nf4"',
    "--model.quantization 8": 'or null. Here it is "int8"',
    "--trainer.precision fp16": 'or null. Here it is "16-mixed"',
    "--model.method.bias all": 'model.method.bias is "all"; it must be true or false',
    "--optim adamw_torch": "Here it is model.optimizer",
    "--model.optimizer adamw_8bit": 'no optimizer "adamw_8bit". Did you mean "AdamW',  # or AdamW8bit of bitsandbytes
    "--deepspeed ds_z3.json": "Here it is --config strategies/deepspeed",
    "--eval_strategy steps": "Here it is trainer.val_check_interval",
    "--report_to wandb": "Here it is trainer.logger",
    "--trainer.logger wandbb": 'no logger "wandbb". Did you mean "wandb"',
    "--early_stopping_patience 3": "Here it is trainer.callbacks (EarlyStopping, with patience)",
    "--load_best_model_at_end true": "Here it is trainer.callbacks (KeepBest)",
    "--data alpaca": 'no data module "alpaca": here it is Completions, with format alpaca',
    "--data json": "here it is data.train that names a file, and data the kind of its rows",
    "--data.path x.csv": 'LabelledText has no "path". Here it is data.train',
    "--packing true": "Here it is data.packing (of Chat, Completions and PlainText)",
    "--trainer.max_steps 1k": 'trainer.max_steps is "1k"; it must be a whole number',
    # misspelt
    "--model.methd LoRA": 'no setting "model.methd". Did you mean "model.method"?',
    "--model.method LoRa": 'Did you mean "LoRA"?',
    "--model.method DORA": 'Did you mean "DoRA"?',
    "--model.method.rnak 3": '"rnak". Did you mean "rank"?',
    "--trainer.max_step 3": 'Did you mean "trainer.max_steps"?',
    "--trainer.callbacks+ KeepBst": 'Did you mean "KeepBest"?',
    "--data LabeledText": 'Did you mean "LabelledText"?',
    "--data.trian x.csv": '"trian". Did you mean "train"?',
    "--model.optimizer AdamWW": 'Did you mean "AdamW"?',
    "--model.task sequence-clasification": 'Did you mean "sequence-classification"?',
    "--model.targets [qury]": 'Nearest: "query" (2 layers)',
    "--config tiyn.yaml": 'Did you mean "tiny.yaml"?',
    "-p no:ll_lroa": 'Did you mean "ll_lora"?',
    "--max_steps 4": 'no setting "max_steps". Did you mean "trainer.max_steps"?',
    # values
    "--model.method.rank 0": "LoRA.rank is 0; it must be at least 1",
    "--model.method.rank two": 'model.method.rank is "two"; it must be',
    "--model.method.rank 1.5": 'rank is "1.5"; it must be',
    "--model.method.rank null": "model.method.rank is null; it must be a whole number. Leave it out, and it is 8",
    "--data.text null": 'data.text is null; it must be text. Leave it out, and it is "text"',
    "--data.batch_size null": "data.batch_size is null; it must be a whole number. Leave it out, and it is 16",
    "--model.optimizer AdamW --model.optimizer.lr null": "model.optimizer.lr is null; it must be a number. "
    "Leave it out, and it is 0.001",
    "--model.method.alpha nan": 'model.method.alpha is "nan"; it must be a number',
    "--model.method.dropout 1.5": "LoRA.dropout is 1.5",
    "--data.batch_size 0": "LabelledText.batch_size is 0; it must be at least 1",
    "--data.max_length 1": "LabelledText.max_length is 1; it must be at least 2 tokens",
    "--data.max_length 9999": "data.max_length is 9999; BertForSequenceClassification has 512 positions",
    "--data.validation_fraction 1.0": "LabelledText.validation_fraction is 1.0; it must lie in [0, 1)",
    "--model.num_labels 1": "model.num_labels is 1; the data have 3 classes",
    "--model.dtype int8": 'model.dtype is "int8"; it must be',
    "--model.quantization nf5": 'quantization is "nf5"; it must be',
    "--trainer.precision 16-true": 'gradients underflow; take "bf16-true"',
    "--trainer.max_steps 0": "trainer.max_steps is 0, so nothing was trained; give a larger one",
    "--trainer.accumulate_grad_batches 0": "accumulate_grad_batches is 0; it must be at least 1",
    "--checkpoint_minutes 0": "SaveOften.checkpoint_minutes is 0.0; it must be above 0, or null",
    "--checkpoint_minutes often": 'checkpoint_minutes is "often"; it must be a number or null',
    "--model.optimizer.lr 0.1": "no optimizer is named. Write model.optimizer: NAME",
    "--model.optimizer AdamW --model.optimizer.lr -1": "model.optimizer.init_args.lr is -1.0; it must be at least 0. ",
    "--model.optimizer AdamW --model.optimizer.lr 0": "model.optimizer: its rate (lr) is 0, so that nothing would be",
    "--trainer.limit_train_batches 0": "trainer.limit_train_batches is 0, so that nothing would be trained",
    "--trainer.check_val_every_n_epoch 0": "trainer.check_val_every_n_epoch is 0; it must be at least 1, or null",
    "--seed_everything 99999999999": "seed_everything is 99999999999; it must be from 0 to 4294967295",
    "--trainer.max_time 00:00:00:00": "the run was stopped before its first step (trainer.should_stop), as",
    "--model.optimizer SGD --model.optimizer.momentum -1": "model.optimizer.init_args.momentum is -1.0; SGD says",
    # places
    "--model.pretrained ./modle": 'model.pretrained is "./modle"; no such folder',
    "--data.train model/trian.csv": '"model/trian.csv"',
    "--data.text sentence": 'LabelledText.text is "sentence"',
    "--data.label star": 'LabelledText.label is "star"',
    "--data.tokenizer ./gone": 'data.tokenizer is "./gone"',
    "--data.tokenizer bigger": "data.tokenizer has 143 tokens; BertForSequenceClassification has 50 rows",
    "--data.train one.csv": 'the data have one class only, "c0", so that nothing can be learned',
    "--config model": "model",
    "--resume runs/none": "--resume runs/none: no such folder",
    "--run runs/none": "only validate, test, predict takes --run; fit continues a run with --resume DIR",
    "--model.pretrained no-owner/no-model": 'model.pretrained is "no-owner/no-model": We couldn\'t connect',
    "--ckpt_path none.ckpt": "--ckpt_path none.ckpt: no such file. Name a checkpoint, or a run's folder with",
    "--ckpt_path model": 'model": Is a directory. Name a file.',
    f"--trainer.default_root_dir {'x' * 300}": "File name too long. Give a shorter name.",
    f"--model.pretrained {'x' * 300}": "File name too long. Give a shorter name.",
    f"--data.train {'x' * 300}.csv": "File name too long. Give a shorter name.",
    f"--config {'x' * 300}.yaml": "File name too long. Give a shorter name.",
    # combinations
    "--trainer.callbacks+ EarlyStopping --trainer.callbacks.monitor eval_loss": 'EarlyStopping.monitor is "eval_loss"; '
    'the run logs train_loss, val_loss, val_accuracy, val_f1, val_mcc. Did you mean "val_loss"?',
    "--trainer.callbacks+ ModelCheckpoint --trainer.callbacks.monitor val_los": 'Did you mean "val_loss"?',
    "--model.task regression": "the data (LabelledText) serve sequence-classification",
    "--model.task causal-lm": "the data (LabelledText) serve sequence-classification",
    "--trainer.callbacks+ KeepBest --trainer.callbacks.monitor val_x": 'KeepBest.monitor is "val_x"; the run',
    "--trainer.callbacks+ EarlyStopping": "trainer.callbacks.monitor (EarlyStopping) is not given; it must be text.",
    "--model.task masked-lm --model.num_labels 3": "the data (LabelledText) serve sequence-classification",
    # without effect
    "--model.max_new_tokens 12": 'model.max_new_tokens is 12, but the task "sequence-classification" generates no text',
    "--model.loss_head plain": 'model.loss_head is "plain", but the task "sequence-classification" computes no loss',
    "--model.half_adapters true": "but frozen weights are float32, so that adapters are, too. Leave it out",
    "--trainer.gradient_clip_algorithm value": 'trainer.gradient_clip_algorithm is "value", but '
    "trainer.gradient_clip_val is None, so that nothing is clipped",
    "--trainer.gradient_clip_val -1": "which would spoil gradients or turn them round; it must be above 0, or null",
    "--trainer.max_steps -1 --trainer.max_time 00:00:00:02 --model.lr_scheduler.decay cosine": "neither "
    "trainer.max_steps nor trainer.max_epochs bounds the run",
    "--trainer.check_val_every_n_epoch 50 --trainer.callbacks+ EarlyStopping --trainer.callbacks.monitor val_loss": (
        "trainer.check_val_every_n_epoch is 50, and the run ends after 4 batches, before it validates, but "
        'EarlyStopping waits for "val_loss". Give a smaller one.'
    ),
    # others
    "--trust-run": "--trust-run goes with --run DIR",
    "--config": "--config needs a value",
    "tiny.yaml": '"tiny.yaml" is a config; give it as --config tiny.yaml',
}

LOGGED = "the run logs train_loss, val_loss, val_accuracy, val_f1, val_mcc. Did you mean "
WATCH = "--trainer.callbacks+"
PLATEAU = "--model.lr_scheduler.decay plateau"
DOCTOR = {
    f"{PLATEAU} --model.lr_scheduler.monitor eval_loss": f'monitor is "eval_loss"; {LOGGED}"val_loss"?',
    f"{PLATEAU} --model.lr_scheduler.mode max": 'model.lr_scheduler.mode is "max", but of val_loss less is better',
    f"{WATCH} EarlyStopping --trainer.callbacks.monitor eval_loss": f'"eval_loss"; {LOGGED}"val_loss"?',
    f"{WATCH} EarlyStopping --trainer.callbacks.monitor val_accuracy": 'EarlyStopping.mode is "min", but of '
    'val_accuracy more is better; set it to "max"',
    f"{WATCH} ModelCheckpoint {WATCH[:-1]}.monitor val_acc": f'"val_acc"; {LOGGED}"val_mcc"',
    "--trainer.callbacks+ KeepBest --trainer.callbacks.monitor val_bleu": 'KeepBest.monitor is "val_bleu"; the run',
    "--trainer.callbacks+ KeepBest --trainer.callbacks.monitor val_loss --data.validation_fraction 0": "It has no "
    "validation data",
    "--data.tokenizer bigger": "data.tokenizer has 143 tokens; BertForSequenceClassification has 50 rows",
    "--data.train one.csv": "the data have one class only",
    "--trainer.gradient_clip_algorithm value": "so that nothing is clipped",
    "--model.max_new_tokens 12": "generates no text",
}

TWICE = {
    "a section": "trainer: {max_steps: 2}\n",
    "a section within a verb's": "fit: {trainer: {max_steps: 2}, trainer: {max_steps: 3}}\n",
    "a setting": "seed_everything: 1\nseed_everything: 2\n",
    "a setting deep inside": "extra: {a: [{b: {c: 1, c: 2}}]}\n",
    "a quoted key": "'seed_everything': 1\nseed_everything: 2\n",
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    place = tmp_path_factory.mktemp("wrong")
    folder = encoder_folder(place / "model")
    labelled_file(folder / "train.csv", rows=40)
    labelled_file(place / "one.csv", rows=20, labels=1)
    (place / "bigger").mkdir()
    save_tokenizer(place / "bigger", more=100)
    (place / "tiny.yaml").write_text(yaml.safe_dump(BASE))
    return place


@pytest.fixture
def here(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


MOST = [pytest.param(flags, marks=pytest.mark.slow if number % 3 else ()) for number, flags in enumerate(FIT)]
"""A third of them in each run of the tests, since a command line takes a fifth of a second to be read."""


@pytest.mark.parametrize("flags", MOST)
def test_fit(here, capsys, flags):
    before = sorted(here.iterdir())
    assert main(["fit", "--config", "tiny.yaml", *flags.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert FIT[flags] in error[-1]
    assert error[-1].startswith("error: ")
    assert not any("Traceback" in line for line in error)
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize("flags", DOCTOR)
def test_doctor_says_it_first(here, capsys, flags):
    assert main(["doctor", "--config", "tiny.yaml", *flags.split()]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert any(DOCTOR[flags] in line for line in problems), problems


def test_doctor_finds_nothing_where_monitors_are_logged(here, capsys):
    from lora_lightning.cli.preflight.config import check_config

    flags = ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "val_loss"]
    assert check_config(["--config", "tiny.yaml", *flags]).problems == []


def test_null_in_a_config_where_a_text_belongs(here, capsys):
    Path("null.yaml").write_text("model: {task: null}\n")
    assert main(["fit", "--config", "tiny.yaml", "--config", "null.yaml"]) == 2
    said = 'model.task is null; it must be text. Leave it out, and it is "sequence-classification".'
    assert capsys.readouterr().err.strip().endswith(f"error: {said}")
    assert main(["doctor", "--config", "tiny.yaml", "--config", "null.yaml"]) == 1
    assert f"problem: {said}" in capsys.readouterr().out


@pytest.mark.parametrize("case", TWICE)
@pytest.mark.parametrize("verb", ["fit", "doctor", "cite"])
def test_a_key_that_stands_twice_is_an_error_everywhere(here, capsys, case, verb):
    Path("tiny.yaml").write_text(yaml.safe_dump(BASE) + TWICE[case])
    words = ["tiny.yaml"] if verb == "cite" else ["--config", "tiny.yaml"]
    assert main([verb, *words]) != 0
    told = capsys.readouterr()
    assert "stands twice, in lines" in told.out + told.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["train", "--config", "tiny.yaml"], 'no verb "train". Here it is "fit"'),
        (["merge", "runs/x"], 'no verb "merge". Here it is "export --format merged"'),
        (["eval", "--run", "runs/x"], 'no verb "eval". Here it is "validate"'),
        (["infer", "--run", "runs/x"], 'no verb "infer". Here it is "generate"'),
        (["ft"], 'no verb "ft". Did you mean "fit"?'),
        (["--config", "tiny.yaml"], "the verb comes first"),
        (
            ["cite", "DoRAA"],
            'cite "DoRAA": no method, start, optimizer or callback of a plugin, no config and no file of ',
        ),
        (["cite", "DoRAA"], 'Did you mean "DoRA"? Methods: AdaLoRA, BeamLoRA,'),
        (
            ["cite", "VeRA"],
            'cite "VeRA": no method, start, optimizer or callback of a plugin, no config and no file of ',
        ),
        (["cite", "lora.yml"], 'config "lora.yml": no file and no config of that name. Did you mean "lora"?'),
        (["show", "DoRAA"], "DoRA"),
        (["export", "runs/none", "--format", "peft", "--output", "x"], "runs/none"),
        (["predict", "--config", "tiny.yaml"], "predict: no trained weights given; --run FOLDER takes a run's"),
        (["validate", "--resume", "runs/none"], "only fit takes --resume"),
        (["predict", "--run", "runs/none"], "--run runs/none: no such folder"),
        (["methods", "--all"], 'methods: it takes no "--all"'),
    ],
)
def test_other_verbs(here, capsys, words, text):
    assert main(words) == 2
    assert text in capsys.readouterr().err
    assert not Path("runs").exists()


EXITS = """
import sys
from lightning.pytorch.callbacks import Callback
class Exits(Callback):
    def on_train_batch_end(self, trainer, *_):
        sys.exit(0)
"""


def test_a_callback_that_ends_the_program_is_no_success(here, capsys, monkeypatch):
    (here / "exits.py").write_text(EXITS)
    monkeypatch.syspath_prepend(here)
    assert main(["fit", "--config", "tiny.yaml", "--trainer.callbacks+", "exits.Exits"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == (
        "error: the run in runs/tiny/001 was stopped by sys.exit() of a callback or a plugin before its first "
        "checkpoint; start it again."
    )


def test_cite_takes_the_name_of_a_class(here, capsys):
    assert main(["cite", "DoRA"]) == 0
    assert "2402.09353" in capsys.readouterr().out
    assert main(["cite", "LoRA", "DoRA", "DoRA"]) == 0
    assert capsys.readouterr().out.count("2402.09353") == 1
