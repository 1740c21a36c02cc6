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
    "template": "data.chat_template",
}  # fmt: skip
"""Where a setting stands here that other tools call so."""
METHODS = {"qlora": "a method on a base of 4 bits: any model.method, with model.quantization nf4"}
"""What other tools call a method and is none here."""
