"""What other tools call a setting, for those who come from them: TRL and transformers, axolotl,
LLaMA-Factory. Imports nothing.
"""

# Their name -> ours, with what there is to know about it.
FIELDS = {
    # the optimiser's step
    "max_steps": "`train.steps`",
    "num_train_epochs": "`train.epochs` (with train.steps=null)",
    "num_epochs": "`train.epochs` (with train.steps=null)",
    "per_device_train_batch_size": "`train.batch_size`, rows per optimiser step over all processes",
    "micro_batch_size": "`train.batch_size`, rows per optimiser step over all processes",
    "gradient_accumulation_steps": "`train.batch_size`, rows per optimiser step; "
    "`train.micro_batch_tokens` says how many are computed at once",
    "auto_find_batch_size": "`train.micro_batch_tokens`, which is found by itself",
    "lr": "`train.learning_rate`",
    "optim": "`train.optimizer`",
    "lr_scheduler_type": "`train.schedule`",
    "lr_scheduler": "`train.schedule`",
    "warmup_ratio": "`train.warmup_steps`",
    "adam_beta1": "`train.adam_betas`",
    "adam_beta2": "`train.adam_betas`",
    "gradient_clipping": "`train.max_grad_norm`",
    "bf16": "`train.dtype=bfloat16`",
    "fp16": "`train.dtype=bfloat16`; float16 is not offered",
    "torch_dtype": "`model.dtype`",
    "fsdp": "`train.shard=true`",
    "deepspeed": "`train.shard=true`",
    # the run
    "logging_steps": "not needed: every step is logged",
    "eval_steps": "`train.eval_every`",
    "eval_strategy": "`train.eval_every`",
    "save_steps": "`train.save_every`",
    "save_strategy": "`train.save_every`",
    "save_total_limit": "`train.keep`",
    "load_best_model_at_end": "`train.early_stopping`, or the checkpoint called best",
    "metric_for_best_model": "`train.metric`",
    "greater_is_better": "`train.metric_goal`",
    "report_to": "`trackers`, such as trackers=[wandb]",
    "push_to_hub": "`hub.push=OWNER/NAME`",
    "hub_model_id": "`hub.push`",
    "hub_private_repo": "`hub.private`",
    "resume_from_checkpoint": "the option `--resume auto`",
    # the model
    "model": "`model.name_or_path`",
    "model_name_or_path": "`model.name_or_path`",
    "base_model": "`model.name_or_path`",
    "attn_implementation": "`model.attention`",
    "load_in_4bit": "`model.quantize=4bit`",
    "load_in_8bit": "`model.quantize=8bit`",
    "use_peft": "`model.adapter.r=16`",
    "lora_r": "`model.adapter.r`",
    "lora_rank": "`model.adapter.r`",
    "lora_alpha": "`model.adapter.alpha`",
    "lora_dropout": "`model.adapter.dropout`",
    "lora_target": "`model.adapter.target_modules`",
    "lora_target_modules": "`model.adapter.target_modules`",
    "use_dora": "`model.adapter.peft.use_dora`",
    "use_rslora": "`model.adapter.peft.use_rslora`",
    "modules_to_save": "`model.adapter.peft.modules_to_save`",
    "ref_model": "`reference.kind`, a path",
    # rows and samples
    "dataset_name": "`data.train`",
    "dataset": "`data.train`",
    "datasets": "`data.train`, a list of sources",
    "train_dataset": "`data.train`",
    "eval_dataset": "`data.eval`",
    "val_set_size": "`data.eval`, see there: data.split=train[:90%] data.eval_split=train[90%:]",
    "val_size": "`data.eval`, see there: data.split=train[:90%] data.eval_split=train[90%:]",
    "test_size": "`data.eval`, see there: data.split=train[:90%] data.eval_split=train[90%:]",
    "train_test_split": "`data.eval`, see there: data.split=train[:90%] data.eval_split=train[90%:]",
    "dataset_config": "`data.subset`",
    "dataset_train_split": "`data.split`",
    "dataset_test_split": "`data.eval_split`",
    "max_samples": "`max_rows` of a source in data.train",
    "max_seq_length": "`data.max_length`",
    "max_seq_len": "`data.max_length`",
    "sequence_len": "`data.max_length`",
    "cutoff_len": "`data.max_length`",
    "max_completion_length": "`rollout.max_new_tokens`",
    "num_generations": "`rollout.completions`",
    "reward_funcs": "`rewards`, such as rewards.0.function=my_file.py:my_function",
    "reward_weights": "`weight` of each of `rewards`",
    "use_vllm": "`rollout.url`, or rollout.colocate=true",
    # the objective
    "loss_type": "`objective.name`; `alignkit recipes list` names the objectives",
    "num_iterations": "`objective.epochs`",
    "epsilon_high": "`objective.clip_high`",
    "epsilon": "`objective.clip_low` and `objective.clip_high`",
    "entropy_coef": "`objective.entropy_weight`",
    "scale_rewards": "`objective.scale_by_std`",
    "mask_truncated_completions": "`rollout.mask_truncated`",
    "use_weighting": "`objective.weighting=wpo`",
    "simpo_gamma": "`objective.gamma` of simpo",
}
# Their value of a field that has a list of values -> ours.
VALUES = {
    "adamw_torch": "`adamw`",
    "adamw_torch_fused": "`adamw`",
    "adamw_hf": "`adamw`",
    "adamw_bnb_8bit": "`adamw_8bit`",
    "paged_adamw_8bit": "`adamw_8bit`",
    "cosine_with_min_lr": "`cosine`, with train.learning_rate_floor",
    "constant_with_warmup": "`constant`, with train.warmup_steps",
    "warmup_stable_decay": "`wsd`",
    "flash_attention_2": "`flex_attention` or `sdpa`",
    "bf16": "`bfloat16`",
    "fp32": "`float32`",
}
# Their name of a loss -> our objective.
LOSSES = {
    "sigmoid": "`dpo`",
    "robust": "`robust_dpo`",
    "kto_pair": "`kto`",
    "apo_zero_unpaired": "`kto`, with objective.form=apo_zero_unpaired",
    "aot_unpaired": "`aot`, with objective.form=unpaired",
    "aot_pair": "`aot`",
    "bnpo": "`grpo`, with objective.aggregation=token_mean",
    "ppo": "`kl_ppo`",
    "dft": "`sft`, with objective.form=dft",
    "nll": "`sft`",
    "reward": "`reward_model`",
    "gkd": "`distill`",
    "wpo": "`dpo`, with objective.weighting=wpo",
}
# Their argument of a trainer -> ours of `alignkit.train`.
ARGUMENTS = {
    "train_dataset": "`data`",
    "dataset": "`data`",
    "eval_dataset": "`eval_data`",
    "reward": "`rewards`",
    "reward_funcs": "`rewards`",
    "processing_class": "`tokenizer`",
    "peft_config": "`model={'adapter': {...}}`, or a peft model as `model`",
    "ref_model": "`reference={'kind': PATH}`",
    "resume_from_checkpoint": "`resume`",
    "args": "the fields themselves, such as steps=300",
}


def argument_here(name: str) -> str:
    """As `called_here`, for an argument of `alignkit.train`."""
    known = ARGUMENTS.get(name)
    return f" In alignkit it is {known}." if known else called_here(name)


def called_here(name: object) -> str:
    """ " In alignkit it is `x`.", or nothing for a name that no other tool has."""
    known = FIELDS.get(name) if isinstance(name, str) else None
    return f" In alignkit it is {known}." if known else ""


def objective_here(name: str) -> str:
    """The same for a loss."""
    known = LOSSES.get(name)
    return f" In alignkit it is {known}." if known else ""


def said_here(value: object) -> str:
    """The same for the value of a field."""
    known = VALUES.get(value) if isinstance(value, str) else None
    return f" In alignkit it is {known}." if known else ""
