"""Batches: every window once, the same for any number of processes, and any step directly."""

import hashlib
import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError
from data.loader import WindowLoader, validation_batches
from data.permutation import Permutation
from data.shards import Shard
from data.tokenizer import EOT

SHARDS = st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(lambda sizes: max(sizes) > 8)


def make(sizes):
    """Make shards whose tokens are all different, so that the tokens identify a window."""
    ends = np.cumsum([0, *sizes])
    return [Shard(np.arange(a, b, dtype=np.uint16)) for a, b in itertools.pairwise(ends)]


def windows_of(shards, seq_len):
    """Return all windows, by slicing: the slow reference."""
    return [
        tuple(shard.tokens[i : i + seq_len + 1].tolist())
        for shard in shards
        for i in range(0, len(shard) - seq_len, seq_len)
    ]


def rows(batch):
    inputs, targets, _ = batch
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    return [(*a, b[-1]) for a, b in zip(inputs.tolist(), targets.tolist(), strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    sizes=SHARDS,
    seq_len=st.integers(1, 8),
    accumulation=st.integers(1, 3),
    world_size=st.sampled_from([1, 2, 3, 8]),
    seed=st.integers(0, 2**32 - 1),
    order=st.sampled_from(["shuffled", "sequential"]),
)
def test_epoch_has_each_window_once_for_any_world_size(sizes, seq_len, accumulation, world_size, seed, order):
    shards = make(sizes)
    expected = sorted(windows_of(shards, seq_len))
    batch_size = accumulation * world_size
    options = {"seq_len": seq_len, "batch_size": batch_size, "seed": seed, "order": order}
    alone = WindowLoader([shards], **options)
    assert alone.counts == [len(expected)]
    assert alone.epochs(3) == [3 * batch_size / len(expected)]
    ranks = [WindowLoader([shards], **options, rank=r, world_size=world_size) for r in range(world_size)]
    stream = []
    for step in range(2 * len(expected) // batch_size + 1):
        batches = [rank.batch(step) for rank in ranks]
        together = [row for batch in batches for row in rows(batch)]
        assert together == rows(alone.batch(step))
        assert together == [row for batch in batches for micro_batch in batch.split(1) for row in rows(micro_batch)]
        stream += together
    n = len(expected)
    assert sorted(stream[:n]) == expected
    assert sorted(stream[n : 2 * n]) == expected
    if order == "sequential":
        assert stream[:n] == stream[n : 2 * n] == windows_of(shards, seq_len)


def test_any_step_can_be_read_directly():
    shards = make([500, 300])
    options = {"seq_len": 4, "batch_size": 12, "seed": 3}
    walked = WindowLoader([shards], **options)
    batches = [walked.batch(step) for step in range(60)]  # three and a half epochs
    for step in (59, 0, 17, 16, 33):
        assert rows(WindowLoader([shards], **options).batch(step)) == rows(batches[step])
        ahead = list(WindowLoader([shards], **options).batches(step, min(60, step + 7)))  # resumed there, read ahead
        assert [rows(batch) for batch in ahead] == [rows(batch) for batch in batches[step : step + 7]]


def test_shuffled_order_never_changes():
    """If this order changed, resumed runs would train on other data. Golden values of 2026-11-24."""
    loader = WindowLoader([make([81])], seq_len=4, batch_size=5, seed=1337)
    golden = [[17, 10, 4, 16, 19], [9, 14, 6, 8, 3], [7, 18, 4, 2, 8]]
    assert [loader.global_batch(step).tolist() for step in (0, 3, 4)] == golden


def test_every_order_of_one_source_never_changes():
    """Golden value of 2026-11-27, of the loader before it knew mixtures."""
    digest = hashlib.sha256()
    for order in ("shuffled", "sequential", "lecture"):
        loader = WindowLoader([make([500, 301, 777])], seq_len=4, batch_size=24, seed=1337, order=order)
        for step in (0, 1, 2, 15, 16, 17, 18, 19072, 10**6):
            digest.update(loader.global_batch(step).astype("<i8").tobytes())
            digest.update(loader.batch(step).inputs.numpy().astype("<i8").tobytes())
    assert digest.hexdigest() == "1de0dfe8177455f7f171fe97c1d3508e7d01e71fd998d0c6b4feb4f482ef654d"


class LectureLoader:
    """The lecture's loader for one GPU, written from its description as an independent reference."""

    def __init__(self, shards, rows, seq_len, gpu):
        self.shards, self.unit, self.seq_len, self.gpu = shards, rows * seq_len, seq_len, gpu
        self.shard, self.position = 0, self.unit * gpu

    def next(self):
        tokens = self.shards[self.shard].tokens
        window = tokens[self.position : self.position + self.unit + 1].tolist()
        self.position += 8 * self.unit
        if self.position + 8 * self.unit + 1 > len(tokens):
            self.shard, self.position = (self.shard + 1) % len(self.shards), self.unit * self.gpu
        return [tuple(window[i : i + self.seq_len + 1]) for i in range(0, self.unit, self.seq_len)]


@pytest.mark.parametrize("rows_of_a_gpu", [1, 3])
def test_lecture_order_equals_the_8_gpus_of_the_lecture(rows_of_a_gpu):
    """Compare token by token, over shards that GPUs finish at different steps, and past the end of the data."""
    shards = make([1000, 1001, 850, 1337, 769])
    gpus = [LectureLoader(shards, rows_of_a_gpu, 4, gpu) for gpu in range(8)]
    options = {"seq_len": 4, "batch_size": 8 * rows_of_a_gpu, "seed": 1, "order": "lecture"}
    alone = WindowLoader([shards], **options)
    two = [WindowLoader([shards], **options, rank=rank, world_size=2) for rank in range(2)]
    apart = False
    for step in range(400):
        expected = [row for gpu in gpus for row in gpu.next()]
        assert rows(alone.batch(step)) == expected
        assert rows(two[0].batch(step)) + rows(two[1].batch(step)) == expected
        apart |= len({gpu.shard for gpu in gpus}) > 1
    assert apart


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097, 99_999])
def test_permutation_has_each_element_once(size):
    assert sorted(Permutation(size, "key")(np.arange(size)).tolist()) == list(range(size))


def test_permutations_look_random():
    """Over many keys each element is at each position equally often, and neighbors are separated."""
    size, keys = 10, 4000
    found = np.array([Permutation(size, str(key))(np.arange(size)) for key in range(keys)])  # [keys, positions]
    counts = np.array([np.bincount(found[:, position], minlength=size) for position in range(size)])
    chi_squared = ((counts - keys / size) ** 2 / (keys / size)).sum()
    assert chi_squared < 81 + 5 * (2 * 81) ** 0.5  # 9 x 9 degrees of freedom, five standard deviations
    order = Permutation(100_000, "key")(np.arange(100_000))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.016  # five standard deviations
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.016
    assert np.mean(np.abs(np.diff(order)) == 1) < 1e-3


def test_any_step_of_ten_billion_tokens_is_read_directly():
    """A list of all windows of 10B tokens is never made."""
    loader = WindowLoader([make([81])], seq_len=4, batch_size=512, seed=1)
    loader.counts = [9_765_625]
    for step in (0, 19_072, 10**6):
        batch = loader.global_batch(step)
        assert len(set(batch.tolist())) == 512
        assert 0 <= batch.min() < batch.max() < 9_765_625


def test_epochs_and_seeds_differ():
    options = {"seq_len": 4, "batch_size": 100}
    first = WindowLoader([make([401])], **options, seed=1)
    assert not np.array_equal(first.global_batch(0), first.global_batch(1))
    assert not np.array_equal(first.global_batch(0), WindowLoader([make([401])], **options, seed=2).global_batch(0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq_len": 100}, r"100 training tokens.*100 \+ 1"),
        ({"world_size": 3}, "10 windows.*3 processes"),
        ({"order": "random"}, "order must be one of shuffled, sequential, lecture, got 'random'"),
        ({"order": "lecture"}, "order 'lecture' needs a batch divisible by 8"),
        ({"order": "lecture", "batch_size": 16}, "order 'lecture' .* 1 shard.s. have less than two batches"),
        ({"boundary": "x"}, "boundary must be one of ignore, document, got 'x'"),
    ],
)
def test_invalid_settings_are_errors(options, words):
    with pytest.raises(DataError, match=words):
        WindowLoader([make([100])], **{"seq_len": 4, "batch_size": 10, "seed": 0, **options})


def test_token_outside_the_vocabulary_is_an_error_of_the_batch():
    tokens = np.arange(100, dtype=np.uint16)
    tokens[41] = 60000
    loader = WindowLoader([[Shard(tokens)]], seq_len=4, batch_size=24, seed=0)
    with pytest.raises(DataError, match="token 41 is 60000"):
        next(loader.batches(0, 3))


def test_closing_the_iterator_stops_the_reader_thread():
    before = threading.active_count()
    batches = WindowLoader([make([500])], seq_len=4, batch_size=2, seed=0).batches(0, 10**6)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


@settings(max_examples=100, deadline=None)
@given(data=st.data(), seq_len=st.integers(1, 12))
def test_position_ids_restart_at_each_document(data, seq_len):
    tokens = data.draw(st.lists(st.sampled_from([EOT, 1, 2]), min_size=20, max_size=60))
    shard = Shard(np.array(tokens, dtype=np.uint16))
    loader = WindowLoader([[shard]], seq_len=seq_len, batch_size=1, seed=0, boundary="document")
    for step in range(loader.counts[0]):
        batch = loader.batch(step)
        expected, position = [], -1
        for token in batch.inputs[0].tolist():
            position = 0 if token == EOT else position + 1
            expected.append(position)
        assert batch.position_ids[0].tolist() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_are_in_pinned_memory():
    batch = next(WindowLoader([make([500])], seq_len=4, batch_size=2, seed=0).batches(0, 3, pin_memory=True))
    assert batch.inputs.is_pinned()
    assert batch.targets.is_pinned()
    assert batch.to(torch.device("cuda")).inputs.is_cuda


@settings(max_examples=50, deadline=None)
@given(sizes=SHARDS, seq_len=st.integers(1, 8), world_size=st.integers(1, 4), limit=st.integers(8, 200))
def test_each_validation_window_on_exactly_one_process(sizes, seq_len, world_size, limit):
    shards = make(sizes)
    seen = []
    options = {"seq_len": seq_len, "batch_size": 2, "max_tokens": limit, "world_size": world_size}
    for rank in range(world_size):
        for batch in validation_batches(shards, **options, rank=rank):
            assert 1 <= len(batch.inputs) <= 2
            seen += rows(batch)
    assert sorted(seen) == sorted(windows_of(shards, seq_len)[: limit // seq_len])


def test_too_few_validation_tokens_are_an_error():
    with pytest.raises(DataError, match="val_tokens is 3"):
        list(validation_batches(make([100]), seq_len=4, batch_size=2, max_tokens=3))
