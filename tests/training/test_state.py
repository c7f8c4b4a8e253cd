"""Sharded training with compiled blocks, on two processes without GPUs: what accelerate does with FSDP2, by hand."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import torch, torch.distributed as dist
from types import SimpleNamespace
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from training.optim import build_optimizer
from training.state import blank_copy, full_state, load_moments, whole_model

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
accelerator = SimpleNamespace(is_main_process=rank == 0, distributed_type=DistributedType.FSDP)

def build(parameters=None, sharded=False):
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=2, n_embd=32, n_head=2, n_positions=32))
    blank = blank_copy(model)
    if parameters:
        model.load_state_dict(parameters, strict=False)
    if sharded:
        for block in model.transformer.h:
            block.compile()
        # As accelerate.utils.fsdp_utils.fsdp2_prepare_model does with tied embeddings:
        mesh = init_device_mesh("cpu", (world_size,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        ends = [model.transformer.ln_f, model.transformer.wte, model.lm_head]
        fully_shard(ends, mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(model, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, device_type="cpu")
    return model, optimizer, blank

def step(model, optimizer, rows, sharded):
    num_items = len(batch) * 32
    for micro, x in enumerate(rows.split(2)):
        if sharded:
            model.set_requires_gradient_sync(micro == len(rows) // 2 - 1)
        loss = model(input_ids=x[:, :-1], shift_labels=x[:, 1:].contiguous(), num_items_in_batch=num_items).loss
        (loss * (world_size if sharded else 1)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

torch.manual_seed(1)
plain, plain_optimizer, _ = build()
model, optimizer, blank = build(sharded=True)
for number in range(4):
    if number == 2:  # saved, and brought back into new objects
        parameters, moments = full_state(model, optimizer, accelerator, copy=True)
        assert rank == 0 or set(parameters.values()) | set(moments.values()) == {None}
        shared = [parameters, moments]
        dist.broadcast_object_list(shared)
        model, optimizer, blank = build(shared[0], sharded=True)
        load_moments(shared[1], model, optimizer, accelerator)
    batch = torch.randint(0, 50257, (8, 33))
    step(plain, plain_optimizer, batch, sharded=False)
    step(model, optimizer, batch[rank * 4 : rank * 4 + 4], sharded=True)
parameters, moments = full_state(model, optimizer, accelerator, copy=True)
whole = whole_model(model, blank)
assert type(whole) is GPT2ReproForCausalLM and whole.lm_head.weight is whole.transformer.wte.weight
if rank == 0:
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameters[name], parameter.detach(), atol=1e-5, rtol=0)
        assert torch.equal(whole.get_parameter(name), parameters[name])
        for key, value in plain_optimizer.state[parameter].items():
            torch.testing.assert_close(moments[f"{key}.{name}"], value, atol=1e-6, rtol=1e-3)
    print("equal")
dist.barrier()
dist.destroy_process_group()
"""


def test_shards_of_fsdp2_train_as_the_whole_and_are_saved_whole(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "program.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "equal" in done.stdout
