"""Launches whose main process makes a folder while the others wait: with light processes, without torch."""

import signal
import subprocess
import sys
import time

import psutil
import pytest
from tiny_run import ROOT, clean_environment

PROGRAM = """
import sys, time
from pathlib import Path
from common import launch
from common.errors import UserError

folder, seconds, launch._PATIENCE_SECONDS = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
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

    def start(rank, seconds=0.0, *, port=29500, patience=60, **environment):
        launched = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "::1", "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, tmp_path / "cache" / "book", str(seconds), str(patience)],
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
    others = [start(1, patience=20), start(2, patience=20)]
    done = outputs(start(0, 1.0, GROUP_WORLD_SIZE="2"), *others)
    assert [out.splitlines()[-1] for out, _ in done] == ["trains"] * 3
    assert [out.count("making\n") for out, _ in done] == [1, 0, 0]
    assert "several machines: " in done[0][0] and str(tmp_path / "cache") in done[0][0]
    assert "process 1 waits until" in done[1][0] and "waits" not in done[2][0]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".book.lock", "book"]


@pytest.mark.parametrize("how", ["fails", "interrupted", "killed"])
def test_the_others_give_up_when_the_main_process_has_gone(start, how):
    """A launcher ends them sooner."""
    main = start(0, -0.5 if how == "fails" else 60)
    others = [start(1, patience=1), start(2, patience=1)]
    main.stdout.readline()  # making
    time.sleep(1.5)  # longer than their patience: the lock is held
    if how != "fails":
        assert [process.poll() for process in others] == [None, None]
        main.send_signal(signal.SIGKILL if how == "killed" else signal.SIGINT)
    main.wait(timeout=20)
    begin = time.monotonic()
    assert [process.wait(timeout=20) for process in others] == [1, 1]
    assert time.monotonic() - begin < 5
    for _, error in outputs(*others):
        assert "the main process (RANK 0) has failed or was killed" in error and error.count("\n") == 1


def test_two_launches_with_the_same_text(start):
    first = start(0, 60, port=1)
    first.stdout.readline()
    second = [start(0, 0.3, port=2), start(1, port=2)]
    assert "another run makes" in second[0].stdout.readline()
    first.kill()  # its lock is free then
    done = outputs(*second)
    assert ["making" in out for out, _ in done] == [True, False]
    assert all(out.endswith("trains\n") for out, _ in done)


def test_no_sign_of_the_main_process(start):
    [(_, error)] = outputs(start(1, patience=0.3))
    assert "Several machines need a folder that they share" in error and error.count("\n") == 1


def test_a_launcher_ends_the_others_within_two_seconds(tmp_path):
    """The main process fails, and reports it; the time until the launcher's own end is the launcher's affair."""
    program = tmp_path / "program.py"
    program.write_text(f"import os; print('pid', os.environ['RANK'], os.getpid(), flush=True)\n{PROGRAM}")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", program]
    process = subprocess.Popen(
        [*command, tmp_path / "cache" / "book", "-1", "60"],
        cwd=ROOT,
        env=clean_environment(tmp_path) | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    pids = {}
    for line in process.stdout:
        if line.startswith("pid"):
            _, rank, pid = line.split()
            pids[rank] = int(pid)
        if len(pids) == 2:
            break
    main, other = (psutil.Process(pids[rank]) for rank in "01")
    psutil.wait_procs([main], timeout=30)
    begin = time.monotonic()
    psutil.wait_procs([other], timeout=30)
    assert time.monotonic() - begin < 2 and not other.is_running()
    process.communicate(timeout=60)
    assert process.returncode == 1
