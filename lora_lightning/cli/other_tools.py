"""Words of other tools, and what stands for them here."""

from __future__ import annotations

SETTINGS = {
    "lr": "model.optimizer.lr", "learning_rate": "model.optimizer.lr", "weight_decay": "model.optimizer.weight_decay",
    "r": "model.method.rank", "lora_r": "model.method.rank", "lora_rank": "model.method.rank",
    "rank": "model.method.rank", "alpha": "model.method.alpha", "lora_alpha": "model.method.alpha",
    "dropout": "model.method.dropout", "lora_dropout": "model.method.dropout", "target_modules": "model.targets",
    "lora_target": "model.targets", "lora_target_modules": "model.targets", "exclude_modules": "model.exclude",
    "modules_to_save": "model.also_train", "trainable_token_indices": "model.train_tokens",
    "rank_pattern": "model.overrides", "alpha_pattern": "model.overrides",
    "load_in_4bit": "model.quantization (nf4)", "load_in_8bit": "model.quantization (int8)",
    "model_name_or_path": "model.pretrained", "base_model": "model.pretrained", "model_name": "model.pretrained",
    "num_train_epochs": "trainer.max_epochs", "num_epochs": "trainer.max_epochs", "epochs": "trainer.max_epochs",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches", "max_grad_norm": "trainer.gradient_clip_val",
    "per_device_train_batch_size": "data.batch_size", "micro_batch_size": "data.batch_size",
    "per_device_eval_batch_size": "data.validation_batch_size", "max_seq_length": "data.max_length",
    "cutoff_len": "data.max_length", "sequence_len": "data.max_length", "output_dir": "trainer.default_root_dir",
    "logging_steps": "trainer.log_every_n_steps", "eval_steps": "trainer.val_check_interval",
    "save_steps": "checkpoint_minutes", "bf16": "trainer.precision (bf16-true or bf16-mixed)",
    "fp16": "trainer.precision (16-mixed)", "seed": "seed_everything",
    "warmup_ratio": "model.lr_scheduler.warmup_fraction",
    "resume_from_checkpoint": "resume", "train_file": "data.train",
    "dataset": "data.train", "val_set_size": "data.validation_fraction",
    "template": "data.chat_template", "chat_template": "data.chat_template", "val_size": "data.validation_fraction",
    "lr_scheduler_type": "model.lr_scheduler.decay", "lr_scheduler": "model.lr_scheduler.decay",
    "warmup_steps": "model.lr_scheduler.warmup_fraction (of all steps)",
    "adapter": "model.method", "finetuning_type": "model.method", "peft_type": "model.method",
    "use_dora": "a method of its own (model.method)", "use_rslora": "model.method.scaling_rule (alpha/sqrt(r))",
    "quantization_bit": "model.quantization (nf4 or int8)", "lora_target_linear": "model.targets (all-linear)",
    "lora_modules_to_save": "model.also_train", "packing": "data.packing (of Chat, Completions and PlainText)",
    "sample_packing": "data.packing (of Chat, Completions and PlainText)", "optim": "model.optimizer",
    "adam_beta1": "model.optimizer.betas", "adam_beta2": "model.optimizer.betas",
    "deepspeed": "--config strategies/deepspeed", "fsdp": "--config strategies/fsdp2",
    "fsdp_config": "--config strategies/fsdp2", "save_strategy": "checkpoint_minutes",
    "eval_strategy": "trainer.val_check_interval", "evaluation_strategy": "trainer.val_check_interval",
    "evals_per_epoch": "trainer.val_check_interval", "report_to": "trainer.logger", "wandb_project": "trainer.logger",
    "early_stopping_patience": "trainer.callbacks (EarlyStopping, with patience)",
    "load_best_model_at_end": "trainer.callbacks (KeepBest)",
    "metric_for_best_model": "trainer.callbacks (KeepBest, with monitor)",
    "dataset_text_field": "data.text", "path": "data.train", "data_files": "data.train", "dataset_name": "data.train",
    "datasets": "data.train", "max_samples": "data.limit", "special_tokens": "data.new_tokens",
    "dataloader_num_workers": "data.num_workers", "group_by_length": "data.group_by_length",
    "eval_batch_size": "data.validation_batch_size",
}  # fmt: skip
"""Where a setting stands here that other tools call so."""
METHODS = {"qlora": "a method on a base of 4 bits: any model.method, with model.quantization nf4"}
"""What other tools call a method and is none here."""
VERBS = {
    "train": "fit", "sft": "fit", "finetune": "fit", "run": "fit", "resume": "fit --resume DIR", "eval": "validate",
    "evaluate": "validate", "infer": "generate", "inference": "generate",
    "merge": "export --format merged", "merge-lora": "export --format merged", "preprocess": "inspect-data",
    "check": "doctor", "lint": "doctor",
}  # fmt: skip
"""What other tools call a verb."""
DATA = {
    "alpaca": "Completions, with format alpaca", "dolly": "Completions, with format dolly", "sharegpt": "Chat",
    "messages": "Chat", "chat_template": "Chat", "json": "data.train that names a file, and data the kind of its rows",
    "csv": "data.train that names a file, and data the kind of its rows", "completion": "PlainText",
}  # fmt: skip
"""What other tools call a kind of data."""
VALUES = {
    "fp16": "16-mixed", "float16": "16-mixed", "bfloat16": "bf16-mixed", "4": "nf4", "4bit": "nf4", "int4": "nf4",
    "8": "int8", "8bit": "int8", "bnb": "nf4", "constant_with_warmup": "constant", "cosine_with_restarts": "cosine",
    "ReduceLROnPlateau": "plateau", "reduce_lr_on_plateau": "plateau", "CosineAnnealingLR": "cosine",
    "LinearLR": "linear", "ConstantLR": "constant",
}  # fmt: skip
"""The choice here that stands for a value elsewhere, where it is one of the choices."""
