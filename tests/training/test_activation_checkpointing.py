"""Activation checkpointing changes memory and time, and nothing else."""

import pytest
import torch

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from training.sharding import checkpoint_activations


@pytest.fixture
def loss_and_gradients():
    """loss_and_gradients(compile_model, dtype): of a model with dropout, without and with checkpointing."""

    def loss_and_gradients(dtype, compile_model=lambda model: model, dropout=0.1):
        names = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
        torch.manual_seed(0)
        config = GPT2ReproConfig(n_layer=2, n_head=2, n_embd=32, n_positions=32, **dict.fromkeys(names, dropout))
        model = GPT2ReproForCausalLM(config).train()
        tokens = torch.randint(0, 1000, (2, 32))
        results = []
        for _ in range(2):
            torch.manual_seed(1)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = compile_model(model)(input_ids=tokens, shift_labels=tokens, return_logits=False).loss
            loss.backward()
            results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
            model.zero_grad()
            checkpoint_activations(model)
        return results

    return loss_and_gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_exact(loss_and_gradients, dtype):
    plain, checkpointed = loss_and_gradients(dtype)
    assert all(map(torch.equal, plain, checkpointed))


@pytest.mark.slow
def test_compiled_loss_and_gradients(loss_and_gradients):
    """In float32. In bfloat16, Inductor rounds at other places when it fuses other operators."""

    def compile_model(model):
        torch._dynamo.reset()
        return torch.compile(model, dynamic=False, fullgraph=True)

    plain, checkpointed = loss_and_gradients(torch.float32, compile_model, dropout=0.0)
    assert all(map(torch.equal, plain, checkpointed))


def test_blocks_keep_only_their_inputs():
    config = GPT2ReproConfig(n_layer=4, n_head=2, n_embd=32, n_positions=32)
    model, kept = GPT2ReproForCausalLM(config).train(), []
    tokens = torch.zeros(2, 32, dtype=torch.int64)

    def count(tensor):
        kept[-1] += tensor.nbytes
        return tensor

    for _ in range(2):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model.transformer(input_ids=tokens)
        checkpoint_activations(model)
    assert kept[1] < kept[0] / 5
