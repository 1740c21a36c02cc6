"""AdapterModule: a pretrained model with an adapter, as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, Self, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.precision import kept
from lora_lightning.callbacks.cascade import Cascade
from lora_lightning.callbacks.guard import TrainingGuard
from lora_lightning.callbacks.resume import ExactResume
from lora_lightning.callbacks.steps import total_steps
from lora_lightning.distributed import fail_together
from lora_lightning.errors import DataError, LoraLightningError, ModelError, ResumeError, SettingsError
from lora_lightning.injection.gates import recomputation
from lora_lightning.injection.inject import ignore_adapter_buffers, inject, lower_adapters
from lora_lightning.injection.records import adapters_named, check_unmerged, records
from lora_lightning.injection.report import InjectionReport
from lora_lightning.methods import Method
from lora_lightning.models.loading import checkpoint_format, load_model, load_without_values
from lora_lightning.models.new_tokens import add_rows_for
from lora_lightning.models.quantization import Loading, Quantization, check_format, loading
from lora_lightning.models.random import full_name, is_random, tokenizer_settings
from lora_lightning.models.tasks import find_task
from lora_lightning.models.tasks.base import Batch, PredictContext, metrics, update_metrics, update_text_metrics
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.optim.warmup import WarmUp
from lora_lightning.registry import arguments
from lora_lightning.seeds import common_seed
from lora_lightning.storage.description import describe_adapter
from lora_lightning.storage.folded import make_room_for_folded
from lora_lightning.storage.resume_check import check_fits, check_same
from lora_lightning.storage.state import adapter_keys
from lora_lightning.training.calibration import calibration, planned
from lora_lightning.training.linear_baseline import LinearBaseline
from lora_lightning.training.packing_check import PackingCheck
from lora_lightning.training.strategies.choice import check_strategy

NAME = "default"


class AdapterModule(LightningModule):
    """Loads a pretrained model, puts an adapter method on it, and trains it on a task.

    Args:
        pretrained: folder, hub id, `pkg:IMPORT_NAME/FOLDER` for weights that an installed package carries, or
            `random:MODEL_TYPE` (of transformers) for a model that knows nothing yet; data.tokenizer is then needed.
        method: the adapter method and its settings.
        task: "sequence-classification", "multi-label-classification", "token-classification", "regression",
            "image-classification", "causal-lm", "seq2seq-lm", "masked-lm", "sentence-embedding" or
            "sentence-similarity".
        targets: "all-linear", a scope ("attention", "mixer", "mlp", "experts", "vision", "vision.mlp", ...), a list of
            name suffixes and scopes, or one regular expression. Of a vision-language model, a scope without a tower
            means the language tower.
        exclude: names of layers to leave out.
        overrides: other settings for some layers, such as `{layer.0: {rank: 4}}`.
        also_train: base parameters that train in full: "heads", or names. What it names need not be in the files of
            `pretrained`; it then starts at random.
        optimizer: the optimizer; null takes the method's own, else AdamW at a rate of 1e-3.
        lr_scheduler: warm-up and decay of the rate.
        num_labels: classes of a classification head; null takes the data module's.
        dtype: of frozen weights: "float64", "float32", "bfloat16", "float16", or "auto" for that of the files; null
            takes "float32", and "bfloat16" where trainer.precision is "bf16-true". What trains is float32 at least.
        half_adapters: keep adapters in the dtype of the frozen weights, too: in half precision small updates are lost,
            and optimizers of factor pairs refuse them.
        gradient_checkpointing: recompute activations in backward: less memory, about a third more time.
        linear_baseline: before training, fit the head alone on frozen features for as many steps, to compare with.
        max_new_tokens: most tokens of a text that is generated, to predict or to be measured.
        seed: seed of the adapter's start values; null takes the run's.
        task_settings: settings of the task, such as `{temperature: 0.02}` of "sentence-embedding".
        random_config: settings of a `random:` model, such as `{hidden_size: 64}`; the vocabulary's size and the marks
            around a text follow from the tokenizer. Its weights are drawn from `seed`.
        quantization: quantize the linear layers of the backbone while loading: "nf4" (4 bits), "nf4-double" (4 bits,
            scales quantized too), "int8" or "torchao-int8" (8 bits). What trains stays in float32. A checkpoint that
            is quantized already needs null.
    """

    strict_loading = False

    def __init__(
        self,
        pretrained: str,
        method: Method,
        task: str = "sequence-classification",
        targets: str | list[str] = "all-linear",
        exclude: list[str] | None = None,
        overrides: dict[str, dict[str, Any]] | None = None,
        also_train: Literal["heads"] | list[str] = "heads",
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: WarmUp = WarmUp(),  # noqa: B008 - frozen
        num_labels: int | None = None,
        dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] | None = None,
        half_adapters: bool = False,
        gradient_checkpointing: bool = False,
        linear_baseline: bool = True,
        max_new_tokens: int = 64,
        seed: int | None = None,
        task_settings: dict[str, Any] | None = None,
        random_config: dict[str, Any] | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__()
        self.pretrained, self.method, self.task = pretrained, method, find_task(task, task_settings)
        self.targets, self.exclude, self.overrides = targets, exclude or [], overrides or {}
        self.also_train, self.optimizer_factory, self.lr_scheduler = also_train, optimizer, lr_scheduler
        self.num_labels, self.dtype_name, self.gradient_checkpointing = num_labels, dtype, gradient_checkpointing
        self.half_adapters = half_adapters
        self.linear_baseline, self.max_new_tokens, self.seed = linear_baseline, max_new_tokens, seed
        self.random_config, self.quantization = random_config or {}, quantization
        if random_config and not is_random(pretrained):
            raise SettingsError(
                f'model.random_config is {random_config}, but model.pretrained is "{pretrained}"; it belongs to '
                '"random:MODEL_TYPE".'
            )
        self.net: nn.Module | None = None
        self.injection: InjectionReport | None = None
        self.meters: dict[str, MetricCollection] = {}

    # -- building ------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the model and inject the adapter, once.

        Raises:
            ModelError: the model cannot be loaded for the task.
            TargetError: the targets do not fit the model.
        """
        if self.net is None:
            self.assemble(load_model if self._reads_values() else load_without_values)

    def assemble(self, load: Callable[..., nn.Module]) -> None:
        """Inject into the model that `load`, called as `load_model` is, gives; raises as `configure_model`."""
        seed = common_seed() if self.seed is None else self.seed
        with fail_together():
            net = self._loaded(load, seed)
        with fail_together():  # a plan is asked of the first process, so all must have come this far
            self.net = self._adapted(net, seed)
        ignore_adapter_buffers(self)

    def _loaded(self, load: Callable[..., nn.Module], seed: int) -> nn.Module:
        """The plain model, with rows for new tokens."""
        self._check_data()
        quantize = self._quantizing()
        self._check_trainer()
        pretrained = self.source(seed)
        net = load(
            pretrained,
            self.task,
            self._labels(),
            dtype=self._frozen_dtype(),
            label_names=self._label_names(),
            also_train=() if self.also_train == "heads" else self.also_train,
            **({"quantize": quantize} if quantize else {}),
        )
        self.check_length(net)
        self._add_tokens(net, seed)
        return net

    def _adapted(self, net: nn.Module, seed: int) -> nn.Module:
        """The model with its adapter."""
        known = planned(self._trainer)
        self.injection = inject(
            net,
            self.method,
            self.targets,
            self.exclude,
            self.overrides,
            self.also_train,
            name=NAME,
            seed=seed,
            probe=calibration(self.method, self.task, self._trainer) if known is None else None,
            planned=known,
        )
        if self.half_adapters:
            lower_adapters(net, NAME)
        if is_random(self.pretrained):
            pretrained = self.source(seed)
            note = f"nothing is pretrained: what is frozen stays as it was drawn ({pretrained})"
            self.injection = replace(self.injection, notes=(*self.injection.notes, note))
        if self.gradient_checkpointing:
            enable_checkpointing(net)
        return net

    def refusals(self) -> list[LoraLightningError]:
        """Everything that `configure_model` would refuse before it loads the model."""
        found: list[LoraLightningError] = []
        for check_one in (self._check_data, self._quantizing, self._check_trainer, self._labels, self._frozen_dtype):
            try:
                check_one()
            except LoraLightningError as error:
                found.append(error)
        return found

    def _reads_values(self) -> bool:
        """Whether this process reads the model's files; under some strategies the first one sends what it has read."""
        strategy = self._trainer.strategy if self._trainer is not None else None
        return not getattr(strategy, "reads_on_first_rank", False) or self.global_rank == 0

    def _quantizing(self) -> Loading | None:
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
        trainer = self._trainer
        strategy = type(trainer.strategy).__name__ if trainer else "auto"
        precision = str(trainer.precision) if trainer else "32-true"
        device = trainer.strategy.root_device if trainer else torch.device("cpu")
        check_format(kind, strategy, precision, device.type, where if given else f'the checkpoint "{self.pretrained}"')
        for callback in trainer.callbacks if trainer else ():  # type: ignore[attr-defined]
            refuses = getattr(callback, "refuses_quantized", None)
            if refuses is not None and (reason := refuses(self.method)):
                raise SettingsError(f"the base is stored as {kind}, and {type(callback).__name__} {reason}")
        return loading(kind, precision, str(device))

    def source(self, seed: int) -> str:
        """Where the model comes from: `pretrained`, or all that decides a random model."""
        if not is_random(self.pretrained):
            return self.pretrained
        tokenizer = getattr(self._datamodule(), "tokenizer_object", None)
        found = tokenizer_settings(self.pretrained, tokenizer, self.random_config) if tokenizer else {}
        return full_name(self.pretrained, {**found, **self.random_config}, seed)

    def _datamodule(self) -> Any:
        return getattr(self._trainer, "datamodule", None) if self._trainer is not None else None

    def _check_data(self) -> None:
        kinds = getattr(self._datamodule(), "task_kinds", None)
        if kinds is not None and self.task.name not in kinds:
            raise DataError(
                f'model.task is "{self.task.name}", but the data ({type(self._datamodule()).__name__}) serve '
                f"{' and '.join(kinds)}."
            )

    def _check_trainer(self) -> None:
        if self._trainer is None:
            return
        check_strategy(self.trainer.strategy)
        if self.trainer.accumulate_grad_batches < 1:
            raise SettingsError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches}; it must be at least 1."
            )

    def _frozen_dtype(self) -> torch.dtype | Literal["auto"]:
        """Dtype of frozen weights: the setting's, else what the trainer's precision means by "true"."""
        precision = str(self.trainer.precision) if self._trainer is not None else "32-true"
        if precision == "16-true":
            raise SettingsError(
                'trainer.precision is "16-true", under which gradients underflow; take "bf16-true", or "16-mixed", '
                "which scales the loss."
            )
        if precision == "bf16-true" and self.dtype_name not in (None, "auto", "bfloat16"):
            raise SettingsError(
                f'model.dtype is "{self.dtype_name}", but trainer.precision "bf16-true" casts frozen weights to '
                'bfloat16; leave dtype null, or take precision "bf16-mixed".'
            )
        if precision == "bf16-true":
            return torch.bfloat16
        return "auto" if self.dtype_name == "auto" else getattr(torch, self.dtype_name or "float32")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts, of which those to half precision are not for what trains."""
        adapters = {id(p) for m in self.modules() if isinstance(m, Adapter) for p in m.parameters()}
        trained = {id(p) for p in self.parameters() if p.requires_grad} - adapters
        return cast(Self, super()._apply(kept(fn, lambda tensor: id(tensor) in trained), recurse))  # type: ignore[no-untyped-call]

    def check_length(self, net: nn.Module) -> None:
        """Raise `SettingsError` where the data's texts are longer than a model can take."""
        longest = getattr(getattr(net, "config", None), "max_position_embeddings", None)
        length = getattr(self._datamodule(), "max_length", None)
        if longest and length and length > longest:
            raise SettingsError(
                f"data.max_length is {length}; {type(net).__name__} has {longest} positions, so at most that."
            )

    def _add_tokens(self, net: nn.Module, seed: int) -> None:
        """Rows for the tokens that the data module has added to its tokenizer."""
        data = self._datamodule()
        tokens = getattr(data, "new_tokens", ())
        if tokens:
            add_rows_for(net, data.tokenizer_object, tokens, seed)

    def _label_names(self) -> list[str]:
        return list(getattr(self._datamodule(), "label_names", ())) if self.task.has_head else []

    def _labels(self) -> int | None:
        if not self.task.has_head:
            return None
        labels = self.num_labels if self.num_labels is not None else getattr(self._datamodule(), "num_labels", None)
        classes = len(self._label_names())
        if labels is not None and labels < classes:
            raise SettingsError(f"model.num_labels is {labels}; the data have {classes} classes, so at least that.")
        if labels is None and self.task.model_options(None) == {}:
            raise SettingsError(
                "model.num_labels is null, and the data module does not say; set it to the class count."
            )
        return labels

    @property
    def model(self) -> nn.Module:
        """The adapted model.

        Raises:
            ModelError: it has not been loaded yet.
        """
        if self.net is None:
            raise ModelError("the model is not loaded yet; call configure_model, or let a Trainer do so.")
        return self.net

    def adapters(self) -> dict[str, Adapter]:
        """The adapters by layer path."""
        return adapters_named(self.model, NAME)

    def configure_callbacks(self) -> list[Callback]:
        """The guard, checks, exact resume, and what the method needs; each yields to one given to the trainer."""
        ours = [
            *self.method.callbacks(),
            TrainingGuard(),
            LinearBaseline(self.linear_baseline),
            PackingCheck(),
            ExactResume(),
        ]
        given = self.trainer.callbacks  # type: ignore[attr-defined]
        for callback in ours:
            _say_difference(callback, given)
        return [callback for callback in ours if not any(isinstance(other, type(callback)) for other in given)]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over named groups, and the schedule per optimizer step where the run's length is known."""
        optimizer = build_optimizer(self.model, self.optimizer_factory)
        total = total_steps(self.trainer)
        if total is None:
            return optimizer
        cascade = next((c for c in self.trainer.callbacks if isinstance(c, Cascade)), None)  # type: ignore[attr-defined]
        scheduler = self.lr_scheduler.schedule(optimizer, total, cascade.knots(self.trainer) if cascade else None)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip groups with a norm of their own, and the rest together by the trainer's value.

        Raises:
            SettingsError: a value where the optimizer says `clips_itself`.
        """
        if gradient_clip_val and getattr(optimizer, "clips_itself", False):
            raise SettingsError(
                f"trainer.gradient_clip_val is {gradient_clip_val}; {type(optimizer).__name__} clips where its rule "
                "allows it, and clipping before would spoil the rule. Leave it null."
            )
        shared = []
        for group in optimizer.param_groups:
            if group.get("clip") is None:
                shared += group["params"]
            else:
                nn.utils.clip_grad_norm_(group["params"], group["clip"])
        if gradient_clip_val and gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(shared, gradient_clip_val)
        elif gradient_clip_val:
            nn.utils.clip_grad_norm_(shared, gradient_clip_val)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Train mode for the whole model: Hugging Face models arrive in eval mode, and Lightning leaves them there."""
        self.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, scaled so that Lightning's mean over the window is the mean over its tokens."""
        loss = self.task.loss(self.task.logits(self.model, batch), batch)
        mean = loss.total / loss.count.clamp_min(1)
        self.log("train_loss", mean.detach(), prog_bar=True, batch_size=int(loss.count))
        if self.task.per_token:
            mean = loss.total * self._window_scale(batch, loss.count)
        penalty = self.method.penalty(self.adapters())
        if penalty is not None:
            self.log("penalty", penalty.detach())
            mean = mean + penalty
        return mean

    def _window_scale(self, batch: Batch, count: Tensor) -> Tensor:
        """(batches in a window) * (processes) / (tokens of the window on all processes)."""
        batches, processes = self.trainer.accumulate_grad_batches, self.trainer.world_size
        if "window_tokens" not in batch and batches > 1:
            raise DataError(
                f"accumulate_grad_batches is {batches}, but the training loader does not say how many tokens a window "
                'has, so the loss would be averaged wrong. Use a loader that adds "window_tokens" to each batch, such '
                "as lora_lightning.data.ResumableLoader, or set it to 1."
            )
        tokens = batch.get("window_tokens", count).to(count.device)
        if processes > 1:
            tokens = cast(Tensor, self.trainer.strategy.reduce(tokens.clone(), reduce_op="sum"))
        return batches * processes / tokens.clamp_min(1)

    def _meters(self, stage: str) -> MetricCollection:
        if stage not in self.meters:
            self.meters[stage] = metrics(self.task, self.model).to(self.device)
        return self.meters[stage]

    def _measure(self, stage: str, batch: Batch) -> None:
        logits = self.task.logits(self.model, batch)
        update_metrics(self.task, self._meters(stage), logits, batch)
        update_text_metrics(self.task, self._meters(stage), self.model, batch, self.predict_context())

    def _log_metrics(self, stage: str) -> None:
        metrics = self._meters(stage)
        for name, value in metrics.compute().items():
            self.log(f"{stage}_{name}", value, prog_bar=name == self.task.metric)
        metrics.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the validation metrics."""
        self._measure("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_metrics("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the test metrics."""
        self._measure("test", batch)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_metrics("test")

    def predict_context(self) -> PredictContext:
        """What predictions, and texts that are measured, need beside the model."""
        return PredictContext(
            label_names=list(getattr(cast(Any, self.model).config, "id2label", {}).values()),
            tokenizer=getattr(self._datamodule(), "tokenizer_object", None),
            max_new_tokens=self.max_new_tokens,
        )

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One dictionary an example, with its row number in the data."""
        rows = self.task.predict(self.model, batch, self.predict_context())
        index = batch["index"].tolist() if "index" in batch else range(len(rows))
        return [{"index": i, **row} for i, row in zip(index, rows, strict=True)]

    # -- checkpoints: adapters and heads, never the base ---------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the adapter owns."""
        own = set(adapter_keys(self, NAME))
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in own}
        checkpoint["lora_lightning"] = describe_adapter(self.model, NAME, records(self.model)[NAME])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare keys, shapes and the base model exactly.

        Raises:
            ResumeError: the checkpoint belongs to another model, method or set of layers.
        """
        if "lora_lightning" not in checkpoint:
            raise ResumeError("the checkpoint was not written by AdapterModule: it has no adapter section.")
        check_unmerged(self.model)
        check_same(self, NAME, checkpoint["lora_lightning"])
        make_room_for_folded(self, NAME, checkpoint["state_dict"])
        check_fits(self, NAME, checkpoint["state_dict"])


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


def _say_difference(callback: Callback, given: Sequence[Callback]) -> None:
    """Print where a callback given by hand replaces the method's with other settings."""
    settings = {key: value for key, value in vars(callback).items() if key in arguments(type(callback))}
    for other in given:
        if isinstance(other, type(callback)):
            theirs = {key: getattr(other, key, None) for key in settings}
            changed = ", ".join(f"{key}={theirs[key]!r}" for key in settings if theirs[key] != settings[key])
            if changed:
                print(f"{type(callback).__name__}: the trainer's replaces the method's ({changed})")
