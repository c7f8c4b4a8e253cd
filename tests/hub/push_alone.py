"""Push a checkpoint with transformers' own push_to_hub: push_alone.py FOLDER USER/NAME"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_gpt2repro  # noqa: F401

folder, name = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(folder).push_to_hub(name, private=True)
AutoTokenizer.from_pretrained(folder).push_to_hub(name)
