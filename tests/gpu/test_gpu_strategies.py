"""One process, one device, and every strategy: each trains, saves and loads what the plain run does."""

from __future__ import annotations

import importlib.util
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from on_gpu import ACCELERATOR, BACKEND, DEVICE, METHODS, ROOT, Losses, command_line, tokens
from resuming import run
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from toy_runs import classification, encoder_folder, labelled_data, labelled_file, trainer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lora_lightning.injection.inject import inject
from lora_lightning.models.loading import load_model
from lora_lightning.models.paths import plain
from lora_lightning.models.tasks import find_task
from lora_lightning.storage.load import load_adapter
from lora_lightning.testing import tiny_decoder

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder"), dropout=0.0)


@pytest.mark.parametrize("name", METHODS)
def test_ddp_over_nccl(encoder, tmp_path, name):
    options = {"accelerator": ACCELERATOR, "max_steps": 3, "limit_val_batches": 0}
    runs, losses = [], []
    for strategy in ({}, {"strategy": DDPStrategy(process_group_backend=BACKEND, find_unused_parameters=True)}):
        losses.append(Losses())
        module = classification(encoder, METHODS[name])
        runs.append(run(module, labelled_data(encoder), tmp_path, [losses[-1]], **options, **strategy))
    assert [found.backend for found in losses] == ["", BACKEND]
    single, ddp = (found["state"] for found in runs)
    assert single.keys() == ddp.keys()
    for key, value in single.items():
        torch.testing.assert_close(ddp[key], value, rtol=0, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


class Project(LightningModule):
    """Somebody's own module: injects in `configure_model`, then shards as `shard` says."""

    def __init__(self, method, shard=None):
        super().__init__()
        self.method, self.shard, self.net = method, shard, None

    def configure_model(self):
        if self.net is None:
            with torch.device("cpu"):  # the same random weights, wherever Lightning builds the module
                self.net = tiny_decoder().train()
            inject(self.net, self.method, seed=0)
            if self.shard is not None:
                self.shard(self)

    def training_step(self, batch, batch_idx):
        ids = tokens(rows=3)
        return self.net(input_ids=ids, labels=ids, use_cache=False).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def shard_blocks(project):
    mesh = project.device_mesh["data_parallel"]
    for block in project.net.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(project.net, mesh=mesh)


def train(project, folder, strategy="auto"):
    """Losses and trained tensors after three steps, by plain name."""
    losses = Losses()
    options = {"accelerator": ACCELERATOR, "max_steps": 3, "limit_val_batches": 0, "strategy": strategy}
    fit = trainer(folder, [losses], **options)
    fit.fit(project, torch.utils.data.DataLoader(range(3)))
    trained = {plain(n): p.detach() for n, p in project.net.named_parameters() if p.requires_grad}
    whole = {n: (p.full_tensor() if isinstance(p, DTensor) else p).flatten().cpu() for n, p in trained.items()}
    return losses.values, whole, losses.backend


STRATEGIES = {
    "FSDP2": lambda: ModelParallelStrategy(
        data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=BACKEND
    ),
    "FSDP1": lambda: FSDPStrategy(
        auto_wrap_policy=partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}),
        use_orig_params=True,
        process_group_backend=BACKEND,
    ),
}


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")  # what one process can do
@pytest.mark.filterwarnings("ignore:.*FSDP.state_dict_type.. and .*:FutureWarning")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", METHODS)
def test_somebodys_sharded_project(tmp_path, name, strategy):
    losses, tensors, _ = train(Project(METHODS[name]), tmp_path)
    shard = shard_blocks if strategy == "FSDP2" else None
    sharded_losses, sharded, backend = train(Project(METHODS[name], shard), tmp_path, STRATEGIES[strategy]())
    assert backend == BACKEND
    assert sharded_losses == pytest.approx(losses, rel=1e-5)
    assert tensors.keys() == sharded.keys()
    for key, value in tensors.items():
        torch.testing.assert_close(sharded[key], value, rtol=0, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


CONFIG = """
model:
  pretrained: {encoder}
  linear_baseline: false
  method: {{class_path: LoRA, init_args: {{rank: 2}}}}
data:
  class_path: LabelledText
  init_args: {{train: {file}, validation: {file}, batch_size: 4}}
trainer:
  accelerator: {accelerator}
  devices: 1
  max_steps: 4
  enable_progress_bar: false
  log_every_n_steps: 1
"""


OFFLOAD = ["--trainer.strategy.init_args.cpu_offload", "true"]


@pytest.mark.parametrize(
    ("strategy", "more"),
    [("ddp", []), ("fsdp2", []), ("fsdp2", OFFLOAD), ("fsdp", []), ("fsdp", OFFLOAD), ("deepspeed", [])],
    ids=["ddp", "fsdp2", "fsdp2 offloaded", "fsdp", "fsdp offloaded", "deepspeed"],
)
def test_strategy_files(tmp_path, strategy, more):
    """A second --config: the same adapter as without it, and a fresh model loads it."""
    file = ROOT / "configs" / "strategies" / f"{strategy}.yaml"
    if not file.exists():
        pytest.skip(f"configs/strategies has no {file.name}")
    if strategy == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    encoder = encoder_folder(tmp_path / "encoder", dropout=0.0)
    rows = labelled_file(tmp_path / "train.csv", rows=32)
    config = tmp_path / "small.yaml"
    config.write_text(CONFIG.format(encoder=encoder, file=rows, accelerator=ACCELERATOR))
    words = ["fit", "--config", "small.yaml"]
    command_line(tmp_path, *words)
    command_line(tmp_path, *words, "--config", str(file), "--trainer.devices", "1", *more)
    one, two = (tmp_path / "runs" / "small" / number / "adapter" for number in ("001", "002"))
    expected, found = (load_file(folder / "adapter.safetensors") for folder in (one, two))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    fresh = load_model(str(encoder), find_task("sequence-classification"), 3).to(DEVICE)
    load_adapter(fresh, two)
