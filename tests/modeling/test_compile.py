"""torch.compile without graph breaks, and torch.export."""

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from transformers import DynamicCache

from modeling_gpt2repro import GPT2ReproForCausalLM
from modeling_gpt2repro import loss as loss_module
from modeling_gpt2repro.loss import linear_cross_entropy


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_forward_compiles_to_one_graph(model, input_ids, kernel):
    model.eval().set_attn_implementation(kernel)
    mask = torch.ones_like(input_ids)
    mask[0, :9] = 0
    for inputs in ({"input_ids": input_ids}, {"input_ids": input_ids, "attention_mask": mask}):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [True, False])
def test_training_step_compiles_to_one_graph(model, input_ids, autocast):
    """Compare three steps with inductor, the default backend, to three eager steps."""
    plain = GPT2ReproForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    losses = []
    for candidate in (torch.compile(model.train(), fullgraph=True), plain.train()):
        optimizer = torch.optim.SGD(candidate.parameters(), lr=0.1)
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = candidate(input_ids, labels=input_ids, num_items_in_batch=torch.tensor(141)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[2] < losses[0] - 0.1
    assert losses[:3] == pytest.approx(losses[3:], abs=2e-3 if autocast else 1e-5)
    if not autocast:
        for actual, reference in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(actual, reference, atol=1e-6, rtol=1e-4)


@pytest.fixture
def gpu_loss(monkeypatch):
    """Let the compiler trace the chunks of the loss, as on a GPU. On a CPU the compiled loss is one custom operator."""
    monkeypatch.setattr(loss_module, "_loss_and_gradients_op", loss_module._loss_and_gradients)
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", {"cpu": 40})
    monkeypatch.setattr(loss_module, "PAD_MATRIX", {"cpu": True})


def test_gpu_code_path_of_the_loss_compiles(model, input_ids, gpu_loss):
    model.train()
    labels = input_ids.clone()
    labels[0, 5:30] = -100
    expected = model(input_ids, labels=labels).loss
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_compiled_loss_keeps_the_logits_of_one_chunk_in_16_bits(gpu_loss):
    """Inductor allocates one [40, 1024] buffer, which both chunks and their gradients share."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (80, 1000))
    targets = torch.randint(0, 1000, (80,), generator=generator)
    targets[::5] = -100

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, targets)
        loss.backward()
        return loss.detach()

    loss, codes = run_and_get_code(torch.compile(step))
    buffers = re.findall(r"empty_strided_cpu\(\((\d+), (10\d\d)\), .*?, torch\.(\w+)\)", "".join(codes))
    assert buffers == [("40", "1024", "bfloat16")]
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets)
    expected.backward()
    for actual, reference in zip(
        (loss, hidden.grad, weight.grad), (expected, exact[0].grad, exact[1].grad), strict=True
    ):
        assert (actual - reference).norm() / reference.norm() < 0.01


@torch.no_grad()
def test_compiled_model_accepts_other_lengths(model, input_ids):
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (48, 31, 17):
        logits = compiled(input_ids[:, :length]).logits
        torch.testing.assert_close(logits, model(input_ids[:, :length]).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_exported_program_runs_on_other_lengths(model, input_ids, tmp_path):
    """Export with a dynamic length, save, load and run on two lengths."""

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model.eval()

        def forward(self, input_ids):
            return self.model(input_ids, use_cache=False).logits

    shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=64)}}
    exported = torch.export.export(Logits(), (input_ids,), dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for ids in (input_ids, input_ids[:, :20]):
        torch.testing.assert_close(loaded(ids), model(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_export_with_static_cache_decodes_like_the_model(model, input_ids):
    """On-device runtimes need one input token and a cache of fixed size inside the program."""
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    model.eval().generation_config.cache_implementation = "static"
    exportable = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=16, device="cpu")
    program = exportable.export(input_ids=input_ids[:1, :1], cache_position=torch.tensor([0])).module()
    steps = [program(input_ids=input_ids[:1, t : t + 1], cache_position=torch.tensor([t])) for t in range(6)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(input_ids[:1, :6]).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_training", [True, False])
def test_compiled_attention_has_no_mask(model, input_ids, monkeypatch, is_training):
    """The flash kernels of CUDA do not accept a mask. torch before 2.14 reports an export while it compiles."""
    monkeypatch.setattr("transformers.masking_utils.is_torchdynamo_exporting", lambda: True, raising=False)
    calls = []

    def backend(graph, _):
        calls.extend(node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target))
        return graph

    torch.compile(model.train(is_training), backend=backend)(input_ids, labels=input_ids)
    assert len(calls) == model.config.n_layer
    assert all(len(call.args) == 3 and call.kwargs["attn_mask"] is None and call.kwargs["is_causal"] for call in calls)


@torch.no_grad()
def test_transformers_exporter_prefills_and_decodes_like_gpt2(pair, input_ids):
    exporters = pytest.importorskip("transformers.exporters.exporter_dynamo")  # not in transformers 5.9
    from transformers.exporters.configs import DynamoConfig

    model, gpt2 = pair
    sample = {"input_ids": input_ids[:, :9], "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    exported = exporters.DynamoExporter().export_for_generation(model, sample, DynamoConfig(dynamic=True))
    cache = DynamicCache(config=model.config)
    pieces = []
    for name, start, end in (("prefill", 0, 12), ("decode", 12, 13), ("decode", 13, 14)):
        inputs = {"input_ids": input_ids[:, start:end], "position_ids": torch.arange(start, end).expand(3, -1)}
        outputs = exported.runners[name](**inputs, past_key_values=cache)
        cache = outputs["past_key_values"]
        pieces.append(outputs["logits"])
    expected = gpt2(input_ids[:, :14]).logits
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("logits_in_training", [False, True])
def test_compiled_training_step_returns_logits_only_on_request(model, input_ids, logits_in_training):
    shapes = []

    def backend(graph, _):
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        shapes.extend(value.shape for value in values if torch.is_tensor(value))
        return graph

    model.train().config.logits_in_training = logits_in_training
    outputs = torch.compile(model, backend=backend, fullgraph=True)(input_ids, labels=input_ids)
    assert ((3, 48, 50257) in shapes) is logits_in_training
    if not logits_in_training:
        with pytest.raises(TypeError, match="logits_in_training = True"):
            outputs.logits[0]
