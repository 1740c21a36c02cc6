"""Runs of methods that plan, share, gate or start from data, which two processes must take like one.

`python -m torch.distributed.run --nproc-per-node=2 tests/sharded_rooms.py STRATEGY FOLDER`, as `sharded_cases.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import sharded_cases
from miniatures import installed
from miniatures.gating import LoRAFlow
from miniatures.sharing import TiedLoRA, VeRA
from miniatures.starts import EVA, PiSSA
from sharded_cases import Case, adamw

METHODS = (EVA, PiSSA, VeRA, TiedLoRA, LoRAFlow)
CASES = {
    "VeRA": Case(VeRA(rank=3), adamw, module={"targets": "all-linear"}),
    "TiedLoRA": Case(TiedLoRA(rank=3), adamw, module={"targets": "all-linear"}),
    "TiedLoRA, window of 2, clipped": Case(
        TiedLoRA(rank=3), adamw, trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_steps": 4}
    ),
    "LoRAFlow": Case(LoRAFlow(), adamw, model="decoder"),
    "LoRAFlow, recomputed": Case(LoRAFlow(), adamw, model="decoder", module={"gradient_checkpointing": True}),
    "TiedLoRA, recomputed": Case(
        TiedLoRA(rank=3), adamw, model="decoder", module={"gradient_checkpointing": True, "targets": ["q_proj"]}
    ),
    "PiSSA": Case(PiSSA(rank=3), adamw),
    "EVA": Case(EVA(rank=2), adamw, module={"targets": ["query", "intermediate.dense", "output.dense"]}),
}

if __name__ == "__main__":
    sharded_cases.CASES = CASES
    with installed(*METHODS):
        sharded_cases.main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
