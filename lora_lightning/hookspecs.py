"""Everything a plugin can contribute. Read this file to decide whether to write one.

One run, from the command line to the export; `*` marks a hook of ours, `o` a hook of Lightning's:

    python -m lora_lightning fit --config configs/rose.yaml
      |
      |  plugins.load                entry points of group "lora_lightning"
      |    * lora_lightning_methods          names usable in YAML from here on
      v
    settings -> AdapterModule(method=..., targets=...), data module, Trainer
      |
      |  o configure_callbacks       guard, resume, report, and method.callbacks()
      |  o setup                     callbacks sorted by phase, Checkpoint callbacks last
      |  o configure_model           load model -> inject: method.build(base), adapter.reset(generator) -> freeze
      |  o configure_optimizers      method.param_groups(adapters); the user's, the method's or AdamW
      |  o on_train_start            totals of schedules resolved once, linear baseline
      v
    for each optimizer step
      |  o training_step             adapter.forward(x, base), method.penalty(adapters)
      |  o on_before_optimizer_step  schedules read complete gradients          (unscaled, unclipped)
      |  o optimizer.step
      |  o on_train_batch_end        schedules act, guard judges, then Checkpoint callbacks save
      v
    adapter folder written (checkpoint.py), summary and report (report.py)
      |
      v
    validate | test | predict | export, or ll.load_adapter / ll.merge in Python

A plugin is an installed package with an entry point in the group `lora_lightning`; the entry point's name is the
import package. Its `__init__` marks functions with `lora_lightning.hookimpl`. A hook returns values, it never changes
its arguments. Hooks are declared here when their first user arrives.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from lora_lightning.methods import Method

NAMESPACE = "lora_lightning"
hookspec = pluggy.HookspecMarker(NAMESPACE)
hookimpl = pluggy.HookimplMarker(NAMESPACE)


@hookspec
def lora_lightning_methods() -> Iterable[type[Method]]:
    """Adapter methods this package provides, as classes.

    Runs once, before the command line is parsed, so that a method's class name works in YAML. Answers of all plugins
    are joined. Two methods with one name raise `DuplicateMethodError` naming both packages.
    """
    raise NotImplementedError("a specification: plugins implement it")
