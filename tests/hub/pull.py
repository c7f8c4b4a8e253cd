"""Open pushed models in a process without this project, and save their logits: pull.py OUTPUT_PREFIX USER/NAME ..."""

import sys

for name in ("modeling_gpt2repro", "accelerate", "datasets", "tiktoken"):
    sys.modules[name] = None  # an import fails as if the package were not installed

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

prefix, *names = sys.argv[1:]
for name in names:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules")
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    ids = tokenizer("Hello, I'm a language model,", return_tensors="pt").input_ids
    torch.save(model(ids).logits.detach(), prefix + name.replace("/", "-"))
