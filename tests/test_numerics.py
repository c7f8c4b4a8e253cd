"""The step is the same however it is split: the mean over the global batch's tokens."""

import json
import shutil

import numpy as np
import pytest
import torch
from plain_loop import initial_gpt2, train_by_hand
from safetensors.torch import load_file
from tiny_run import TWO_PROCESSES, records

from data.manifest import open_split
from modeling_gpt2repro import GPT2ReproForCausalLM

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
EVALUATIONS = ("--eval.hellaswag", "sample", "--eval.prompts", "[The]")  # of the compiled run
SEVERAL_RUNS = """
import json, sys, train

for arguments in json.loads(sys.argv[1]):
    assert train.train(arguments) == 0
"""


@pytest.fixture(scope="module")
def by_hand(small):
    """{name: tensor} after ten steps of transformers' GPT-2 in a plain PyTorch loop, the whole batch at once."""
    (shard,) = open_split(small.parent / "shards", "train")
    tokens = torch.from_numpy(np.array(shard[: 10 * 256 + 1]).astype(np.int64))
    windows = (tokens[step * 256 : step * 256 + 257] for step in range(10))
    gpt2 = initial_gpt2(vocab_size=512)
    train_by_hand(gpt2, [(window[:-1].view(8, 32), window[1:]) for window in windows])
    return dict(GPT2ReproForCausalLM.from_gpt2(gpt2).named_parameters())


def assert_same_parameters(run, expected):
    found = load_file(run / "checkpoints" / "step_000010" / "model.safetensors")
    assert found.keys() == expected.keys()  # no prefixes of torch.compile and DDP
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
            *(EVALUATIONS if compiled == "true" else ()),
        ]
        for name, (micro, compiled, checkpointing) in splits.items()
    ]
    launch(SEVERAL_RUNS, json.dumps(runs), script="-c")
    for name in splits:
        assert_same_parameters(tmp_path / name, by_hand)
    if len(splits) < len(SPLITS):
        pytest.skip("no C++ compiler: torch.compile was not tried")
    evaluations = records(tmp_path / "2x4 compiled", "val_loss")
    assert [evaluation["step"] for evaluation in evaluations] == [0, 10]
    for evaluation in evaluations:
        assert evaluation["hellaswag"]["n"] == 6 and evaluation["samples"][0].startswith("The")


@pytest.mark.parametrize("compiled", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_two_processes(launch, small, by_hand, tmp_path, compiled):
    """Each with two micro-batches. test_train.py has two processes with one micro-batch each."""
    split = ("--batch.micro_batch_size", 2, "--activation_checkpointing", "block", "--compile", compiled)
    launch("--config", small, "--output_dir", tmp_path / "run", *ARGUMENTS, *split, accelerate=TWO_PROCESSES)
    assert_same_parameters(tmp_path / "run", by_hand)
