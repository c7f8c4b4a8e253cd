"""fp16 with loss scaling, for GPUs without bfloat16: the same step code on a CPU, which multiplies in float16, too."""

import json

import pytest
import torch
from tiny_run import losses, records

import train
from training import estimate

QUICK = ["--eval.hellaswag", "null", "--eval.prompts", "[]", "--eval_every", "12", "--max_steps", "12"]


@pytest.fixture
def train_in(small, tmp_path, monkeypatch):
    """train_in(name, *options, init_scale): train in float32, or with init_scale in fp16. Return its steps' metrics."""
    monkeypatch.setattr(estimate, "measure_matmul_flops", lambda *_: 1e11)  # a minute without fp16's instructions
    start_accelerator = train.start_accelerator

    def run(name, *options, init_scale=None):
        def start(*_, **__):
            accelerator = start_accelerator("no", "cpu")
            if init_scale is not None:  # what accelerate makes on a GPU, and refuses to make on a CPU
                accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
                accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=6)
            return accelerator

        monkeypatch.setattr(train, "start_accelerator", start)
        folder = tmp_path / name
        assert train.train(["--config", str(small), "--output_dir", str(folder), *QUICK, *options]) == 0
        return records(folder, "grad_norm")

    return run


def test_fp16_follows_float32_and_its_scale_grows(train_in, tmp_path, monkeypatch):
    train_in("float32")
    dtypes, forward = set(), torch.nn.Linear.forward

    def record_dtype(self, inputs):
        outputs = forward(self, inputs)
        dtypes.add(outputs.dtype)
        return outputs

    monkeypatch.setattr(torch.nn.Linear, "forward", record_dtype)
    steps = train_in("fp16", init_scale=2.0**10)
    assert dtypes == {torch.float16}
    assert losses(tmp_path / "fp16") == pytest.approx(losses(tmp_path / "float32"), abs=0.02)
    assert [step["loss_scale"] for step in steps[4:6]] == [2.0**10, 2.0**11]
    assert not any("skipped" in step for step in steps)


def test_overflow_lowers_the_scale_and_is_not_a_skipped_step(train_in, tmp_path, capsys):
    """The first scale is far too large. A resumed run takes the scale, and where it grows next, from its checkpoint."""
    steps = train_in("run", "--optim.max_skipped_steps", "2", "--save_every", "6", init_scale=2.0**40)
    overflowed = [step["step"] for step in steps if step["grad_norm"] is None]
    assert len(overflowed) > 2 and overflowed == list(range(1, len(overflowed) + 1))
    assert steps[len(overflowed) - 1]["loss_scale"] == 2.0 ** (40 - len(overflowed))
    assert not any("skipped" in step for step in steps)
    assert "fp16: a gradient overflowed" in capsys.readouterr().out
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000006"
    assert json.loads((checkpoint / "training_state" / "state.json").read_text())["num_skipped"] == 0
    # Overflowed steps left the weights and moments as they were.
    assert steps[0]["loss"] == pytest.approx(steps[1]["loss"], abs=0.2)
    resumed = train_in("resumed", "--resume", str(checkpoint), init_scale=2.0**40)
    for step, again in zip(steps[6:], resumed[-6:], strict=True):
        assert {**step, "ms": 0, "tokens_per_s": 0} == {**again, "ms": 0, "tokens_per_s": 0}
