import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lora_lightning import plugins
from lora_lightning.cli.configs import config_names, find_config
from lora_lightning.cli.main import main
from lora_lightning.cli.preflight.memory import find_strategy
from lora_lightning.cli.verbs.estimate import devices_of, strategy_of
from lora_lightning.injection.inject import inject
from lora_lightning.models.loading import load_skeleton
from lora_lightning.models.random import full_name
from lora_lightning.models.tasks import all_tasks
from lora_lightning.testing import tiny_decoder

CONFIG = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
CONFIG |= {"intermediate_size": 24, "vocab_size": 32}
WORDS = [
    "estimate",
    "--config",
    "lora",
    "--model.pretrained=random:llama",
    "--model.task=causal-lm",
    f"--model.random_config={json.dumps(CONFIG)}",
    "--model.method.init_args.rank=2",
    "--length=8",
    "--batch-size=2",
]


def rows(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def mib(cell):
    value, unit = cell.split()
    return float(value) * {"GiB": 1024, "MiB": 1}[unit]


def test_a_table_of_strategies_and_gpus(capsys):
    assert main([*WORDS, "--strategy", "ddp", "fsdp2", "--gpus", "1", "4", "--memory=1", "--markdown"]) == 0
    out = capsys.readouterr().out
    found = rows(out)
    assert [(row["Strategy"], row["GPUs"]) for row in found] == [
        ("ddp", "1"),
        ("ddp", "4"),
        ("fsdp2", "4"),
    ]
    net = tiny_decoder()
    report = inject(net, plugins.method("LoRA")(rank=2), seed=0)
    trained = 4 * report.trainable_parameters / 2**20
    frozen = 4 * report.total_parameters / 2**20 - trained
    assert mib(found[0]["Frozen"]) == pytest.approx(frozen, rel=0.01)
    assert mib(found[0]["Trained"]) == mib(found[0]["Gradients"]) == pytest.approx(trained, rel=0.01)
    assert mib(found[0]["Optimizer"]) == pytest.approx(2 * trained, rel=0.05)
    assert mib(found[2]["Frozen"]) == pytest.approx(frozen / 4, rel=0.01)
    assert "LlamaForCausalLM with LoRA: batches of 2 x 8 tokens, 1 batch a step, 32-true" in out
    assert "Fits into 1 GiB a GPU" in out


@pytest.mark.slow
def test_what_a_quantized_base_leaves_plain_keeps_its_dtype(capsys):
    """As in training: embeddings, norms and what flows between layers are float32 unless model.dtype says otherwise."""
    found = []
    for words in ([], ["--quantized=nf4"], ["--quantized=nf4", "--model.dtype=bfloat16"]):
        assert main([*WORDS, *words, "--length=256", "--markdown"]) == 0
        found.append(rows(capsys.readouterr().out)[0])
    plain, packed, half = found
    linear = sum(m.numel() for name, m in tiny_decoder().named_parameters() if name.endswith("_proj.weight"))
    difference = mib(plain["Frozen"]) - mib(packed["Frozen"])
    assert difference == pytest.approx(linear * (4 - 1 / 2 - 4 / 64) / 2**20, rel=0.02)
    unpacked = 4 * 16 * 24 / 2**20  # of the largest weight
    assert mib(packed["Activations"]) == pytest.approx(mib(plain["Activations"]) + unpacked, rel=0.01)
    assert mib(half["Activations"]) < 0.8 * mib(packed["Activations"])


@pytest.mark.timeout(120)
def test_weights_that_are_drawn_until_they_lie_in_bounds(capsys):
    """As those of vision transformers: without values there is no end to it."""
    assert main(["estimate", "tasks/image_classification", "--batch-size=2", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "ViTForImageClassification with LoRA: batches of 2 examples," in out
    linear = 2 * (4 * 64 * 64 + 2 * 64 * 128) + 2 * (5 * 64 + 128)  # of two blocks, with biases
    assert mib(rows(out)[0]["Frozen"]) == pytest.approx(4 * linear / 2**20, rel=0.01)


def test_a_checkpoint_that_is_quantized_is_counted_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lora_lightning.models.quantized_loading.find_spec", lambda name: object())
    config, found = tiny_decoder().config, []
    for stated in (None, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}):
        if stated:
            config.quantization_config = stated
        config.save_pretrained(tmp_path)
        words = [word for word in WORDS if "random" not in word]
        words += [f"--model.pretrained={tmp_path}", *([] if stated else ["--quantized=nf4"])]
        assert main([*words, "--markdown"]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_config_that_quantizes_its_base_is_counted_so(capsys):
    printed = []
    for words in (["--quantized=nf4"], ["--model.quantization=nf4"]):
        assert main([*WORDS, *words, "--markdown"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strategy=ddq"], 'strategy is "ddq". Did you mean "ddp"?'),
        (["--gpus", "8", "0"], "gpus is 0; it must be at least 1."),
        (["--length=0"], "length is 0; it must be at least 1."),
        (["--batch-size=0"], "batch_size is 0; it must be at least 1."),
        (["--memory=0"], "memory is 0; it must be more than 0."),
        (["--precision=bf16"], 'precision is "bf16". Did you mean "bf16-true"?'),
        (["--quantized=nf44"], 'quantized is "nf44". Did you mean "nf4"?'),
    ],
)
def test_what_cannot_be_estimated(words, message, capsys, monkeypatch):
    module, data = (
        SimpleNamespace(quantization=None, pretrained="random:llama"),
        SimpleNamespace(batch_size=2, max_length=8),
    )
    monkeypatch.setitem(
        sys.modules,
        "lora_lightning.cli.lightning",
        SimpleNamespace(build_with_settings=lambda flags: (module, data, {})),
    )
    assert main(["estimate", "{}", *words]) == 2
    assert message in capsys.readouterr().err


def test_what_the_trainer_says():
    assert (devices_of({}), devices_of({"devices": "auto"}), devices_of({"devices": -1})) == (1, 1, 1)
    assert (devices_of({"devices": 4, "num_nodes": 2}), devices_of({"devices": [0, 1]})) == (8, 2)
    assert strategy_of({"strategy": {"class_path": "x.DDPStrategy"}}) == "x.DDPStrategy"
    assert strategy_of({}) == "auto"


@pytest.mark.parametrize("name", [name for name in config_names() if name.startswith("strategies/")])
def test_each_config_of_a_strategy_has_its_layout(name):
    trainer = yaml.safe_load(Path(find_config(name)).read_text(encoding="utf-8"))["trainer"]
    assert f"strategies/{find_strategy(strategy_of(trainer))}" == name


# those of images and sounds have the example of a causal language model: text alone
TEXTS = {name: task for name, task in all_tasks().items() if not name.endswith("-text-to-text")}


@pytest.mark.parametrize("task", TEXTS.values(), ids=TEXTS)
def test_the_example_of_a_task_is_a_batch_it_can_be_trained_on(task):
    """The smallest models of their kinds: the loss of the example is a number that has a gradient."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    kinds = {
        "image-classification": ("vit", {**sizes, "image_size": 8, "patch_size": 4}),
        "causal-lm": ("llama", {**sizes, "vocab_size": 16}),
        "seq2seq-lm": ("t5", {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 16}),
    }
    kind, settings = kinds.get(task.name, ("bert", {**sizes, "vocab_size": 16}))
    settings |= {"decoder_start_token_id": 0} if kind == "t5" else {}
    net = load_skeleton(full_name(f"random:{kind}", settings, 0), task(), 1 if task.name == "regression" else 3)
    batch = task().example(net.config, 2, 4)
    loss = task().loss(task().logits(net, batch), batch)
    assert loss.total.isfinite()
    assert loss.total.requires_grad
    assert int(loss.count) > 0


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"method": "DoRA"}, {"also_train": ["lm_head"]}], ids=str)
def test_an_adapter_to_train_on_counts_as_a_new_one_does(tmp_path, capsys, settings):
    """Read from a folder of this library, or of peft."""
    import lora_lightning as ll
    from lora_lightning.models.loading import load_model
    from lora_lightning.models.tasks import find_task

    net = load_model(full_name("random:llama", CONFIG, 0), find_task("causal-lm"))
    options = {name: value for name, value in settings.items() if name != "method"}
    inject(net, ll.method(settings.get("method", "LoRA"))(rank=2), **options)
    words = [word for word in [*WORDS, "--markdown"] if "method" not in word]
    method = [f"--model.method={settings.get('method', 'LoRA')}", "--model.method.rank=2"]
    assert main([*words, *method, *(f"--model.{name}={value}" for name, value in options.items())]) == 0
    new = rows(capsys.readouterr().out)
    ll.save_adapter(net, tmp_path / "ours")
    ll.export(net, tmp_path / "peft")
    for folder in (tmp_path / "ours", tmp_path / "peft"):
        assert main([*words, "--model.method=null", f"--model.adapter={folder}", "--model.targets=null"]) == 0
        out = capsys.readouterr().out
        assert rows(out) == new
        assert f'It trains on from "{folder}"' in out


@pytest.mark.slow
def test_a_folder_of_peft_that_means_nothing_without_the_base_models_values(tmp_path, capsys):
    import lora_lightning as ll
    from lora_lightning.models.loading import load_model
    from lora_lightning.models.tasks import find_task

    net = load_model(full_name("random:llama", CONFIG, 0), find_task("causal-lm"))
    inject(net, ll.method("LoRA")(rank=2))
    ll.export(net, tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": "pissa"}))
    words = [word for word in WORDS if "method" not in word]
    words += ["--model.method=null", f"--model.adapter={tmp_path / 'peft'}", "--model.targets=null"]
    assert main(words) != 0
    told = " ".join(capsys.readouterr().err.split())
    assert "init_lora_weights='pissa' changes the base weights. Read it once with import_peft, and save" in told


def test_ids_of_tokens_that_train_need_no_tokenizer(capsys):
    assert main([*WORDS, "--model.train_tokens=[3]", "--markdown"]) == 0
    with_rows = capsys.readouterr().out
    assert main([*WORDS, "--markdown"]) == 0
    assert capsys.readouterr().out != with_rows
    assert main([*WORDS, "--data=Completions", "--model.train_tokens=[w3]"]) == 2
    assert "okenizer" in capsys.readouterr().err
