"""The step is the same however it is split: the mean over the global batch's tokens."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import TWO_PROCESSES

from data.manifest import open_split
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

# 8 sequences a step; the learning rate peaks in the middle.
ARGUMENTS = (
    *("--max_steps", "10", "--eval_every", "100", "--save_every", "10", "--eval.hellaswag", "null"),
    *("--eval.prompts", "[]", "--eval.ngram_baselines", "false", "--trackers", "[]", "--data.order", "sequential"),
)
# micro-batch size, compile, activation checkpointing
SPLITS = {
    "1x8": ("8", "false", "none"),
    "2x4": ("4", "false", "none"),
    "4x2 checkpointed": ("2", "false", "block"),
    "2x4 compiled": ("4", "true", "none"),
}
SEVERAL_RUNS = """
import json, sys, train

for arguments in json.loads(sys.argv[1]):
    assert train.train(arguments) == 0
"""


@pytest.fixture(scope="module")
def by_hand(small):
    """{name: tensor} after ten steps of transformers' GPT-2 in a plain PyTorch loop, the whole batch at once."""
    torch.manual_seed(1337)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": 512}
    gpt2 = GPT2ReproForCausalLM(GPT2ReproConfig(**shape)).to_gpt2().train()
    (shard,) = open_split(small.parent / "shards", "train")
    tokens = torch.from_numpy(np.array(shard[: 10 * 256 + 1]).astype(np.int64))
    groups = [[p for p in gpt2.parameters() if p.dim() >= 2], [p for p in gpt2.parameters() if p.dim() < 2]]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    for step in range(10):
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 6))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * ((step + 1) / 4 if step < 4 else cosine)
        window = tokens[step * 256 : step * 256 + 257]
        logits = gpt2(window[:-1].view(8, 32)).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[1:]).backward()
        torch.nn.utils.clip_grad_norm_(gpt2.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return dict(GPT2ReproForCausalLM.from_gpt2(gpt2).named_parameters())


def assert_same_parameters(run, expected):
    found = load_file(run / "checkpoints" / "step_000010" / "model.safetensors")
    for name, parameter in expected.items():
        difference = (found[name] - parameter.detach()).abs().max().item()
        assert difference < 1e-5, f"{name}: {difference}"


def test_one_process(launch, small, by_hand, tmp_path):
    splits = dict(SPLITS)
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        del splits["2x4 compiled"]
    runs = [
        [
            *("--config", str(small), "--output_dir", str(tmp_path / name), *ARGUMENTS),
            *("--batch.micro_batch_size", micro, "--compile", compiled, "--activation_checkpointing", checkpointing),
        ]
        for name, (micro, compiled, checkpointing) in splits.items()
    ]
    launch(SEVERAL_RUNS, json.dumps(runs), script="-c")
    for name in splits:
        assert_same_parameters(tmp_path / name, by_hand)


@pytest.mark.parametrize(
    ("micro", "more"),
    [
        (4, ()),
        (2, ("--activation_checkpointing", "block")),
        pytest.param(2, ("--activation_checkpointing", "block", "--compile", "true"), marks=pytest.mark.slow),
    ],
)
def test_two_processes(launch, small, by_hand, tmp_path, micro, more):
    launch(
        *("--config", small, "--output_dir", tmp_path / "run", *ARGUMENTS, "--batch.micro_batch_size", micro, *more),
        accelerate=TWO_PROCESSES,
    )
    assert_same_parameters(tmp_path / "run", by_hand)
