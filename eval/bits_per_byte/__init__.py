"""
How well a model predicts a text: the loss of a token, and bits per byte, which do not depend on the tokenizer.

    task.py             the text or shards, and the windows they are scored in
    compression.py      the arithmetic
    bits_per_byte.py    the same as a metric: `evaluate.load("eval/bits_per_byte")`
"""
