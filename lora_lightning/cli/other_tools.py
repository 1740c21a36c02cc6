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
    "evals_per_epoch": "trainer.val_check_interval", "report_to": "trainer.logger (wandb, mlflow, comet)",
    "wandb_project": "trainer.logger (wandb, with project)",
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
TEMPLATES: dict[str, tuple[str, dict[str, object]]] = {
    "llama3": ("llama-3.1", {}), "llama3.1": ("llama-3.1", {}), "llama-3": ("llama-3.1", {}), "qwen": ("qwen-2.5", {}),
    "qwen25": ("qwen-2.5", {}), "qwen_25": ("qwen-2.5", {}), "qwen3": ("qwen-3", {}),
    "qwen3_nothink": ("qwen-3", {"enable_thinking": False}), "gemma": ("gemma-3", {}), "gemma2": ("gemma-3", {}),
    "gemma3": ("gemma-3", {}), "gemma_chat": ("gemma-3", {}), "mistral": ("mistral", {}),
    "mistral_v3_tekken": ("mistral", {}), "mistral_small": ("mistral", {}), "phi": ("phi-3", {}),
    "phi_3": ("phi-3", {}), "phi_35": ("phi-3", {}), "phi_4": ("phi-4", {}), "phi4": ("phi-4", {}),
    "gpt": ("harmony", {}), "gpt_oss": ("harmony", {}), "deepseek3": ("deepseek-v3", {}),
    "deepseek_v3": ("deepseek-v3", {}), "deepseekr1": ("deepseek-r1", {}), "zephyr": ("zephyr", {}),
    "chatml": ("chatml", {}),
}  # fmt: skip
"""The template of `data.chat_template` that stands for one of another tool, with its `chat_template_kwargs`."""
OPTIMIZERS = {
    "adamw": "AdamW", "adamw_hf": "AdamW", "adamw_torch": "AdamW", "adamw_torch_fused": "AdamW", "adam": "Adam",
    "adamw_apex_fused": "AdamW", "sgd": "SGD", "adafactor": "Adafactor", "rmsprop": "RMSprop", "adagrad": "Adagrad",
}  # fmt: skip
"""The optimizer of `model.optimizer` that stands for one of another tool."""
RESULTS = "every run folder keeps what it says: adapter, last.ckpt, metrics.csv, report.png"
UNNEEDED = {
    "overwrite_output_dir": "every run gets a folder of its own", "plot_loss": RESULTS, "save_strategy": RESULTS,
    "logging_dir": RESULTS, "save_safetensors": "adapters are always safetensors", "strict": "settings always are",
    "save_total_limit": "one last.ckpt is kept; ModelCheckpoint in trainer.callbacks keeps more",
    "saves_per_epoch": "last.ckpt is written every checkpoint_minutes, 5 of them by default",
    "save_steps": "last.ckpt is written every checkpoint_minutes, 5 of them by default",
    "save_only_model": "a run can always be resumed; its adapter folder holds the adapter alone",
    "overwrite_cache": "tokenised data are found again by what they are made of",
    "dataset_prepared_path": "tokenised data are found again by what they are made of",
    "preprocessing_num_workers": "data are tokenised in batches",
    "dataset_num_proc": "data are tokenised in batches",
    "dataset_processes": "data are tokenised in batches",
    "do_train": "the verb says it: fit", "do_eval": "the verb says it: validate", "do_predict": "the verb: predict",
    "predict_with_generate": "model.task_settings.generate_batches measures generated texts",
    "ddp_timeout": "timeout of the strategy, where it must be another one", "local_rank": "the launcher says it",
    "ddp_find_unused_parameters": "parameters without a part in the loss are refused, by name",
    "model_type": "the model's own config says it", "tokenizer_type": "the tokenizer's own config says it",
    "is_llama_derived_model": "the model's own config says it", "tf32": "torch.set_float32_matmul_precision decides",
    "is_mistral_derived_model": "the model's own config says it",
    "pad_to_sequence_len": "batches are as wide as their longest row",
    "eval_sample_packing": "validation measures examples one by one",
    "peft_version": "it is the version that wrote the file", "auto_mapping": "the layers are found in the model",
    "inference_mode": "the verb says it", "fan_in_fan_out": "the layer's kind says it",
    "task_type": "model.task says it", "megatron_config": "it is of Megatron alone",
    "megatron_core": "it is of Megatron alone", "qlora_sharded_model_loading": "the strategy decides",
    "include_num_input_tokens_seen": "tokens a second are always logged",
    "low_cpu_mem_usage": "weights are always read one by one", "remove_unused_columns": "columns are chosen by name",
}  # fmt: skip
"""Settings elsewhere that need no counterpart here, and why."""
ABSENT = {
    "pissa_init": "PiSSA cannot be trained here; a peft folder that was is read and merged",
    "pissa_iter": "PiSSA cannot be trained here", "pissa_convert": "PiSSA cannot be trained here",
    "init_lora_weights": "factors start as model.method says: B at zero",
    "peft_init_lora_weights": "factors start as model.method says: B at zero",
    "loftq_config": "LoftQ cannot be trained here", "corda_config": "CorDA cannot be trained here",
    "eva_config": "EVA cannot be trained here", "lora_bias": "model.method.bias, where the method has it",
    "layers_to_transform": "name the layers in model.targets, such as a regular expression",
    "layers_pattern": "name the layers in model.targets, such as a regular expression",
    "lora_layers_to_transform": "name the layers in model.targets, such as a regular expression",
    "peft_layers_to_transform": "name the layers in model.targets, such as a regular expression",
    "layer_replication": "layers are never repeated",
    "target_parameters": 'fused experts are the scope "experts" of model.targets',
    "trust_remote_code": "code of a model's repository is never run", "use_unsloth": "kernels of Unsloth are not used",
    "enable_liger_kernel": "model.loss_head auto computes losses in chunks, without Liger",
    "neftune_noise_alpha": "noise on embeddings is not offered; the callback NoiseInjection adds some to weights",
    "train_on_inputs": "the loss is on completions, and in Chat on assistant turns; PlainText learns whole texts",
    "train_on_prompt": "the loss is on completions, and in Chat on assistant turns; PlainText learns whole texts",
    "ref_model": "the reference is the base with the adapters off",
    "pref_ftx": "losses are not mixed; loss_type orpo has a likelihood term of its own",
    "rope_scaling": "set it in the model's own config", "shift_attn": "attention stays the model's own",
    "default_system": 'write it into the rows, as a column "system"',
    "push_to_hub": "export writes a folder that can be uploaded",
    "hub_model_id": "export writes a folder that can be uploaded",
    "use_galore": "GaLore is not offered", "use_apollo": "APOLLO is not offered", "use_badam": "BAdam is not offered",
    "use_llama_pro": "LLaMA Pro is not offered", "freeze_vision_tower": "model.targets names the towers that train",
    "interleave_probs": "weights of sources: data.train as a mapping, {a.jsonl: 2, b.jsonl: 1}",
    "mix_strategy": "weights of sources: data.train as a mapping, {a.jsonl: 2, b.jsonl: 1}",
    "special_tokens": "data.new_tokens adds tokens; the tokenizer keeps its own marks",
    "revision": "take a folder with that revision as model.pretrained",
    "loraplus_lr_embedding": "rows of tokens train at the rate of the run",
}  # fmt: skip
"""Settings elsewhere that nothing stands for here, with the nearest thing to do."""
