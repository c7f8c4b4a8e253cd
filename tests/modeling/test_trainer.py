"""Training with transformers' Trainer: label smoothing, a custom loss, memory, DDP and DataParallel."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro import loss as loss_module

VOCAB_SIZE = 1000
LENGTH = 32


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(vocab_size=VOCAB_SIZE, n_layer=2, n_head=2, n_embd=32, n_positions=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def batch():
    """Return four rows of tokens, and labels with some ignored positions."""
    input_ids = torch.randint(0, VOCAB_SIZE, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = input_ids.clone()
    labels[0, 20:] = -100
    labels[2, :5] = -100
    return {"input_ids": input_ids, "labels": labels}


@pytest.fixture
def make_trainer(tmp_path):
    def make(model, trainer_class=Trainer, batch=None, **arguments):
        arguments = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"} | arguments
        data = batch and [{name: row[i] for name, row in batch.items()} for i in range(4)]
        training_arguments = TrainingArguments(
            tmp_path / "trainer", per_device_train_batch_size=2, max_steps=2, **arguments
        )
        return trainer_class(model, training_arguments, train_dataset=data)

    return make


@pytest.mark.parametrize("kind", ["gpt2repro", "gpt2", "LoRA"])
def test_label_smoothing_shifts_the_labels(model, batch, make_trainer, kind):
    """Trainer shifts by class name. The expected loss is 0.9 of the target's and 0.1 of the vocabulary's mean."""
    with torch.no_grad():
        log_p = model.eval()(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    targets = batch["labels"][:, 1:]
    counts = targets != -100
    nll = -log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected = (0.9 * nll - 0.1 * log_p.mean(-1))[counts].mean()
    if kind == "LoRA":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    elif kind == "gpt2":
        model = model.to_gpt2()
    trainer = make_trainer(model, label_smoothing_factor=0.1)
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


class CustomLossTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits[..., :-1, :].float().flatten(0, 1), inputs["labels"][:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_custom_loss_needs_logits_in_training(model, batch, make_trainer, bf16):
    """With bf16, accelerate converts the outputs before Trainer computes the loss."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(TypeError, match="logits_in_training = True"):
        make_trainer(model, CustomLossTrainer, batch, bf16=bf16).train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    expected = model.eval()(**batch).loss.item()
    model.config.logits_in_training = True
    trainer = make_trainer(model, CustomLossTrainer, batch, bf16=bf16, logging_steps=1, learning_rate=1e-3)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=0.1)  # two of the four rows
    assert model.eval()(**batch).loss < expected - 0.05
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < expected - 0.05


class LargestTensor(TorchDispatchMode):
    """Record the size of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, tuple | list) else [result]
        self.numel = max([self.numel, *(tensor.numel() for tensor in tensors if torch.is_tensor(tensor))])
        return result


@pytest.mark.parametrize(
    ("arguments", "has_logits"),
    [
        ({}, False),
        ({"bf16": True}, False),
        ({"gradient_checkpointing": True}, False),
        ({"logits_in_training": True}, True),
    ],
    ids=str,
)
def test_training_step_never_holds_the_full_logits(model, batch, make_trainer, monkeypatch, arguments, has_logits):
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", {"cpu": 4})
    monkeypatch.setattr(loss_module, "GRADIENT_ROWS", {"cpu": 64})
    model.config.logits_in_training = arguments.pop("logits_in_training", False)
    trainer = make_trainer(model, batch=batch, **arguments)
    with LargestTensor() as largest:
        trainer.train()
    assert trainer.state.global_step == 2
    num_logits = 2 * LENGTH * VOCAB_SIZE
    assert (largest.numel >= num_logits) is has_logits
    assert largest.numel > num_logits / 10  # the operations of the step were recorded


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_ddp_keeps_the_logits_placeholder(model, batch, tmp_path, options):
    expected = model.train()(**batch).loss
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(model, **options)
        outputs = ddp(**batch)
        outputs.loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    with pytest.raises(AttributeError, match="logits_in_training = True"):
        _ = outputs.logits.shape


def test_data_parallel_replicas_return_only_the_loss(model, batch):
    replica = model.train()._replicate_for_data_parallel()
    assert set(replica(**batch)) == {"loss"}
