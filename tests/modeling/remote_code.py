# ruff: noqa: E402 (packages are blocked before the imports)
"""Load a checkpoint with its own code, without this project and without any optional package.

    python remote_code.py CHECKPOINT OUT

CHECKPOINT also has the file input_ids.json. Writes the logits to OUT/logits.safetensors and the model to OUT/again.
"""

import json
import sys
from pathlib import Path

OPTIONAL = ("accelerate", "datasets", "tiktoken", "evaluate", "peft", "torchao", "jsonargparse")
for package in ("modeling_gpt2repro", *OPTIONAL):
    sys.modules[package] = None  # makes the import fail

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

checkpoint, out = map(Path, sys.argv[1:])
input_ids = torch.tensor(json.loads((checkpoint / "input_ids.json").read_text()))
model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
with torch.no_grad():
    save_file({"logits": model(input_ids).logits}, out / "logits.safetensors")
assert model.generate(input_ids[:, :4], max_new_tokens=3, pad_token_id=50256).shape[1] == 7
loss = model.train()(input_ids, labels=input_ids).loss
loss.backward()
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids, labels=input_ids).loss
torch.testing.assert_close(compiled, loss)
model.save_pretrained(out / "again")
