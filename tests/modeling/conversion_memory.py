"""Print the size of a GPT-2, and the memory of one and of two copies divided by that size, as JSON."""

import json
import re
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_gpt2repro import GPT2ReproForCausalLM

torch.set_num_threads(1)


def memory(field: str) -> int:
    """Read bytes from /proc, not from getrusage, where a process inherits the peak of its parent."""
    return 1024 * int(re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


before = memory("VmRSS")
gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=20, n_embd=640, n_head=10))
size = sum(p.numel() * p.element_size() for p in gpt2.parameters())
one = memory("VmRSS") - before
model = GPT2ReproForCausalLM.from_gpt2(gpt2)
two = memory("VmHWM") - before
print(json.dumps({"size": size, "one": one / size, "two": two / size}))
