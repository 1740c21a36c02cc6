"""Loading a pretrained model for a task, strictly: no weight of the backbone is left at random."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import transformers
from torch import nn

from lora_lightning.errors import ModelError
from lora_lightning.models.anatomy import survey
from lora_lightning.models.attention import Attention
from lora_lightning.models.meta import expect_values
from lora_lightning.models.paths import inside, within
from lora_lightning.models.pretrained import resolve, unreachable
from lora_lightning.models.quantized_loading import Loading, quantization_config, stated
from lora_lightning.models.random import build_random, config_of, is_random
from lora_lightning.models.tasks.base import Task

Dtype = torch.dtype | Literal["auto"] | None


def load_model(
    pretrained: str,
    task: Task,
    num_labels: int | None = None,
    dtype: Dtype = None,
    label_names: Sequence[str] = (),
    also_train: Sequence[str] = (),
    quantize: Loading | None = None,
    attention: Attention | None = None,
) -> nn.Module:
    """The pretrained model with the task's head.

    Args:
        pretrained: folder, hub id, `pkg:IMPORT_NAME/FOLDER`, or the full name of a random model.
        task: decides the model class.
        num_labels: size of a classification head.
        dtype: dtype of the weights, or "auto" for that of the files; None takes float32.
        label_names: names of the classes, kept in the model's configuration.
        also_train: names of parameters that will train in full, and so may start at random.
        quantize: how linear layers of the backbone are quantized, or are already; None for a plain model.
        attention: kernel of attention; None for transformers' choice.

    Raises:
        ModelError: missing folder or weights, a model class without such a head, backbone weights the files lack, or
            nothing that could be quantized.
    """
    source = resolve(pretrained)
    options = _options(task, num_labels, label_names)
    if is_random(pretrained):
        return _from_config(pretrained, task, config_of(pretrained, **options), dtype, attention)
    if quantize is not None:
        options |= _quantized(source, task, options, quantize, also_train)
    try:
        with _silent():
            # a head of another size starts anew; any other tensor of another shape is refused below
            model, info = getattr(transformers, task.auto_class).from_pretrained(
                source,
                dtype=dtype or torch.float32,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                **_kernel(attention),
                **options,
            )
    except OSError as error:
        raise unreachable(pretrained, error) from error
    except ValueError as error:
        _refuse_class(error, pretrained, task)
        raise
    if quantize is not None and survey(model).formats is None:
        raise ModelError(
            f'model.quantization is "{quantize.format}", which has quantized no layer of {type(model).__name__}: it '
            'knows nn.Linear only. Nearest: "nf4" or "int8", which know Conv1D too.'
        )
    _check_complete(model, info, pretrained, task.unused, also_train)
    zero_absent(model, info["missing_keys"], task.unused)
    return _named(model, pretrained)


def _options(task: Task, num_labels: int | None, label_names: Sequence[str]) -> dict[str, Any]:
    """Settings of the model's configuration that the task needs."""
    options: dict[str, Any] = task.model_options(num_labels)
    if label_names and len(label_names) == num_labels:
        options["id2label"] = dict(enumerate(label_names))
        options["label2id"] = {name: number for number, name in enumerate(label_names)}
    return options


def _named(model: Any, pretrained: str) -> nn.Module:
    """The model with its name as given, so that an adapter's description holds on another machine."""
    model.config._name_or_path = pretrained
    eos = getattr(model.config, "eos_token_id", None)  # a model of images has neither
    if eos is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    return cast(nn.Module, model)


def load_without_values(pretrained: str, *args: Any, **options: Any) -> nn.Module:
    """As `load_model`, on the meta device: another process reads the values and will send them."""
    with torch.device("meta"):
        model: Any = load_skeleton(pretrained, *args, **options)
    if model.can_generate():
        with contextlib.suppress(OSError):  # a model without a file for it generates as its configuration says
            model.generation_config = transformers.GenerationConfig.from_pretrained(resolve(pretrained))
    return expect_values(model)


def checkpoint_format(pretrained: str) -> str | None:
    """The format that a checkpoint's weights are stored in; None for a plain one, or where there is no checkpoint."""
    if is_random(pretrained):
        return None
    try:
        return stated(transformers.AutoConfig.from_pretrained(resolve(pretrained), trust_remote_code=False))
    except (OSError, ValueError):  # said when it is loaded
        return None


def _quantized(
    source: str, task: Task, options: Mapping[str, Any], how: Loading, also_train: Sequence[str]
) -> dict[str, Any]:
    cls = getattr(transformers, task.auto_class)
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        return quantized_options(config, lambda: cls.from_config(config, trust_remote_code=False), how, also_train)
    except (OSError, ValueError):  # said in the words of every other model when it is loaded
        return {}


def quantized_options(
    config: Any, make: Callable[[], nn.Module], how: Loading, also_train: Sequence[str]
) -> dict[str, Any]:
    """Options of `from_pretrained`: where to load, and how to quantize what is not quantized already.

    Args:
        config: the model's configuration.
        make: builds the model from it; called on the meta device.
        how: format, device and compute type.
        also_train: parameters that train in full, and so stay as they are.
    """
    found: dict[str, Any] = {"device_map": {"": how.device}}
    if stated(config) is None:
        with torch.device("meta"):
            found["quantization_config"] = quantization_config(how, kept_plain(make(), also_train))
    return found


def load_skeleton(
    pretrained: str,
    task: Task,
    num_labels: int | None = None,
    dtype: Dtype = None,
    label_names: Sequence[str] = (),
    also_train: Sequence[str] = (),  # noqa: ARG001 - an argument of `load_model`
    quantize: Loading | None = None,
    attention: Attention | None = None,
) -> nn.Module:
    """As `load_model`, but from the configuration alone: weights start at random, and files of weights are not read.

    Raises:
        ModelError: no configuration, a model class without such a head, or a quantized model.
    """
    if quantize is not None:
        raise ModelError(
            f'the base model is to be "{quantize.format}", and without its weights there is nothing to quantize: set '
            "model.quantization to null for a plain base."
        )
    source, options = resolve(pretrained), _options(task, num_labels, label_names)
    if is_random(pretrained):
        config = config_of(pretrained, **options)
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        except OSError as error:
            raise unreachable(pretrained, error) from error
        except ValueError as error:
            _refuse_class(error, pretrained, task)
            raise
    return _from_config(pretrained, task, config, dtype, attention)


def _kernel(attention: Attention | None) -> dict[str, Any]:
    return {"attn_implementation": attention} if attention else {}


def _from_config(name: str, task: Task, config: Any, dtype: Dtype, attention: Attention | None) -> nn.Module:
    if dtype == "auto":
        dtype = config.dtype

    def make() -> nn.Module:
        cls: Any = getattr(transformers, task.auto_class)
        options = {"dtype": dtype or torch.float32, "trust_remote_code": False, **_kernel(attention)}
        return cast(nn.Module, cls.from_config(config, **options))

    try:
        model = build_random(name, make) if is_random(name) else make().eval()
    except ValueError as error:
        _refuse_class(error, name, task)
        raise
    return _named(model, name)


def _refuse_class(error: ValueError, pretrained: str, task: Task) -> None:
    """Raise `ModelError` where transformers said that the model has no class for the task, or one that it brings."""
    if "custom code" in str(error):
        raise ModelError(
            f'model.pretrained is "{pretrained}", which brings code of its own, and such code is not run. If you trust '
            "it, load the model in Python with trust_remote_code=True, and call lora_lightning.inject."
        ) from error
    if "Unrecognized configuration class" in str(error):
        raise ModelError(
            f'model.task is "{task.name}", but "{pretrained}" has no {task.auto_class} in transformers.'
        ) from error


def kept_plain(model: nn.Module, also_train: Sequence[str] = ()) -> list[str]:
    """Paths of modules that are not to be quantized: heads, output layers, and what trains in full."""
    anatomy = survey(model)
    found = dict.fromkeys([*anatomy.heads, *anatomy.output_layers])
    for name in anatomy.parameters:
        if any(within(pattern, name) for pattern in also_train):
            found[name.rpartition(".")[0]] = None
    return list(found)


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


def zero_absent(model: nn.Module, missing: Iterable[str], unused: Sequence[str]) -> set[str]:
    """Zero weights below modules called `unused` that the files lack, so that every loading gives the same model."""
    absent = {key for key in missing if set(unused).intersection(key.split("."))}
    with torch.no_grad():
        for key in absent:
            model.get_parameter(key).zero_()
    return absent


def _in_any(key: str, heads: Iterable[str]) -> bool:
    return any(inside(key, head) for head in heads)


def _check_complete(
    model: nn.Module, info: dict[str, Any], pretrained: str, unused: Sequence[str], also_train: Sequence[str]
) -> None:
    heads = survey(model).heads
    needed = [key for key in info["missing_keys"] if not set(unused).intersection(key.split("."))]
    frozen = [key for key in needed if not any(within(pattern, key) for pattern in also_train)]
    missing = sorted(key for key in frozen if not _in_any(key, heads))
    if missing:
        raise ModelError(
            f'"{pretrained}" lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}; they would '
            "stay random. Choose the task the model was trained for, or complete weights; or train them in full: "
            f"also_train: [{missing[0].partition('.')[0]}]."
        )
    wrong = [key for key, *_ in info["mismatched_keys"] if not _in_any(key, heads)]
    if wrong:
        raise ModelError(f'"{pretrained}" holds weights of another shape than {type(model).__name__} has: {wrong[0]}.')
