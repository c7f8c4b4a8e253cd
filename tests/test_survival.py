"""Runs that are killed, asked to stop, damaged, or given a full disk: nothing is lost, and the curve is the same."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest
from killing import assert_same_run, kill_at_random, start, status, wait_for, wait_for_step
from tiny_run import ROOT, TWO_PROCESSES, clean_environment, losses

from training.run import EXIT_RESUME, StopRequest

LAUNCH = ("-m", "accelerate.commands.launch")

# Saves often, so that a random moment is often one of saving; dropout, so that the random state counts.
STEPS = 150
OFTEN = (
    *("--max_steps", STEPS, "--save_every", 6, "--eval_every", 30, "--keep_last", 2, "--keep_every", 30),
    *("--model.dropout", 0.1, "--eval.hellaswag", "null", "--eval.prompts", "[]", "--eval.ngram_baselines", "false"),
    *("--trackers", "[]"),
)


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    """Return a run with the settings above that is not interrupted."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    run = start(output, output.parent, "--config", small, *OFTEN)
    assert run.wait(timeout=300) == 0, output.with_suffix(".log").read_text()
    return output


@pytest.fixture
def halfway(undisturbed, tmp_path):
    """Return the same run, killed at step 33. Its last checkpoint is that of step 30."""
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output, symlinks=True)
    for folder in (output / "checkpoints").iterdir():
        if folder.name != "step_000030":
            shutil.rmtree(folder)
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 33))
    return output


@pytest.mark.parametrize(
    ("seed", "times"), [(0, 3), *(pytest.param(seed, 5, marks=pytest.mark.slow) for seed in range(1, 6))]
)
def test_killed_at_random_moments(small, undisturbed, tmp_path, seed, times):
    output = tmp_path / "run"
    began, ended = ((undisturbed / name).stat().st_mtime for name in ("provenance.json", "status.json"))
    most = 0.8 * (ended - began) / times  # seconds
    kill_at_random(
        output, tmp_path, "--config", small, *OFTEN, random=random.Random(seed), most_seconds=most, times=times
    )
    assert_same_run(output, undisturbed, STEPS)
    names = [sorted(p.name for p in (run / "checkpoints").iterdir()) for run in (output, undisturbed)]
    assert names[0] == names[1]


# ---------------------------------------------------------------------------------------------------------------
# Asked to stop.


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(n, marks=pytest.mark.slow) for n in ("SIGUSR1", "SIGHUP", "SIGINT"))]
)
def test_a_signal_saves_and_says_resume_me(name, small, undisturbed, tmp_path):
    """In the middle of a stretch without checkpoints, and at a step that should have been evaluated."""
    output = tmp_path / "run"
    arguments = ("--config", small, *OFTEN, "--save_every", STEPS)
    run = start(output, tmp_path, *arguments)
    wait_for_step(output, 17, run)
    run.send_signal(getattr(signal, name))
    assert run.wait(timeout=60) == EXIT_RESUME
    says = status(output)
    assert (says["status"], says["exit_code"]) == ("resume me", EXIT_RESUME)
    log = output.with_suffix(".log").read_text()
    assert f"stopped at step {says['step']} ({name})" in log
    assert (output / "checkpoints" / f"step_{says['step']:06d}").is_dir()
    assert "Traceback" not in log
    if name == "SIGTERM":
        run = start(output, tmp_path, *arguments)
        assert run.wait(timeout=120) == 0
        assert_same_run(output, undisturbed, STEPS)


@pytest.mark.skipif(not hasattr(os, "tcsetpgrp"), reason="POSIX terminals")
def test_ctrl_c_at_a_terminal_under_the_launcher_saves_without_a_traceback(small, undisturbed, tmp_path):
    """
    The launcher keeps waiting until the checkpoint is saved, and prints nothing. Until then the losses are those of
    `python train.py`.
    """
    import pty

    output = tmp_path / "run"
    command = [sys.executable, *LAUNCH, "--mixed_precision=no", "--num_processes=1", "--num_machines=1"]
    command += [
        "--dynamo_backend=no",
        "train.py",
        "--config",
        small,
        *OFTEN,
        "--save_every",
        STEPS,
        "--output_dir",
        output,
    ]
    pid, terminal = pty.fork()  # a session of its own, with the launcher as the leader of the foreground job
    if pid == 0:
        os.chdir(ROOT)
        environment = clean_environment(tmp_path) | {"TERM": "xterm-256color", "NO_COLOR": "1"}
        os.execve(sys.executable, [str(argument) for argument in command], environment)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal's output, on Linux
        while data := os.read(terminal, 2**16):
            shown += data
            if b"step     10/" in shown and b"^C" not in shown:
                os.write(terminal, b"\x03")
    os.close(terminal)
    shown = shown.decode()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown
    assert "SIGINT: stopping after" in shown
    assert "Traceback" not in shown
    titles = re.findall(r"\x1b]0;(.*?)\x07", shown)
    assert titles[0].startswith("gpt2-repro") and titles[-1] == ""  # cleared at the end
    assert not re.findall(r"\x1b\[[\d;]*m", shown)  # no colors
    assert status(output)["status"] == "resume me"
    assert (output / "checkpoints" / f"step_{status(output)['step']:06d}").is_dir()
    launched = losses(output)
    assert launched == pytest.approx(losses(undisturbed)[: len(launched)], abs=1e-5)


# Ctrl-C arrives at the first import of a package that takes long.
INTERRUPTED_IMPORT = """
import runpy, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name in ("torch", "numpy", "tqdm", "transformers", "accelerate"):
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
run = runpy.run_path if sys.argv[1].endswith(".py") else runpy.run_module
run(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize(
    "command", ["train.py", "sample.py", "data.prepare", "data.verify", "eval", "eval.miniseries", "hub.__main__"]
)
def test_ctrl_c_during_the_imports_ends_with_one_line(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT, command],
        cwd=ROOT,
        env=clean_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    if command == "hub.__main__":  # imports nothing heavy before it has read its arguments
        assert "python -m hub" in done.stderr and "Traceback" not in done.stderr
        return
    assert done.stderr == "interrupted\n"
    assert done.returncode != 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no hangups on Windows")
@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_closed_terminal_is_a_request_to_stop_except_under_nohup(is_ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        with StopRequest(None, 0) as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.reason == (None if is_ignored else "SIGHUP")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_stop_request_survives_a_closed_stderr(monkeypatch):
    """Ctrl-C also ends the `tee` behind a run; the run still has to save its checkpoint."""

    def broken(*_):
        raise BrokenPipeError

    with StopRequest(None, 0.0) as stop:
        monkeypatch.setattr(os, "write", broken)
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_requested and stop.reason == "SIGTERM"


def test_a_signal_to_one_of_two_processes_stops_both(small, tmp_path):
    output = tmp_path / "run"
    run = start(
        *(output, tmp_path, "--config", small, "--max_steps", 2000, "--eval_every", 2000),
        through=(*LAUNCH, *TWO_PROCESSES),
    )
    wait_for_step(output, 5, run)
    workers = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGTERM)
    run.wait(timeout=60)
    log = output.with_suffix(".log").read_text()
    assert status(output)["status"] == "resume me", log
    assert "(SIGTERM)" in log


@pytest.mark.parametrize("signal_to_launcher", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_launcher_that_is_killed_takes_the_run_with_it(signal_to_launcher, small, tmp_path):
    output = tmp_path / "run"
    arguments = ("--config", small, "--max_steps", 2000, "--eval_every", 2000)
    run = start(output, tmp_path, *arguments, through=LAUNCH)
    wait_for_step(output, 5, run)
    run.send_signal(signal_to_launcher)
    run.wait()
    # Nobody waits for the old one to leave: the new one does.
    again = start(output, tmp_path, *arguments)
    wait_for(lambda: status(output).get("pid") == again.pid, output, again)
    os.killpg(again.pid, signal.SIGKILL)
    again.wait()
    log = output.with_suffix(".log").read_text()
    assert "(the launcher has gone)" in log
    assert "resume    from" in log


def test_a_time_limit(undisturbed, small, tmp_path):
    """It is over before the first evaluation is: nothing has been learnt, that is saved, and gone on from."""
    output = tmp_path / "run"
    run = start(output, tmp_path, "--config", small, *OFTEN, "--max_hours", 1e-6)
    assert run.wait(timeout=60) == EXIT_RESUME
    assert "max_hours=1e-06" in output.with_suffix(".log").read_text()
    assert status(output)["step"] == 0
    assert losses(output) == []
    run = start(output, tmp_path, "--config", small, *OFTEN)
    assert run.wait(timeout=60) == 0
    assert losses(output) == losses(undisturbed)


# ---------------------------------------------------------------------------------------------------------------
# Damaged checkpoints.


def test_a_damaged_checkpoint_is_passed_over(small, undisturbed, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output, symlinks=True)
    folders = sorted((output / "checkpoints").glob("step_*"))
    weights = folders[-1] / "model.safetensors"
    with weights.open("r+b") as file:  # one bit
        file.seek(weights.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    run = start(output, tmp_path, "--config", small, *OFTEN)
    assert run.wait(timeout=120) == 0
    log = output.with_suffix(".log").read_text()
    assert f"passing over {folders[-1]}: model.safetensors is not what was written" in log
    assert f"resume    from {folders[-2]}" in log
    assert_same_run(output, undisturbed, STEPS)


def test_two_runs_in_one_folder(tmp_path, capsys, monkeypatch):
    """The second waits for the first to leave, and says so; here it does not leave."""
    from training import TrainingError
    from training.run import RunFolder

    # The lock alone: importing training takes seconds.
    code = (
        "from common.locks import Lock\n"
        f"lock = Lock({str(tmp_path / '.run.lock')!r}); lock.acquire(); print('held'); input()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    monkeypatch.setattr("training.run._PATIENCE_SECONDS", 0.1)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(TrainingError, match="another process is training in"):
        folder.lock(None)
    assert "waiting for it to leave" in capsys.readouterr().out
    first.kill()  # whatever way it ends
    first.wait()
    with folder:
        folder.lock(None)
    assert not capsys.readouterr().out


SLOW_EVALUATION = """
import sys, time, train
batches, evaluations = train.WindowLoader.val_batches, 0

def slow(*arguments, **more):
    global evaluations
    evaluations += 1
    for batch in batches(*arguments, **more):
        time.sleep(0.5 if evaluations == 3 else 0)  # the last one
        yield batch

train.WindowLoader.val_batches = slow
sys.exit(train.main(sys.argv[2:]))
"""


# ---------------------------------------------------------------------------------------------------------------
# A disk that is full.

FULL_DISK = """
import resource, runpy, signal, sys
# Files of more than 100 KB cannot be written: what a full disk does to weights but not to logs.
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.argv = sys.argv[1:]
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_full_disk_does_not_stop_training(small, undisturbed, halfway, tmp_path):
    output = halfway
    run = start(output, tmp_path, "--config", small, *OFTEN, through=("-c", FULL_DISK))
    assert run.wait(timeout=120) == 1
    log = output.with_suffix(".log").read_text()
    assert f"resume    from {output / 'checkpoints' / 'step_000030'}" in log
    assert log.count("Training continues") >= 5
    assert "It needs 0.0" in log and "make room on the disk" in log
    assert "error: could not write the checkpoint" in log  # the last one
    assert status(output)["status"] == "failed"
    assert "Traceback" not in log
    assert losses(output) == losses(undisturbed)
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step_000030"]

    run = start(output, tmp_path, "--config", small, *OFTEN)  # there is room again
    assert run.wait(timeout=120) == 0
    assert_same_run(output, undisturbed, STEPS)


@pytest.mark.slow  # test_machines.py has the same in one process
def test_stopped_in_the_last_evaluation(small, undisturbed, halfway, tmp_path):
    """The steps are all there; what is missing is evaluated and saved after resuming."""
    output = halfway
    run = start(output, tmp_path, "--config", small, *OFTEN, through=("-c", SLOW_EVALUATION))
    wait_for_step(output, STEPS, run)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == EXIT_RESUME
    assert status(output)["step"] == STEPS
    run = start(output, tmp_path, "--config", small, *OFTEN)
    assert run.wait(timeout=60) == 0
    assert status(output)["status"] == "finished"
    assert_same_run(output, undisturbed, STEPS)
