"""Mixtures: exact shares at every step, for any number of processes, any step directly."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader import make, rows, windows_of

from data import DataError, mixture
from data.loader import WindowLoader
from data.manifest import dataset_fingerprint, open_split
from data.mixture import Shares, floor_sum, mixture_fingerprint, normalize
from data.shards import write_shard

WEIGHTS = st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(weights=WEIGHTS, batch_size=st.integers(1, 2048), step=st.integers(0, 10**9))
def test_every_step_has_the_shares_to_one_window(weights, batch_size, step):
    shares = Shares(weights, batch_size)
    before, after = shares.windows_before(step), shares.windows_before(step + 1)
    assert sum(before) == step * batch_size and sum(after) == (step + 1) * batch_size
    for share, start, end in zip(normalize(weights), before, after, strict=True):
        assert abs(end - start - batch_size * share) < 1
        assert abs(start - step * batch_size * share) < 8  # the rounding averages out


@settings(max_examples=100, deadline=None)
@given(n=st.integers(0, 30), m=st.integers(1, 40), a=st.integers(0, 60), b=st.integers(-90, 90))
def test_floor_sum(n, m, a, b):
    assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


def test_weights_are_the_decimal_numbers_that_were_written():
    assert normalize([0.7, 0.3]) == normalize([7.0, 3.0]) == normalize([0.07, 0.03])
    # Steps of 10 windows need no rounding; with 0.7 as a binary fraction, some had 8 and 2.
    shares = Shares([0.7, 0.2, 0.1], 10)
    assert all(shares.windows_before(step) == [7 * step, 2 * step, step] for step in range(1000))


def mixed(sizes=(300, 500, 120), **options):
    tokens = make(sizes)
    options = {"weights": [5.0, 3.0, 2.0], "seq_len": 4, "batch_size": 24, "seed": 3, **options}
    return WindowLoader([[shard] for shard in tokens], **options), [windows_of([shard], 4) for shard in tokens]


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_each_source_is_read_in_its_own_epochs(order):
    loader, expected = mixed(order=order)
    read = [[], [], []]
    for step in range(60):
        batch = rows(loader.batch(step))
        windows = loader.global_batch(step)
        for source, (first, end) in enumerate(pairwise(np.cumsum([0, *loader.counts]).tolist())):
            read[source] += [row for row, window in zip(batch, windows, strict=True) if first <= window < end]
    for windows, source, epochs in zip(read, expected, loader.epochs(60), strict=True):
        assert len(windows) / len(source) == epochs
        times = Counter(windows)
        assert set(times) <= set(source)
        assert all(int(epochs) <= times[window] <= int(epochs) + 1 for window in source)


def test_order_does_not_depend_on_processes_or_history():
    alone, _ = mixed()
    walked = [rows(alone.batch(step)) for step in range(40)]
    for world_size in (2, 3, 8):
        ranks = [mixed(rank=rank, world_size=world_size)[0] for rank in range(world_size)]
        assert [row for loader in ranks for row in rows(loader.batch(17))] == walked[17]
    assert [rows(batch) for batch in mixed()[0].batches(31, 40)] == walked[31:]
    assert rows(mixed(seed=4)[0].batch(0)) != walked[0]
    # Rows of the sources are interleaved, so that every micro-batch has some of each.
    window = np.concatenate([alone.global_batch(step) for step in range(40)]).reshape(-1, 24)
    source = np.searchsorted(np.cumsum(alone.counts), window, side="right")
    assert (np.abs((source[:, :12] == 0).mean(axis=0) - 0.5) < 0.35).all()
    assert len(alone.global_batch(10**6)) == 24


def test_mixed_order_never_changes():
    """If this order changed, resumed runs would train on other data. Golden values of 2026-11-27."""
    loader, _ = mixed(batch_size=8, seed=1337)
    golden = [
        [48, 44, 181, 154, 226, 182, 58, 34],
        [5, 80, 225, 204, 148, 57, 4, 25],
        [198, 122, 68, 1, 127, 220, 60, 7],
    ]
    assert [loader.global_batch(step).tolist() for step in (0, 1, 10**6)] == golden


@pytest.fixture
def folders(tmp_path):
    for name, count in (("a", 500), ("b", 300)):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "x_train_000000.bin", np.arange(count))
        write_shard(tmp_path / name / "x_val_000001.bin", np.arange(50))
    return str(tmp_path / "a"), str(tmp_path / "b")


def test_origins_name_the_folder(folders):
    loader = WindowLoader(
        [open_split(folder, "train") for folder in folders], weights=[1.0, 1.0], seq_len=4, batch_size=4, seed=0
    )
    origins = loader.window_origins(0)
    assert sorted(origin["folder"] for origin in origins) == [folders[0]] * 2 + [folders[1]] * 2
    assert set(origins[0]) == {"folder", "shard", "first_token"}


def test_fingerprint_has_content_and_weights_but_no_names(folders, tiny, tmp_path):
    a, b = folders
    assert mixture_fingerprint({a: 2.0}) == dataset_fingerprint(a)
    made = mixture_fingerprint({a: 7.0, b: 3.0})
    assert (made["train_tokens"], made["val_tokens"], made["mix_weights"]) == (800, 100, [0.7, 0.3])
    prepared = str(tiny.parent / "shards")
    assert mixture_fingerprint({a: 1.0, prepared: 1.0})["sources"][prepared]["manifest_sha256"] is not None
    assert made["sources"][b] == {"weight": 0.3, **dataset_fingerprint(b)}
    (tmp_path / "b").rename(tmp_path / "c")
    moved = mixture_fingerprint({a: 0.7, str(tmp_path / "c"): 0.3})
    assert all(moved[key] == made[key] for key in ("mix_weights", "train_tokens", "train_sha256"))
    assert mixture_fingerprint({str(tmp_path / "c"): 0.7, a: 0.3})["train_sha256"] != made["train_sha256"]


def test_sources_that_cannot_be_mixed_are_errors(folders, monkeypatch):
    with pytest.raises(DataError, match="order 'lecture' reads one folder"):
        mixed(order="lecture")
    with pytest.raises(DataError, match="3 training tokens"):
        mixed(sizes=(300, 3, 120))
    fingerprint = mixture.dataset_fingerprint
    monkeypatch.setattr(
        mixture, "dataset_fingerprint", lambda folder: {**fingerprint(folder), "tokenizer_sha256": folder}
    )
    with pytest.raises(DataError, match="made with different tokenizers"):
        mixture_fingerprint(dict.fromkeys(folders, 1.0))


def test_validation_text_is_never_trained_on(tiny):
    """By content, in an epoch of a mixture: stretches of 24 tokens, a few of which are the same everywhere."""
    train, val = (open_split(tiny.parent / "shards", split) for split in ("train", "val"))
    loader = WindowLoader([train, train], weights=[3.0, 1.0], seq_len=32, batch_size=8, seed=1)
    trained = {
        tuple(row[i : i + 24])
        for step in range(loader.counts[0] // 6 + 1)
        for row in rows(loader.batch(step))
        for i in range(len(row) - 23)
    }
    assert len(trained) > 3000
    validated = [tuple(shard[i : i + 24].tolist()) for shard in val for i in range(len(shard) - 23)]
    assert len(validated) > 1000
    assert sum(row in trained for row in validated) < 0.05 * len(validated)
