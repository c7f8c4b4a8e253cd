"""The micro-batch that fits into memory, and warnings if none does."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from plans import make_plan
from torch._dynamo.testing import CompileCounter

from modeling_gpt2repro import GPT2ReproForCausalLM
from training import TrainingError, batch
from training.batch import (
    RESERVED_SHARE,
    check_memory,
    choose_micro_batch_size,
    device_memory,
    out_of_memory_as_one_line,
    try_step,
)
from training.checkpoint import LoopState

GB = 1e9
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), distributed_type=DistributedType.NO)


@pytest.fixture
def plan():
    return make_plan(12, 768, 12, 1024, 4, 2, "bf16")


@pytest.fixture
def set_memory(monkeypatch):
    def set_memory(free, total):
        monkeypatch.setattr(batch, "device_memory", lambda hardware: (free * GB, total * GB))

    return set_memory


@pytest.mark.parametrize(
    ("free", "micro_batch_size", "words"),
    [
        (64, 4, []),
        (4, 4, ["4 sequences", "4.58 GB", "4.00 GB", "--batch.micro_batch_size 2 or auto"]),
        (4, 1000, ["8 sequences", "5.56 GB", "--batch.micro_batch_size 2 or auto"]),  # a step has 8
        (1, 4, ["1.00 GB", "smaller model", "--activation_checkpointing block"]),
        (1, "auto", ["1 sequence ", "smaller model"]),
        (4, "auto", []),
    ],
)
def test_too_little_memory_is_a_warning_with_both_numbers(plan, set_memory, free, micro_batch_size, words, capsys):
    plan.batch.micro_batch_size = micro_batch_size
    set_memory(free, 64)
    check_memory(plan, is_dry_run=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == bool(words)
    assert all(word in lines[0] for word in words), lines


def test_model_larger_than_the_machine_is_an_error_except_in_a_dry_run(plan, set_memory, capsys):
    set_memory(1, 1.4)  # 12 bytes per parameter are 1.49 GB
    check_memory(plan, is_dry_run=True)
    assert "warning" in capsys.readouterr().out
    with pytest.raises(TrainingError, match=r"1\.49 GB .*1\.40 GB"):
        check_memory(plan, is_dry_run=False)


@pytest.mark.parametrize(("free", "expected"), [(64, 8), (5, 2), (0.1, 1)])
def test_auto_on_a_cpu_is_the_estimates(plan, set_memory, free, expected):
    plan.batch.micro_batch_size = "auto"
    set_memory(free, 64)
    assert choose_micro_batch_size(plan, ACCELERATOR, model=object()) == (expected, 8 // expected)


def test_processes_share_a_cpus_memory(plan, monkeypatch):
    monkeypatch.setattr(batch.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=3000))
    monkeypatch.setattr(batch.psutil, "swap_memory", lambda: SimpleNamespace(total=1000))
    assert device_memory(plan.hardware._replace(local_world_size=4)) == (250, 1000)


class TestTrial:
    """On a GPU, "auto" tries steps, here with a simulated memory."""

    @pytest.fixture
    def choose(self, plan, monkeypatch, set_memory):
        """choose(fits, saved): the size for a memory in which up to `fits` sequences fit, and the sizes tried."""

        def choose(fits, saved=None, others=(), limit=64, message="CUDA out of memory. Tried to allocate 20.00 MiB"):
            tried = []

            def try_step(plan, accelerator, model, size, *, num_reserved):
                tried.append((size, num_reserved))
                if size > fits:
                    raise RuntimeError(message)

            monkeypatch.setattr(batch, "try_step", try_step)
            monkeypatch.setattr(batch, "gather_object", lambda sizes: [*sizes, *others])
            set_memory(limit, 64)
            gpu = dataclasses.replace(plan, hardware=plan.hardware._replace(device=torch.device("cuda"), name="X"))
            gpu.batch.micro_batch_size = "auto"
            size, _ = choose_micro_batch_size(gpu, ACCELERATOR, object(), saved=saved)
            return size, tried

        return choose

    def test_largest_size_that_fits(self, choose):
        slack = [int(64 * GB * RESERVED_SHARE / 2)] * 2
        assert choose(fits=5) == (4, [*zip((8, 4), slack, strict=True)])

    def test_sizes_far_above_the_estimate_are_not_tried(self, choose):
        size, tried = choose(fits=8, limit=6)
        assert size == tried[0][0] < 8

    def test_smallest_size_of_all_processes(self, choose):
        assert choose(fits=8, others=[2])[0] == 2

    def test_saved_size_is_used_again(self, choose, capsys):
        saved = LoopState(micro_batch_size=2, num_processes=1)
        assert choose(fits=8, saved=saved) == (2, [(2, 0)])
        assert not capsys.readouterr().out
        assert choose(fits=8, saved=LoopState(micro_batch_size=2, num_processes=2))[0] == 8

    def test_saved_size_that_no_longer_fits(self, choose, capsys):
        assert choose(fits=2, saved=LoopState(micro_batch_size=4, num_processes=1))[0] == 2
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume")]
        assert all(words in line for words in ("4 sequence(s)", "with 2", "not bit-exact"))

    def test_nothing_fits(self, choose):
        with pytest.raises(TrainingError, match=r"not even one sequence .* of X, .*activation_checkpointing block"):
            choose(fits=0)

    def test_other_errors_are_raised(self, choose):
        with pytest.raises(RuntimeError, match="device-side assert"):
            choose(fits=0, message="device-side assert")


def test_trial_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    plan = make_plan(1, 8, 1, 8, 2, 2, "no")
    accelerator = SimpleNamespace(**vars(ACCELERATOR), num_processes=1, autocast=contextlib.nullcontext)
    model = GPT2ReproForCausalLM(plan.shape).train()
    for has_positions in (False, True):
        plan = dataclasses.replace(plan, has_positions=has_positions)
        try_step(plan, accelerator, model, 2, num_reserved=10)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("has_positions", [False, True])
def test_training_step_uses_the_code_compiled_for_the_trial(monkeypatch, has_positions):
    """On an H100 the first step of 124M took 29 s when it compiled again, and 1.4 s when not."""
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    counter = CompileCounter()
    monkeypatch.setattr(batch, "compile_model", lambda model, _: torch.compile(model, backend=counter, dynamic=False))
    plan = dataclasses.replace(make_plan(1, 8, 1, 8, 2, 2, "no"), compiled=True, has_positions=has_positions)
    accelerator = SimpleNamespace(**vars(ACCELERATOR), num_processes=1, autocast=contextlib.nullcontext)
    model = GPT2ReproForCausalLM(plan.shape).train()
    try_step(plan, accelerator, model, 2, num_reserved=10)
    compiled_for_trial = counter.frame_count
    tokens = torch.zeros(2, plan.batch.seq_len + 1, dtype=torch.int64)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]]) if has_positions else None
    step_model = torch.compile(model, backend=counter, dynamic=False)
    step_model(input_ids=inputs, position_ids=positions, shift_labels=targets)
    assert counter.frame_count == compiled_for_trial > 0


@pytest.mark.parametrize(
    ("size", "free", "words"),
    [(8, 5, ["8 sequence(s)", "--batch.micro_batch_size 2 fits", "3.84 GB"]), (1, 5, ["--activation_checkpointing"])],
)
def test_out_of_memory_is_one_line_with_the_size_that_fits(plan, set_memory, size, free, words):
    set_memory(free, 64)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory (MPS ...")):
        with pytest.raises(TrainingError) as caught, out_of_memory_as_one_line(plan, size):
            raise error
        assert all(word in str(caught.value) for word in [*words, "out of memory on cpu"]), caught.value
    with pytest.raises(RuntimeError, match="something else"), out_of_memory_as_one_line(plan, size):
        raise RuntimeError("something else")
