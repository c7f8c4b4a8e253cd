"""sample.py and hub/sampling.py."""

import copy
import io
import shutil

import pytest
import torch
from transformers import TextStreamer

import sample
from hub import HubError
from hub.sampling import SamplingParams, encode_chat, encode_prompt, stream_tokens

PROMPT = "Hello, I'm a language model,"


def tokens_after(model, prompt_ids, params):
    return [token for token, _ in stream_tokens(model, prompt_ids, params)]


def new_tokens(model, tokenizer, prompt=PROMPT, **settings):
    return tokens_after(model, tokenizer(prompt).input_ids, SamplingParams(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
        {"temperature": 1.3, "top_p": 0.9},
    ],
    ids=str,
)
def test_same_seed_gives_the_tokens_of_generate(model, tokenizer, settings):
    """The tokens are those of one call of `model.generate` after torch.manual_seed."""
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    sampling = {"temperature": 1.0, "top_k": 50, "top_p": 1.0} | settings
    options = {"do_sample": False} if settings["temperature"] == 0 else {"do_sample": True} | sampling
    torch.manual_seed(7)
    expected = model.generate(ids, max_new_tokens=40, pad_token_id=50256, eos_token_id=None, **options)
    expected = expected[0, ids.shape[1] :].tolist()
    params = SamplingParams(seed=7, max_new_tokens=40, **settings)
    assert tokens_after(model, ids[0].tolist(), params) == expected


def test_generation_ends_with_the_context(model, tokenizer):
    assert new_tokens(model, tokenizer, seed=1) == new_tokens(model, tokenizer, seed=1)
    assert new_tokens(model, tokenizer, seed=1) != new_tokens(model, tokenizer, seed=2)
    assert len(new_tokens(model, tokenizer, max_new_tokens=500)) == 128 - 8
    with pytest.raises(HubError, match="the prompt has 300 tokens and the model's context 128"):
        encode_prompt(tokenizer, " a" * 300, model.config)
    assert encode_prompt(tokenizer, "", model.config) == [50256]


def test_generation_ends_before_the_end_of_text_token(model, tokenizer, monkeypatch):
    tokens = new_tokens(model, tokenizer, temperature=0, max_new_tokens=20)
    monkeypatch.setattr(model.generation_config, "eos_token_id", tokens[10])
    expected = tokens[: tokens.index(tokens[10])]
    assert new_tokens(model, tokenizer, temperature=0, max_new_tokens=20) == expected


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_an_error(model, tokenizer, monkeypatch, temperature):
    monkeypatch.setattr(model.transformer.ln_f.weight, "data", torch.full((64,), float("nan")))
    with pytest.raises(HubError, match="not finite"):
        new_tokens(model, tokenizer, temperature=temperature)


@pytest.mark.parametrize(
    "text", ["plain text", "naïve café — 東京 🙂👩‍👩‍👧 ends", "🙂", "two\nlines. And . spaces , kept"]
)
def test_text_is_printed_in_whole_characters(model, tokenizer, monkeypatch, text):
    pieces, ids = [], tokenizer(text).input_ids
    monkeypatch.setattr(TextStreamer, "on_finalized_text", lambda _, text, **__: pieces.append(text))
    monkeypatch.setattr(sample, "stream_tokens", lambda *_: ((token, None) for token in ids))
    assert sample.write(model, tokenizer, [1, 2, 3], SamplingParams()) == ids
    assert len(pieces) > 1 and "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_stream_has_the_probabilities_of_the_model(model, tokenizer):
    params = SamplingParams(max_new_tokens=2, temperature=0.5, top_k=3)
    [(first, _), (_, probabilities)] = stream_tokens(model, tokenizer(PROMPT).input_ids, params)
    with torch.no_grad():
        expected = model(torch.tensor([[*tokenizer(PROMPT).input_ids, first]])).logits[0, -1].softmax(-1)
    torch.testing.assert_close(probabilities, expected)


def run(capsys, monkeypatch, *arguments, stdin=""):
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    code = sample.main([*map(str, arguments), "--device", "cpu"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_prints_prompt_and_continuations(checkpoint, model, tokenizer, capsys, monkeypatch):
    greedy = tokenizer.decode(new_tokens(model, tokenizer, temperature=0, max_new_tokens=12))
    options = ("--temperature", 0, "--max_new_tokens", 12)
    for arguments, stdin in (((PROMPT,), ""), ((), f"{PROMPT}\n")):
        code, out, _ = run(capsys, monkeypatch, checkpoint, *arguments, *options, stdin=stdin)
        assert (code, out) == (0, f"{PROMPT}{greedy}\n")

    code, out, _ = run(capsys, monkeypatch, checkpoint, PROMPT, "--n", 2, "--seed", 5, "--max_new_tokens", 12)
    texts = [tokenizer.decode(new_tokens(model, tokenizer, seed=seed, max_new_tokens=12)) for seed in (5, 6)]
    assert out == f"--- 1\n{PROMPT}{texts[0]}\n--- 2\n{PROMPT}{texts[1]}\n"

    code, out, error = run(capsys, monkeypatch, checkpoint, PROMPT, "--max_new_tokens", 500)
    assert code == 0 and "context of 128 tokens is full" in error


def test_interactive_continues_one_text(checkpoint, model, tokenizer, capsys, monkeypatch):
    settings = {"temperature": 0, "max_new_tokens": 5}
    arguments = (checkpoint, "--interactive", "--temperature", 0, "--max_new_tokens", 5)
    first = new_tokens(model, tokenizer, **settings)
    ids = tokenizer(PROMPT).input_ids + first + tokenizer("\nAnd then").input_ids
    second = tokenizer.decode(tokens_after(model, ids, SamplingParams(**settings)))
    first = tokenizer.decode(first)
    _, out, _ = run(capsys, monkeypatch, *arguments, stdin=f"{PROMPT}\nAnd then\n\n{PROMPT}\n")
    assert out == f"{first}\n{second}\n{first}\n\n"
    long = "".join(f"{PROMPT}\n" for _ in range(30))  # far more than the context holds
    code, out, _ = run(capsys, monkeypatch, *arguments, stdin=long)
    assert code == 0 and len(out.splitlines()) >= 30
    code, out, error = run(capsys, monkeypatch, *arguments, stdin=f"{' a' * 300}\n{PROMPT}\n")
    assert (code, out) == (0, f"{first}\n\n")  # the line that is too long changes nothing
    assert "the prompt has 300 tokens" in error and error.count("\n") == 1


TEMPLATE = """\
{%- for message in messages %}{{ message.role + ":\\n" + message.content + "\\n" }}{% endfor %}
{%- if add_generation_prompt %}{{ "assistant:\\n" }}{% endif %}"""


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def as_messages(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_interactive_chats_by_the_chat_template(checkpoint, model, chat_tokenizer, tmp_path, capsys, monkeypatch):
    """Lines are messages, with the conversation so far; an empty line begins another."""
    tokenizer = chat_tokenizer
    checkpoint = shutil.copytree(checkpoint, tmp_path / "chat", ignore=shutil.ignore_patterns("training_state"))
    tokenizer.save_pretrained(checkpoint)
    prompts = ["user:\nHello\nassistant:\n"]
    first = tokenizer.decode(new_tokens(model, tokenizer, prompts[0], temperature=0, max_new_tokens=5))
    prompts.append(f"{prompts[0]}{first}\nuser:\nAnd then?\nassistant:\n")
    second = tokenizer.decode(new_tokens(model, tokenizer, prompts[1], temperature=0, max_new_tokens=5))
    arguments = (checkpoint, "--interactive", "--temperature", 0, "--max_new_tokens", 5)
    code, out, _ = run(capsys, monkeypatch, *arguments, stdin="Hello\nAnd then?\n\nHello\n")
    assert (code, out) == (0, f"{first}\n{second}\n{first}\n\n")
    # A message that is too long changes nothing, and a long conversation loses its oldest turns.
    code, out, error = run(capsys, monkeypatch, *arguments, stdin=f"Hello\n{' a' * 300}\nAnd then?\n")
    assert (code, out) == (0, f"{first}\n{second}\n\n")
    assert "tokens and the model's context 128" in error and error.count("\n") == 1
    code, out, error = run(capsys, monkeypatch, *arguments, stdin="Hello\n" * 30)
    assert (code, error) == (0, "") and len(out.splitlines()) >= 30


def test_conversation_fits_the_context(model, chat_tokenizer):
    """The oldest questions are dropped with their answers until the answer has room; the last message is kept."""
    tokenizer, params = chat_tokenizer, SamplingParams(max_new_tokens=28)
    messages = as_messages(*["word" + " word" * 19] * 7)  # 24 tokens each, 128 in the context
    kept, ids = encode_chat(tokenizer, messages, model.config, params)
    assert kept == messages[-3:] and len(ids) <= 128 - 28
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(kept, add_generation_prompt=True, tokenize=False)
    assert encode_chat(tokenizer, messages, model.config, SamplingParams(max_new_tokens=500))[0] == messages[-1:]
    long = as_messages("word" + " word" * 99)
    assert encode_chat(tokenizer, long, model.config, SamplingParams(max_new_tokens=100))[0] == long
    with pytest.raises(HubError, match="not UTF-8"):
        encode_chat(tokenizer, as_messages("\udcff"), model.config, params)


def test_old_name_of_interactive_works_and_names_the_new_one(checkpoint, capsys, monkeypatch):
    code, out, error = run(capsys, monkeypatch, checkpoint, "--chatty", stdin="")
    assert (code, out, error) == (0, "\n", "--chatty is now called --interactive\n")


@pytest.mark.parametrize("flags", [[], ["--trust_remote_code"]])
def test_code_from_the_hub_runs_only_with_the_flag(trust_requests, capsys, monkeypatch, flags):
    requests = trust_requests(sample)
    assert run(capsys, monkeypatch, "me/x", PROMPT, *flags)[0] == 2
    assert requests == [bool(flags)] * 2
