"""Auto classes, pipelines, Trainer and PEFT on a checkpoint, in processes without this project."""

import importlib.util
import json
import os

import checkpoint_cases
import pytest
import torch
from fresh_process import QUESTION
from tiny_run import ROOT
from transformers import pipeline

from data.tokenizer import GPT2
from modeling_gpt2repro import (
    GPT2ReproForCausalLM,
    GPT2ReproForSequenceClassification,
    GPT2ReproForTokenClassification,
)

if not hasattr(os, "fork"):
    pytest.skip("these tests fork processes, and this system cannot", allow_module_level=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the three models and the folder with their checkpoints."""
    from modeling_gpt2repro import GPT2ReproConfig

    folder = tmp_path_factory.mktemp("checkpoints")
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "pad_token_id": 50256}
    labels = {"contradiction": 0, "neutral": 1, "entailment": 2}
    shape |= {"label2id": labels, "id2label": {number: label for label, number in labels.items()}}
    models = {}
    for kind, model_class in {
        "causal": GPT2ReproForCausalLM,
        "sequence": GPT2ReproForSequenceClassification,
        "token": GPT2ReproForTokenClassification,
    }.items():
        torch.manual_seed(0)
        models[kind] = model_class(GPT2ReproConfig(**shape)).eval()
        with torch.no_grad():
            for parameter in models[kind].parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        models[kind].save_pretrained(folder / kind)
        GPT2.hf().save_pretrained(folder / kind)
    return models, folder


@pytest.fixture(scope="module")
def expected(models):
    """Return the expected result of each case, computed with the classes of this process."""
    models, _ = models
    tokenizer = GPT2.hf()
    ids = checkpoint_cases.ids()

    @torch.no_grad()
    def logits(kind):
        return models[kind](ids).logits.flatten()[-50:].tolist()

    def own(task, kind, **arguments):
        return pipeline(task, models[kind], tokenizer=tokenizer, **arguments)

    with torch.no_grad():
        hidden_states = models["causal"].transformer(ids).last_hidden_state.flatten()[-50:].tolist()
        log_p = models["causal"](ids).logits[:, :-1].log_softmax(-1)
        nll = -log_p.gather(-1, ids[:, 1:, None]).mean()
    prompt, labels = checkpoint_cases.PROMPT, checkpoint_cases.LABELS
    text = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 50256, "return_full_text": False}
    zero_shot = own("zero-shot-classification", "sequence")(prompt, candidate_labels=labels)
    return {
        "AutoConfig": 2,
        "AutoModel": hidden_states,
        "AutoModelForCausalLM": logits("causal"),
        "AutoModelForSequenceClassification": logits("sequence"),
        "AutoModelForTokenClassification": logits("token"),
        "a new head": [1, 3, *models["causal"].transformer.wte.weight.flatten()[:20].tolist()],
        "from_config": [1, 3, 1, 5, 3],
        "label smoothing": (0.9 * nll - 0.1 * log_p.mean()).item(),
        "LoRA": [
            f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_{side}.default.weight"
            for layer in range(2)
            for side in "AB"
        ],
        "the project imported after": logits("sequence") * 2 + logits("token"),
        "the project imported before": logits("sequence") * 2 + logits("token") * 2,
        "text-generation": own("text-generation", "causal")(prompt, **text)[0]["generated_text"],
        "text-classification": checkpoint_cases.scores(own("text-classification", "sequence")(prompt, top_k=None)),
        "token-classification": checkpoint_cases.scores(own("token-classification", "token")(prompt)),
        "zero-shot-classification": [round(score, 6) for score in zero_shot["scores"]],
        "feature-extraction": hidden_states,
    }


@pytest.mark.parametrize("case", checkpoint_cases.CASES)
def test_checkpoint_works_without_the_project(case, models, expected, fresh, tmp_path):
    """Each case in a process of its own. test_train.py opens a run's checkpoint in a new one that is not forked."""
    if case == "LoRA" and importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    program = "import runpy, sys; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = fresh.run(program, checkpoint_cases.__file__, str(models[1]), case, str(ROOT), cwd=tmp_path)
    assert done.returncode == 0, done.output
    result = json.loads(done.output.splitlines()[-1])
    if case in ("LoRA", "text-generation"):
        assert result == expected[case]
    else:
        torch.testing.assert_close(torch.tensor(result), torch.tensor(expected[case]), atol=1e-5, rtol=1e-5)
    shown = done.output.lower()
    assert not any(words in shown for words in ("custom code", "not supported", "traceback", QUESTION)), shown
