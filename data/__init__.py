"""
What the model is trained on: text -> tokens -> shards -> batches.

    sources.py        where documents come from: the offline sample, your own files
    hub.py            data sets on the Hugging Face Hub, whatever the network does
    pretokenized.py   shards that others have made
    tokenizer.py      GPT-2's BPE, twice: tiktoken for speed, a Hugging Face tokenizer for the checkpoint
    encode.py         records to tokens, over several processes
    shards.py         the shard file format: write, read, check
    manifest.py       what a folder of shards holds
    prepare.py        python -m data.prepare SOURCE --out DIR
    verify.py         python -m data.verify DIR
    loader.py         seeded batches that depend on the step and on nothing else
    ngram.py          the unigram and bigram losses of a corpus, to compare a model with
"""

from common.errors import UserError


class DataError(UserError):
    """An error about the data that the user can fix."""
