"""Settings of adapters and of training that LLaMA-Factory and axolotl share, most of them words of transformers."""

from __future__ import annotations

import math
from typing import Any

from lora_lightning.cli.imports.translation import Translation, method_of
from lora_lightning.cli.other_tools import OPTIMIZERS, TEMPLATES, VALUES

SCHEDULES = ("linear", "cosine", "constant", "plateau")
CLIP, SEED, BETAS = 1.0, 42, (0.9, 0.999)
"""What transformers' trainer takes where nothing is said."""


def adapter(t: Translation, *, alpha_of_rank: int | None) -> None:
    """Method, rank, scaling and layers.

    Args:
        t: what is translated.
        alpha_of_rank: what alpha is where it is not given, as a multiple of the rank; None is rank 8's 16.
    """
    t.put("model.method", method_of({"use_dora": True} if t.get("use_dora", "peft_use_dora", default=False) else {}))
    rank = t.number("lora_rank", "lora_r", default=8)
    t.put("model.method.rank", rank)
    t.put("model.method.alpha", float(t.number("lora_alpha", default=(alpha_of_rank or 2) * rank)))
    t.put("model.method.dropout", float(t.number("lora_dropout", default=0.0)))
    if t.get("use_rslora", "peft_use_rslora", default=False):
        t.put("model.method.scaling_rule", "alpha/sqrt(r)")
    if trained := t.get("additional_target", "lora_modules_to_save"):
        t.put("model.also_train", listed(trained))


def listed(value: Any) -> list[str]:
    """Names in a list, or in one text with commas between them."""
    return [str(one).strip() for one in (value.split(",") if isinstance(value, str) else value)]


def optimizer(t: Translation, rate: float | None) -> None:
    """Optimizer, rate and schedule.

    Args:
        t: what is translated.
        rate: what the tool takes where none is given.
    """
    named = str(t.get("optim", "optimizer", default="adamw_torch")).lower()
    name = OPTIMIZERS.get(named)
    if name is None:
        t.lose(t.name_of("optim", "optimizer"), "AdamW stands in its place; its state is of 32 bits")
    place = "model.optimizer"
    if ratio := t.number("loraplus_lr_ratio"):
        t.put(place, "LoRAPlus")
        t.put(f"{place}.ratio", float(ratio))
        place = f"{place}.inner"
    t.put(place, name or "AdamW")
    if (lr := t.number("learning_rate", default=rate)) is not None:
        t.put(f"{place}.lr", float(lr))
    t.put(f"{place}.weight_decay", float(t.number("weight_decay", default=0.0)))
    betas = [float(t.number(key, default=own)) for key, own in zip(("adam_beta1", "adam_beta2"), BETAS, strict=True)]
    epsilon = t.number("adam_epsilon")
    if name in (None, "AdamW", "Adam") and tuple(betas) != BETAS:
        t.put(f"{place}.betas", betas)
    if name in (None, "AdamW", "Adam") and epsilon is not None:
        t.put(f"{place}.eps", float(epsilon))


def schedule(t: Translation, decay: str) -> None:
    """Warm-up and decay; `decay` is what the tool takes where none is given."""
    named = str(t.get("lr_scheduler_type", "lr_scheduler", default=decay))
    ours = VALUES.get(named, named)
    key = t.name_of("lr_scheduler_type", "lr_scheduler")
    if ours not in SCHEDULES:
        t.lose(key, f"model.lr_scheduler.decay is one of {', '.join(SCHEDULES)}; cosine stands in its place")
        ours = "cosine"
    elif "restarts" in named:
        t.lose(key, "a cosine without restarts stands in its place")
    t.put("model.lr_scheduler.decay", ours)
    steps, most = t.number("warmup_steps"), t.number("max_steps", default=-1)
    ratio = t.number("warmup_ratio", default=0.0)
    if steps and steps < 1:
        ratio = steps
    elif steps and most > 0:
        ratio = steps / most
    elif steps:
        t.lose(
            "warmup_steps", "model.lr_scheduler.warmup_fraction is a fraction of all steps; none stands in its place"
        )
    t.put("model.lr_scheduler.warmup_fraction", round(float(ratio), 6))


def length(t: Translation, epochs: float, batch: int) -> None:
    """How long a run is, in which batches, and with which numbers.

    Args:
        t: what is translated.
        epochs: what the tool takes where none are given.
        batch: the same of rows a batch.
    """
    t.put("seed_everything", t.number("seed", default=SEED))
    most, passes = t.number("max_steps", default=-1), t.number("num_train_epochs", "num_epochs", default=epochs)
    if most > 0:
        t.put("trainer.max_steps", most)
        t.put("trainer.max_epochs", -1)
    else:
        t.put("trainer.max_epochs", math.ceil(passes))
        if passes != math.ceil(passes):
            t.lose(t.name_of("num_train_epochs", "num_epochs"), "trainer.max_epochs is whole; set trainer.max_steps")
    t.put("data.batch_size", t.number("per_device_train_batch_size", "micro_batch_size", default=batch))
    if rows := t.number("per_device_eval_batch_size", "eval_batch_size"):
        t.put("data.validation_batch_size", rows)
    window = t.number("gradient_accumulation_steps", default=1)
    t.put("trainer.accumulate_grad_batches", window)
    if clip := t.number("max_grad_norm", default=CLIP):
        t.put("trainer.gradient_clip_val", float(clip))
    if every := t.number("logging_steps"):
        t.put("trainer.log_every_n_steps", max(1, int(every)))
    _validations(t, window, most)


def _validations(t: Translation, window: int, most: int) -> None:
    """When to validate; Lightning counts batches, not steps."""
    strategy, per_epoch = t.get("eval_strategy", "evaluation_strategy"), t.number("evals_per_epoch")
    steps = t.number("eval_steps")
    off = str(strategy).lower() in ("no", "false") or per_epoch == 0
    if off:
        t.put("trainer.limit_val_batches", 0)
    elif per_epoch and per_epoch > 1:
        t.put("trainer.val_check_interval", round(1 / per_epoch, 6))
    elif steps and strategy in (None, "steps"):
        if steps < 1 and most <= 0:
            t.lose("eval_steps", "it is a fraction of all steps; trainer.val_check_interval counts batches")
            return
        count = steps * most if steps < 1 else steps
        t.put("trainer.val_check_interval", max(1, round(count)) * window)
        t.put("trainer.check_val_every_n_epoch", None)


def precision(t: Translation) -> None:
    """Numbers: half precision, quantization, attention."""
    half, half_16 = str(t.get("bf16", "bfloat16", default="")).lower(), t.get("fp16", "float16", default=False)
    if t.get("pure_bf16", default=False):
        t.put("trainer.precision", "bf16-true")
        t.put("model.half_adapters", True)
    elif half in ("true", "auto", "full"):
        t.put("trainer.precision", "bf16-true")
        t.notes.append("bf16: frozen weights are bfloat16 and what trains is float32 (trainer.precision bf16-true)")
    elif half_16:
        t.put("trainer.precision", "16-mixed")
    attention = t.get("attn_implementation", "flash_attn")
    named = {"fa2": "flash_attention_2", "disabled": "eager", "auto": None}
    flags = {
        "flash_attention": "flash_attention_2",
        "sdp_attention": "sdpa",
        "flex_attention": "flex_attention",
        "eager_attention": "eager",
    }
    chosen = named.get(str(attention), attention) or next((ours for name, ours in flags.items() if t.get(name)), None)
    if chosen in ("sdpa", "flash_attention_2", "flex_attention", "eager"):
        t.put("model.attention", chosen)
    elif chosen:
        t.lose(t.name_of("attn_implementation", "flash_attn"), "model.attention null takes transformers' choice")


def template(t: Translation, name: str | None) -> None:
    """The chat template of data that are conversations; None or "default" is the tokenizer's own."""
    key = t.name_of("template", "chat_template")
    if name is None or name in ("default", "tokenizer_default", "empty"):
        t.notes.append("chat_template: the tokenizer's own")
        return
    ours, variables = TEMPLATES.get(name.removeprefix("tokenizer_default_fallback_"), (None, {}))
    if ours is None:
        t.lose(key, "data.chat_template null takes the tokenizer's own; name one of ours where it has none")
        return
    t.put("data.chat_template", ours)
    if variables:
        t.put("data.chat_template_kwargs", dict(variables))


def logging(t: Translation) -> None:
    """Loggers by their short names."""
    asked = t.get("report_to", default=[])
    names = [name for name in (asked if isinstance(asked, list) else [asked]) if name not in ("none", "all")]
    known = {"wandb": "wandb", "mlflow": "mlflow", "comet_ml": "comet", "tensorboard": "tensorboard"}
    project = t.get("wandb_project")
    if (project or t.get("use_wandb")) and "wandb" not in names:
        names.append("wandb")
    if (experiment := t.get("mlflow_experiment_name")) and "mlflow" not in names:
        names.append("mlflow")
    if t.get("use_mlflow") and "mlflow" not in names:
        names.append("mlflow")
    if t.get("use_comet") and "comet_ml" not in names:
        names.append("comet_ml")
    if t.get("use_tensorboard") and "tensorboard" not in names:
        names.append("tensorboard")
    settings: dict[str, dict[str, Any]] = {"wandb": {}, "mlflow": {}, "comet": {}, "tensorboard": {}}
    for word, value in (("project", project), ("name", t.get("wandb_name", "wandb_run_id", "run_name"))):
        if value:
            settings["wandb"][word] = value
    if entity := t.get("wandb_entity"):
        settings["wandb"]["options"] = {"entity": entity}
    if experiment:
        settings["mlflow"]["experiment"] = experiment
    if uri := t.get("mlflow_tracking_uri"):
        settings["mlflow"]["tracking_uri"] = uri
    ours = [known[name] for name in names if name in known]
    if lost := [str(name) for name in names if name not in known]:
        t.lose("report_to", f"no logger stands for {', '.join(lost)}; a class of Lightning's loggers can be named")
    if ours:
        made = [{"class_path": name, "init_args": settings[name]} if settings[name] else name for name in ours]
        t.put("trainer.logger", made)
