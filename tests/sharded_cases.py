"""Runs that two processes must take like one: what they train, with what, and where they are resumed.

`python -m torch.distributed.run --nproc-per-node=2 tests/sharded_cases.py STRATEGY FOLDER [CASE ...]` takes every case
straight, then again from a checkpoint in the middle, and writes the adapter of both. STRATEGY: ddp, fsdp2 or fsdp.
A process that fails ends the launch. Without words it prints the table of cases for docs/processes.md.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from resuming import SaveAt, at_step
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, TensorDataset
from toy_runs import (
    classification,
    completion_data,
    decoder_folder,
    encoder_folder,
    experts_folder,
    labelled_data,
    trainer,
)
from transformers import BertForSequenceClassification

from ll_adalora import AdaLoRA
from ll_beamlora import BeamLoRA
from ll_ce_lora import CELoRA
from ll_cola import COLA
from ll_dora import DoRA
from ll_lora import LoRA
from ll_lorasc import LoRASC
from ll_lorasc.optim import SlowFast
from ll_lors import LoRS
from ll_mora import MoRA
from ll_multilora import MultiLoRA
from ll_neat import NEAT
from ll_optimizers.fa import LoRAFA
from ll_optimizers.multiplicative import Multiplicative
from ll_optimizers.plus import LoRAPlus
from ll_optimizers.pro import LoRAPro
from ll_optimizers.riemannian import RiemannianAdamW, RiemannianSGD
from ll_optimizers.rite import LoRARITE
from ll_periodic_lora import PeriodicLoRA
from ll_pst import PST
from ll_rac_lora import RACLoRA
from ll_relora import ReLoRA
from ll_reslora import ResLoRA, ResLoRAInputs
from ll_riemannian_moe import MoELoRA
from ll_rose import RoseLoRA
from ll_sara import SaRA
from ll_sbora import SBoRA
from ll_sora import SoRA
from ll_weight_change.callback import WeightDecomposition
from ll_weight_change.spectrum import UpdateSpectrum
from ll_xgblora import XGBLoRA
from lora_lightning.callbacks.best import KeepBest
from lora_lightning.callbacks.cascade import Cascade
from lora_lightning.callbacks.forgetting import Forgetting
from lora_lightning.callbacks.inject import InjectAdapters
from lora_lightning.callbacks.noise import NoiseInjection
from lora_lightning.callbacks.rank_pruning import RankPruning
from lora_lightning.callbacks.resume import ExactResume
from lora_lightning.callbacks.samples import Samples
from lora_lightning.data import ResumableLoader
from lora_lightning.errors import AdapterStateError, SettingsError
from lora_lightning.exporters.export import export
from lora_lightning.exporters.trained_adapter import find_adapter
from lora_lightning.methods import Method
from lora_lightning.storage.folder import save_adapter
from lora_lightning.testing.toy_models import seeded
from lora_lightning.training import assembly
from lora_lightning.training.module import AdapterModule
from lora_lightning.training.run_report import RunReport
from lora_lightning.training.strategies.fsdp1 import FSDP1
from lora_lightning.training.strategies.fsdp2 import FSDP2
from lora_lightning.training.trainer_checkpoints import AtomicCheckpoints

STEPS, SAVED_AT = 6, 3
STRATEGIES: dict[str, Callable[[], Any]] = {"ddp": DDPStrategy, "fsdp2": FSDP2, "fsdp": FSDP1}


@dataclass(frozen=True)
class Case:
    """A run."""

    method: Method
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
    callbacks: Callable[[], list[Any]] = list
    model: str = "encoder"
    """ "encoder" (a classifier), "decoder" (a causal language model), "experts" (one with fused experts), or "project"
    (a module that knows nothing of adapters)."""
    data: dict[str, Any] = field(default_factory=dict)
    """More settings of the data module."""
    reads_base: bool = False
    """Whether frozen weights are read or written between steps, which FSDP1 refuses."""
    apart: bool = False
    """Whether a loss is one of micro-batches, so that one process takes two of one row for a step, as two do."""
    module: dict[str, Any] = field(default_factory=dict)
    """More settings of AdapterModule."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """More settings of Trainer."""
    forgets: bool = False
    """Whether other data are measured before, while and after training."""
    start: Method | None = None
    """What the adapter was trained with that the run begins with, by itself or, with another `method`, on top of it."""
    start_format: str = "ours"
    """ "ours" or "peft": of that adapter's folder."""


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


CASES: dict[str, Case] = {
    "LoRA": Case(LoRA(rank=3)),
    "LoRA, float32": Case(LoRA(rank=3), adamw, module={"dtype": "float32"}),
    "DoRA, float32": Case(DoRA(rank=3), adamw, module={"dtype": "float32"}),
    "LoRA, window of 2, clipped": Case(
        LoRA(rank=3), trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_steps": 4}
    ),
    "LoRA, RiemannianSGD": Case(
        LoRA(rank=3), partial(RiemannianSGD, lr=1e-2, weight_decay=0.1, divide_by_scaling_sq=True)
    ),
    "LoRA, RiemannianAdamW, gauss_seidel": Case(
        LoRA(rank=3), partial(RiemannianAdamW, lr=1e-2, weight_decay=0.1, order="gauss_seidel")
    ),
    "LoRA of rank 1, RiemannianAdamW, window of 2, clipped": Case(
        LoRA(rank=1),
        partial(RiemannianAdamW, lr=1e-2, damping=0.0),
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_steps": 4},
    ),
    "LoRA, LoRAPlus": Case(LoRA(rank=3), partial(LoRAPlus, ratio=4.0)),
    "LoRA, Multiplicative": Case(LoRA(rank=3), partial(Multiplicative, modes={"A": "mult"})),
    "LoRA, LoRAFA": Case(LoRA(rank=3, train="B"), partial(LoRAFA, lr=1e-2)),
    "LoRA, LoRAPro": Case(LoRA(rank=3), partial(LoRAPro, lr=1e-2, weight_decay=0.1)),
    "LoRA, LoRARITE": Case(
        LoRA(rank=3),
        partial(LoRARITE, lr=1e-2, weight_decay=0.1, clip_norm=0.1, skip_rms=None),
        model="decoder",  # rounding is magnified where factors are near singular, as on the encoder's few examples
    ),
    "LoRA as wide as its layer, LoRARITE": Case(
        LoRA(rank=16), partial(LoRARITE, lr=1e-2), model="decoder", module={"targets": ["gate_proj", "up_proj"]}
    ),
    "LoRA, SlowFast": Case(LoRA(rank=3), partial(SlowFast, inner=partial(RiemannianAdamW, lr=1e-2), every_n_steps=2)),
    "RoseLoRA, RiemannianAdamW": Case(
        RoseLoRA(rank=3, sparsity=0.6, start=2, end=5, clamp=0.3),
        partial(RiemannianAdamW, lr=1e-2),
        callbacks=lambda: [RunReport()],
    ),
    "RoseLoRA": Case(RoseLoRA(rank=3, sparsity=0.6, start=2, end=4, first_score="gradient")),
    "SoRA": Case(SoRA(rank=3, shrinkage=30.0, gate_penalty=0.5), adamw, model="decoder"),
    "AdaLoRA": Case(AdaLoRA(rank=3, budget=0.5, start=2, end=4, every_n_steps=1), adamw, model="decoder"),
    "BeamLoRA": Case(BeamLoRA(rank=3, stage_steps=2, pruned_mass=0.4, end=6), adamw, model="decoder"),
    "SBoRA": Case(SBoRA(rank=4)),
    "MultiLoRA": Case(MultiLoRA(modules=2, rank=2)),
    "MoRA, folded": Case(MoRA(rank=1, maps="modulo", fold_every=3), reads_base=True),
    "NEAT": Case(NEAT(rank=2, depth=1, activation="tanh")),
    "ResLoRA": Case(ResLoRA(rank=3), adamw, model="decoder"),
    "ResLoRA, recomputed, RiemannianAdamW": Case(
        ResLoRA(rank=3), partial(RiemannianAdamW, lr=1e-2), model="decoder", module={"gradient_checkpointing": True}
    ),
    "ResLoRAInputs": Case(ResLoRAInputs(rank=3, window=2), adamw, model="decoder", apart=True),
    "ResLoRAInputs, input, recomputed": Case(
        ResLoRAInputs(rank=3, shortcut="input", window=3),
        adamw,
        model="decoder",
        apart=True,
        module={"gradient_checkpointing": True},
    ),
    "LoRA, RankPruning": Case(LoRA(rank=5), callbacks=lambda: [RankPruning(final_rank=2, start=2, end=5)]),
    "LoRA, KeepBest": Case(
        LoRA(rank=3),
        partial(torch.optim.SGD, lr=3.0),
        callbacks=lambda: [KeepBest("val_loss", "max")],  # which is not the last state
        trainer={"val_check_interval": 2},
    ),
    "MoELoRA, RiemannianAdamW, clipped": Case(
        MoELoRA(experts=3, top_k=3, rank=2, router_clip=1e-3, router_lr_ratio=1.0),
        partial(RiemannianAdamW, lr=1e-2),
        trainer={"gradient_clip_val": 0.05},
    ),
    "LoRA, decoder, checkpointed": Case(LoRA(rank=3), model="decoder", module={"gradient_checkpointing": True}),
    "LoRA, decoder, output layer adapted": Case(
        LoRA(rank=3), model="decoder", module={"targets": ["q_proj", "lm_head"]}, trainer={"accumulate_grad_batches": 2}
    ),
    "LoRA, decoder, output layer trained in full": Case(
        LoRA(rank=3), adamw, model="decoder", module={"also_train": ["embed_tokens"], "dtype": "float32"}
    ),
    "LoRA, decoder, watched": Case(
        LoRA(rank=3),
        partial(torch.optim.SGD, lr=3.0),
        model="decoder",
        callbacks=lambda: [Samples(["w1 w2 w3", "w9"], every_n_steps=2, max_new_tokens=6)],
        forgets=True,
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.01, "max_steps": 4, "log_every_n_steps": 1},
    ),
    # 8 packed rows: of an odd number a sampler repeats one, and two processes would see other batches than one
    "LoRA, decoder, packed": Case(LoRA(rank=3), model="decoder", data={"packing": True, "max_length": 40}),
    "DoRA": Case(
        DoRA(rank=3), callbacks=lambda: [WeightDecomposition(at=[2]), UpdateSpectrum(at=[2])], reads_base=True
    ),
    "DoRA, full gradient": Case(DoRA(rank=3, detach_norm=False), module={"targets": "all-linear"}),
    "DoRA, magnitude": Case(DoRA(mode="magnitude"), model="decoder"),
    "CELoRA": Case(
        CELoRA(rank=3, kept=0.5, svd_rank=2, every_n_steps=2), module={"targets": "all-linear"}, reads_base=True
    ),
    "CELoRA, drawn, window of 2": Case(
        CELoRA(rank=3, kept=0.5, svd_rank=2, every_n_steps=1, selection="sample"),
        model="decoder",
        trainer={"accumulate_grad_batches": 2, "max_steps": 4},
        reads_base=True,
    ),
    "LoRS": Case(LoRS(rank=3), model="decoder", module={"targets": "all-linear"}, reads_base=True),
    "PST": Case(PST(rank=2, score_rank=2, sparsity=0.5, start=2, end=5), reads_base=True),
    "SaRA": Case(SaRA(threshold=0.01, nuclear=1e-4, reselect=4), reads_base=True),
    "MoELoRA": Case(MoELoRA(rank=2, experts=4, top_k=2, balance_loss=0.1, z_loss=0.01), adamw, apart=True),
    "LoRASC, logs": Case(
        LoRASC(inner=LoRA(rank=1), noise=0.0, stage_steps=2, blend=0.5), model="decoder", reads_base=True
    ),
    "LoRASC, dense, noise persists": Case(
        LoRASC(inner=LoRA(rank=3), noise=0.1, noise_mode="persist", stage_steps=4, rule="outer_step"),
        model="decoder",
        reads_base=True,
    ),
    "ReLoRA": Case(
        ReLoRA(inner=LoRA(rank=1), stage_steps=2, rewarm_steps=1, pruned_fraction=0.5),
        adamw,
        model="decoder",
        reads_base=True,
    ),
    "COLA, later stages of lower rank": Case(
        COLA(inner=LoRA(rank=3), stage_steps=2, stage_ranks=[3, 1], moments="prune", pruned_by="magnitude"),
        adamw,
        model="decoder",
        reads_base=True,
    ),
    "PeriodicLoRA, window of 2": Case(
        PeriodicLoRA(inner=LoRA(rank=3), blend=0.3, stage_steps=2, pruned_fraction=0.5),
        adamw,
        model="decoder",
        trainer={"accumulate_grad_batches": 2, "max_steps": 4},
        reads_base=True,
    ),
    "RACLoRA": Case(RACLoRA(inner=LoRA(rank=1), stage_steps=2), adamw, model="decoder", reads_base=True),
    "XGBLoRA, log cut to rank 1": Case(
        XGBLoRA(inner=LoRA(rank=1), active_layers=3, stage_steps=2, log_rank=1, factor_decay=0.01),
        adamw,
        model="decoder",
        reads_base=True,
    ),
    "LoRASC of DoRA": Case(
        LoRASC(inner=DoRA(rank=3), noise=0.1, stage_steps=2), module={"targets": "all-linear"}, reads_base=True
    ),
    "LoRASC of CELoRA": Case(
        LoRASC(inner=CELoRA(rank=3, kept=0.5, svd_rank=2, every_n_steps=1), noise=0.1, stage_steps=2),
        model="decoder",
        reads_base=True,
    ),
    "noise": Case(LoRA(rank=3), callbacks=lambda: [NoiseInjection(0.2)], reads_base=True),
    "noise persists": Case(DoRA(rank=3), callbacks=lambda: [NoiseInjection(0.2, "persist")], reads_base=True),
    "embedding, cascade": Case(
        DoRA(rank=3),
        callbacks=lambda: [Cascade(stage_steps=3, noise=0.1)],
        module={"targets": ["word_embeddings"]},
        reads_base=True,
    ),
    "experts": Case(DoRA(rank=3), model="experts", module={"targets": "experts"}),
    "experts, RiemannianAdamW": Case(
        LoRA(rank=3), partial(RiemannianAdamW, lr=1e-2), model="experts", module={"targets": "experts"}
    ),
    "experts, cascade": Case(
        LoRASC(inner=LoRA(rank=3), noise=0.1, stage_steps=2),
        model="experts",
        module={"targets": ["gate_up_proj", "down_proj", "q_proj"]},
        reads_base=True,
    ),
    "project": Case(DoRA(rank=2), model="project", module={"targets": ["mix", "out_proj"], "checkpoint": "full"}),
    "project, cascade, adapter alone": Case(
        LoRASC(inner=LoRA(rank=2), noise=0.1, stage_steps=2),
        model="project",
        module={"targets": ["mix"], "also_train": ["head"], "checkpoint": "adapter"},
        reads_base=True,
    ),
    "tied embedding": Case(LoRA(rank=3), model="decoder", module={"targets": ["embed_tokens", "q_proj"]}),
    "new tokens": Case(LoRA(rank=3), model="decoder", data={"new_tokens": ["<a>", "<b>", "<c>"]}),
    "known tokens": Case(LoRA(rank=3), model="decoder", module={"train_tokens": [5, 7, 11]}),
    "untied": Case(LoRA(rank=3), model="decoder", module={"targets": ["embed_tokens", "lm_head"], "untie": True}),
    "DoRA, trained on from a folder": Case(DoRA(rank=3), start=DoRA(rank=3)),
    "LoRA on top of an adapter": Case(LoRA(rank=2), start=LoRA(rank=3)),
    "LoRA, trained on from a folder of peft": Case(LoRA(rank=3), start=LoRA(rank=3), start_format="peft"),
}


class FirstStep(Callback):
    """The first forward pass of a run computes what the saved adapter does on the base model.

    Args:
        folder: the base model.
        adapter: the adapter.
    """

    def __init__(self, folder: Path, adapter: Path) -> None:
        self.folder, self.adapter, self.seen = folder, adapter, 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 0:
            self.hook = pl_module.model.register_forward_hook(self.compare, with_kwargs=True)

    def compare(self, model: Any, args: Any, inputs: dict[str, Tensor], output: Any) -> None:
        self.hook.remove()
        saved = BertForSequenceClassification.from_pretrained(self.folder, num_labels=3).double().eval()
        find_adapter(str(self.adapter)).load(saved)
        with torch.no_grad():
            torch.testing.assert_close(output.logits, saved(**inputs).logits, rtol=0, atol=1e-12)
        self.seen += 1

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        assert self.seen == (not trainer.ckpt_path)


class Eager(AdapterModule):
    """With a loop over experts: the grouped product of torch takes no float64."""

    def configure_model(self) -> None:
        super().configure_model()
        self.model.set_experts_implementation("eager")


class Block(nn.Module):
    """x + tanh(W norm(x)), and an attention that reads its output layer's weight instead of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(7), nn.Linear(7, 7)
        self.attention = nn.MultiheadAttention(7, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 7) to (N, 7)."""
        x = x + torch.tanh(self.mix(self.norm(x)))
        tokens = torch.stack([x, -x], dim=1)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0][:, 0]


class Net(nn.Module):
    """Two blocks and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 7) to (N, 3)."""
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Project(LightningModule):
    """A module and data of a project's own."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        with seeded(4):
            self.net = Net().double()
            self.rows = TensorDataset(torch.randn(32, 7).double(), torch.randint(3, (32,)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> Any:
        mine = DistributedSampler(self.rows, self.trainer.world_size, self.global_rank, shuffle=False)
        return ResumableLoader(self.rows, batch_size=self.batch, sampler=mine)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def take(
    case: Case, folder: Path, batch: int, callbacks: list[Any], checkpoint: Path | None = None, **more: Any
) -> Any:
    """One run; its module, still sharded where the strategy makes any."""
    seed_everything(3, verbose=False)
    if case.apart:
        batch, more = 1, more if "devices" in more else {"accumulate_grad_batches": 2}
    module: Any
    data: Any
    options: dict[str, Any] = {"optimizer": case.optimizer, "dtype": "float64", **case.module}
    callbacks = [*case.callbacks(), *callbacks]
    method: Method | None = case.method
    if case.start is not None:
        path, stacked = started(folder, case), case.start != case.method
        method, options["adapter"] = (method, [str(path)]) if stacked else (None, str(path))
        callbacks += [FirstStep(folder, path)]
    if case.model == "project":
        callbacks += [InjectAdapters(case.method, seed=1, **case.module), ExactResume()]
        module, data, more = Project(batch), None, {"use_distributed_sampler": False, **more}
    elif case.model == "encoder":
        module = classification(folder, method, **options)
        data = labelled_data(folder, batch_size=batch, group_by_length=False, limit=32, **case.data)
    else:
        targets = {"targets": "all-linear", "linear_baseline": False, "seed": 1, "task": "causal-lm"}
        module = Eager(str(folder), case.method, **{**targets, **options})
        data = completion_data(folder, batch_size=batch, group_by_length=False, **case.data)
        callbacks += [Forgetting(completion_data(folder, batch_size=3), every_n_steps=2)] if case.forgets else []
    settings = {"max_steps": STEPS, "plugins": [AtomicCheckpoints()], **case.trainer, **more}
    run = trainer(folder, callbacks, **settings)
    run.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module


def folder_of(base: Path, case: Case) -> Path:
    """A model without dropout, with its tokenizer and data."""
    folder = base / case.model
    if not folder.exists():
        make: dict[str, Callable[[Path], Any]] = {
            "encoder": partial(encoder_folder, dropout=0.0),
            "decoder": decoder_folder,
            "experts": experts_folder,
            "project": Path.mkdir,
        }
        make[case.model](folder)
    if case.start is not None and not started(folder, case).exists():
        module = take(replace(case, method=case.start, start=None), folder, 4, [], max_steps=2)
        write = save_adapter if case.start_format == "ours" else export
        write(module, started(folder, case))
    return folder


def started(folder: Path, case: Case) -> Path:
    """The adapter that runs begin with, beside their base model."""
    return folder / f"adapter-{type(case.start).__name__}-{case.start_format}"


def record(module: Any, out: Path) -> None:
    """Write the adapter, what was logged, and what a report says, where a test looks for it."""
    save_adapter(module, out)
    if module.global_rank == 0:
        logged = {k: float(v) for k, v in module.trainer.callback_metrics.items() if k.startswith("router_")}
        (out / "router.json").write_text(json.dumps(logged))
        samples = Path(module.trainer.default_root_dir) / "samples.jsonl"
        if samples.is_file():  # a run that is watched logs at every step
            watched = {k: float(v) for k, v in module.trainer.callback_metrics.items() if k in ("grad_norm", "lr")}
            rows = samples.read_text().splitlines()[-2:]
            (out / "watched.json").write_text(json.dumps({**watched, "samples": rows}))
        for recorder in module.trainer.callbacks:
            if isinstance(recorder, Forgetting | UpdateSpectrum):
                text = (Path(module.trainer.default_root_dir) / recorder.filename).read_text()
                (out / recorder.filename).write_text(text)
        summary = next((c.summary for c in module.trainer.callbacks if isinstance(c, RunReport)), None)
        if summary is not None:
            told = {name: summary[name] for name in ("report", "surviving_parameters", "changed", "values")}
            (out / "summary.json").write_text(json.dumps(told))


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("under fsdp2 the first process alone reads a model's files")


def main(strategy: str, base: Path, names: list[str]) -> None:
    """Every case on this process, straight and resumed."""
    warnings.simplefilter("ignore")
    if strategy == "fsdp2" and os.environ["RANK"] != "0":
        assembly.load_model = never
    for name in names or CASES:
        case, out = CASES[name], base / strategy / name
        for kind in ("straight", "resumed"):
            saved = out / "saved.ckpt"
            callbacks = [SaveAt(saved, at_step(min(SAVED_AT, case.trainer.get("max_steps", STEPS) - 1)))]
            shared = {"devices": 2, "accelerator": "cpu", "default_root_dir": out / kind}
            more = shared | {"strategy": STRATEGIES[strategy]()}
            if strategy == "fsdp" and case.module.get("checkpoint") == "full":
                with pytest.raises(AdapterStateError, match="under FSDP1 checkpoints hold the adapter alone"):
                    take(case, base / case.model, 2, [], **more)
                continue
            if strategy == "fsdp" and case.reads_base:
                with pytest.raises(SettingsError, match=r"frozen weights.*FSDP1 keeps in flat shards"):
                    take(case, base / case.model, 2, [], **more)
                continue
            resumed = {"checkpoint": saved} if kind == "resumed" else {}
            module = take(case, base / case.model, 2, callbacks if not resumed else [], **resumed, **more)
            record(module, out / kind) if strategy == "fsdp2" or module.global_rank == 0 else None
            module.trainer.strategy.barrier()
        print(f"{name}: taken", flush=True)


def table() -> str:
    """Markdown: a row a case, a column a strategy."""
    lines = ["| run | ddp | fsdp2 | fsdp |", "| --- | --- | --- | --- |"]
    for name, case in CASES.items():
        lines.append(f"| {name} | equal | equal | {'refused' if case.reads_base else 'equal'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
    else:
        print(table())
