"""Exported checkpoints write the same text in other engines, token for token."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from documents import commands_of, python_program
from fresh_process import QUESTION
from safetensors import safe_open
from tiny_run import ROOT
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from data.tokenizer import GPT2
from hub import HubError
from hub import export as export_module
from hub.__main__ import main
from hub.export import export
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

PROMPTS = [
    *(
        "Hello, I'm a language model,",
        "The meaning of life is",
        "Once upon a time there was",
        "def fibonacci(n):\n    ",
    ),
    *("1 2 3 4 5", "The capital of France is", " leading space", "trailing space ", "Two\n\nparagraphs"),
    *("Don't you think we'll see? They've said I'd.", "naïve café, “quotes” — and dashes…", "東京は日本の"),
    *("Привет, мир", "🙂🙃 emoji 👩‍👩‍👧", "tabs\tand\twhite   space", "A", "https://example.com/path?x=1&y=2"),
    *("UPPER lower MiXeD", "3.14159 and 2,718,281", "She said: 'It is <b>bold</b>!'"),
]
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def greedy(model, tokenizer):
    """[(ids of a prompt, the model's own greedy continuation of 64 tokens)]"""
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=50256, eos_token_id=None)
        texts.append((ids[0].tolist(), output[0, ids.shape[1] :].tolist()))
    assert len({tuple(new) for _, new in texts}) == len(PROMPTS)
    assert min(len(set(new)) for _, new in texts) > NEW_TOKENS / 3  # not one phrase repeated
    return texts


@pytest.fixture(scope="session")
def exported(checkpoint, tmp_path_factory):
    """exported(format) returns the folder of an export, written once."""
    folders = {}

    def folder(to):
        if to not in folders:
            for package in {"onnx": ["onnxscript", "onnxruntime"], "gguf": ["gguf"], "gpt2": []}[to]:
                pytest.importorskip(package)
            folders[to] = tmp_path_factory.mktemp("exported") / to
            export(str(checkpoint), to=to, out=folders[to])
        return folders[to]

    return folder


@torch.no_grad()
def test_gpt2_export_opens_as_plain_gpt2(exported, model, tokenizer, greedy):
    folder = exported("gpt2")
    assert not list(folder.rglob("*.py"))
    plain, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(plain) is GPT2LMHeadModel and not any(loading.values())
    ids = torch.randint(0, 50257, (2, 100), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(plain.eval()(ids).logits, model(ids).logits, atol=2e-5, rtol=0)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "return_full_text": False}
    [text] = pipeline("text-generation", str(folder))(PROMPTS[0], **options)
    assert text["generated_text"] == tokenizer.decode(greedy[0][1])
    # What mlx_lm reads: n_ctx, and the names of OpenAI's own file.
    assert json.loads((folder / "config.json").read_text())["n_ctx"] == 128
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {name.partition(".")[0] for name in file.keys()} == {"wte", "wpe", "h", "ln_f"}  # noqa: SIM118
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert vocabulary == tokenizer.get_vocab()
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert (merges[0], merges[1], len(merges)) == ("#version: 0.2", "Ġ t", 50_001)
    assert AutoTokenizer.from_pretrained(folder)(PROMPTS).input_ids == [prompt for prompt, _ in greedy]


def test_documented_python_opens_the_exports(exported, checkpoint, fresh, tmp_path):
    """The blocks of docs/sharing.md run in a process that has only the exports and a checkpoint."""
    for name, to in (("plain", "gpt2"), ("onnx", "onnx")):
        (tmp_path / name).symlink_to(exported(to))
    shutil.copytree(checkpoint, tmp_path / "runs" / "sample" / "checkpoints" / "step_000660")
    document = ROOT / "docs" / "sharing.md"
    finished = fresh.run(python_program(document, document.read_text(encoding="utf-8")), cwd=tmp_path)
    assert finished.returncode == 0 and QUESTION not in finished.output, finished.output


def test_transformers_serve_answers_on_an_export(exported, model, tokenizer, fresh, tmp_path):
    """The documented command serves an export. In a chat, the documented template joins the messages."""
    for package in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(package)
    shutil.copytree(exported("gpt2"), tmp_path / "plain")
    document = (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8")
    [command] = [words for words in commands_of(document) if words[:2] == ["transformers", "serve"]]
    [echo] = [words for words in commands_of(document) if words[0] == "echo" and words[-1].endswith(".jinja")]
    (tmp_path / echo[-1]).write_text(echo[1] + "\n")
    program = Path(__file__).with_name("serve.py").read_text(encoding="utf-8")
    finished = fresh.run(program, *command[1:], cwd=tmp_path)
    assert finished.returncode == 0 and "answers:" in finished.output, finished.output
    answers = json.loads(finished.output.partition("answers: ")[2].splitlines()[0])

    def greedy(prompt):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=50256)
        return tokenizer.decode(output[0, ids.shape[1] :])

    assert answers["completions"]["choices"][0]["text"] == greedy("Hello, I'm a language model,")
    assert answers["chat"]["choices"][0]["message"]["content"] == greedy("Hello\n")
    assert answers["responses"]["output"][0]["content"][0]["text"] == greedy("Hello\n")


def test_ctranslate2_writes_the_same_text(exported, tokenizer, greedy, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    ctranslate2.converters.TransformersConverter(str(exported("gpt2"))).convert(str(tmp_path / "ct2"))
    engine = ctranslate2.Generator(str(tmp_path / "ct2"), device="cpu", compute_type="float32", intra_threads=1)
    results = engine.generate_batch(
        [tokenizer.convert_ids_to_tokens(prompt) for prompt, _ in greedy],
        max_length=NEW_TOKENS,
        sampling_topk=1,
        include_prompt_in_result=False,
        end_token=[],
        max_batch_size=1,  # in a batch, the longer prompts' ends would count as written
    )
    assert [result.sequences_ids[0] for result in results] == [new for _, new in greedy]


def test_onnx_runtime_writes_the_same_text(exported, model, greedy):
    """One graph generates token by token, for padded texts of different lengths. The other reads full texts."""
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = exported("onnx") / "onnx"
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [i.name for i in session.get_inputs() if i.name.startswith("past_key_values")]
    assert names[:2] == ["past_key_values.0.key", "past_key_values.0.value"] and len(names) == 4
    longest = max(len(prompt) for prompt, _ in greedy)
    ids = np.array([[50256] * (longest - len(prompt)) + prompt for prompt, _ in greedy])
    mask = np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in greedy])
    past = {name: np.zeros((len(ids), 4, 0, 16), np.float32) for name in names}
    written = []
    while len(written) < NEW_TOKENS:
        positions = (mask.cumsum(1) - 1).clip(0)[:, -ids.shape[1] :]
        logits, *present = session.run(
            None, {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        )
        past = dict(zip(names, present, strict=True))
        ids = logits[:, -1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        written.append(ids[:, 0])
    assert np.stack(written, axis=1).tolist() == [new for _, new in greedy]

    whole = onnxruntime.InferenceSession(folder / "model_without_past.onnx")
    for prompt, new in greedy[:3]:
        ids = np.array([prompt + new])
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.size)[None]}
        [logits] = whole.run(None, inputs)
        with torch.no_grad():
            torch.testing.assert_close(
                torch.from_numpy(logits), model(torch.from_numpy(ids)).logits, atol=1e-4, rtol=1e-4
            )


GGUF_FIELDS = {
    "general.architecture": "gpt2",
    "general.type": "model",
    "general.name": "tiny-step_000020",
    "general.size_label": "3M",
    "general.license": "mit",
    "general.tags": ["text-generation", "gpt2"],
    "general.file_type": 1,
    "general.quantization_version": 2,
    "gpt2.vocab_size": 50257,
    "gpt2.context_length": 128,
    "gpt2.embedding_length": 64,
    "gpt2.feed_forward_length": 256,
    "gpt2.block_count": 2,
    "gpt2.attention.head_count": 4,
    "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-5),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.bos_token_id": 50256,
    "tokenizer.ggml.eos_token_id": 50256,
    "tokenizer.ggml.unknown_token_id": 50256,
    "tokenizer.ggml.add_bos_token": False,
}


def test_gguf_has_all_metadata(exported, tokenizer):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(exported("gguf") / "tiny-step_000020-F16.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields.pop("tokenizer.ggml.tokens") == tokenizer.convert_ids_to_tokens(range(50257))
    merges = fields.pop("tokenizer.ggml.merges")
    assert (merges[0], len(merges)) == ("Ġ t", 50_000)
    assert fields.pop("tokenizer.ggml.token_type") == [1] * 50256 + [3]
    assert fields == GGUF_FIELDS


@pytest.mark.parametrize(("kind", "file_type", "tolerance"), [("F16", 1, 1e-3), ("Q8_0", 7, 5e-3)])
def test_gguf_has_all_tensors(exported, model, kind, file_type, tolerance):
    gguf = pytest.importorskip("gguf")
    folder = exported("gguf")
    assert len(list(folder.iterdir())) == 2
    reader = gguf.GGUFReader(folder / f"tiny-step_000020-{kind}.gguf")
    assert reader.fields["general.file_type"].contents() == file_type
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(list(model.parameters())) and "output.weight" not in tensors
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == kind
    assert tensors["position_embd.weight"].tensor_type.name == "F32"
    weight = tensors["blk.0.attn_qkv.weight"]
    found = torch.from_numpy(gguf.quants.dequantize(weight.data, weight.tensor_type).copy())
    assert (found - model.transformer.h[0].attn.c_attn.weight.detach()).abs().max() < tolerance


@torch.no_grad()
@pytest.mark.parametrize(("kind", "tolerance", "share"), [("F16", 0.02, 0.99), ("Q8_0", 0.3, 0.9)])
def test_llama_cpp_writes_the_same_text_up_to_rounding(exported, model, tokenizer, kind, tolerance, share):
    """Each token is the model's own choice after the same text, or has nearly the same logit (they span over 10)."""
    xllamacpp = pytest.importorskip("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(exported("gguf") / f"tiny-step_000020-{kind}.gguf")
    parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = 128, 1, 1
    parameters.warmup = False
    engine = xllamacpp.Server(parameters)
    followed, same = 0, 0
    for prompt in PROMPTS:
        request = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        answer = engine.handle_completions(request)
        ids = tokenizer(prompt).input_ids
        assert answer["usage"]["prompt_tokens"] == len(ids)  # its tokenizer is the same
        new = [entry["id"] for entry in answer["choices"][0]["logprobs"]["content"]]
        if len(new) < NEW_TOKENS:  # its list leaves out some tokens that are parts of a character
            continue
        logits = model(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1]
        chosen = logits.gather(-1, torch.tensor(new)[:, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() < tolerance, prompt
        followed += 1
        same += int((logits.argmax(-1) == torch.tensor(new)).sum())
    assert followed >= len(PROMPTS) / 2
    assert same > share * NEW_TOKENS * followed


def test_plain_gpt2_can_be_exported(exported, tmp_path, capsys):
    """The input is transformers' own GPT-2, through the command."""
    assert main(["export", str(exported("gpt2")), "--to", "gpt2", "--out", str(tmp_path / "out")]) == 0
    assert "out/model.safetensors" in capsys.readouterr().out
    for name in ("model.safetensors", "config.json", "vocab.json"):
        assert (tmp_path / "out" / name).read_bytes() == (exported("gpt2") / name).read_bytes()


def test_code_in_a_folder_is_not_run(exported, tmp_path):
    folder = shutil.copytree(exported("gpt2"), tmp_path / "gpt2")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nclass Evil: pass\n")
    for name, classes in (("config.json", {"AutoConfig": "evil.Evil"}), ("tokenizer_config.json", {})):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        auto_map = classes or {"AutoTokenizer": ["evil.Evil", None]}
        path.write_text(json.dumps(content | {"auto_map": auto_map}))
    assert main(["export", str(folder), "--to", "gpt2", "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "was_run").exists()


def test_gpt2_export_has_an_untied_head(tmp_path):
    config = GPT2ReproConfig(n_layer=1, n_head=1, n_embd=32, n_positions=8, tie_word_embeddings=False)
    model = GPT2ReproForCausalLM(config).eval()
    [exported] = export_module.write_gpt2(model, tmp_path)
    export_module.compare_logits(model, exported, tolerance=1e-4)
    head = GPT2LMHeadModel.from_pretrained(tmp_path).lm_head.weight
    torch.testing.assert_close(head, model.lm_head.weight, atol=0, rtol=0)


@pytest.fixture
def fails(checkpoint, tmp_path, capsys):
    """fails(words) exports the checkpoint, which must end with one line that has the words, and leave no files."""

    def export_fails(*words, source=checkpoint, to="gpt2", out=tmp_path / "out"):
        capsys.readouterr()  # progress bars
        assert main(["export", str(source), "--to", to, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert all(word in error for word in words), error
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
        return error

    return export_fails


def test_out_that_cannot_be_written_is_an_error(fails, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    monkeypatch.chdir(tmp_path / "full")
    fails("full' exists and is not an empty folder", out=".")
    fails("File name too long", out=tmp_path / ("a" * 300))
    fails("File name too long", out=tmp_path / ("a" * 250))  # fits, but not with .partial

    def full(self, folder):
        raise Exception("No space left on device (os error 28)")  # as the tokenizers package does

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    fails("cannot be written (No space left on device")


def test_model_that_is_not_a_gpt2_is_an_error(fails, checkpoint, tokenizer, tmp_path, monkeypatch):
    encoder = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=1, n_head=1, n_embd=32, n_positions=8, is_causal=False))
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    fails("is_causal=False", source=tmp_path / "encoder")

    def code(*_, **__):
        raise ValueError("Please pass the argument `trust_remote_code=True`")

    monkeypatch.setattr("common.models.hub_error", lambda: None)
    monkeypatch.setattr(AutoConfig, "from_pretrained", code)
    assert "--trust" not in fails("it must be a GPT-2", source="me/x")


def test_missing_package_is_an_error(fails, monkeypatch):
    monkeypatch.setitem(export_module._PACKAGES, "gpt2", ("no_such_package",))
    fails("no_such_package not installed: pip install")


def test_export_failure_leaves_no_files(checkpoint, tmp_path, monkeypatch):
    """The check after writing finds weights that changed on the way."""
    to_gpt2 = GPT2ReproForCausalLM.to_gpt2

    def wrong(model):
        plain = to_gpt2(model)
        plain.transformer.h[0].mlp.c_fc.weight.data *= 1.01
        return plain

    monkeypatch.setattr(GPT2ReproForCausalLM, "to_gpt2", wrong)
    with pytest.raises(HubError, match="logits differ by"):
        export(str(checkpoint), to="gpt2", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_into_the_empty_current_folder(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    export(str(checkpoint), to="gpt2", out=".")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.fixture
def write_onnx_again(exported, model, tmp_path, monkeypatch):
    """write_onnx_again(wrong) writes the graphs of an earlier export; the one named `wrong` gets other numbers."""
    folder, names = exported("onnx") / "onnx", iter(("model.onnx", "model_without_past.onnx"))
    import onnx_ir

    from hub import to_onnx

    def write(wrong):
        def written_before(*_, **__):
            name = next(names)
            graph = onnx_ir.load(folder / name)
            if name == wrong:
                weights = graph.graph.initializers["model.transformer.wpe.weight"]
                weights.const_value = onnx_ir.tensor(weights.const_value.numpy() * 1.01, name=weights.name)
            return SimpleNamespace(model=graph)

        monkeypatch.setattr(torch.onnx, "export", written_before)
        monkeypatch.setattr(to_onnx, "_LARGE_BYTES", 0)
        eager = copy.deepcopy(model)  # write_onnx changes its attention implementation
        for run in to_onnx.write_onnx(eager, tmp_path):
            export_module.compare_logits(eager, run, tolerance=1e-3)

    return write


@pytest.mark.parametrize("wrong", ["model.onnx", "model_without_past.onnx"])
def test_onnx_graph_with_other_numbers_is_rejected(write_onnx_again, wrong):
    with pytest.raises(HubError, match="logits differ by"):
        write_onnx_again(wrong)


def test_large_onnx_weights_are_in_a_file_next_to_the_graph(write_onnx_again, tmp_path):
    write_onnx_again(None)
    for name in ("model.onnx", "model_without_past.onnx"):
        assert (tmp_path / "onnx" / name).stat().st_size < 1e6 < (tmp_path / "onnx" / f"{name}_data").stat().st_size


def test_gguf_of_a_tokenizer_that_splits_otherwise_is_refused():
    """llama.cpp knows GPT-2's pre-tokenization by its name only, and would give other tokens."""
    pytest.importorskip("gguf")
    from hub import to_gguf

    other = Tokenizer.from_str(GPT2.hf().backend_tokenizer.to_str())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(HubError, match=r"splits a text as GPT-2's tokenizer does.* export --to gpt2 instead"):
        to_gguf._vocabulary(PreTrainedTokenizerFast(tokenizer_object=other), 50257)


@pytest.fixture
def write_small_gguf(tokenizer, tmp_path, monkeypatch):
    """Write a model with an untied head and few tokens: GGUF's reader takes seconds for GPT-2's vocabulary."""
    gguf = pytest.importorskip("gguf")
    from hub import to_gguf

    torch.manual_seed(0)
    config = GPT2ReproConfig(n_layer=1, n_head=1, n_embd=32, n_positions=8, vocab_size=64, tie_word_embeddings=False)
    model = GPT2ReproForCausalLM(config).eval()
    words = [f"w{i}" for i in range(64)]
    monkeypatch.setattr(to_gguf, "_vocabulary", lambda *_: (words, [gguf.TokenType.NORMAL] * 64, ["w 1"]))

    def write():
        to_gguf.write_gguf(model, tokenizer, tmp_path, name="x", license=None)
        return model, gguf.GGUFReader(tmp_path / "x-F16.gguf")

    return write


def test_gguf_has_an_untied_head(write_small_gguf):
    model, reader = write_small_gguf()
    [head] = [tensor for tensor in reader.tensors if tensor.name == "output.weight"]
    np.testing.assert_allclose(head.data, model.lm_head.weight.detach().numpy(), atol=1e-3)
    assert "general.license" not in reader.fields  # not known


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_gguf_with_another_value_is_rejected(write_small_gguf, monkeypatch, kind):
    from gguf import quants

    dequantize = quants.dequantize

    def other(data, tensor_type):
        numbers = dequantize(data, tensor_type).copy()
        if tensor_type.name == kind:
            numbers.flat[-1] += 0.01
        return numbers

    monkeypatch.setattr(quants, "dequantize", other)
    with pytest.raises(HubError, match="reads back with other values"):
        write_small_gguf()
