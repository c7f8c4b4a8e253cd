"""
A table of mistakes: each ends with exit code 2 and one line that names the value and the remedy, and writes nothing.

A row is (name, command line, words of the message). The command runs in this process and in a folder with the files of
FILES; "{tiny}" is the recipe of tests/conftest.py, "{root}" the checkout.
"""

import json
import os
import shlex
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import constants
from tiny_run import ROOT, clean_environment

import eval.__main__
import hub.__main__
import sample
import train
from common.cli import run_command
from common.errors import UserError
from data import prepare, verify
from data.tokenizer import GPT2
from eval import miniseries
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from training import estimate

COMMANDS = {
    "train": lambda argv: run_command(train.train, argv),
    "eval": eval.__main__.main,
    "miniseries": miniseries.main,
    "sample": sample.main,
    "hub": hub.__main__.main,
    "prepare": prepare.main,
    "verify": verify.main,
}

FILES = {
    "binary.yaml": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "control.yaml": b"max_steps: 5\x07\n",
    "latin1.yaml": "output_dir: fünf\n".encode("latin-1"),
    "large.yaml": b"#" * 1_000_001,
    "empty.yaml": b"",
    "comments.yaml": b"# max_steps: 5\n\n",
    "list.yaml": b"- max_steps\n- 5\n",
    "text.yaml": b"just a sentence\n",
    "number.yaml": b"5\n",
    "two.yaml": b"max_steps: 5\n---\nmax_steps: 6\n",
    "tabs.yaml": b"max_steps: 10\noptim:\n\tlr: 1e-3\n",
    "open.yaml": b"optim: {lr: 1e-3\n",
    "brackets.yaml": b"[" * 1200,
    "circle.yaml": b"eval:\n  prompts: &a [*a]\n",
    "twice.yaml": b"max_steps: 5\nseed: 1\nmax_steps: 6\n",
    "group_number.yaml": b"optim: 5\n",
    "group_list.yaml": b"model: [n_layer, 2]\n",
    "group_text.yaml": b"data: shards/sample\n",
    "setting_group.yaml": b"max_steps: {value: 5}\n",
    "key_list.yaml": b"? [max_steps]\n: 5\n",
    "nested.yaml": b"eval:\n  prompts: [[a]]\n",
    "list_group.yaml": b"eval:\n  prompts: {a: b}\n",
    "nested_numbers.yaml": b"optim:\n  betas: [[0.9, 0.95]]\n",
    "object.yaml": b"max_steps: !!python/object/apply:os.getpid []\n",
    "hf.yaml": b"optim:\n  learning_rate: 1e-3\n",
    "nanogpt.py": b"batch_size = 12\nblock_size = 64\n",
    "accelerate.yaml": b"compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\n",
    "json.json": b'{"max_steps": 0}',
    "items.jsonl": b'{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}\n{"ctx": "a"}\n',
    "shards/shakespeare/x": b"",
}

MISTAKES = [
    # Data that is not there; the default recipe makes its sample under its own name only.
    ("data_default_recipe", "train --data.path shards/mine", "no data in shards/mine", "data.prepare files"),
    ("data_of_a_corpus", "train --data.path shards/fineweb-edu", "`python -m data.prepare fineweb-edu --out"),
    ("data_near_name", "train --data.path shards/shakespear", "did you mean shards/shakespeare?"),
    ("data_quoted", "train --data.path 'my shards'", "--out 'my shards'"),
    ("data_is_a_text_file", "train --data.path text.yaml", "train.py --text text.yaml"),
    ("data_other_recipe", "train --config {tiny} --data.path nowhere", "no data in nowhere", "python -m data.prepare"),
    # Text.
    ("text_missing", "train --text book.txt", "text=book.txt: no such file", ".parquet", "OWNER/NAME"),
    ("text_or_data_set", "train --text texts/mine", "texts/mine is not a file or folder here", "HF_HUB_OFFLINE"),
    ("text_kind", "train --text text.yaml", "text.yaml", "'.yaml' are not supported", ".jsonl"),
    ("text_folder", "train --text shards", "shards: no .txt", "in this folder"),
    ("text_pattern", "train --text 'notes/*.txt'", "notes/*.txt: no file matches"),
    ("text_and_path", "train --data.path shards/sample --text text.yaml", "data.path and data.text", "leave one"),
    # Recipes that are none.
    ("recipe_missing", "train --config recipes/gpt2_124.yaml", "No such file", "did you mean", "gpt2_124m.yaml"),
    ("recipe_missing_unlike", "train --config zzz.yaml", "zzz.yaml", "the recipes are recipes/gpt2_124m.yaml"),
    ("recipe_without_folder", "train --config sample", "did you mean recipes/sample.yaml?"),
    ("recipe_folder", "train --config shards", "shards", "s a directory"),
    ("recipe_nothing", "train --config ''", "--config ''", "s a directory"),
    ("recipe_below_a_file", "train --config text.yaml/x.yaml", "Not a directory"),
    ("recipe_binary", "train --config binary.yaml", "binary.yaml", "not text in UTF-8"),
    ("recipe_latin1", "train --config latin1.yaml", "not text in UTF-8"),
    ("recipe_control", "train --config control.yaml", "not a recipe (not text)"),
    ("recipe_large", "train --config large.yaml", "larger than 1,000,000 bytes"),
    ("recipe_endless", "train --config /dev/zero", "larger than 1,000,000 bytes"),
    ("recipe_empty", "train --config empty.yaml", "empty.yaml", "it has no settings"),
    ("recipe_comments", "train --config comments.yaml", "it has no settings"),
    ("recipe_list", "train --config list.yaml", "not a recipe (its settings have no names)", "see recipes/sample.yaml"),
    ("recipe_text", "train --config text.yaml", "not a recipe"),
    ("recipe_number", "train --config number.yaml", "not a recipe"),
    ("recipe_python", "train --config nanogpt.py", "not a recipe"),
    ("recipe_two_documents", "train --config two.yaml", "two.yaml:2", "single document"),
    ("recipe_tabs", "train --config tabs.yaml", "tabs.yaml:3", "spaces, not tabs"),
    ("recipe_open", "train --config open.yaml", "open.yaml:", "not YAML"),
    ("recipe_brackets", "train --config brackets.yaml", "nested too deeply"),
    ("recipe_circle", "train --config circle.yaml", "nested too deeply"),
    ("recipe_twice", "train --config twice.yaml", "twice.yaml:3", "max_steps appears twice"),
    ("recipe_group_number", "train --config group_number.yaml", "optim is a group", "optim.lr", "got 5"),
    ("recipe_group_list", "train --config group_list.yaml", "model is a group", "['n_layer', '2']"),
    ("recipe_group_text", "train --config group_text.yaml", "data.path", "got shards/sample"),
    ("recipe_setting_group", "train --config setting_group.yaml", "max_steps must be", "{'value': '5'}"),
    ("recipe_key_list", "train --config key_list.yaml", "key_list.yaml:1", "unknown setting", "max_steps"),
    ("recipe_nested", "train --config nested.yaml", "eval.prompts must be a list", "[['a']]"),
    ("recipe_list_group", "train --config list_group.yaml", "eval.prompts must be a list", "{'a': 'b'}"),
    (
        "recipe_nested_numbers",
        "train --config nested_numbers.yaml",
        "optim.betas must be 2 values",
        "[['0.9', '0.95']]",
    ),
    ("recipe_object", "train --config object.yaml", "max_steps must be an integer", "got []"),
    ("recipe_hf", "train --config hf.yaml", "hf.yaml:2", "optim.learning_rate", "did you mean 'optim.lr'"),
    ("recipe_accelerate", "train --config accelerate.yaml", "compute_environment", "accelerate launch"),
    ("recipe_json", "train --config json.json", "json.json:1", "max_steps", "got 0"),
    # Values.
    ("large_number", f"train --max_steps {10**23 - 1} --dry_run", "max_steps", "[1, 1e9]", "got 9999"),
    ("long_number", f"train --seed {'9' * 5000}", "seed must be an integer", "999..."),
    ("long_exponent", "train --max_steps 1e999999999", "max_steps", "got 1e999999999"),
    ("many_positions", "train --model.n_positions 100000000000", "model.n_positions", "[1, 1e9]"),
    ("many_layers", "train --model.n_layer 1e6 --dry_run", "model.n_layer", "[1, 1000]"),
    ("wide", "train --model.n_embd 99999999 --dry_run", "model.n_embd", "[1, 1e6]"),
    ("zero", "train --log_every 0", "log_every must be an integer in [1, 1e9], got 0"),
    ("negative", "train --save_every -5", "save_every", "got -5"),
    ("fraction", "train --max_steps 1.5", "max_steps", "got 1.5"),
    ("inexact", "train --max_steps 1.23e1", "max_steps", "got 1.23e1"),
    ("thousands", "train --max_steps 19,073", "max_steps", "got 19,073"),
    ("word", "train --optim.lr fast", "optim.lr must be a number in (0, inf), got fast"),
    ("nan", "train --optim.lr nan", "optim.lr", "got nan"),
    ("infinite", "train --optim.lr 1e400", "optim.lr", "got 1e400"),
    ("nan_money", "train --dollars_per_hour nan", "dollars_per_hour", "got nan"),
    ("negative_money", "train --dollars_per_hour -1", "dollars_per_hour", "got -1"),
    ("beta", "train --optim.betas 0.9 1", "optim.betas", "in [0, 1)", "['0.9', '1']"),
    ("one_beta", "train --optim.betas 0.9", "optim.betas must be 2 values such as 0.9 0.95", "got 0.9"),
    ("three_betas", "train --optim.betas 0.9,0.95,0.99", "optim.betas", "got 0.9,0.95,0.99"),
    ("tracker", "train --trackers mlflow", "trackers", "tensorboard, wandb or trackio", "got mlflow"),
    ("precision", "train --mixed_precision fp8", "mixed_precision must be auto, no, bf16 or fp16, got fp8"),
    ("switch", "train --compile maybe", "compile must be true or false, got maybe"),
    ("one_item", "train --eval.hellaswag_limit 1", "eval.hellaswag_limit", "[2, 1e9]", "got 1"),
    ("no_folder", "train --output_dir ''", "output_dir", "not empty", "got ''"),
    ("no_folder_equals", "train --output_dir=", "output_dir", "not empty", "got ''"),
    ("folder_is_the_checkout", "train --output_dir {root}", "output_dir must be a folder of the run's own"),
    ("folder_is_above_it", "train --output_dir /", "output_dir must be a folder of the run's own", "got /"),
    ("folder_below_a_file", "train --config {tiny} --output_dir text.yaml/run", "cannot be written to"),
    ("folder_is_a_file", "train --config {tiny} --output_dir text.yaml", "is a file"),
    ("blank_folder", "train --output_dir '  '", "output_dir must be text (not empty) or null, got ' '"),
    ("no_data", "train --data.path ''", "data.path", "not empty", "got ''"),
    ("no_weights", "train --init_from ''", "init_from", "not empty", "got ''"),
    ("long_folder", f"train --output_dir {'x' * 5000}", "output_dir", "too long", "xxx..."),
    ("long_data", f"train --dry_run --data.path {'x/' * 5000}", "data.path", "too long"),
    ("prompt_not_utf8", "train --eval.prompts \udcff", "eval.prompts", "\\udcff"),
    ("scratch", "train --init_from scratch", "init_from", "leave it out"),
    ("resume_of_nanogpt", "train --init_from resume", "--resume auto"),
    ("resume_switch", "train --resume true", "resume must be auto or a checkpoint's path"),
    ("push_switch", "train --push_to_hub true", "push_to_hub must be USER/NAME"),
    ("larger_than_memory", "train --model.n_positions 1e9", "parameters", "GB", "choose a smaller model"),
    ("wider_than_memory", "train --model.n_embd 100000", "parameters", "GB", "model.n_embd"),
    # Forms.
    ("value_missing", "train --max_steps", "--max_steps needs a value, an integer", "optimizer steps"),
    ("value_missing_before", "train --max_steps --dry_run", "--max_steps needs a value"),
    ("push_bare", "train --push_to_hub", "--push_to_hub needs a value", "USER/NAME"),
    ("resume_bare", "train --resume --dry_run", "--resume needs a value", "`auto`"),
    ("config_bare", "train --config", "--config needs a value"),
    ("recipe_position", "train recipes/gpt2_124m.yaml", "--config recipes/gpt2_124m.yaml"),
    ("recipe_after_switch", "train --dry_run recipes/gpt2_124m.yaml", "--config recipes/gpt2_124m.yaml"),
    ("recipe_after_value", "train --max_steps 5 mine.yml", "--config mine.yml"),
    ("value_after_value", "train --max_steps 5 6", "unexpected argument 6 after --max_steps 5"),
    ("one_dash", "train -max_steps 5", "'-max_steps'", "--max_steps VALUE"),
    ("en_dash", "train –max_steps 5", "--max_steps VALUE"),
    ("no_dash", "train optim.lr=3e-4", "--optim.lr 3e-4"),
    ("blank", "train ' ' --max_steps 5", "blank", "backslash"),
    ("group", "train --optim adamw", "optim is a group of settings", "optim.lr"),
    ("group_value", "train --model.optim 5", "unknown setting 'model.optim'"),
    # Names.
    ("mistyped", "train --max_stepz 3", "max_stepz", "did you mean 'max_steps'"),
    ("mistyped_in_group", "train --optim.lrr=3", "did you mean 'optim.lr'"),
    ("mistyped_decay", "train --optim.weight_decat 0.1", "did you mean 'optim.weight_decay'"),
    ("without_group", "train --seq_len 64", "did you mean 'batch.seq_len'"),
    ("wrong_group", "train --model.seq_len 64", "did you mean 'batch.seq_len'"),
    ("dot", "train --eval.every 5", "did you mean 'eval_every'"),
    ("dashes", "train --max-steps 5", "did you mean 'max_steps'"),
    ("capitals", "train --Max_Steps 5", "did you mean 'max_steps'"),
    ("negated", "train --no-compile", "--compile false"),
    ("negated_in_group", "train --eval.no_ngram_baselines", "--eval.ngram_baselines false"),
    ("like_nothing", "train --frobnicate 5", "frobnicate", "train.py --help"),
    ("confg", "train --confg x.yaml", "did you mean '--config'"),
    ("hf_learning_rate", "train --optim.learning_rate 1e-3", "did you mean 'optim.lr'"),
    ("hf_learning_rat", "train --learning_rat 1e-3", "did you mean 'optim.lr'"),
    ("hf_batch", "train --per_device_train_batch_size 8", "batch.micro_batch_size", "tokens_per_step"),
    ("hf_epochs", "train --num_train_epochs 3", "max_steps = epochs x training tokens"),
    ("hf_clip", "train --max_grad_norm 1", "did you mean 'optim.grad_clip'"),
    ("hf_bf16", "train --bf16", "mixed_precision (auto, no, bf16 or fp16)"),
    ("hf_report", "train --report_to none", "trackers"),
    ("hf_resume", "train --resume_from_checkpoint x", "resume (`auto`"),
    ("hf_hub_id", "train --hub_model_id me/x", "push_to_hub USER/NAME"),
    ("hf_layers", "train --model.num_hidden_layers 2", "did you mean 'model.n_layer'"),
    ("nanogpt_batch", "train --batch_size=12", "batch.tokens_per_step = batch_size x batch.seq_len"),
    ("nanogpt_block", "train --block_size=64", "batch.seq_len", "model.n_positions"),
    ("nanogpt_device", "train --device=cpu", "accelerate launch", "accelerate_configs/cpu.yaml"),
    ("nanogpt_iters", "train --max_iters=2000", "did you mean 'max_steps'"),
    ("nanogpt_min_lr", "train --min_lr=6e-5", "optim.final_lr_fraction = min_lr / optim.lr"),
    ("nanogpt_beta", "train --beta2=0.99", "optim.betas BETA1 BETA2"),
    ("nanogpt_equals", "train batch_size=12", "batch.tokens_per_step = batch_size x batch.seq_len"),
    ("nanochat_depth", "train --depth=4", "model.n_layer", "model.n_embd"),
    ("nanochat_batch", "train --total-batch-size=512", "batch.tokens_per_step, in tokens"),
    ("nanochat_device_batch", "train --device-batch-size=1", "batch.micro_batch_size"),
    ("nanochat_iterations", "train --num-iterations=20", "did you mean 'max_steps'"),
    ("nanochat_matrix_lr", "train --matrix-lr=0.02", "did you mean 'optim.muon_lr'"),
    ("launcher", "train --num_processes 2", "accelerate launch", "before train.py"),
    ("launcher_config", "train --config_file x.yaml", "before train.py"),
    # Values that cannot be together.
    ("longer_than_model", "train --batch.seq_len 2048 --batch.tokens_per_step 4096", "2048", "n_positions=128"),
    ("no_whole_sequences", "train --batch.seq_len 100", "1024", "1000 or 1100"),
    (
        "few_validation_tokens",
        "train --config {tiny} --eval.val_tokens 31",
        "eval.val_tokens=31 is less than a sequence",
    ),
    (
        "long_prompt",
        "train --config {tiny} --eval.prompts \"['Hello there']\" --eval.sample_tokens 500",
        "'Hello there' and eval.sample_tokens=500",
    ),
    ("empty_prompt", "train --config {tiny} --eval.prompts \"['']\"", "'' has no tokens"),
    ("heads", "train --config {tiny} --model.n_embd 100 --model.n_head 12", "n_embd=100", "96 or 108"),
    ("odd_micro_batch", "train --config {tiny} --batch.micro_batch_size 3", "micro_batch_size=3"),
    ("keep_every_alone", "train --keep_every 5", "keep_every=5 needs keep_last"),
    # Tasks that cannot be loaded.
    ("items", "train --config {tiny} --eval.hellaswag items.jsonl", "items.jsonl:2"),
    ("task", "train --config {tiny} --eval.tasks lambda", "unknown task 'lambda'", "lambada"),
    (
        "task_offline",
        "train --config {tiny} --eval.tasks lambada",
        "EleutherAI/lambada_openai is not available",
        "eval.task_data lambada: FILE",
    ),
    ("task_without_data", "train --config {tiny} --eval.tasks core:mini", "eval.task_data core: FOLDER"),
    # Usage of the other commands.
    ("eval_usage", "eval --modl x", "--model", "python -m eval --help"),
    ("miniseries_usage", "miniseries", "CHECKPOINT", "python -m eval.miniseries --help"),
    ("eval_name", "eval --model 'a b'", "checkpoint 'a b': no such folder, nor a Hub id"),
    ("eval_file", "eval --model ok/config.json", "is a file; give the folder"),
    ("sample_usage", "sample ok hi --temperature hot", "--temperature", "'hot'", "sample.py --help"),
    ("hub_usage", "hub pull ok", "'pull'", "python -m hub --help"),
    ("hub_push_usage", "hub push ok", "USER/NAME", "python -m hub push --help"),
    ("prepare_usage", "prepare files text.yaml", "--out", "python -m data.prepare files --help"),
    ("prepare_number", "prepare files text.yaml --out out --max_tokens 1.5", "'1.5'", "1e6"),
    ("verify_usage", "verify", "DIR", "python -m data.verify --help"),
    ("verify_nowhere", "verify nowhere", "nowhere", "no such folder"),
    ("sample_negative", "sample ok hi --top_k -1", "top_k must be at least 0, got -1"),
    ("sample_top_p", "sample ok hi --top_p 0", "top_p must be above 0 and at most 1, got 0.0"),
    ("sample_no_texts", "sample ok hi --n 0", "n must be at least 1, got 0"),
    ("sample_interactive_prompt", "sample ok hi --interactive", "leave out the prompt"),
    ("sample_not_utf8", "sample ok \udcff\udcfe", "is not UTF-8 text"),
    ("sample_nowhere", "sample 'nowhere at all' hi", "no such folder, nor a Hub id"),
    ("sample_long_name", f"sample {'a' * 300} hi", "File name too long"),
    ("sample_long_prompt", "sample ok '" + "word " * 40 + "'", "41 tokens", "8"),
    ("demo_nowhere", "hub demo 'nowhere at all'", "no such folder, nor a Hub id"),
    ("demo_of_three", "hub demo ok ok ok", "the page has room for two"),
    ("demo_port_0", "hub demo ok --port 0", "--port must be between 1 and 65535, got 0"),
    ("demo_port_65536", "hub demo ok --port 65536", "--port must be between 1 and 65535, got 65536"),
    ("push_long_name", f"hub push {'a' * 300} me/model", "File name too long"),
    ("export_format", "hub export ok --to tflite --out out", "'tflite'", "gguf"),
    ("export_out_taken", "hub export ok --to gpt2 --out shards", "shards", "name another folder"),
    # Names on the Hub, and no Hub.
    ("push_name_alone", "hub push ok justname --dry_run", "'justname'", "USER/justname"),
    ("push_name_blank", "hub push ok 'me/ x' --dry_run", "me/ x", "USER/NAME"),
    ("push_to_name_alone", "train --push_to_hub justname --output_dir out", "USER/justname"),
    ("push_offline", "hub push ok me/x", "HF_HUB_OFFLINE is set"),
    ("push_offline_training", "train --push_to_hub me/x --output_dir out", "HF_HUB_OFFLINE is set"),
    ("init_from_offline", "train --init_from gpt2 --output_dir out", "'gpt2'", "local cache, and"),
    ("eval_offline", "eval --model openai-community/gpt2", "'openai-community/gpt2'", "local cache, and"),
    ("sample_offline", "sample gpt2 hi", "'gpt2'", "local cache, and"),
    # Resuming.
    (
        "resume_run_folder",
        "train --resume runs/r --output_dir out",
        *("runs/r", "is a run's folder, not a checkpoint; give one of", "step_000020", "3.5000, the best"),
    ),
    ("resume_nothing", "train --resume nowhere --output_dir out", "nowhere", "training_state"),
    ("resume_model", "train --resume ok --output_dir out", "ok", "training_state"),
    ("resume_best_unevaluated", "train --resume runs/new/checkpoints/best --output_dir out", "step_000007"),
    ("fresh_start_there", "train --output_dir runs/r", "runs/r", "step_000020", "--resume auto"),
    # A loss that is not finite.
    ("push_diverged", "hub push nan me/x --dry_run", "model.safetensors", "is not finite", "diverged"),
    ("export_diverged", "hub export nan --to gpt2 --out out", "not finite", "diverged"),
    (
        "init_from_diverged",
        "train --config {tiny} --batch.seq_len 8 --eval.hellaswag null --init_from nan --output_dir out",
        "not finite",
        "diverged",
    ),
]

# Where each command takes a checkpoint, and what may be wrong with one.
OPENS = {
    "eval": "eval --model {}",
    "miniseries": "miniseries {}",
    "sample": "sample {} hi",
    "push": "hub push {} me/x --dry_run",
    "export": "hub export {} --to gpt2 --out out",
    "demo": "hub demo {}",
    "init_from": "train --init_from {} --output_dir out",
}
BAD_CHECKPOINTS = {
    "missing": ["no such folder", "nowhere/x/y"],
    "torn": ["model.safetensors is damaged or incomplete", "not fully covered", "copy or download it again"],
    "stump": ["model.safetensors is damaged or incomplete", "header too small", "copy or download it again"],
    "pickle": ["pytorch_model.bin", "a pickle", "save_pretrained"],
    "adapter": ["a PEFT adapter of 'me/base'", "merge_and_unload"],
    "bare": ["no weights (*.safetensors)"],
    "run": [
        "runs/r",
        "is a run's folder",
        "step_000010 (validation loss 3.5000, the best)",
        "step_000020 (no validation loss)",
    ],
    "unevaluated": ["runs/new/checkpoints/best", "no checkpoint", "step_000007 (no validation loss)"],
}
WHERE = {"missing": "nowhere/x/y", "run": "runs/r", "unevaluated": "runs/new/checkpoints/best"}
MISTAKES += [
    (
        f"{command}_{kind}",
        line.format(WHERE.get(kind, kind)),
        *(words[1:] if (command, kind) == ("push", "missing") else words),
    )
    for command, line in OPENS.items()
    for kind, words in BAD_CHECKPOINTS.items()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=1, n_head=1, n_embd=4, n_positions=8))
    model.save_pretrained(folder / "ok")
    GPT2.hf().save_pretrained(folder / "ok")
    for name in ("torn", "stump", "pickle", "adapter", "bare", "nan"):
        shutil.copytree(folder / "ok", folder / name)
    weights = folder / "torn" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    (folder / "stump" / "model.safetensors").write_bytes(b"\0" * 3)
    (folder / "pickle" / "model.safetensors").rename(folder / "pickle" / "pytorch_model.bin")
    (folder / "bare" / "model.safetensors").unlink()
    (folder / "adapter" / "model.safetensors").rename(folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "config.json").unlink()
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base"}')
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    model.save_pretrained(folder / "nan")
    for step, val_loss in (("runs/r/checkpoints/step_000010", 3.5), ("runs/r/checkpoints/step_000020", None)):
        shutil.copytree(folder / "ok", folder / step)
        (folder / step / "training_state").mkdir()
        (folder / step / "training_state" / "state.json").write_text(json.dumps({"val_loss": val_loss}))
    shutil.copytree(folder / "runs/r/checkpoints/step_000020", folder / "runs/new/checkpoints/step_000007")
    return folder


@pytest.mark.parametrize(("command", "words"), [pytest.param(row[1], row[2:], id=row[0]) for row in MISTAKES])
def test_a_mistake_ends_with_one_line_and_exit_code_2(command, words, folder, tiny, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", clean_environment(folder))
    monkeypatch.setattr(estimate, "measure_matmul_flops", lambda *_: 1e12)  # takes 0.3 s
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(folder)
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run of this process had other settings
    before = {path for path in folder.rglob("*") if path.suffix != ".lock"}
    command = command.replace("{tiny}", shlex.quote(str(tiny))).replace("{root}", shlex.quote(str(ROOT)))
    name, *argv = shlex.split(command)
    code = COMMANDS[name](argv)
    message = capsys.readouterr().err
    assert code == UserError.exit_code == 2, message
    assert message.startswith("error: ") and message.count("\n") == 1 and len(message) < 700, message
    for word in words:
        assert word in message
    assert {path for path in folder.rglob("*") if path.suffix != ".lock"} - before <= {folder / "runs"}
