"""`model.quantization`: what is refused before loading, what is loaded, and what leaves the model again."""

from __future__ import annotations

import copy
import importlib.util
import json

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader
from toy_runs import encoder_folder, labelled_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

import lora_lightning as ll
from lora_lightning import AdapterModule, export, plugins
from lora_lightning.adapters.folded import FactoredUpdate
from lora_lightning.callbacks import NoiseInjection
from lora_lightning.cli.main import main
from lora_lightning.distributed import leave_process_group
from lora_lightning.errors import ModelError, SettingsError
from lora_lightning.exporters.from_folder import export_folder
from lora_lightning.injection.inject import ignore_adapter_buffers
from lora_lightning.models.anatomy import survey
from lora_lightning.models.loading import load_model
from lora_lightning.models.quantized_loading import FORMATS, Loading, check_format, loading
from lora_lightning.models.tasks import find_task
from lora_lightning.testing import perturb, tiny_decoder, tiny_encoder
from lora_lightning.testing.toy_models import QUANTIZED, seeded

CELoRA, DoRA, LoRA, LoRASC = (plugins.method(name) for name in ("CELoRA", "DoRA", "LoRA", "LoRASC"))
TASK = "sequence-classification"


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    """Rules are tested without the packages."""
    monkeypatch.setattr("lora_lightning.models.quantized_loading.find_spec", lambda name: object())


loads = pytest.mark.usefixtures("_packages")


@pytest.fixture
def _packages(monkeypatch):
    monkeypatch.setattr("lora_lightning.models.quantized_loading.find_spec", importlib.util.find_spec)
    for package in ("accelerate", "bitsandbytes", "torchao"):
        pytest.importorskip(package, reason=f'needs {package}: pip install "lora-lightning[quant]"')


@pytest.fixture
def encoder(tmp_path):
    tiny_encoder().save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nf5",), r'model.quantization is "nf5"\. Did you mean "nf4"\? Known: nf4, nf4-double, int8, torchao-int8'),
        (("gptq",), 'model.quantization is "gptq".* Known: nf4'),
        (("torchao-int4",), 'quantize such a model in Python and call inject. Nearest: "nf4"'),
        (("nf4", "fsdp"), 'trainer.strategy is "fsdp", which shards weights.* Works: one device, or "ddp"'),
        (("int8", "ModelParallelStrategy"), "which shards weights"),
        (("int8", "deepspeed_stage_3"), "which shards weights"),
        (("nf4", "ddp", "64-true"), 'trainer.precision is "64-true"; nearest: "bf16-mixed" or "32-true"'),
        (("nf4", "ddp", "bf16-mixed", "mps"), 'the device is "mps"; it works on cpu and cuda'),
    ],
)
def test_what_cannot_work_is_refused_by_name(arguments, text):
    with pytest.raises(SettingsError, match=text):
        check_format(*arguments)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("strategy", ["auto", "SingleDeviceStrategy", "DDPStrategy", "ddp_spawn"])
def test_what_works(name, strategy):
    check_format(name, strategy, "bf16-mixed", "cuda")


@pytest.mark.parametrize(("name", "package"), [("nf4", "bitsandbytes"), ("torchao-int8", "torchao")])
def test_a_missing_package_is_named_with_its_extra(name, package, monkeypatch):
    monkeypatch.setattr(
        "lora_lightning.models.quantized_loading.find_spec", lambda wanted: None if wanted == package else object()
    )
    with pytest.raises(SettingsError, match=rf'needs {package}: pip install "lora-lightning\[quant\]"'):
        check_format(name)


@pytest.mark.parametrize(
    ("precision", "compute"), [("32-true", "float32"), ("bf16-mixed", "bfloat16"), ("16-mixed", "float16")]
)
def test_four_bit_products_take_the_precisions_half(precision, compute):
    assert loading("nf4", precision, "cpu").compute == compute


def batches(n=8):
    """Random token ids with labels."""
    with seeded(3):
        ids, labels = torch.randint(3, 32, (2 * n, 6)), torch.randint(0, 3, (2 * n,))
    rows = [{"input_ids": ids[i], "attention_mask": torch.ones_like(ids[i]), "labels": labels[i]} for i in range(2 * n)]
    return DataLoader(rows, batch_size=2)


def module(pretrained, method=None, **settings):
    method = method or LoRA(rank=2, alpha=4.0)
    return AdapterModule(pretrained, method, TASK, num_labels=3, linear_baseline=False, seed=0, **settings)


def trainer(path, **settings):
    return Trainer(
        accelerator="cpu",
        default_root_dir=path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_steps": 4, **settings},
    )


@pytest.mark.parametrize(
    ("settings", "callbacks", "text"),
    [
        (
            {"quantization": "nf4"},
            [NoiseInjection()],
            "stored as nf4, and NoiseInjection writes noise into its",
        ),
        ({"quantization": "nf5"}, [], "Did you mean"),
        (
            {"quantization": "int8", "method": LoRASC(inner=LoRA(rank=2), noise=0.1)},
            [],
            "stored as int8, and Cascade writes noise into its weights",
        ),
        (
            {"quantization": "int8", "method": LoRASC(inner=DoRA(rank=2), noise=0.0)},
            [],
            "stored as int8, and Cascade folds dense updates, .*: take a method whose update is a product",
        ),
    ],
)
def test_a_run_is_refused_before_anything_is_loaded(settings, callbacks, text, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_lightning.training.assembly.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(SettingsError, match=text):
        trainer(tmp_path, callbacks=callbacks).fit(module(encoder, **settings), batches(), batches())


def test_a_model_without_weights_is_refused():
    with pytest.raises(SettingsError, match='"random:bert" has no weights to quantize; leave it null'):
        module("random:bert", quantization="nf4").configure_model()


def test_the_command_line_trains_on_a_quantized_base(tmp_path, monkeypatch, capsys):
    """Through the kinds of layer that a plugin brings; without the plugin there is nothing to adapt."""
    for package in ("accelerate", "torchao"):
        pytest.importorskip(package, reason=f'needs {package}: pip install "lora-lightning[quant]"')
    monkeypatch.setattr("lora_lightning.models.quantized_loading.find_spec", importlib.util.find_spec)
    monkeypatch.chdir(tmp_path)
    labelled_file(encoder_folder(tmp_path / "model") / "train.csv", rows=24)
    words = ["--model.pretrained=model", "--model.method=LoRA", "--model.targets=[query, value]"]
    words += ["--model.quantization=torchao-int8", "--model.linear_baseline=false", "--data=LabelledText"]
    words += ["--data.train=model/train.csv", "--data.validation=model/train.csv", "--data.batch_size=4"]
    words += ["--trainer.max_steps=4", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *words]) == 0
    assert "linear, torchao-int8" in capsys.readouterr().out
    try:
        assert main(["-p", "no:ll_quantized", "fit", *words]) == 2
        assert "error: " in capsys.readouterr().err
    finally:
        plugins.load()


@loads
@pytest.mark.parametrize("name", FORMATS)
def test_a_run_on_a_quantized_base(name, encoder, tmp_path, capsys):
    """The head stays plain and trains; the adapter folder says what it was trained on, and goes back onto it."""
    own = module(encoder, quantization=name)
    run = trainer(tmp_path)
    run.fit(own, batches(), batches())
    assert survey(own.model).formats == name
    paths = set(survey(own.model).quantized)
    assert len(paths) == 12
    assert not any("classifier" in path or "pooler" in path for path in paths)
    assert {p.dtype for p in own.model.parameters() if p.requires_grad} == {torch.float32}
    ll.save_adapter(own.model, tmp_path / "adapter")
    described = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert described["quantization"] == name
    fresh = module(encoder, quantization=name)
    fresh.configure_model()
    ll.load_adapter(fresh.model, tmp_path / "adapter")
    ids = next(iter(batches()))["input_ids"]
    with torch.no_grad():
        expected = own.model.eval()(input_ids=ids).logits
        assert torch.equal(fresh.model.eval()(input_ids=ids).logits, expected)
    before = {key: value.clone() for key, value in own.model.state_dict().items() if "bits" not in key}

    report = export(own.model, tmp_path / "merged", format="merged")
    assert "outputs differ from the unmerged ones by" in str(report)
    assert report.difference == 0.0
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert survey(plain).formats is None
    assert type(plain.bert.encoder.layer[0].attention.self.query) is nn.Linear
    with torch.no_grad():
        found = plain.eval()(input_ids=ids).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05 if name == "int8" else 1e-5)
        assert torch.equal(own.model.eval()(input_ids=ids).logits, expected)  # nothing of the model was changed
    assert own.model.state_dict().keys() >= before.keys()
    assert survey(own.model).formats == name

    from_folder = export_folder(tmp_path / "adapter", tmp_path / "again", "merged")
    assert "outputs differ from the unmerged ones by" in str(from_folder)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in again.state_dict().items())


@loads
def test_an_approximated_backward_reads_dequantized_weights(encoder, tmp_path):
    own = module(encoder, CELoRA(rank=2, svd_rank=2, every_n_steps=2), quantization="nf4")
    run = trainer(tmp_path)
    run.fit(own, batches(), batches())
    assert next(c for c in run.callbacks if hasattr(c, "refreshes")).refreshes == 2  # after steps 1 and 3
    assert all(layer.adapter("default").index is not None for _, layer in list(ll.iter_adapters(own.model))[3:])


@loads
def test_a_cascade_of_factors_runs(encoder, tmp_path):
    own = module(encoder, LoRASC(inner=LoRA(rank=2), stage_steps=2, noise=0.0), quantization="torchao-int8")
    trainer(tmp_path).fit(own, batches(), batches())
    for _, layer in ll.iter_adapters(own.model):
        assert isinstance(layer.shifts["default"], FactoredUpdate)
        assert layer.shifts["default"].log_A.shape[0] == 4


def _train(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name in ("nf4", "torchao-int8"):
        _train_format(name, rank)
    leave_process_group()


def _train_format(name, rank):
    """Two SGD steps on half of each batch; the adapter must be the one that a process of its own trains on all."""
    with seeded(1):
        model = nn.Sequential(nn.Linear(16, 16), QUANTIZED[name][1](nn.Linear(16, 8))).train()
        data = torch.randn(2, 8, 16)
    ll.inject(model, LoRA(rank=2), ["1"], also_train=(), seed=0)
    alone = copy.deepcopy(model)
    ignore_adapter_buffers(model)
    joined = nn.parallel.DistributedDataParallel(model)
    for net, mine in ((alone, slice(None)), (joined, slice(4 * rank, 4 * rank + 4))):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for batch in data:
            optimizer.zero_grad()
            net(batch[mine]).square().mean().backward()
            optimizer.step()
    found, expected = model[1].adapter("default").state_dict(), alone[1].adapter("default").state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    assert bool(expected["lora_B"].any())


@loads
@pytest.mark.multi
@pytest.mark.timeout(300)
def test_two_processes_train_what_one_does(tmp_path):
    torch.multiprocessing.spawn(_train, (str(tmp_path),), nprocs=2)


@loads
def test_a_checkpoint_that_is_quantized_already(encoder, tmp_path):
    first = load_model(encoder, find_task(TASK), 3, quantize=Loading("nf4-double"))
    first.save_pretrained(tmp_path / "packed")
    own = module(str(tmp_path / "packed"))
    own.configure_model()
    assert survey(own.model).formats == "nf4-double"
    ids = torch.randint(3, 32, (2, 6))
    with torch.no_grad():
        assert torch.equal(own.model.eval()(input_ids=ids).logits, first.eval()(input_ids=ids).logits)
    report = export(own.model, tmp_path / "merged", format="merged")
    assert "outputs differ from the unmerged ones by" in str(report)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert survey(plain).formats is None
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, own.model(input_ids=ids).logits, rtol=0, atol=1e-5)
    with pytest.raises(SettingsError, match="is stored as nf4-double already; leave it null"):
        module(str(tmp_path / "packed"), quantization="nf4").configure_model()


@loads
def test_layers_of_gpt2_are_conv1d_before_and_after(tmp_path):
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1)
    with seeded(0):
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    task = find_task("causal-lm")
    with pytest.raises(ModelError, match='"torchao-int8", which has quantized no layer of GPT2LMHeadModel'):
        load_model(str(tmp_path / "gpt2"), task, quantize=Loading("torchao-int8"))
    model = load_model(str(tmp_path / "gpt2"), task, quantize=Loading("nf4")).eval()
    ll.inject(model, LoRA(rank=2), seed=0)
    for _, layer in ll.iter_adapters(model):
        perturb(layer.adapter("default"), size=0.05)
    ids = torch.randint(3, 32, (2, 6))
    with torch.no_grad():
        expected = model(ids).logits
        export(model, tmp_path / "merged", format="merged")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert type(plain.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
        torch.testing.assert_close(plain.eval()(ids).logits, expected, rtol=1e-4, atol=1e-5)


@loads
def test_adapters_travel_in_peft_format(tmp_path):
    tiny_decoder().save_pretrained(tmp_path / "decoder")
    model = load_model(str(tmp_path / "decoder"), find_task("causal-lm"), quantize=Loading("nf4")).eval()
    ll.inject(model, LoRA(rank=2), seed=0)
    for _, layer in ll.iter_adapters(model):
        perturb(layer.adapter("default"))
    export(model, tmp_path / "peft")
    fresh = load_model(str(tmp_path / "decoder"), find_task("causal-lm"), quantize=Loading("nf4")).eval()
    ll.import_peft(fresh, tmp_path / "peft")
    ids = torch.randint(3, 32, (2, 6))
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, model(ids).logits)


@loads
def test_data_parallel_wrappers_leave_packed_weights_alone(encoder):
    model = load_model(encoder, find_task(TASK), 3, quantize=Loading("torchao-int8"))
    ll.inject(model, LoRA(rank=2), ["query"], seed=0)
    ignore_adapter_buffers(model)
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert "bert.encoder.layer.0.attention.self.query.base.weight" in ignored
    assert "bert.encoder.layer.0.attention.self.key.weight" in ignored
    assert "bert.embeddings.word_embeddings.weight" not in ignored
