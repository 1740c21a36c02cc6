"""Everything a plugin can contribute. Read this file to decide whether to write one.

One run, from the command line to the export; `*` marks a hook of ours, `o` a hook of Lightning's:

    python -m lora_lightning fit --config configs/rose.yaml
      |
      |  plugins.load                entry points of group "lora_lightning"
      |    * lora_lightning_methods          names usable in YAML from here on
      |    * lora_lightning_starts           names usable as model.method.init
      |    * lora_lightning_commands         further verbs
      |    * lora_lightning_exporters        further formats of `export`
      |    * lora_lightning_tables           further tables "builtin:NAME"
      |    * lora_lightning_optimizers       names usable as model.optimizer
      |    * lora_lightning_callbacks        names usable in trainer.callbacks
      |    * lora_lightning_datamodules      names usable as data
      |  plugins.load_classes        only where something trains: these classes, and torch with them, are imported
      v
    settings -> AdapterModule(method=..., targets=...), data module, Trainer
      |
      |  o configure_callbacks       guard, resume, report, and method.callbacks()
      |  o setup                     callbacks sorted by phase, Checkpoint callbacks last
      |    * lora_lightning_base_layers       asked for each layer, by inject and by whatever reads a weight
      |  o configure_model           load model -> inject: method.plan, build(base), reset, link, initialize -> freeze
      |  o configure_optimizers      method.param_groups(adapters); the user's, the method's or AdamW
      |  o on_train_start            totals of schedules resolved once, linear baseline
      v
    for each optimizer step
      |  o training_step             adapter.forward(x, base), method.penalty(adapters)
      |  o on_before_optimizer_step  schedules read complete gradients          (unscaled, unclipped)
      |  o optimizer.step
      |  o on_train_batch_end        schedules act, guard judges, then Checkpoint callbacks save
      v
    adapter folder written (storage), summary and report (training.run_report)
      |
      v
    validate | test | predict | export, or ll.load_adapter / ll.merge in Python

A plugin is an installed package with an entry point in the group `lora_lightning`; the entry point's name is the
import package. Its `__init__` marks functions with `lora_lightning.hookimpl`. A hook returns values, it never changes
its arguments. Methods are classes, since settings import no torch; everything else is a name with an import path, and
is imported where it is used, so that `--help` and `methods` stay fast. Hooks are declared here when their first user
arrives.

`requires_api = ">=2,<3"` in that `__init__` says which versions of this interface (`API`) the plugin was written for; a
core of another one does not load it, and says so. Where it stands above an import that fails, it is still read.
CONTRIBUTING.md says what a version promises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import nn

    from lora_lightning.adapters.layers.base import BaseLayer
    from lora_lightning.methods import Method
    from lora_lightning.start_values import Start

NAMESPACE = "lora_lightning"
API = "2.1"
"""Version of what plugins may rely on: a new first number breaks some, a new second one only adds."""
hookspec = pluggy.HookspecMarker(NAMESPACE)
hookimpl = pluggy.HookimplMarker(NAMESPACE)


@hookspec
def lora_lightning_methods() -> Iterable[type[Method]]:
    """Adapter methods this package provides, as classes.

    Runs once, before the command line is parsed, so that a method's class name works in YAML. Answers of all plugins
    are joined. Two methods with one name raise `DuplicateMethodError` naming both packages.
    """
    raise NotImplementedError("a specification: plugins implement it")


@hookspec
def lora_lightning_starts() -> Iterable[type[Start]]:
    """Starts of factor pairs this package provides, as classes: values of the field `init`.

    Runs once, after the methods, whose classes they are like. Answers of all plugins are joined; a name that is taken
    makes the plugin fail, with `PluginError`.
    """
    raise NotImplementedError("a specification: plugins implement it")


@hookspec
def lora_lightning_commands() -> Mapping[str, str]:
    """Further verbs of the command line: name to import path of a module.

    Runs once, after the methods. The module has `add_arguments(parser)` and `run(args) -> int`; the first line of its
    docstring is the verb's help. It is imported for `--help`, so it imports torch inside `run`. Answers of all plugins
    are joined. A verb that exists already makes the plugin fail, with `PluginError`.
    """
    raise NotImplementedError("a specification: plugins implement it")


@hookspec
def lora_lightning_optimizers() -> Mapping[str, str]:
    """Optimizers this package provides, usable by their names as `model.optimizer`: {"Name": "module:Name"}.

    Runs once, after the methods; the classes are imported only where something trains, or asks for one by its name.
    Answers of all plugins are joined. Parameter groups come named, and an optimizer with `bind_pairs(pairs)` receives
    the factor pairs of all trainable adapters. A name that is taken, by a class of torch, Lightning, core or another
    plugin, keeps its meaning: the class goes by its full path only, and the plugin is in the list of failures, with
    `PluginError`. A class that cannot be imported is there too, and its cause is named where a config asks for it.
    """
    raise NotImplementedError("a specification: plugins implement it")


@hookspec
def lora_lightning_callbacks() -> Mapping[str, str]:
    """Lightning callbacks this package provides, usable by their names in `trainer.callbacks`: {"Name": "module:Name"}.

    Runs when optimizers are asked for; answers are joined, and names clash, as theirs do. What a method needs always
    comes from `Method.callbacks` instead.
    """
    raise NotImplementedError("a specification: plugins implement it")


@hookspec
def lora_lightning_datamodules() -> Mapping[str, str]:
    """Data modules this package provides, usable by their names as `data`: {"Name": "module:Name"}.

    Runs when optimizers are asked for; answers are joined, and names clash, as theirs do. `task_kinds`, `num_labels`
    and a null `tokenizer` are understood as those of the bundled ones are; `data.text.TextData` and
    `data.table.TableData` of core answer most of it.
    """
    raise NotImplementedError("a specification: plugins implement it")


@hookspec
def lora_lightning_exporters() -> Mapping[str, str]:
    """Further formats of `export`: name to import path of a module.

    Runs once, after the methods. The module has `write(source, folder, rank, verify) -> Written`, which writes an
    adapter (`exporters.source.Source`) into an empty folder, and `TAKES_RANK = True` where it can limit the rank. A run
    says before it begins what its `check(source)`, if it has one, raises `ExportError` for. It is imported when the
    format is asked for. A format that exists already makes the plugin fail, with `PluginError`.
    """
    raise NotImplementedError("a specification: plugins implement it")


@hookspec
def lora_lightning_tables() -> Mapping[str, str]:
    """Tables that need no file, "builtin:NAME" where a data module takes a source: {"NAME": "module:function"}.

    Runs once, after the methods. The function takes nothing and returns a `datasets.Dataset`; it is called when a
    source first names the table, once a process. A table that exists already makes the plugin fail, with `PluginError`.
    """
    raise NotImplementedError("a specification: plugins implement it")


@hookspec
def lora_lightning_base_layers() -> Iterable[Callable[[nn.Module], BaseLayer | None]]:
    """Kinds of layer that can carry an adapter: functions from a module to its base layer, or None.

    Runs once, when a layer is first looked at, on the command line and in Python; import torch inside. Each function is
    asked for every module before core's own kinds are. Two plugins that serve one module raise `PluginError` naming
    both. A base layer is a `BaseLayer`; for a quantized weight, a `QuantizedBase` that answers `dequantize`.
    """
    raise NotImplementedError("a specification: plugins implement it")
