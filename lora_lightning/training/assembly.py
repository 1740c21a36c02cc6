"""Assembly: from the settings of AdapterModule to a model with adapters, after what cannot work has been refused.

refusals     everything that is wrong, before anything is loaded
loader       who reads values: every process, or the first one for all
load         load, check against the data, add tokens
adapt        plan, inject, lower, recompute
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lora_lightning.errors import DataError, LoraLightningError, ModelError, SettingsError
from lora_lightning.injection.gates import recomputation
from lora_lightning.injection.inject import inject, lower_adapters
from lora_lightning.injection.report import InjectionReport
from lora_lightning.methods import Method
from lora_lightning.models.attention import Attention, check_attention
from lora_lightning.models.loading import checkpoint_format, load_model, load_skeleton, load_without_values
from lora_lightning.models.new_tokens import add_rows_for
from lora_lightning.models.quantized_loading import Loading, Quantization, check_format, loading
from lora_lightning.models.random import full_name, is_random, tokenizer_settings
from lora_lightning.models.tasks.base import Task
from lora_lightning.models.token_rows import Tokens
from lora_lightning.training.calibration import calibration, planned
from lora_lightning.training.start import Start
from lora_lightning.training.strategies.choice import check_strategy

NAME = "default"
"""The adapter of a run."""


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Settings of AdapterModule that decide its model, with the trainer that is to run it, where there is one.

    Fields are those of AdapterModule, which says what they mean.
    """

    pretrained: str
    method: Method
    task: Task
    targets: str | list[str]
    exclude: list[str]
    overrides: dict[str, dict[str, Any]]
    also_train: Literal["heads", "all"] | list[str]
    train_tokens: Tokens
    untie: bool
    num_labels: int | None
    dtype: str | None
    half_adapters: bool
    gradient_checkpointing: bool
    random_config: dict[str, Any]
    quantization: Quantization | None
    attention: Attention | None
    trainer: Trainer | None
    start: Start | None = None
    """What `model.adapter` names."""
    said: Mapping[str, Any] = field(default_factory=dict)
    """Settings that choose layers and heads as they were given, None for those that were not."""

    def loader(self) -> Callable[..., nn.Module]:
        """What loads the model here; under some strategies the first process alone reads values, and sends them."""
        on_first = getattr(self._strategy, "reads_on_first_rank", False)
        reads = not on_first or self.trainer is None or self.trainer.global_rank == 0
        return load_model if reads else load_without_values

    def load(self, load: Callable[..., nn.Module], seed: int) -> nn.Module:
        """The plain model that `load`, called as `load_model` is, gives, with rows for new tokens.

        Raises:
            ModelError: the model cannot be loaded for the task.
            SettingsError: a setting that does not fit the data, the trainer or the model.
        """
        self.check_data()
        for error in self._unfit_start():
            raise error
        quantize = self.quantizing()
        self.check_trainer()
        self.check_attention()
        net = load(
            self.source(seed),
            self.task,
            self.labels(),
            dtype=self.frozen_dtype(),
            label_names=self._label_names(),
            also_train=self._may_lack_weights(),
            **({"quantize": quantize} if quantize else {}),
            **({"attention": self.attention} if self.attention else {}),
        )
        self.check_length(net)
        self.check_vocabulary(net)
        self._add_tokens(net, seed)
        return net

    def adapt(self, net: nn.Module, seed: int) -> InjectionReport:
        """Put the adapter on the model, in place.

        Raises:
            TargetError: the targets do not fit the model.
            SettingsError: a setting that a layer cannot have.
        """
        report = self._adapt(net, seed)
        if self.half_adapters:
            lower_adapters(net, NAME)
        if is_random(self.pretrained):
            note = f"nothing is pretrained: what is frozen stays as it was drawn ({self.source(seed)})"
            report = replace(report, notes=(*report.notes, note))
        if self.gradient_checkpointing:
            enable_checkpointing(net)
        return report

    def _adapt(self, net: nn.Module, seed: int) -> InjectionReport:
        """A new adapter, one on top of others, or a trained one."""
        if self.start is not None and not self.start.stacked:
            return self.start.train_on(net, NAME, self.method, self.said)
        heads: Mapping[str, Tensor] = {}
        if self.start is not None:
            self.start.load_below(net)
            heads = self.start.kept_heads(net)
        known = planned(self.trainer)
        report = inject(
            net,
            self.method,
            self.targets,
            self.exclude,
            self.overrides,
            self.also_train,
            name=NAME,
            seed=seed,
            probe=calibration(self.method, self.task, self.trainer) if known is None else None,
            planned=known,
            train_tokens=self.train_tokens,
            tokenizer=getattr(self._data, "tokenizer_object", None) if self.train_tokens else None,
            untie=self.untie,
        )
        if self.start is not None:
            self.start.put_on_top(net, NAME, heads)
            report = replace(report, notes=(*self.start.lines, *report.notes))
        return report

    def refusals(self) -> list[LoraLightningError]:
        """Everything that `load` would refuse before it loads the model."""
        found: list[LoraLightningError] = []
        checks = (
            *(self.check_data, self.quantizing, self.check_trainer, self.labels, self.frozen_dtype),
            self.check_attention,
        )
        for check_one in checks:
            try:
                check_one()
            except LoraLightningError as error:
                found.append(error)
        return [*found, *self._unfit_start()]

    def _unfit_start(self) -> list[LoraLightningError]:
        """What of the data does not fit the adapters that the run begins with."""
        if self.start is None:
            return []
        names, tokens = self._label_names(), getattr(self._data, "new_tokens", ())
        return self.start.refusals(names, tokens, getattr(self._data, "tokenizer_object", None))

    def _may_lack_weights(self) -> Sequence[str]:
        """Parameters that the files of the model need not have: they start at random, or an adapter brings them."""
        named = () if self.also_train in ("heads", "all") else self.also_train
        return (*named, *(self.start.trained() if self.start is not None else ()))

    @property
    def _strategy(self) -> Any:
        return self.trainer.strategy if self.trainer is not None else None

    @property
    def _data(self) -> Any:
        """The data module of the run; None where there is none."""
        return getattr(self.trainer, "datamodule", None)

    def source(self, seed: int) -> str:
        """Where the model comes from: `pretrained`, or all that decides a random model."""
        if not is_random(self.pretrained):
            return self.pretrained
        tokenizer = getattr(self._data, "tokenizer_object", None)
        found = tokenizer_settings(self.pretrained, tokenizer, self.random_config) if tokenizer else {}
        return full_name(self.pretrained, {**found, **self.random_config}, seed)

    # -- what is refused -----------------------------------------------------------------------------------------------

    def check_data(self) -> None:
        """Raise `DataError` where the data serve other tasks."""
        kinds = getattr(self._data, "task_kinds", None)
        if kinds is not None and self.task.name not in kinds:
            raise DataError(
                f'model.task is "{self.task.name}", but the data ({type(self._data).__name__}) serve '
                f"{' and '.join(kinds)}."
            )
        if self._data is not None:
            self.task.check_data(self._data)

    def check_trainer(self) -> None:
        """Raise `SettingsError` for a strategy that knows nothing of adapters, or no whole window."""
        if self.trainer is None:
            return
        check_strategy(self.trainer.strategy)
        if self.trainer.accumulate_grad_batches < 1:
            raise SettingsError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches}; it must be at least 1."
            )

    def check_attention(self) -> None:
        """Raise `SettingsError` where the model cannot compute attention as it is told to, before weights are read."""
        if self.attention is not None:
            with torch.device("meta"):
                skeleton = load_skeleton(self.source(0), self.task, self.num_labels)
            check_attention(skeleton, self.attention)

    def quantizing(self) -> Loading | None:
        """How the base is quantized, after everything that could not work has been refused."""
        own = checkpoint_format(self.pretrained)
        given, where = self.quantization, "model.quantization"
        if given and is_random(self.pretrained):
            raise SettingsError(
                f'{where} is "{given}", but "{self.pretrained}" has no weights to quantize; leave it null.'
            )
        if given and own:
            raise SettingsError(
                f'{where} is "{given}", but "{self.pretrained}" is stored as {own} already; leave it null.'
            )
        kind = given or own
        if kind is None:
            return None
        strategy = type(self._strategy).__name__ if self.trainer else "auto"
        precision = str(self.trainer.precision) if self.trainer else "32-true"
        device = self._strategy.root_device if self.trainer else torch.device("cpu")
        check_format(kind, strategy, precision, device.type, where if given else f'the checkpoint "{self.pretrained}"')
        self._check_callbacks(kind)
        return loading(kind, precision, str(device))

    def _check_callbacks(self, kind: str) -> None:
        """Refuse callbacks that cannot act on a quantized base."""
        for callback in self.trainer.callbacks if self.trainer else ():  # type: ignore[attr-defined]
            refuses = getattr(callback, "refuses_quantized", None)
            reason = refuses(self.method) if refuses is not None else ""
            if reason:
                raise SettingsError(f"the base is stored as {kind}, and {type(callback).__name__} {reason}")

    def frozen_dtype(self) -> torch.dtype | Literal["auto"]:
        """Dtype of frozen weights: the setting's, else what the trainer's precision means by "true"."""
        precision = str(self.trainer.precision) if self.trainer is not None else "32-true"
        if precision == "16-true":
            raise SettingsError(
                'trainer.precision is "16-true", under which gradients underflow; take "bf16-true", or "16-mixed", '
                "which scales the loss."
            )
        if precision == "bf16-true" and self.dtype not in (None, "auto", "bfloat16"):
            raise SettingsError(
                f'model.dtype is "{self.dtype}", but trainer.precision "bf16-true" casts frozen weights to '
                'bfloat16; leave dtype null, or take precision "bf16-mixed".'
            )
        if precision == "bf16-true":
            return torch.bfloat16
        return "auto" if self.dtype == "auto" else getattr(torch, self.dtype or "float32")

    def labels(self) -> int | None:
        """Classes of the head: the setting's, else the data's; None for a task without a head."""
        if not self.task.has_head:
            return None
        names = self._label_names()
        if len(names) == 1 and "multi" not in self.task.name and "classification" in self.task.name:
            raise DataError(
                f'the data have one class only, "{names[0]}", so that nothing can be learned; look at the column of '
                "labels, or name all classes in data.labels."
            )
        labels = self.num_labels if self.num_labels is not None else getattr(self._data, "num_labels", None)
        classes = len(names)
        if self._data is None and labels is None and classes:
            labels = classes  # those of the head that an adapter brings
        if labels is not None and labels < classes:
            raise SettingsError(f"model.num_labels is {labels}; the data have {classes} classes, so at least that.")
        if labels is None and self.task.model_options(None) == {}:
            raise SettingsError(
                "model.num_labels is null, and the data module does not say; set it to the class count."
            )
        return labels

    def _label_names(self) -> list[str]:
        if not self.task.has_head:
            return []
        own = list(getattr(self._data, "label_names", ()))
        return own if self._data is not None or self.start is None else self.start.labels

    def check_length(self, net: nn.Module) -> None:
        """Raise `SettingsError` where the data's texts are longer than a model can take."""
        longest = getattr(getattr(net, "config", None), "max_position_embeddings", None)
        length = getattr(self._data, "max_length", None)
        if longest and length and length > longest:
            raise SettingsError(
                f"data.max_length is {length}; {type(net).__name__} has {longest} positions, so at most that."
            )

    def check_vocabulary(self, net: nn.Module) -> None:
        """Raise `SettingsError` where the data's tokenizer knows more tokens than the model has rows for."""
        tokenizer = self._data.__dict__.get("tokenizer_object") if self._data is not None else None
        rows = getattr(getattr(net, "config", None), "vocab_size", None)
        if tokenizer is None or rows is None:
            return
        added = {*getattr(self._data, "new_tokens", ())}
        added |= {token for one in (self.start.adapters if self.start else ()) for token in one.new_tokens}
        known = max((number for token, number in tokenizer.get_vocab().items() if token not in added), default=-1) + 1
        if known > rows:
            raise SettingsError(
                f"data.tokenizer has {known} tokens; {type(net).__name__} has {rows} rows, so that a token may have "
                "none. Take the model's own tokenizer (data.tokenizer null), or a model with the tokens added."
            )

    def _add_tokens(self, net: nn.Module, seed: int) -> None:
        """Rows for the tokens that the data module has added to its tokenizer."""
        tokens = getattr(self._data, "new_tokens", ())
        if tokens:
            add_rows_for(net, self._data.tokenizer_object, tokens, seed)


def enable_checkpointing(net: nn.Module) -> None:
    """Non-reentrant activation checkpointing, without making the inputs require gradients (they need not here).

    Raises:
        ModelError: the model has none.
    """
    if not getattr(net, "supports_gradient_checkpointing", False):
        raise ModelError(f"model.gradient_checkpointing is True; {type(net).__name__} does not support it.")
    hf_model = cast(Any, net)
    enable = getattr(hf_model, "activation_checkpointing_enable", None) or hf_model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": recomputation})
    hf_model.disable_input_require_grads()
