"""Preparations in processes of their own: killed, interrupted, and measured."""

import contextlib
import gzip
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from shard_folders import content_of, jsonl

PROGRAM = Path(__file__).with_name("prepare_as_in_a_terminal.py")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="kills processes and reads /proc")


@pytest.fixture(scope="module")
def big(sample, tmp_path_factory):
    """Return a folder of 8 files of 3 MB, one of them compressed, and what one process makes of them, uninterrupted."""
    folder = tmp_path_factory.mktemp("big")
    documents = itertools.cycle(sample)
    for number in range(7):
        jsonl(folder / f"{number}.jsonl", [f"{number} {text}" for text in itertools.islice(documents, 700)])
    (folder / "8.jsonl.gz").write_bytes(gzip.compress((folder / "0.jsonl").read_bytes()))  # read in pieces
    process = start(folder, folder / "uninterrupted", num_proc=1)
    assert process.wait(timeout=120) == 0
    # Renamed afterwards, since the name of --out is the prefix of the file names.
    (folder / "uninterrupted").rename(folder / "result")
    return folder, folder / "result"


def start(files, out, num_proc=2):
    arguments = ["files", *sorted(files.glob("*.jsonl*")), "--out", out, "--num_proc", num_proc]
    arguments += ["--shard_tokens", 300_000]
    return subprocess.Popen(
        [sys.executable, PROGRAM, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def processes(option, process, pattern=""):
    """Return the children (-P) of a process, or the processes of its group (-g), whose command has a pattern."""
    command = ["pgrep", option, str(process.pid), "-f", pattern]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_all_end(process):
    """Wait until no process of the preparation runs."""
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in processes("-g", process)):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.05)


def num_done(out):
    """Return the number of finished tasks and parts."""
    return len(list(out.glob("parts/*.json"))) + len(list(out.glob("tasks/*.json")))


@linux_only
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_random_kills_do_not_change_the_bytes(big, tmp_path, seed):
    files, result = big
    out, rng = tmp_path / "uninterrupted", random.Random(seed)
    kills = 0
    for _ in range(30):
        process = start(files, out)
        try:
            if kills < 4:
                goal = rng.randrange(0, 4) + num_done(out)
                while process.poll() is None and num_done(out) < goal:
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 0.5))
                workers = processes("-P", process, "spawn_main")  # not the resource tracker
                victims = rng.choice([[process.pid], [process.pid, *workers], *([worker] for worker in workers)])
                kills += process.poll() is None
                for victim in victims:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(victim, signal.SIGKILL)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        if process.returncode == 0:
            break
        assert process.returncode in (2, -signal.SIGKILL), errors
        assert "Traceback" not in errors
        assert_all_end(process)
    assert kills >= 1
    assert content_of(out) == content_of(result)  # and no temporary files


@linux_only
@pytest.mark.parametrize("times", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_interrupts_at_random_moments_end_in_two_seconds_and_keep_parts(big, tmp_path, times):
    """Interrupt the main process alone, all processes as a terminal does, or all of them twice."""
    files, result = big
    rng = random.Random(times)
    seconds = []
    for attempt in range(times):
        out = tmp_path / str(attempt) / "uninterrupted"
        process = start(files, out)
        try:
            while process.poll() is None and not out.exists():
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1))
            begin = time.monotonic()
            number = rng.choice([signal.SIGINT, signal.SIGTERM])
            sends = rng.choice([[os.kill], [os.killpg], [os.killpg, os.killpg]])
            for send in sends:
                with contextlib.suppress(ProcessLookupError):
                    send(process.pid, number)
                time.sleep(0.01)
            _, errors = process.communicate(timeout=60)
            seconds.append(time.monotonic() - begin)
        finally:
            process.kill()
        if process.returncode == 0:
            continue  # finished before
        if number == signal.SIGINT:
            assert process.returncode in (130, -number)  # -SIGINT, a shell's 130: the second one came as Python exited
            assert errors.startswith("interrupted"), errors
            assert "Traceback" not in errors
            assert errors.count("\n") <= len(sends), errors
            assert ("tasks are kept in" in errors) == (num_done(out) > 0) or len(sends) == 2
        else:
            assert process.returncode == -number, errors
        assert_all_end(process)
    print(f"{times} interrupts: median {statistics.median(seconds):.2f} s, maximum {max(seconds):.2f} s to end")
    assert max(seconds) < 2
    process = start(files, out)
    assert process.wait(timeout=60) == 0
    assert content_of(out) == content_of(result)


@linux_only
def test_interrupt_does_not_wait_for_a_large_document(tmp_path):
    jsonl(tmp_path / "0.jsonl", ["".join(f"{number} words of a book\n" for number in range(3_000_000))])
    process = start(tmp_path, tmp_path / "out")
    try:
        while not (tmp_path / "out").exists():
            time.sleep(0.01)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=2)
    finally:
        process.kill()
    assert process.returncode == 130, errors


@linux_only
@pytest.mark.parametrize(
    "kind", ["txt", "jsonl.gz", *(pytest.param(k, marks=pytest.mark.slow) for k in ("book.txt", "parquet"))]
)
def test_memory_does_not_grow_with_the_input(tmp_path, kind):
    """Compare the peak for 200 MB of text with that for 20 MB; Arrow alone has buffers of up to 130 MB."""
    pytest.importorskip("gigatoken")
    text = "".join(f"{i % 9973}word " for i in range(7_000))
    peaks = []
    for documents in (300, 3000):
        texts = (f"{number} {text}" for number in range(documents))
        path = tmp_path / f"{documents}.{kind}"
        if kind.endswith("txt"):
            path.write_text(("\n--\n" if kind == "txt" else "\n").join(texts))
        elif kind == "parquet":
            parquet.write_table(pyarrow.table({"text": list(texts)}), path, use_dictionary=False)  # one row group
        else:
            with gzip.open(path, "wt", compresslevel=1) as file:
                file.writelines(f"{json.dumps(text)}\n" for text in texts)
        options = {"separator": "\n--\n", "val_fraction": 0.1, "num_proc": 1, "shard_tokens": 2_000_000}
        if kind == "book.txt":
            del options["separator"]
        options |= {"tokenizer_backend": "gigatoken", "out": tmp_path / f"{documents}"}
        done = subprocess.run(
            [sys.executable, PROGRAM, "files", path, *(f"--{name}={value}" for name, value in options.items())],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TASK_BYTES": "8_000_000"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]) // 1024)
    assert peaks[1] < peaks[0] + (150 if kind == "parquet" else 50), peaks
    assert peaks[1] < 450
