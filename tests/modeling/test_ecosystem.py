"""Features of a transformers model: saving and loading, resizing, heads, Trainer, PEFT, quantization."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from modeling_gpt2repro import (
    GPT2ReproForCausalLM,
    GPT2ReproForSequenceClassification,
    GPT2ReproForTokenClassification,
    GPT2ReproModel,
)


def next_token_loss(logits, input_ids):
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())


@torch.no_grad()
def assert_same_logits(model, expected, input_ids, atol=0.0):
    torch.testing.assert_close(model.eval()(input_ids).logits.float(), expected, atol=atol, rtol=0)


@pytest.fixture
def saved(model, input_ids, tmp_path):
    """Return a folder with the model in shards of 3 MB, and the logits of the model."""
    model.eval().save_pretrained(tmp_path, max_shard_size="3MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert not list(tmp_path.glob("*.bin"))
    with torch.no_grad():
        return tmp_path, model(input_ids).logits


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"low_cpu_mem_usage": True},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"dtype": torch.bfloat16},
        {"dtype": "auto", "attn_implementation": "eager"},
    ],
    ids=str,
)
def test_every_way_of_loading_keeps_the_tie_and_the_logits(saved, input_ids, arguments):
    path, expected = saved
    model = AutoModelForCausalLM.from_pretrained(path, **arguments)
    assert type(model) is GPT2ReproForCausalLM
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.dtype == (torch.bfloat16 if arguments.get("dtype") is torch.bfloat16 else torch.float32)
    atol = 0.02 if model.dtype is torch.bfloat16 else 1e-5 if "attn_implementation" in arguments else 0.0
    assert_same_logits(model, expected, input_ids, atol)


@torch.no_grad()
def test_auto_model_opens_the_trunk(saved, input_ids):
    path, expected = saved
    trunk = AutoModel.from_pretrained(path)
    assert type(trunk) is GPT2ReproModel
    head = AutoModelForCausalLM.from_pretrained(path).lm_head
    assert torch.equal(head(trunk(input_ids).last_hidden_state), expected)


def test_offloaded_weights_give_the_same_logits_and_loss(saved, input_ids, tmp_path):
    """With offloading, the weight of a module is loaded only while the module is called."""
    path, expected = saved
    on_cpu = ["transformer.wte", "transformer.wpe", "transformer.drop", "transformer.h.0", "lm_head"]
    on_disk = ["transformer.h.1", "transformer.h.2", "transformer.ln_f"]
    device_map = dict.fromkeys(on_cpu, "cpu") | dict.fromkeys(on_disk, "disk")
    model = AutoModelForCausalLM.from_pretrained(path, device_map=device_map, offload_folder=tmp_path / "offload")
    assert model.transformer.h[1].mlp.c_fc.weight.device.type == "meta"
    assert_same_logits(model, expected, input_ids)
    with torch.no_grad():
        loss = model(input_ids, labels=input_ids).loss
    torch.testing.assert_close(loss, next_token_loss(expected, input_ids))


def test_bf16_checkpoint_loads_as_bf16(model, tmp_path):
    model.bfloat16().save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype is torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype is torch.float32


def test_untied_head_stays_untied(tiny_config, input_ids, tmp_path):
    tiny_config.tie_word_embeddings = False
    model = GPT2ReproForCausalLM(tiny_config)
    assert model.lm_head.weight is not model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.transformer.wte.weight)


@pytest.mark.parametrize("vocab_size", [50260, 50304, 1000])
def test_resized_vocabulary_keeps_the_tie(model, input_ids, vocab_size, tmp_path):
    before = model.transformer.wte.weight.detach().clone()
    model.resize_token_embeddings(vocab_size)
    assert model.config.vocab_size == vocab_size
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.shape == (vocab_size, 64)
    assert torch.equal(model.transformer.wte.weight[:50257], before[:vocab_size])
    input_ids = input_ids % vocab_size
    loss = model.train()(input_ids, labels=input_ids).loss
    loss.backward()
    with torch.no_grad():
        logits = model.eval()(input_ids).logits
    assert logits.shape[-1] == vocab_size
    torch.testing.assert_close(next_token_loss(logits, input_ids), loss.detach())
    model.save_pretrained(tmp_path)
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path), logits, input_ids)


def test_input_embeddings_can_be_replaced(model, input_ids):
    new = torch.nn.Embedding(50257, 64)
    model.set_input_embeddings(new)
    model.tie_weights()
    assert model.get_input_embeddings() is new
    assert model.get_output_embeddings().weight is new.weight


@torch.no_grad()
def test_return_dict_false_gives_a_tuple(model, input_ids):
    arguments = {"labels": input_ids, "use_cache": False, "output_hidden_states": True}
    output = model.eval()(input_ids, **arguments)
    plain = model(input_ids, **arguments, return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], output.loss)
    assert torch.equal(plain[1], output.logits)
    assert len(plain[2]) == 4


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(model, input_ids, use_reentrant):
    model.train()
    expected = model(input_ids, labels=input_ids).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    calls = []
    handle = model.transformer.h[1].attn.register_forward_hook(lambda *_: calls.append(1))
    loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    handle.remove()
    assert len(calls) == 2  # forward, and again in the backward pass
    assert torch.equal(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=0, rtol=0)


def test_mlp_matches_autograd_and_saves_fewer_activations(model, input_ids):
    """Compare with calls of the three modules, in float64."""
    mlp = model.transformer.h[0].mlp
    x = torch.randn(3, 7, 64, dtype=torch.float64)

    def results(call, leaf):
        mlp.zero_grad()
        output = call(leaf.requires_grad_())
        output.double().square().sum().backward()
        return [output, leaf.grad, *(parameter.grad for parameter in mlp.parameters())]

    mlp.double()
    references = results(lambda leaf: mlp.c_proj(mlp.act(mlp.c_fc(leaf))), x.clone())
    for actual, reference in zip(results(mlp, x.clone()), references, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-12, atol=1e-12)

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mlp(x.clone().requires_grad_())
    # Saved: the input, the output of c_fc and the two matrices. Autograd would save the output of GELU too.
    assert sum(t.numel() for t in saved) == 3 * 7 * (64 + 256) + 2 * 64 * 256

    mlp.float()
    with torch.autocast("cpu", torch.bfloat16):
        output, *gradients = results(mlp, x.float())
    assert output.dtype is torch.bfloat16
    for actual, reference in zip(gradients, references[1:], strict=True):
        assert actual.dtype is torch.float32
        assert (actual - reference).norm() / reference.norm() < 0.02  # bf16 has 8 bits


def test_frozen_parameters_get_no_gradient(model, input_ids):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("h.2" in name)
    model.train()(input_ids, labels=input_ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("h.2" in name), name


def test_hooks_on_linear_layers_are_called_in_training(model, input_ids):
    """The head and the MLP use the weights directly only if the layers have no hooks."""
    seen = []
    for layer in (model.lm_head, model.transformer.h[0].mlp.c_fc, model.transformer.h[1].mlp.act):
        layer.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    loss = model.train()(input_ids, labels=input_ids).loss
    assert sorted(seen) == ["GELU", "LanguageModelHead", "Linear"]
    fresh = GPT2ReproForCausalLM(model.config)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(loss, fresh.train()(input_ids, labels=input_ids).loss)


@pytest.mark.parametrize("kind", ["backward", "backward_pre", "global"])
def test_other_hooks_on_linear_layers_are_called_in_training(model, input_ids, kind):
    seen = []
    layers = [model.lm_head, model.transformer.h[0].mlp.c_fc, model.transformer.h[0].mlp.c_proj]
    add = {"backward": "register_full_backward_hook", "backward_pre": "register_full_backward_pre_hook"}.get(kind)
    if kind == "global":
        handles = [torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))]
    else:
        handles = [getattr(layer, add)(lambda module, *_: seen.append(module)) for layer in layers]
    try:
        model.train()(input_ids=input_ids, labels=input_ids).loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    assert set(layers) <= set(seen)


def test_replaced_layers_of_the_mlp_are_used_in_training(model, input_ids):
    """Another GELU and a linear layer without bias: the same loss with and without gradients."""
    mlp = model.transformer.h[0].mlp
    mlp.act = torch.nn.GELU()
    mlp.c_fc = torch.nn.Linear(mlp.c_fc.in_features, mlp.c_fc.out_features, bias=False)
    loss = model(input_ids=input_ids, labels=input_ids).loss
    with torch.no_grad():
        torch.testing.assert_close(loss, model(input_ids=input_ids, labels=input_ids).loss)


def test_sequence_classifier_trains_and_ignores_padding(saved, model, input_ids):
    path, _ = saved
    head = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3, pad_token_id=50256).train()
    assert type(head) is GPT2ReproForSequenceClassification
    assert torch.equal(head.transformer.wte.weight, model.transformer.wte.weight)
    padded = input_ids.clone()
    padded[1, 20:] = 50256
    outputs = head(padded, attention_mask=(padded != 50256).long(), labels=torch.tensor([0, 1, 2]))
    assert outputs.logits.shape == (3, 3)
    outputs.loss.backward()
    for layer in (head.score, head.transformer.h[0].mlp.c_fc):
        assert layer.weight.grad.abs().sum() > 0
    with torch.no_grad():
        single = head.eval()(input_ids[1:2, :20]).logits
    torch.testing.assert_close(outputs.logits[1:2], single, atol=1e-5, rtol=1e-5)


def test_token_classifier_trains_and_reloads(saved, input_ids, tmp_path):
    head = AutoModelForTokenClassification.from_pretrained(saved[0], num_labels=5)
    assert type(head) is GPT2ReproForTokenClassification
    outputs = head.train()(input_ids, labels=input_ids % 5)
    assert outputs.logits.shape == (3, 48, 5)
    outputs.loss.backward()
    head.eval().save_pretrained(tmp_path / "head")
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "head").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids).logits, head(input_ids).logits)


def test_trainer_trains_and_resumes(tiny_config, tmp_path):
    """The loss decreases, and a run resumed in the middle ends with the parameters of the full run."""
    tiny_config.vocab_size = 1000
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 50, (64, 1), generator=generator) + torch.arange(32)
    data = [{"input_ids": row, "labels": row} for row in rows]

    def train(resume_from=None):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            tmp_path,
            max_steps=40,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            save_steps=20,
            logging_steps=10,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(GPT2ReproForCausalLM(tiny_config), arguments, train_dataset=data, eval_dataset=data[:8])
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    full = train()
    losses = [entry["loss"] for entry in full.state.log_history if "loss" in entry]
    assert 4 < losses[0] < 7  # ln 1000 is 6.9, so gradient accumulation did not multiply the loss
    assert losses[-1] < losses[0] / 2
    assert full.evaluate()["eval_loss"] < losses[0] / 2
    resumed = train(resume_from=str(tmp_path / "checkpoint-20"))
    for actual, reference in zip(resumed.model.parameters(), full.model.parameters(), strict=True):
        torch.testing.assert_close(actual, reference, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("targets", [["c_attn", "c_proj", "c_fc"], "all-linear", ["c_attn", "lm_head"]], ids=str)
def test_lora_attaches_trains_and_merges(model, input_ids, targets):
    peft = pytest.importorskip("peft")
    base = list(model.parameters())
    frozen = [p.detach().clone() for p in base]
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = lora.train()(input_ids, labels=input_ids).loss
        loss.backward()
        for name, parameter in lora.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name  # all adapters get gradients
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    with torch.no_grad():
        adapted = lora.eval()(input_ids).logits
    assert all(torch.equal(p, before) for p, before in zip(base, frozen, strict=True))
    if "lm_head" not in targets:  # merging into a tied head would change the embedding too, as PEFT warns
        with torch.no_grad():
            merged = lora.merge_and_unload()
            torch.testing.assert_close(merged(input_ids).logits, adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("package", ["torchao", "bitsandbytes"])
def test_quantized_model_gives_close_logits(saved, input_ids, package):
    pytest.importorskip(package)
    path, expected = saved
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        quantization = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization, device_map="cpu")
    assert type(model.transformer.h[0].mlp.c_fc.weight.data) is not torch.Tensor or package == "bitsandbytes"
    with torch.no_grad():
        outputs = model(input_ids, labels=input_ids)
    error = (outputs.logits - expected).norm() / expected.norm()
    assert 0 < error < 0.05
    torch.testing.assert_close(outputs.loss, next_token_loss(outputs.logits, input_ids), atol=1e-3, rtol=1e-3)


def test_remote_code_needs_only_torch_and_transformers(saved, input_ids, tmp_path):
    """Load in a process that cannot import this project, accelerate, datasets, tiktoken, evaluate or peft."""
    path, expected = saved
    (path / "input_ids.json").write_text(json.dumps(input_ids.tolist()))
    command = [sys.executable, str(Path(__file__).with_name("remote_code.py")), str(path), str(tmp_path)]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert set(again["auto_map"]) >= {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert {"modeling_gpt2repro.py", "loss.py", "mlp.py"} <= {file.name for file in (tmp_path / "again").iterdir()}
