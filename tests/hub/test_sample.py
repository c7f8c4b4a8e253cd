"""sample.py, and the text that it and the demo show."""

import io

import pytest
import torch

import sample
from hub import HubError
from hub.continuation import Settings, continuation, encode_prompt, text_pieces, top_tokens

PROMPT = "Hello, I'm a language model,"


def written(model, tokenizer, **settings):
    return [step.token for step in continuation(model, tokenizer(PROMPT).input_ids, Settings(**settings))]


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
def test_it_is_what_generate_writes(model, tokenizer, settings):
    """With the same random numbers, the same tokens."""
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    chosen = {"temperature": 1.0, "top_k": 50, "top_p": 1.0} | settings
    options = {"do_sample": False} if settings["temperature"] == 0 else {"do_sample": True} | chosen
    torch.manual_seed(7)
    expected = model.generate(ids, max_new_tokens=40, pad_token_id=50256, eos_token_id=None, **options)
    assert written(model, tokenizer, seed=7, max_new_tokens=40, **settings) == expected[0, ids.shape[1] :].tolist()


def test_seed_length_and_context(model, tokenizer):
    assert written(model, tokenizer, seed=1) == written(model, tokenizer, seed=1) != written(model, tokenizer, seed=2)
    assert len(written(model, tokenizer, max_new_tokens=500)) == 128 - 8  # to the end of the context
    with pytest.raises(HubError, match="the prompt has 300 tokens and the model's context 128"):
        encode_prompt(tokenizer, " a" * 300, model.config)
    assert encode_prompt(tokenizer, "", model.config) == [50256]


def test_end_of_text_ends_it(model, tokenizer, monkeypatch):
    tokens = written(model, tokenizer, temperature=0, max_new_tokens=20)
    monkeypatch.setattr(model.config, "eos_token_id", tokens[10])
    assert written(model, tokenizer, temperature=0, max_new_tokens=20) == tokens[: tokens.index(tokens[10])]


def test_a_model_that_has_diverged_says_so(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.transformer.ln_f.weight, "data", torch.full((64,), float("nan")))
    with pytest.raises(HubError, match="not finite"):
        written(model, tokenizer)


@pytest.mark.parametrize("text", ["plain text", "naïve café — 東京 🙂👩‍👩‍👧 ends", "🙂"])
def test_characters_come_whole(tokenizer, text):
    ids = tokenizer(text).input_ids
    pieces = list(text_pieces(tokenizer, ids))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert text_pieces(tokenizer, iter(ids)).__next__() in (text[: len(pieces[0])], "")  # as they are read
    nothing = list(text_pieces(tokenizer, tokenizer.convert_tokens_to_ids(["Ģ"] * 8)))  # bytes that begin no character
    assert len(nothing) == 8 and all("\N{REPLACEMENT CHARACTER}" in nothing[i] for i in (3, 7))  # are not waited for
    broken = list(text_pieces(tokenizer, ids[:1]))  # half a character, where the text ends
    assert broken[-1] in (text[: len(broken[-1])], "\N{REPLACEMENT CHARACTER}")


def test_the_most_probable_tokens(model, tokenizer):
    [step] = continuation(model, tokenizer(PROMPT).input_ids, Settings(max_new_tokens=1))
    with torch.no_grad():
        expected = model(tokenizer(PROMPT, return_tensors="pt").input_ids).logits[0, -1].softmax(-1)
    torch.testing.assert_close(step.probabilities, expected)
    top = top_tokens(tokenizer, step.probabilities, 5)
    assert [token for _, token, _ in top] == expected.topk(5).indices.tolist()
    assert top[0][0] == tokenizer.decode([top[0][1]])


def run(capsys, monkeypatch, *arguments, stdin=""):
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    code = sample.main([*map(str, arguments), "--device", "cpu"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command(checkpoint, model, tokenizer, capsys, monkeypatch):
    greedy = tokenizer.decode(written(model, tokenizer, temperature=0, max_new_tokens=12))
    options = ("--temperature", 0, "--max_new_tokens", 12)
    for arguments, stdin in (((PROMPT,), ""), ((), f"{PROMPT}\n")):
        code, out, _ = run(capsys, monkeypatch, checkpoint, *arguments, *options, stdin=stdin)
        assert (code, out) == (0, f"{PROMPT}{greedy}\n")

    code, out, _ = run(capsys, monkeypatch, checkpoint, PROMPT, "--n", 2, "--seed", 5, "--max_new_tokens", 12)
    texts = [tokenizer.decode(written(model, tokenizer, seed=seed, max_new_tokens=12)) for seed in (5, 6)]
    assert out == f"--- 1\n{PROMPT}{texts[0]}\n--- 2\n{PROMPT}{texts[1]}\n"

    code, out, error = run(capsys, monkeypatch, checkpoint, PROMPT, "--max_new_tokens", 500)
    assert code == 0 and "context of 128 tokens is full" in error


def test_chatty_goes_on_with_one_text(checkpoint, model, tokenizer, capsys, monkeypatch):
    arguments = (checkpoint, "--chatty", "--temperature", 0, "--max_new_tokens", 5)
    first = tokenizer.decode(written(model, tokenizer, temperature=0, max_new_tokens=5))
    _, out, _ = run(capsys, monkeypatch, *arguments, stdin=f"{PROMPT}\nAnd then\n\n{PROMPT}\n")
    ids = tokenizer(PROMPT).input_ids + written(model, tokenizer, temperature=0, max_new_tokens=5)
    ids += tokenizer("\nAnd then").input_ids
    second = [step.token for step in continuation(model, ids, Settings(temperature=0, max_new_tokens=5))]
    assert out == f"{first}\n{tokenizer.decode(second)}\n{first}\n\n"
    long = "".join(f"{PROMPT}\n" for _ in range(30))  # far more than the context holds
    code, out, _ = run(capsys, monkeypatch, *arguments, stdin=long)
    assert code == 0 and len(out.splitlines()) >= 30
    code, out, error = run(capsys, monkeypatch, *arguments, stdin=f"{' a' * 300}\n{PROMPT}\n")
    assert (code, out) == (0, f"{first}\n\n")  # a line that is too long changes nothing
    assert "the prompt has 300 tokens" in error and error.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--trust_remote_code"]])
def test_code_from_the_hub_runs_only_when_asked_for(trusted_by, capsys, monkeypatch, flags):
    asked = trusted_by(sample)
    assert run(capsys, monkeypatch, "me/x", PROMPT, *flags)[0] == 2
    assert asked == [bool(flags)] * 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere at all", PROMPT], "no such folder, nor a Hub id"),
        (["CHECKPOINT", PROMPT, "--top_p", "0"], "top_p must be above 0"),
        (["CHECKPOINT", PROMPT, "--n", "0"], "n must be at least 1"),
        (["CHECKPOINT", PROMPT, "--chatty"], "leave out the prompt"),
        (["CHECKPOINT", " a" * 300], "shorten it to 127"),
        (["CHECKPOINT", PROMPT, "--warmth", "1"], "--warmth"),
        (["CHECKPOINT", "\udcff\udcfe"], "is not UTF-8 text"),
        (["a" * 300, PROMPT], "cannot be opened (File name too long)"),
    ],
)
def test_one_clear_line(checkpoint, capsys, monkeypatch, arguments, says):
    code, _, error = run(capsys, monkeypatch, *[a.replace("CHECKPOINT", str(checkpoint)) for a in arguments])
    assert code == 2 and says in error
    assert error.startswith("error: ") and error.count("\n") == 1
