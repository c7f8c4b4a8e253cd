"""Sharded training with compiled blocks, on two processes without GPUs: what accelerate does with FSDP2, by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
import torch, torch.distributed as dist
from types import SimpleNamespace
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM, modeling_gpt2repro
from training.config import OptimConfig
from training.optim import build_optimizer
from training.skipping import step_where_finite
from training.state import blank_copy, fsdp_precision, full_state, load_moments, whole_model

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
muon_lr = 0.02 if sys.argv[1] == "muon" else None
accelerator = SimpleNamespace(is_main_process=rank == 0, distributed_type=DistributedType.FSDP)

def build(parameters=None, sharded=None):  # sharded: "no" or "bf16", the mixed precision
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=2, n_embd=32, n_head=2, n_positions=32))
    blank = blank_copy(model)
    if parameters:
        model.load_state_dict(parameters, strict=False)
    if sharded:
        for block in model.transformer.h:
            block.compile()
        # As accelerate.utils.fsdp_utils.fsdp2_prepare_model does with tied embeddings:
        options = {"mesh": init_device_mesh("cpu", (world_size,)), "mp_policy": fsdp_precision(sharded)}
        for block in model.transformer.h:
            fully_shard(block, **options)
        ends = [model.transformer.ln_f, model.transformer.wte, model.lm_head]
        fully_shard(ends, **options, reshard_after_forward=False)
        fully_shard(model, **options)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, muon_lr=muon_lr), "cpu")
    return model, optimizer, blank

def step(model, optimizer, rows, sharded):
    num_items = len(batch) * 32
    head_calls.clear()
    for micro, x in enumerate(rows.split(2)):
        if sharded:
            model.set_requires_gradient_sync(micro == len(rows) // 2 - 1)
        loss = model(input_ids=x[:, :-1], shift_labels=x[:, 1:].contiguous(), num_items_in_batch=num_items).loss
        (loss * (world_size if sharded else 1)).backward()
    assert len(head_calls) == len(rows) // 2  # never all the logits
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    # As train.py does, and now and then the step is not taken.
    with CommDebugMode() as messages:
        step_where_finite(SimpleNamespace(optimizer=optimizer, step=optimizer.step), torch.tensor(number != 1))
    assert messages.get_total_counts() == (8 if sharded and muon_lr else 0)  # each matrix is gathered once
    optimizer.zero_grad()

head_calls, head_loss = [], modeling_gpt2repro.linear_cross_entropy

def counted(*arguments, **more):
    head_calls.append(1)
    return head_loss(*arguments, **more)

modeling_gpt2repro.linear_cross_entropy = counted
torch.manual_seed(1)
plain, plain_optimizer, _ = build()
initial = {name: p.detach().clone() for name, p in plain.named_parameters()}
model, optimizer, blank = build(sharded="no")
for number in range(5):
    if number == 3:  # saved, and brought back into new objects
        parameters, moments = full_state(model, optimizer, accelerator, copy=True)
        assert rank == 0 or set(parameters.values()) | set(moments.values()) == {None}
        shared = [parameters, moments]
        dist.broadcast_object_list(shared)
        model, optimizer, blank = build(shared[0], sharded="no")
        load_moments(shared[1], model, optimizer, accelerator)
    batch = torch.randint(0, 50257, (8, 33))
    step(plain, plain_optimizer, batch, sharded=False)
    step(model, optimizer, batch[rank * 4 : rank * 4 + 4], sharded=True)
parameters, moments = full_state(model, optimizer, accelerator, copy=True)
with whole_model(model, blank) as whole:
    assert type(whole) is GPT2ReproForCausalLM and whole.lm_head.weight is whole.transformer.wte.weight
    assert not whole.training
    whole_parameters = {name: p.clone() for name, p in whole.named_parameters()}
assert model.training and blank.device.type == "meta"
if rank == 0:
    for name, parameter in plain.named_parameters():
        if muon_lr is None:
            torch.testing.assert_close(parameters[name], parameter.detach(), atol=1e-5, rtol=0)
        else:  # it computes in bfloat16
            moved = (parameter - initial[name]).norm()
            assert (parameters[name] - parameter).norm() < 0.1 * moved, name
        assert torch.equal(whole_parameters[name], parameters[name])
        for key, value in plain_optimizer.state[parameter].items() if muon_lr is None else ():
            torch.testing.assert_close(moments[f"{key}.{name}"], value, atol=1e-6, rtol=1e-3)
    print("equal")

# In bfloat16 the loss and the gradients are summed up in float32 all the same.
half, _, _ = build(whole_parameters, sharded="bf16")
inputs, targets = batch[:, :-1], batch[:, 1:].contiguous()
with torch.autocast("cpu", torch.bfloat16):
    loss = half(input_ids=inputs, shift_labels=targets).loss
loss.backward()
expected = plain(input_ids=inputs, shift_labels=targets).loss
expected.backward()
assert loss.dtype == torch.float32
torch.testing.assert_close(loss, expected, atol=0, rtol=1e-3)
for name, parameter in half.named_parameters():
    assert parameter.grad.dtype == torch.float32, name
matrix = half.transformer.h[0].mlp.c_fc.weight.grad.full_tensor()
difference = matrix - plain.transformer.h[0].mlp.c_fc.weight.grad
assert difference.norm() < 0.02 * matrix.norm(), difference.norm() / matrix.norm()
if rank == 0:
    print("close")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_shards_of_fsdp2_train_as_the_whole_and_are_saved_whole(tmp_path, optimizer):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            tmp_path / "program.py",
            optimizer,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal", "close"]
