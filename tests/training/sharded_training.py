"""
A program for test_sharding.py, on two processes: train a model sharded by FSDP2 next to one that is not, and compare.

It wraps the model as accelerate.utils.fsdp_utils.fsdp2_prepare_model does, since accelerate turns FSDP into DDP on a
CPU.
"""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM, modeling_gpt2repro
from training.config import OptimConfig
from training.optim import build_optimizer, step_if_finite
from training.sharding import fsdp_precision_policy, full_state_dict, load_moments, unsharded_model

NUM_MATRICES = 8  # in the blocks
head_calls, head_loss = [], modeling_gpt2repro.linear_cross_entropy


def count_head_calls(*args, **kwargs):
    head_calls.append(1)
    return head_loss(*args, **kwargs)


def build_model(parameters=None):
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=2, n_embd=32, n_head=2, n_positions=32, vocab_size=512))
    if parameters:
        model.load_state_dict(parameters, strict=False)
    return model


def shard(model, mixed_precision):
    for block in model.transformer.h:
        block.compile()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options = {"mesh": mesh, "mp_policy": fsdp_precision_policy(mixed_precision)}
    for block in model.transformer.h:
        fully_shard(block, **options)
    ends = [model.transformer.ln_f, model.transformer.wte, model.lm_head]  # together, since the embedding is tied
    fully_shard(ends, **options, reshard_after_forward=False)
    fully_shard(model, **options)
    return model


def train_step(model, optimizer, rows, num_items, *, is_sharded, is_finite):
    """Take a step of two micro-batches or more. Return the number of messages between processes in the optimizer."""
    head_calls.clear()
    micro_batches = rows.split(2)
    for micro, x in enumerate(micro_batches):
        if is_sharded:
            model.set_requires_gradient_sync(micro == len(micro_batches) - 1)
        loss = model(input_ids=x[:, :-1], shift_labels=x[:, 1:].contiguous(), num_items_in_batch=num_items).loss
        (loss * (dist.get_world_size() if is_sharded else 1)).backward()
    assert len(head_calls) == len(micro_batches)  # the loss without logits
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with CommDebugMode() as messages:
        step_if_finite(SimpleNamespace(optimizer=optimizer, step=optimizer.step), torch.tensor(is_finite))
    optimizer.zero_grad()
    return messages.get_total_counts()


def check_training(name, optim):
    """Train five steps, of which one is skipped, and save and load before the fourth. Return the full model."""
    rank = dist.get_rank()
    accelerator = SimpleNamespace(is_main_process=rank == 0, distributed_type=DistributedType.FSDP)
    torch.manual_seed(1)
    plain = build_model()
    plain_optimizer = build_optimizer(plain, optim)
    initial = {name: p.detach().clone() for name, p in plain.named_parameters()}
    model = shard(build_model(), "no")
    optimizer = build_optimizer(model, optim)
    generator = torch.Generator().manual_seed(1)
    for number in range(5):
        if number == 3:
            parameters, moments = full_state_dict(model, optimizer, accelerator, copy=True)
            assert rank == 0 or not parameters | moments
            shared = [parameters, moments]
            dist.broadcast_object_list(shared)
            model = shard(build_model(shared[0]), "no")
            optimizer = build_optimizer(model, optim)
            load_moments(shared[1], model, optimizer)
        batch = torch.randint(0, 512, (8, 33), generator=generator)
        step = {"num_items": len(batch) * 32, "is_finite": number != 1}
        train_step(plain, plain_optimizer, batch, is_sharded=False, **step)
        num_messages = train_step(model, optimizer, batch[rank * 4 : rank * 4 + 4], is_sharded=True, **step)
        assert num_messages == (NUM_MATRICES if optim.muon_lr else 0)  # each matrix is gathered once
    parameters, moments = full_state_dict(model, optimizer, accelerator, copy=True)
    with unsharded_model(SimpleNamespace(bare=model, compiled=model)) as (full_model, loss_model):
        assert loss_model is full_model
        assert type(full_model) is GPT2ReproForCausalLM
        assert full_model.lm_head.weight is full_model.transformer.wte.weight
        assert not full_model.training
        gathered = {name: p.clone() for name, p in full_model.named_parameters()}
    assert model.training and full_model.device.type == "meta"  # the gathered parameters are freed
    if rank == 0:
        for key, parameter in plain.named_parameters():
            if optim.muon_lr is None:
                torch.testing.assert_close(parameters[key], parameter.detach(), atol=1e-5, rtol=0)
                for moment, value in plain_optimizer.state[parameter].items():
                    torch.testing.assert_close(moments[f"{moment}.{key}"], value, atol=1e-6, rtol=1e-3)
            else:  # computes in bfloat16
                difference, change = parameters[key] - parameter, parameter - initial[key]
                assert difference.norm() < 0.1 * change.norm(), key
            assert torch.equal(gathered[key], parameters[key])
        print(f"{name}: equal", flush=True)
    return plain, gathered, batch


def check_bfloat16(plain, parameters, batch):
    """Check that sharding in bfloat16 still sums the loss and the gradients in float32."""
    half = shard(build_model(parameters), "bf16")
    inputs, targets = batch[:, :-1], batch[:, 1:].contiguous()
    loss = half(input_ids=inputs, shift_labels=targets).loss  # without autocast, as accelerate under FSDP2
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
    if dist.get_rank() == 0:
        print("bfloat16: close", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    modeling_gpt2repro.linear_cross_entropy = count_head_calls
    # eps: gradients that are nearly 0 would turn the order of a sum into a visible difference.
    trained = check_training("AdamW", OptimConfig(lr=1e-3, eps=1e-6))
    check_training("Muon", OptimConfig(lr=1e-3, muon_lr=0.02))
    check_bfloat16(*trained)
    dist.barrier()
    dist.destroy_process_group()
