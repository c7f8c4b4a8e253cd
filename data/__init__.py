"""Training data: text -> tokens -> shards -> batches.

sources.py          documents from the offline sample and from your own files
parquet.py          .parquet files, here or on the Hub, in pieces
hub.py              data sets on the Hugging Face Hub
corpora.py          well-known corpora by name
pretokenized.py     shards made by others
nanogpt.py          nanoGPT's data sets of characters
tokenizer.py        GPT-2's BPE by tiktoken, or any fast tokenizer of transformers
train_tokenizer.py  python -m data.tokenizer train
shards.py           the shard file format: write, read, check
manifest.py         manifest.json, which describes a folder of shards
prepare.py          python -m data.prepare SOURCE --out DIR
tasks.py            tokenize tasks of 8 MB, in several processes
plan.py             the plan of a preparation, and the joining of finished tasks to shards
cluster.py          the tasks of a preparation on SLURM or Ray, by datatrove
verify.py           python -m data.verify DIR
windows.py          windows of shards, and batches of them
mixture.py          the shares of several folders in each step
loader.py           seeded batches that depend on the step alone
permutation.py      the shuffled order of the windows
text_cache.py       train.py --text: the folder that a text is prepared into
ngram.py            the unigram and bigram losses of a corpus, to compare a model with
"""

from common.errors import UserError


class DataError(UserError):
    """An error about the data that the user can fix."""
