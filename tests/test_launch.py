"""Launches whose main process makes a folder while the others wait: with light processes, without torch."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from tiny_run import ROOT, clean_environment

from common import launch

PROGRAM = """
import sys, time
from pathlib import Path
from common import launch
from common.errors import UserError

folder, seconds, launch._NOTE_SECONDS = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
launch._LINE_SECONDS = 0.2

def make():
    print("making", flush=True)
    time.sleep(abs(seconds))
    if seconds < 0:
        raise UserError("a bad text")
    folder.mkdir()

try:
    launch.make_once(folder, folder.exists, make)
except UserError as error:
    sys.exit(f"error: {error}")
print("trains", flush=True)
"""


@pytest.fixture
def start(tmp_path):
    """start(rank, seconds): a process of a launch that makes the folder in that time, or fails after -seconds."""
    processes = []

    def start(rank, seconds=0.0, *, port=29500, note_seconds=60, **environment):
        launched = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "::1", "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, tmp_path / "cache" / "book", str(seconds), str(note_seconds)],
                cwd=ROOT,
                env=clean_environment(tmp_path) | launched | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def outputs(*processes):
    return [process.communicate(timeout=20) for process in processes]


def test_one_process_makes_and_the_others_wait(start, tmp_path):
    others = [start(1, note_seconds=20), start(2, note_seconds=20)]
    done = outputs(start(0, 1.0, GROUP_WORLD_SIZE="2"), *others)
    assert [out.splitlines()[-1] for out, _ in done] == ["trains"] * 3
    assert [out.count("making\n") for out, _ in done] == [1, 0, 0]
    assert "several machines: " in done[0][0] and str(tmp_path / "cache") in done[0][0]
    assert "process 1 waits until" in done[1][0] and "waits" not in done[2][0]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".book.lock", "book"]


@pytest.mark.parametrize("how", ["fails", "interrupted", "killed"])
def test_the_others_end_with_the_main_process(start, how):
    main = start(0, -0.5 if how == "fails" else 60)
    others = [start(1), start(2)]
    main.stdout.readline()  # making
    time.sleep(0.5)
    for process in [main, *others] if how == "interrupted" else [main] if how == "killed" else []:
        process.send_signal(signal.SIGKILL if how == "killed" else signal.SIGINT)
    if how == "fails":
        main.wait(timeout=20)
    # A killed main process stays a zombie here, as under a launcher that does not look.
    begin = time.monotonic()
    codes = [process.wait(timeout=20) for process in others]
    assert time.monotonic() - begin < 2
    assert 0 not in codes
    if how != "interrupted":
        (_, first), (_, second) = outputs(*others)
        assert "the main process (RANK 0) has failed or was killed" in first and first.count("\n") == 1
        assert second == ""


def test_two_launches_with_the_same_text(start):
    first = start(0, 60, port=1)
    first.stdout.readline()
    second = [start(0, 0.3, port=2), start(1, port=2)]
    assert "another run makes" in second[0].stdout.readline()
    first.kill()  # its lock is free then, and its note does not concern the second launch
    done = outputs(*second)
    assert ["making" in out for out, _ in done] == [True, False]
    assert all(out.endswith("trains\n") for out, _ in done)


def test_no_sign_of_the_main_process(start):
    [(_, error)] = outputs(start(1, note_seconds=0.3))
    assert "Several machines need a folder that they share" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("note", "expected"),
    [
        (None, "missing"),
        ({"state": "failed", "time": 1000}, "ended"),
        ({"state": "failed", "time": 900}, "missing"),  # an earlier launch's
        ({"state": "making", "time": 1000}, "making"),
        ({"state": "making", "time": 900}, "making"),  # this process started late
        ({"state": "making", "time": 1000, "started": 5.0}, "ended"),  # another process has its id now
        ({"state": "making", "time": 900, "started": 5.0}, "missing"),
        ({"state": "making", "time": 900, "started": 5.0, "machine": "another"}, "making"),
    ],
)
def test_what_a_note_says(note, expected, tmp_path):
    path = tmp_path / "note.json"
    if note is not None:
        writer = {"machine": launch._machine(), "pid": os.getpid(), "started": psutil.Process().create_time()}
        path.write_text(json.dumps(writer | note))
    assert launch._state(path, started=1000.0) == expected


def test_a_process_without_a_launcher_writes_no_note(tmp_path, monkeypatch):
    """Nobody waits for it, and a second one would write the same file."""
    monkeypatch.delenv("RANK", raising=False)
    notes = []
    launch.make_once(tmp_path / "book", lambda: False, lambda: notes.extend(tmp_path.glob("*.json")))
    assert notes == []
