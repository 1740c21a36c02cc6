"""Preferences on two processes: the adapter, the metrics and the reference of one process on the joint batch."""

from __future__ import annotations

import json

import pytest
import torch
from preference_runs import pairs_file
from safetensors.torch import load_file
from test_processes import on_two, run
from toy_runs import decoder_folder

pytestmark = [pytest.mark.multi, pytest.mark.timeout(300)]

CONFIG = """
model:
  pretrained: {decoder}
  task: {task}
  {settings}
  method: {{class_path: LoRA, init_args: {{rank: 2}}}}
  lr_scheduler: {{warmup_fraction: 0}}
  optimizer: {{class_path: AdamW, init_args: {{lr: 1.0e-3, eps: 1.0e-4}}}}
  linear_baseline: false
  dtype: float64
data:
  class_path: Preferences
  init_args: {{train: {rows}, validation: {odd}, batch_size: {batch}, unpair: {unpair}}}
trainer: {{accelerator: cpu, max_steps: 6, accumulate_grad_batches: 2, enable_progress_bar: false}}
"""


@pytest.mark.parametrize(
    ("kind", "strategy"), [("dpo", "ddp"), ("kto", "ddp"), ("reward", "ddp"), ("dpo", "fsdp2"), ("kto", "fsdp2")]
)
def test_two_processes_train_what_one_does_on_the_joint_batch(tmp_path, kind, strategy):
    """Validation has an odd number of rows where each is measured by itself."""
    adapters, summaries = [], []
    for name, batch, words in (("one", 4, ()), ("two", 2, on_two(strategy))):
        folder = tmp_path / name
        folder.mkdir()
        task, settings = ("reward", "") if kind == "reward" else ("preference", f"task_settings: {{loss_type: {kind}}}")
        (folder / "small.yaml").write_text(
            CONFIG.format(
                decoder=decoder_folder(folder / "decoder"),
                task=task,
                settings=settings,
                rows=pairs_file(folder / "rows.jsonl", 24),
                odd=pairs_file(folder / "odd.jsonl", 8 if kind == "kto" else 9),
                batch=batch,
                unpair="true" if kind == "kto" else "false",
            )
        )
        cache = {"HF_DATASETS_CACHE": str(folder / "cache")}
        output = run(folder, "fit", "--config", "small.yaml", *words, **cache)
        compared = kind in ("dpo", "kto")
        assert output.count("reference   the base model, its adapters off: ") == compared
        assert len(list((folder / "cache").rglob("values.safetensors"))) == 2 * compared
        done = folder / "runs" / "small" / "001"
        adapters.append(load_file(done / "adapter" / "adapter.safetensors"))
        summaries.append(json.loads((done / "summary.json").read_text()))
    for values in ("untrained", "values"):
        assert summaries[1][values] == pytest.approx(summaries[0][values], abs=1e-5)
    assert summaries[0]["values"]["margin"] != pytest.approx(summaries[0]["untrained"]["margin"], abs=1e-4)
    one, two = adapters
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=2e-7, msg=lambda text, key=key: f"{key}: {text}")
