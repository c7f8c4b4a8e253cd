"""Other names of the settings: those of an earlier release, and those of nanoGPT, nanochat, llm.c and Hugging Face."""

# {old name: new name}. An old name works in this release and prints the new one.
RENAMED = {"dollars_an_hour": "dollars_per_hour"}
# {short name: name}
SHORT = {"text": "data.text"}

# {hint in the error about an unknown setting: names elsewhere}. They are not aliases, since units and meanings differ.
_NAMES_BY_HINT = {
    # Model
    "model.n_layer": "n_layers num_layers num_hidden_layers layers",
    "model.n_layer, with model.n_embd and model.n_head for the width": "depth aspect_ratio",
    "model.n_head": "n_heads num_heads num_attention_heads heads",
    "model.n_head = model.n_embd / head_dim": "head_dim",
    "model.n_embd": "hidden_size d_model n_embed embed_dim embedding_dim model_dim hidden_dim dim width",
    "batch.seq_len for the sequences in training, model.n_positions for the longest sequence of the model": (
        "block_size max_seq_len max_seq_length sequence_length seq_length sequence_len max_length context_length"
        " context_size context_window n_ctx max_position_embeddings"
    ),
    "model.dropout": "resid_pdrop embd_pdrop attn_pdrop dropout_rate dropout_prob hidden_dropout attention_dropout",
    "the tokenizer is that of the shards (`python -m data.prepare ... --tokenizer NAME`)": (
        "vocab_size n_vocab tokenizer tokenizer_name tokenizer_path"
    ),
    "GPT-2 has biases in all linear layers and LayerNorms": "bias",
    "--config recipes/gpt2_124m.yaml (or 350m, 774m, 1558m)": "model_type model_size model_name config_name",
    # Data
    "text, a file, folder or Hub id; or data.path, a folder of shards that `python -m data.prepare` writes": (
        "dataset dataset_name dataset_path data_dir data_path data_root input_file input_bin input_val_bin train_file"
        " train_files train_data validation_file val_data"
    ),
    "one thread reads ahead, without a setting": "num_workers dataloader_num_workers",
    # Batch
    "batch.tokens_per_step, in tokens": "total_batch_size global_batch_tokens batch_tokens",
    "batch.tokens_per_step = sequences x batch.seq_len": "global_batch_size train_batch_size effective_batch_size",
    "batch.tokens_per_step = batch_size x batch.seq_len (x accumulation x processes), and batch.micro_batch_size for "
    "the sequences in one forward pass": "batch_size",
    "batch.micro_batch_size; a step has batch.tokens_per_step = micro_batch_size x batch.seq_len x accumulation x "
    "processes": "device_batch_size per_device_train_batch_size per_device_batch_size local_batch_size micro_batch "
    "train_micro_batch_size_per_gpu",
    "batch.tokens_per_step = micro_batch_size x batch.seq_len x accumulation x processes": (
        "gradient_accumulation_steps grad_accum_steps grad_accum accumulation_steps gradient_accumulation"
    ),
    "batch.micro_batch_size, which evaluation uses too": "per_device_eval_batch_size eval_batch_size",
    "batch.micro_batch_size auto": "auto_find_batch_size",
    "activation_checkpointing block": "gradient_checkpointing activation_checkpoint checkpoint_activations",
    # Optimizer
    "optim.lr": "learning_rate max_lr peak_lr base_lr lr_max adam_lr",
    "optim.muon_lr": "matrix_lr",
    "optim.lr for AdamW, optim.muon_lr for Muon": "embedding_lr unembedding_lr scalar_lr head_lr",
    "optim.final_lr_fraction = min_lr / optim.lr": "min_lr lr_min end_lr final_lr",
    "optim.final_lr_fraction": "final_lr_frac min_lr_ratio min_lr_frac min_lr_rate learning_rate_decay_frac",
    "optim.warmup_steps": "warmup_iters num_warmup_steps warmup_iterations lr_warmup_steps",
    "optim.warmup_steps = warmup_ratio x max_steps": "warmup_ratio warmup_fraction",
    "optim.cooldown_fraction": "warmdown_ratio cooldown_frac cooldown_ratio",
    "optim.cooldown_fraction = cooldown steps / max_steps": "warmdown_iters cooldown_steps decay_steps num_decay_steps",
    "a cosine to optim.final_lr_fraction that ends at max_steps, or a linear decay over optim.cooldown_fraction": (
        "lr_decay_iters decay_lr lr_scheduler_type lr_scheduler lr_schedule scheduler schedule"
    ),
    "optim.betas BETA1 BETA2": "beta1 beta2 beta_1 beta_2 adam_beta1 adam_beta2 adam_betas",
    "optim.eps": "adam_epsilon adam_eps epsilon",
    "optim.grad_clip": "max_grad_norm clip_grad_norm clip_grad gradient_clipping gradient_clip_val max_norm",
    "optim.weight_decay": "wd adam_weight_decay",
    "AdamW, or Muon for the blocks' matrices with optim.muon_lr": "optimizer optimizer_type optimizer_name",
    # Length of the run
    "max_steps": (
        "max_iters num_iterations num_steps n_steps steps iterations num_iters total_steps train_steps training_steps"
        " num_training_steps max_train_steps"
    ),
    "max_steps = epochs x training tokens / batch.tokens_per_step": (
        "epochs num_train_epochs num_epochs max_epochs n_epochs train_epochs"
    ),
    "max_steps = tokens / batch.tokens_per_step": "max_tokens total_tokens num_tokens train_tokens training_tokens",
    "max_hours": "max_time time_limit walltime",
    # Evaluation, checkpoints, logs
    "eval_every": (
        "eval_interval eval_steps eval_freq eval_strategy val_every val_interval val_loss_every sample_every"
        " hellaswag_every core_metric_every"
    ),
    "eval.val_tokens = batches x batch size x sequence length": "eval_iters val_steps eval_batches val_max_steps",
    "eval.val_tokens": "eval_tokens",
    "`python -m eval --model CHECKPOINT`": "eval_only do_eval",
    "eval.prompts": "prompt sample_prompts",
    "log_every": "log_interval logging_steps log_freq logging_interval",
    "save_every": (
        "save_steps save_interval save_freq save_strategy checkpoint_interval checkpoint_every checkpoint_steps"
        " always_save_checkpoint"
    ),
    "keep_last": "save_total_limit",
    "keep_best": "load_best_model_at_end",
    "output_dir": "out_dir outdir output out output_path save_dir run_dir checkpoint_dir log_dir logging_dir model_tag",
    "another output_dir, or `--resume auto` to continue the run in output_dir": "overwrite_output_dir",
    "trackers, such as `--trackers wandb tensorboard`": (
        "report_to log_with wandb_log use_wandb wandb tensorboard logger"
    ),
    "output_dir, whose last part is the run's name": "run run_name wandb_run_name wandb_project project exp_name",
    "resume (`auto`, or a checkpoint's path)": (
        "resume_from_checkpoint resume_from resume_from_step load_checkpoint ckpt ckpt_path continue"
    ),
    "init_from": "model_name_or_path pretrained_model_name_or_path pretrained from_pretrained checkpoint",
    # The Hub
    "push_to_hub USER/NAME": "hub_model_id hub_repo hub_id repo_id",
    "push_public; without it, a pushed model is private": "hub_private_repo private",
    "push_to_hub USER/NAME pushes the last checkpoint, `python -m hub push` any other (push_every_save was removed)": (
        "push_every_save hub_strategy hub_always_push"
    ),
    "HF_TOKEN in the environment, or `hf auth login`": "hub_token hf_token",
    # Hardware
    "the launcher chooses: `accelerate launch --config_file accelerate_configs/cpu.yaml train.py`, or --gpu_ids 0": (
        "device device_type use_cpu no_cuda cuda gpu gpus"
    ),
    "an option of `accelerate launch`, which goes before train.py": (
        "config_file multi_gpu num_processes num_machines gpu_ids machine_rank main_process_ip main_process_port"
        " num_cpu_threads_per_process use_fsdp use_deepspeed dynamo_backend quiet compute_environment distributed_type"
        " fsdp_config deepspeed_config nproc_per_node"
    ),
    "`accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml train.py` (or accelerate_configs/fsdp2.yaml)": (
        "ddp fsdp deepspeed backend ddp_backend distributed world_size"
    ),
    "mixed_precision (auto, no, bf16 or fp16)": "dtype precision torch_dtype bf16 fp16 fp32 float16 bfloat16 amp",
    "compile": "torch_compile use_compile",
    "attention is always PyTorch's scaled_dot_product_attention": "flash use_flash flash_attention attn_implementation",
    "seed": "data_seed random_seed",
}
HINTS = {name: hint for hint, names in _NAMES_BY_HINT.items() for name in names.split()}
