"""AdapterModule: a pretrained model with an adapter, as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Literal, Self, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.precision import kept
from lora_lightning.callbacks.beside import refuse_beside
from lora_lightning.callbacks.cascade import Cascade
from lora_lightning.callbacks.guard import TrainingGuard
from lora_lightning.callbacks.meters import Meters
from lora_lightning.callbacks.plateau import FollowPlateau
from lora_lightning.callbacks.resume import ExactResume
from lora_lightning.callbacks.step_counting import logs_at, outside_step, total_steps
from lora_lightning.distributed import fail_together, gather_objects, reshard
from lora_lightning.errors import DataError, LoraLightningError, ModelError, ResumeError, SettingsError, check
from lora_lightning.injection.heads import waiting_heads
from lora_lightning.injection.inject import ignore_adapter_buffers
from lora_lightning.injection.records import adapters_named, check_unmerged, injected_root, records
from lora_lightning.injection.report import InjectionReport
from lora_lightning.methods import Method
from lora_lightning.models.anatomy import survey
from lora_lightning.models.attention import Attention
from lora_lightning.models.loss_head import LossHead, choose, loss_head, set_loss_head
from lora_lightning.models.quantized_loading import Quantization
from lora_lightning.models.random import is_random
from lora_lightning.models.tasks import find_task
from lora_lightning.models.tasks.base import (
    Batch,
    Loss,
    PredictContext,
    evaluate,
    measure,
    metrics,
    update_text_metrics,
)
from lora_lightning.models.token_rows import Tokens
from lora_lightning.optim.clipping import clip_gradients
from lora_lightning.optim.groups import build_optimizer, head_ratio
from lora_lightning.optim.warmup import WarmUp
from lora_lightning.seeds import common_seed
from lora_lightning.storage.description import describe_adapter
from lora_lightning.storage.folded import make_room_for_folded
from lora_lightning.storage.resume_check import check_fits, check_same
from lora_lightning.storage.state import adapter_keys
from lora_lightning.training.assembly import NAME, Assembly
from lora_lightning.training.compilation import check_compile, compiled
from lora_lightning.training.end_check import EndCheck
from lora_lightning.training.given_callbacks import yielding
from lora_lightning.training.linear_baseline import LinearBaseline
from lora_lightning.training.packing_check import PackingCheck
from lora_lightning.training.reference import ReferenceValues
from lora_lightning.training.start import find_start
from lora_lightning.training.window_mean import WindowMeans
from lora_lightning.training.without_effect import check_validation_comes, unscheduled, without_effect


class AdapterModule(LightningModule):
    """Loads a pretrained model, puts an adapter method on it, and trains it on a task.

    Args:
        pretrained: folder, hub id, `pkg:IMPORT_NAME/FOLDER` for weights that an installed package carries, or
            `random:MODEL_TYPE` (of transformers) for a model that knows nothing yet; data.tokenizer is then needed.
        method: the adapter method and its settings; null takes those of `adapter`.
        task: "sequence-classification", "multi-label-classification", "token-classification", "regression",
            "image-classification", "causal-lm", "image-text-to-text", "audio-text-to-text", "seq2seq-lm", "masked-lm",
            "preference", "reward", "sentence-embedding" or "sentence-similarity".
        targets: "all-linear", a scope ("attention", "mixer", "mlp", "experts", "vision", "vision.mlp", ...), a list of
            name suffixes and scopes, or one regular expression. Of a vision-language model, a scope without a tower
            means the language tower. "none" leaves training to `also_train`. Null takes "all-linear", or the layers of
            `adapter`.
        exclude: names of layers to leave out.
        overrides: other settings for some layers, such as `{layer.0: {rank: 4}}`.
        also_train: base parameters that are fully trained: "heads", "all", or names. What it names need not be in the
            files of `pretrained`; it then starts at random. Null takes "heads", or what `adapter` has.
        train_tokens: texts or ids of known tokens whose rows train in the embedding, and in an output layer that shares
            its weight, such as `["<|im_start|>", 128005]`; or layers with texts or ids, `{lm_head: [3]}`. Texts take
            the data module's tokenizer. New tokens are `data.new_tokens`.
        untie: give an output layer that shares the embedding's weight a copy of its own, so that each of them can be
            adapted, trained and merged.
        optimizer: the optimizer; null takes the method's own, else AdamW at a rate of 1e-3.
        head_lr_ratio: rate of what `also_train` names over the optimizer's; null takes 3 for a task's head, else 1.
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
        loss_head: "auto" computes a language model's loss without logits of tokens that carry no label, in chunks where
            its output layer allows it; "plain" computes all logits.
        attention: kernel of attention: "sdpa", "flash_attention_2", "flex_attention" or "eager"; null takes
            transformers' choice.
        compile: "blocks" compiles each of the model's repeated blocks for the time of a fit; "off" or null does not.
        quantization: quantize the linear layers of the backbone while loading: "nf4" (4 bits), "nf4-double" (4 bits,
            scales quantized too), "int8" or "torchao-int8" (8 bits). What trains stays in float32. A checkpoint that
            is quantized already needs null.
        adapter: a trained adapter to train on: a run folder, an adapter folder of this library or of peft, or a hub id.
            A list of them stays as it is, and a new adapter of `method` trains on top.
    """

    strict_loading = False

    def __init__(
        self,
        pretrained: str,
        method: Method | None = None,
        task: str = "sequence-classification",
        targets: str | list[str] | None = None,
        exclude: list[str] | None = None,
        overrides: dict[str, dict[str, Any]] | None = None,
        also_train: Literal["heads", "all"] | list[str] | None = None,
        optimizer: OptimizerCallable | None = None,
        head_lr_ratio: float | None = None,
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
        train_tokens: list[str | int] | dict[str, list[str | int]] | None = None,
        untie: bool = False,
        adapter: str | list[str] | None = None,
        loss_head: Literal["auto", "plain"] = "auto",
        attention: Attention | None = None,
        compile: Literal["off", "blocks", False] | None = None,
    ) -> None:
        super().__init__()
        self.start, self.method = find_start(adapter, method)
        self.pretrained, self.task = pretrained, find_task(task, task_settings)
        self.targets, self.exclude, self.overrides = (
            "all-linear" if targets is None else targets,
            exclude or [],
            overrides or {},
        )
        self.also_train: Literal["heads", "all"] | list[str] = "heads" if also_train is None else also_train
        self._said = {"targets": targets, "exclude": exclude, "overrides": overrides, "also_train": also_train}
        self.optimizer_factory, self.lr_scheduler = optimizer, lr_scheduler
        self.num_labels, self.dtype_name, self.gradient_checkpointing = num_labels, dtype, gradient_checkpointing
        self.num_labels, self.dtype_name, self.gradient_checkpointing = num_labels, dtype, gradient_checkpointing
        self.half_adapters, self.untie = half_adapters, untie
        self.linear_baseline, self.max_new_tokens, self.seed = linear_baseline, max_new_tokens, seed
        self.random_config, self.quantization = random_config or {}, quantization
        self.train_tokens: Tokens = train_tokens or []
        self.loss_head, self.attention, self.head_lr_ratio = loss_head, attention, head_lr_ratio
        self.compiling = check_compile(compile, gradient_checkpointing)
        rule = "it must be above 0, or null. Rate of the heads over the optimizer's."
        check(head_lr_ratio is None or head_lr_ratio > 0, self, "head_lr_ratio", rule)
        self._compiled = ExitStack()
        if random_config and not is_random(pretrained):
            raise SettingsError(
                f'model.random_config is {random_config}, but model.pretrained is "{pretrained}"; it belongs to '
                '"random:MODEL_TYPE".'
            )
        self.net: nn.Module | None = None
        self.injection: InjectionReport | None = None
        self.stage_metrics: dict[str, MetricCollection] = {}
        self.window_means = WindowMeans()

    def setup(self, stage: str) -> None:
        """Begin a fit with an empty window of losses.

        Raises:
            SettingsError: a setting would do nothing.
        """
        if stage == "fit":
            for error in without_effect(self, self._trainer, getattr(self._trainer, "datamodule", None)):
                raise error
            self.window_means = WindowMeans()

    # -- building ------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the model and inject the adapter, once.

        Raises:
            ModelError: the model cannot be loaded for the task.
            TargetError: the targets do not fit the model.
        """
        if self.net is None:
            self.assemble(self.assembly().loader())

    def assembly(self) -> Assembly:
        """What decides the model, as it stands now."""
        return Assembly(
            pretrained=self.pretrained,
            method=self.method,
            task=self.task,
            targets=self.targets,
            exclude=self.exclude,
            overrides=self.overrides,
            also_train=self.also_train,
            train_tokens=self.train_tokens,
            untie=self.untie,
            num_labels=self.num_labels,
            dtype=self.dtype_name,
            half_adapters=self.half_adapters,
            gradient_checkpointing=self.gradient_checkpointing,
            random_config=self.random_config,
            quantization=self.quantization,
            attention=self.attention,
            trainer=self._trainer,
            start=self.start,
            said=self._said,
        )

    def assemble(self, load: Callable[..., nn.Module]) -> None:
        """Inject into the model that `load`, called as `load_model` is, gives; raises as `configure_model`."""
        seed = common_seed() if self.seed is None else self.seed
        assembly = self.assembly()
        with fail_together():
            net = assembly.load(load, seed)
        if self.loss_head == "plain":
            set_loss_head(net, LossHead("plain", 'model.loss_head is "plain"'))
        with fail_together():  # a plan is asked of the first process, so all must have come this far
            self.injection = assembly.adapt(net, seed)
        self.net = net
        self.method = records(net)[NAME].method
        ignore_adapter_buffers(self)

    @property
    def head_ratio(self) -> float:
        """Rate of what is fully trained over the optimizer's."""
        return head_ratio(self.head_lr_ratio, self.task.has_head and self.also_train == "heads")

    def refusals(self) -> list[LoraLightningError]:
        """Everything that a fit would refuse before it loads the model."""
        data = getattr(self._trainer, "datamodule", None)
        return [*self.assembly().refusals(), *without_effect(self, self._trainer, data)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts, of which those to half precision are not for what trains."""
        adapters = {id(p) for m in self.modules() if isinstance(m, Adapter) for p in m.parameters()}
        trained = {id(p) for p in self.parameters() if p.requires_grad} - adapters
        return cast(Self, super()._apply(kept(fn, lambda tensor: id(tensor) in trained), recurse))  # type: ignore[no-untyped-call]

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

    def settings_callbacks(self) -> list[Callback]:
        """What the method and the schedule of the rate need."""
        follows = [FollowPlateau(self.lr_scheduler)] if self.lr_scheduler.decay == "plateau" else []
        return [*(self.method.callbacks() if self.method is not None else ()), *follows]

    def configure_callbacks(self) -> list[Callback]:
        """The guard, checks, meters, exact resume, and what settings need; each yields to one given to the trainer."""
        ours = [
            *self.settings_callbacks(),
            TrainingGuard(stop_unreached=True),
            LinearBaseline(self.linear_baseline),
            PackingCheck(),
            EndCheck(),
            ReferenceValues(),
            Meters(),
            ExactResume(),
        ]
        if self.trainer.training:
            refuse_beside(self.trainer.callbacks, self)  # type: ignore[attr-defined]
        return yielding(ours, self.trainer.callbacks)  # type: ignore[attr-defined]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over named groups, and the schedule per optimizer step where the run's length is known."""
        optimizer = build_optimizer(self.model, self.optimizer_factory, self.head_ratio, "model.optimizer")
        total = total_steps(self.trainer)
        if total is None:
            self.print(unscheduled(self.lr_scheduler))
            return optimizer
        cascade = next((c for c in self.trainer.callbacks if isinstance(c, Cascade)), None)  # type: ignore[attr-defined]
        scheduler = self.lr_scheduler.schedule(optimizer, total, cascade.stage_ends(self.trainer) if cascade else None)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as `lora_lightning.optim.clipping` does."""
        clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Prepare the model for its losses, and compile it where asked."""
        self.prepare_losses()
        if self.task.by_loss_head:
            self.print(f"loss head: {loss_head(self.model)}")
        if self.compiling == "blocks":
            self._compiled.enter_context(compiled(self.model))

    def prepare_losses(self) -> None:
        """Train mode for the whole model: Hugging Face models arrive in eval mode, and Lightning leaves them there.

        The way that losses are computed is chosen here, where adapters and shards are in place.
        """
        self.train()
        if self.task.by_loss_head and self.loss_head == "auto":
            set_loss_head(self.model, outside_step(self.trainer, lambda: choose(self.model)))
            reshard(self.model)

    def on_train_start(self) -> None:
        """Say where the run would end before it validates, or refuse it where a callback waits for that."""
        if told := check_validation_comes(self.trainer):
            self.print(told)

    def teardown(self, stage: str) -> None:
        """Leave the model as it was before a fit."""
        self._compiled.close()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, scaled so that Lightning's mean over the window is the mean over its tokens."""
        loss = self.task.loss_of(self.model, batch)
        mean = loss.total / loss.count.clamp_min(1)
        penalty = self.method.penalty(self.adapters())
        self._log_means(loss, penalty)
        if self.task.per_token:
            mean = loss.total * self._window_scale(batch, loss.count)
        return mean if penalty is None else mean + penalty

    def _log_means(self, loss: Loss, penalty: Tensor | None) -> None:
        """Log at each step's end the means since the run has last logged, the last micro-batch with it."""
        self.window_means.add(loss, penalty)
        if self.trainer.fit_loop.epoch_loop._should_accumulate():
            return
        for name, mean in self.window_means.means(self._over_processes).items():
            self.log(name, mean, prog_bar=name == "train_loss")
        if logs_at(self.trainer, self.trainer.global_step + 1):
            self.window_means.close()

    def _over_processes(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.trainer.world_size == 1:
            return values
        return cast(Tensor, self.trainer.strategy.reduce(values, reduce_op="sum"))

    def _window_scale(self, batch: Batch, count: Tensor) -> Tensor:
        """(batches in a window) * (processes) / (tokens of the window on all processes)."""
        batches = self.trainer.accumulate_grad_batches
        if "window_tokens" not in batch and batches > 1:
            raise DataError(
                f"accumulate_grad_batches is {batches}, but the training loader does not say how many tokens a window "
                'has, so the loss would be averaged wrong. Use a loader that adds "window_tokens" to each batch, such '
                "as lora_lightning.data.ResumableLoader, or set it to 1."
            )
        tokens = batch.get("window_tokens", count).to(count.device)
        return batches * self.trainer.world_size / self._over_processes(tokens.clone()).clamp_min(1)

    def _metrics(self, stage: str) -> MetricCollection:
        if stage not in self.stage_metrics:
            self.stage_metrics[stage] = metrics(self.task, self.model).to(self.device)
        return self.stage_metrics[stage]

    def _update_metrics(self, stage: str, batch: Batch) -> None:
        measure(self.task, self._metrics(stage), self.model, batch)
        update_text_metrics(self.task, self._metrics(stage), self.model, batch, self.predict_context())

    def _log_metrics(self, stage: str) -> None:
        metrics = self._metrics(stage)
        for name, value in metrics.compute().items():  # of classes that nobody predicts, some of them are whole numbers
            self.log(f"{stage}_{name}", value.float(), prog_bar=name == self.task.metric)
        metrics.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the validation metrics."""
        self._update_metrics("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_metrics("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the test metrics."""
        self._update_metrics("test", batch)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_metrics("test")

    def measure_batches(self, batches: Iterable[Batch]) -> dict[str, float]:
        """All metrics of the task on batches of any set, in eval mode; the run's own metrics stay as they are."""
        return evaluate(self.task, injected_root(self.model), batches, self.predict_context())

    def predict_context(self) -> PredictContext:
        """What predictions, and texts that are measured, need beside the model."""
        data = getattr(self._trainer, "datamodule", None)
        return PredictContext(
            label_names=list(getattr(cast(Any, self.model).config, "id2label", {}).values()),
            tokenizer=getattr(data, "tokenizer_object", None),
            max_new_tokens=self.max_new_tokens,
            in_turns=hasattr(type(data), "renderer"),
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
        state = {key: value for key, value in checkpoint["state_dict"].items() if key in own}
        checkpoint["state_dict"] = state | waiting_heads(self, NAME)
        checkpoint["lora_lightning"] = describe_adapter(survey(self.model), NAME)
        checkpoint["lora_lightning_loss"] = gather_objects(self.window_means.state())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare keys, shapes and the base model exactly.

        Raises:
            ResumeError: the checkpoint belongs to another model, method or set of layers.
        """
        if "lora_lightning" not in checkpoint:
            raise ResumeError("the checkpoint was not written by AdapterModule: it has no adapter section.")
        check_unmerged(self.model)
        check_same(self, NAME, checkpoint["lora_lightning"])
        if sums := checkpoint.get("lora_lightning_loss"):  # older ones have none
            self.window_means.load(sums, self.trainer.global_rank, self.trainer.world_size)
        make_room_for_folded(self, NAME, checkpoint["state_dict"])
        check_fits(self, NAME, checkpoint["state_dict"])
