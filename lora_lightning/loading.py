"""Loading a pretrained model for a task, strictly: no weight of the backbone is left at random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn

from lora_lightning.errors import ModelError
from lora_lightning.pretrained import resolve
from lora_lightning.targets import head_prefixes, within
from lora_lightning.tasks.base import Task


def load_model(
    pretrained: str,
    task: Task,
    num_labels: int | None = None,
    dtype: torch.dtype | None = None,
    label_names: Sequence[str] = (),
    also_train: Sequence[str] = (),
) -> nn.Module:
    """The pretrained model with the task's head.

    Args:
        pretrained: folder, hub id, or `pkg:IMPORT_NAME/FOLDER`.
        task: decides the model class.
        num_labels: size of a classification head.
        dtype: dtype of the weights; None takes float32.
        label_names: names of the classes, kept in the model's configuration.
        also_train: names of parameters that will train in full, and so may start at random.

    Raises:
        ModelError: missing folder or weights, a model class without such a head, or backbone weights the files lack.
    """
    source = resolve(pretrained)
    options: dict[str, Any] = task.model_options(num_labels)
    if label_names and len(label_names) == num_labels:
        options["id2label"] = dict(enumerate(label_names))
        options["label2id"] = {name: number for number, name in enumerate(label_names)}
    try:
        with _silent():
            # a head of another size starts anew; any other tensor of another shape is refused below
            model, info = getattr(transformers, task.auto_class).from_pretrained(
                source,
                dtype=dtype or torch.float32,
                output_loading_info=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except OSError as error:
        raise ModelError(f'model.pretrained is "{pretrained}": {_first_line(error)}') from error
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ModelError(
            f'model.task is "{task.name}", but "{pretrained}" has no {task.auto_class} in transformers.'
        ) from error
    _check_complete(model, info, pretrained, task.unused, also_train)
    model.config._name_or_path = pretrained  # as given, so that an adapter's description holds on another machine
    if model.config.pad_token_id is None and model.config.eos_token_id is not None:
        eos = model.config.eos_token_id
        model.config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    return model  # type: ignore[no-any-return]


@contextmanager
def _silent() -> Iterator[None]:
    """No loading report and no bar: what is missing is judged here."""
    verbosity, bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bar:
            transformers.logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n", maxsplit=1)[0].split())


def _check_complete(
    model: nn.Module, info: dict[str, Any], pretrained: str, unused: Sequence[str], also_train: Sequence[str]
) -> None:
    heads = tuple(f"{prefix}." for prefix in head_prefixes(model))
    needed = [key for key in info["missing_keys"] if not set(unused).intersection(key.split("."))]
    frozen = [key for key in needed if not any(within(pattern, key) for pattern in also_train)]
    missing = sorted(key for key in frozen if not key.startswith(heads or ("\0",)))
    if missing:
        raise ModelError(
            f'"{pretrained}" lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}; they would '
            "stay random. Choose the task the model was trained for, or complete weights; or train them in full: "
            f"also_train: [{missing[0].partition('.')[0]}]."
        )
    wrong = [key for key, *_ in info["mismatched_keys"] if not key.startswith(heads or ("\0",))]
    if wrong:
        raise ModelError(f'"{pretrained}" holds weights of another shape than {type(model).__name__} has: {wrong[0]}.')
