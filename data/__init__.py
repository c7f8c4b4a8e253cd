"""
What the model is trained on: text -> tokens -> shards -> batches.

    sources.py     where documents come from: the offline sample, your own files; hub.py: data sets on the Hub
    tokenizer.py   GPT-2's BPE, twice: tiktoken for speed, a Hugging Face tokenizer for the checkpoint
    shards.py      the shard file format and the manifest: write, read, check
    prepare.py     python -m data.prepare sample|files ... --out DIR
    loader.py      seeded batches that depend on the step and on nothing else
    ngram.py       the unigram and bigram losses of a corpus, to compare a model with
"""


class DataError(ValueError):
    """Something the user can mend; the commands show its message on one line, without a traceback."""
