"""Use cases of a checkpoint folder, for a process that cannot import this project.

    python checkpoint_cases.py FOLDER CASE PROJECT

FOLDER has the checkpoints "causal", "sequence" and "token" (see test_checkpoint_cases.py). The last line of the output
is the result of the case as JSON (numbers or names).
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import pipeline

PROMPT = "The cat sat on the"
LABELS = ["animals", "money"]
REMOTE = {"trust_remote_code": True}


def load(auto_class, kind, **arguments):
    model = getattr(transformers, auto_class).from_pretrained(FOLDER / kind, **REMOTE, **arguments).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    return model


def ids():
    return torch.tensor([[464, 3797, 3332, 319, 262]])


def logits(auto_class, kind):
    with torch.no_grad():
        return load(auto_class, kind)(ids()).logits.flatten()[-50:].tolist()


def config():
    return transformers.AutoConfig.from_pretrained(FOLDER / "causal", **REMOTE).n_layer


def hidden_states():
    with torch.no_grad():
        return load("AutoModel", "causal")(ids()).last_hidden_state.flatten()[-50:].tolist()


def new_head():
    """Load a language model as a classifier: the head is new, the trunk comes from the checkpoint."""
    head = load("AutoModelForSequenceClassification", "causal", num_labels=3)
    return [*head(ids()).logits.shape, *head.transformer.wte.weight.flatten()[:20].tolist()]


def from_config():
    shapes = []
    for name in ("SequenceClassification", "TokenClassification"):
        settings = transformers.AutoConfig.from_pretrained(FOLDER / "causal", num_labels=3, **REMOTE)
        head = getattr(transformers, f"AutoModelFor{name}").from_config(settings, **REMOTE)
        shapes += head(ids()).logits.shape
    return shapes


def label_smoothing():
    """Compute Trainer's loss for a model with custom code."""
    arguments = transformers.TrainingArguments(
        tempfile.gettempdir(), label_smoothing_factor=0.1, report_to=[], use_cpu=True
    )
    trainer = transformers.Trainer(load("AutoModelForCausalLM", "causal"), arguments)
    return trainer.compute_loss(trainer.model, {"input_ids": ids(), "labels": ids()}).item()


def lora():
    """Create a LoRA adapter with PEFT's defaults for GPT-2."""
    model = load("AutoModelForCausalLM", "causal")
    import peft

    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    return sorted(name for name, parameter in adapted.named_parameters() if parameter.requires_grad)


def project_imported_after():
    """Load a checkpoint with its own code, then import the project and load with its classes."""
    remote = logits("AutoModelForSequenceClassification", "sequence")
    sys.path.insert(0, PROJECT)
    import modeling_gpt2repro

    model = modeling_gpt2repro.GPT2ReproForSequenceClassification.from_pretrained(FOLDER / "sequence")
    assert type(model).__module__ == "modeling_gpt2repro.modeling_gpt2repro"
    auto = transformers.AutoModelForTokenClassification.from_pretrained(FOLDER / "token")
    assert type(auto).__module__ == "modeling_gpt2repro.modeling_gpt2repro"
    with torch.no_grad():
        own = [each.eval()(ids()).logits.flatten()[-50:].tolist() for each in (model, auto)]
    return [*remote, *own[0], *own[1]]


def project_imported_before():
    """Import the project, then load checkpoints with and without their own code."""
    sys.path.insert(0, PROJECT)
    import modeling_gpt2repro

    classes = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification")
    results = []
    for auto_class, kind in zip(classes, ("sequence", "token"), strict=True):
        for arguments in ({}, REMOTE):
            model = getattr(transformers, auto_class).from_pretrained(FOLDER / kind, **arguments)
            assert isinstance(model.config, modeling_gpt2repro.GPT2ReproConfig) or arguments
            results += model.eval()(ids()).logits.flatten()[-50:].tolist()
    return results


def scores(results):
    return [round(float(result["score"]), 6) for result in results]


def text_generation():
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 50256, "return_full_text": False}
    return pipeline("text-generation", str(FOLDER / "causal"), **REMOTE)(PROMPT, **settings)[0]["generated_text"]


def text_classification():
    return scores(pipeline("text-classification", str(FOLDER / "sequence"), **REMOTE)(PROMPT, top_k=None))


def token_classification():
    return scores(pipeline("token-classification", str(FOLDER / "token"), **REMOTE)(PROMPT))


def zero_shot_classification():
    classify = pipeline("zero-shot-classification", str(FOLDER / "sequence"), **REMOTE)
    return [round(score, 6) for score in classify(PROMPT, candidate_labels=LABELS)["scores"]]


def feature_extraction():
    features = pipeline("feature-extraction", str(FOLDER / "causal"), **REMOTE)(PROMPT)
    return torch.tensor(features).flatten()[-50:].tolist()


CASES = {
    "AutoConfig": config,
    "AutoModel": hidden_states,
    "AutoModelForCausalLM": lambda: logits("AutoModelForCausalLM", "causal"),
    "AutoModelForSequenceClassification": lambda: logits("AutoModelForSequenceClassification", "sequence"),
    "AutoModelForTokenClassification": lambda: logits("AutoModelForTokenClassification", "token"),
    "a new head": new_head,
    "from_config": from_config,
    "label smoothing": label_smoothing,
    "LoRA": lora,
    "the project imported after": project_imported_after,
    "the project imported before": project_imported_before,
    "text-generation": text_generation,
    "text-classification": text_classification,
    "token-classification": token_classification,
    "feature-extraction": feature_extraction,
    "zero-shot-classification": zero_shot_classification,
}


if __name__ == "__main__":
    FOLDER, case, PROJECT = Path(sys.argv[1]), *sys.argv[2:]
    assert not any("gpt2repro" in name for name in sys.modules)
    print(json.dumps(CASES[case]()))
