"""
Every machine: the conditions of Windows, network disks, cloud drives and small consoles, simulated on Linux.

A short run, its evaluation, sampling, export and push live through all of them at once.
"""

import contextlib
import errno
import fcntl
import gc
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from unittest import mock

import conditions
import pytest
import torch
from hub_server import TOKEN, HubServer
from killing import status
from tiny_run import ROOT, clean_environment

import train
from common import cli, files, locks
from common.checkpoints import resolve_checkpoint, resolve_checkpoints
from common.errors import UserError
from common.files import atomic_write, flush_to_disk, replace_file
from training import TrainingError, batch, estimate
from training.checkpoint import LoopState
from training.distributed import MainProcessFailed
from training.logging import RunLog
from training.run import RunFolder, StopRequest

SHORT = (
    *("--max_steps", 4, "--eval_every", 4, "--save_every", 2, "--keep_last", 1, "--eval.hellaswag_limit", 2),
    *("--eval.ngram_baselines", "false", "--eval.prompts", "[Grüße]"),  # no ASCII, and not in every console
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Half a second less for each run in this process."""
    monkeypatch.setattr(estimate, "measure_matmul_flops", lambda *_: 1e11)


def commands(tiny, folder):
    """(module, arguments) of each step: data, a run, the same run resumed, and what is done with its checkpoint."""
    run, best = folder / "rün", folder / "rün" / "checkpoints" / "best"
    options = ("--config", tiny, "--output_dir", run, "--data.path", folder / "dätä", *SHORT)
    text = tiny.parent / "tiny.jsonl"
    return [
        ("data.prepare", ("files", text, "--out", folder / "dätä", "--num_proc", 1, "--val_fraction", 0.2)),
        ("train", options),
        ("train", (*options, "--max_steps", 6, "--resume", best)),
        ("eval", ("--model", best, "--data", "sample", "--limit", 2, "--output", folder / "scöres.json")),
        ("sample", (best, "Grüße", "--max_new_tokens", 3)),
        ("hub", ("export", best, "--to", "gpt2", "--out", folder / "pläin")),
        ("hub", ("push", best, "me/model", "--results", folder / "scöres.json")),
    ]


# The commands as `python -m MODULE ARGUMENTS` runs them, one after the other in one process; "NEXT" parts them.
ALL_AT_ONCE = f"""
import contextlib, os, runpy, sys
sys.path.append({str(Path(__file__).parent)!r})
import conditions

with contextlib.ExitStack() as held:
    for condition in conditions.ALL:
        held.enter_context(condition())
    lines = [[]]
    for argument in sys.argv[1:]:
        lines.append([]) if argument == "NEXT" else lines[-1].append(argument)
    for module, *arguments in lines:
        sys.argv = [module, *arguments]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code not in (None, 0):
                sys.exit(f"{{module}} ended with {{end.code}}")
"""


def test_everything_lives_through_all_at_once(tiny, tmp_path):
    """With a console and paths in ASCII, too: `ü` in each path, and in what is sampled."""
    arguments = []
    for module, options in commands(tiny, tmp_path):
        arguments += ["NEXT", module, *map(str, options)]
    with HubServer({}) as server:
        done = subprocess.run(
            [sys.executable, "-c", ALL_AT_ONCE, *arguments[1:]],
            cwd=ROOT,
            env=clean_environment(tmp_path)
            | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
            | {"HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN},
            capture_output=True,
            timeout=300,
        )
    output = (done.stdout + done.stderr).decode("ascii")  # a console that has nothing else shows all of it
    assert done.returncode == 0, output
    assert "Traceback" not in output
    assert r"Gr\xfc\xdfe" in output
    assert output.count("has no locks") == 1
    assert "could not be put in order" not in output
    run = tmp_path / "rün"
    assert status(run)["status"] == "finished"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000006"]
    assert json.loads((tmp_path / "scöres.json").read_text())["results"]["hellaswag"]["n"] == 2
    pushed = server.repos["models/me/model"]["model.safetensors"]
    assert pushed == (run / "checkpoints" / "step_000006" / "model.safetensors").read_bytes()
    assert (tmp_path / "pläin" / "model.safetensors").is_file()
    assert not list(tmp_path.rglob("*.partial"))
    for finished in (run / "checkpoints", tmp_path / "pläin"):  # weights too, which safetensors makes 0600
        assert conditions.modes(finished) == {oct(0o666 & ~0o027)}


# ---------------------------------------------------------------------------------------------------------------
# Files.


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "status.json"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_write(path) as tmp_file:
        tmp_file.write_text("half of it")
        raise KeyError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("status.json", "old")]


def test_replacing_waits_for_a_reader_on_windows_only(tmp_path, monkeypatch):
    (tmp_path / "new").write_text("new")
    calls, replace = [], Path.replace

    def busy_twice(self, target):
        calls.append(target)
        if len(calls) < 3:
            raise PermissionError(errno.EACCES, "used by another process")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", busy_twice)
    with pytest.raises(PermissionError):
        replace_file(tmp_path / "new", tmp_path / "old")
    monkeypatch.setattr(files, "_PATIENCE_SECONDS", 2.0)  # Windows
    replace_file(tmp_path / "new", tmp_path / "old")
    assert len(calls) == 3 and (tmp_path / "old").read_text() == "new"


@pytest.mark.parametrize(
    ("number", "of_folder", "of_file"),
    [("EINVAL", True, True), ("ENOTSUP", True, True), ("EACCES", True, False), ("EIO", False, False)],
)
def test_flushing_where_a_disk_cannot(number, of_folder, of_file, tmp_path, monkeypatch):
    """Network disks and Windows cannot flush everything; a disk that fails is an error."""
    (tmp_path / "file").touch()

    def fail(descriptor):
        raise OSError(getattr(errno, number), number)

    monkeypatch.setattr(os, "fsync", fail)
    for path, is_tolerated in ((tmp_path, of_folder), (tmp_path / "file", of_file)):
        with contextlib.nullcontext() if is_tolerated else pytest.raises(OSError, match=number):
            flush_to_disk(path)


@pytest.mark.parametrize("number", ["ENOLCK", "ENOTSUP", "ENOSYS", "EIO"])
def test_no_locks_is_said_once_for_each_disk(number, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(getattr(errno, number), number)

    monkeypatch.setattr(locks, "_disks_without_locks", set())
    monkeypatch.setattr(fcntl, "flock", refuse)
    for name in ("one", "two"):
        with pytest.raises(OSError, match="EIO") if number == "EIO" else contextlib.nullcontext():
            assert not locks.Lock(tmp_path / name).acquire()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (0 if number == "EIO" else 1)
    assert all("has no locks" in line for line in lines)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("is_prepared", [True, False])
def test_a_console_prints_what_it_can(is_prepared, encoding, monkeypatch):
    """A command prepares its streams; `train()` in another program prints what that program's console has."""
    text = "Gr\u00fc\u00dfe \u4f60\u597d \udcfc"
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    if is_prepared:
        cli.prepare_process()
        gc.enable()  # as run_command does
    print(text if is_prepared else cli.encodable(text))
    printed = console.buffer.getvalue().decode(encoding)
    assert printed == text.encode(encoding, "backslashreplace").decode(encoding) + "\n"


EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    ("system", "before", "after"),
    [
        ("posix", {}, EXPANDABLE),
        ("nt", {}, {}),
        ("posix", {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, {}),
        ("posix", {"PYTORCH_ALLOC_CONF": ""}, {}),
    ],
)
def test_the_allocator_is_set_unless_the_user_has_set_it(system, before, after, monkeypatch):
    environment = dict(before)
    monkeypatch.setattr(cli, "os", SimpleNamespace(name=system, environ=environment))
    cli._use_expandable_segments()
    assert environment == before | after


# ---------------------------------------------------------------------------------------------------------------
# A checkpoint's name.


def make_checkpoint(folder, val_loss=None):
    (folder / "training_state").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "training_state" / "state.json").write_text(json.dumps({"val_loss": val_loss}))
    return folder


@pytest.fixture
def runs(tmp_path):
    """runs/a with three checkpoints, the second the best; runs/b whose checkpoint was not evaluated; runs/c empty."""
    for step, val_loss in ((10, 5.0), (20, 3.25), (30, 4.0)):
        make_checkpoint(tmp_path / "runs" / "a" / "checkpoints" / f"step_{step:06d}", val_loss)
    make_checkpoint(tmp_path / "runs" / "b" / "checkpoints" / "step_000007")
    (tmp_path / "runs" / "c" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "c" / "status.json").write_text("{}")
    return tmp_path / "runs"


def as_it_is(runs):
    pass


def with_stale_link(runs):
    (runs / "a" / "checkpoints" / "best").symlink_to("step_000010")


def with_stale_copy(runs):
    """`cp -rL`, archives and cloud drives make this of a link."""
    shutil.copytree(runs / "a" / "checkpoints" / "step_000010", runs / "a" / "checkpoints" / "best")


def with_damaged_state(runs):
    (runs / "a" / "checkpoints" / "step_000030" / "training_state" / "state.json").write_text('{"val_loss": ')


@pytest.mark.parametrize("change", [as_it_is, with_stale_link, with_stale_copy, with_damaged_state])
def test_best_is_the_lowest_validation_loss(change, runs, monkeypatch, capsys):
    change(runs)
    best = runs / "a" / "checkpoints" / "step_000020"
    assert resolve_checkpoint(runs / "a" / "checkpoints" / "best") == str(best)
    assert capsys.readouterr().err == f"best      {best} (validation loss 3.2500)\n"
    monkeypatch.chdir(runs / "a" / "checkpoints")
    assert resolve_checkpoint("best/") == "step_000020"
    monkeypatch.chdir(runs)
    shutil.rmtree("b")
    assert resolve_checkpoints(["*/checkpoints/best", "me/model"]) == ["a/checkpoints/step_000020", "me/model"]
    assert resolve_checkpoints([str(runs / "*" / "checkpoints" / "best")]) == [str(best)]


def test_other_names_stay_as_they_are(runs, monkeypatch):
    checkpoint = runs / "a" / "checkpoints" / "step_000010"
    alone = make_checkpoint(runs / "downloads" / "best")
    monkeypatch.chdir(runs)
    for name in (str(checkpoint), str(alone), "openai-community/gpt2", "me/best", "best", "no/such/folder", "x" * 5000):
        assert resolve_checkpoint(name) == name


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        (
            "a",
            ["step_000010 (validation loss 5.0000)", "step_000020 (validation loss 3.2500, the best)", "step_000030"],
        ),
        ("a/checkpoints", ["step_000010", "step_000020", "step_000030"]),
        ("b", ["step_000007 (no validation loss)"]),
        ("b/checkpoints/best", ["no checkpoint in", "was evaluated", "step_000007"]),  # stopped before an evaluation
        ("c", ["a run's folder", "does not have a checkpoint yet"]),
        ("c/checkpoints/best", ["c/checkpoints does not have a checkpoint yet"]),
    ],
)
def test_a_runs_folder_is_no_checkpoint(name, listed, runs):
    """Every command says so in the same words: test_mistakes.py has them with a run's folder."""
    with pytest.raises(UserError) as caught:
        resolve_checkpoint(runs / name)
    assert all(part in str(caught.value) for part in listed), caught.value


@pytest.mark.parametrize("best", [None, 3.5])
def test_the_last_lines_name_the_best_checkpoint_and_paths_that_python_reads(best, runs, capsys):
    """A backslash in the line to paste would begin an escape."""
    hardware = SimpleNamespace(peak_flops=1, num_processes=1, dollars_per_hour=None)
    batch = SimpleNamespace(tokens_per_step=1)
    plan = SimpleNamespace(
        num_parameters=1, max_steps=1, flops_per_token=1, batch=batch, hardware=hardware, compiled=False
    )
    settings = {"log_every": 1, "eval_every": 1, "eval": {"prompts": ['Say "$HOME"']}}
    log = RunLog(runs, plan, settings, [], 0, loss_lines={}, score_lines={})
    folder = runs / "a" / "checkpoints" / ("step_000020" if best is None else "step_000030")
    state = LoopState(val_loss=4.0)
    log.print_summary(state, folder)
    named = [line for line in capsys.readouterr().out.splitlines() if line.startswith("best ")]
    assert named == ([] if best is None else [f"best      {folder.with_name('step_000020')} (validation loss 3.2500)"])
    log.print_summary(state, PureWindowsPath(r"runs\x\checkpoints\step_000100"))
    output = capsys.readouterr().out
    assert 'from_pretrained("runs/x/checkpoints/step_000100", ' in output
    assert output.count("""'Say "$HOME"'""") == 1  # quoted for the shell


# ---------------------------------------------------------------------------------------------------------------
# train() as a function.

QUICK = (
    *("--max_steps", "2", "--eval_every", "2", "--save_every", "2", "--eval.hellaswag", "null"),
    *("--eval.ngram_baselines", "false", "--eval.prompts", "[]"),
)


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


def test_train_is_called_again_and_again(small, tmp_path, monkeypatch):
    """As in a notebook: the same folder, another one, other precisions, and after a run that failed."""
    before, started = handlers(), time.monotonic()

    def call(run, *more):
        code = train.train(["--config", str(small), "--output_dir", str(tmp_path / run), *QUICK, *more])
        assert handlers() == before
        assert gc.isenabled() and gc.get_freeze_count() == 0
        return code

    assert call("one") == 0
    with pytest.raises(TrainingError, match="already holds a run"):
        call("one")
    assert call("one", "--max_steps", "4", "--resume", "auto") == 0
    # --max_hours counts from the call, not from the start of the notebook.
    assert call("two", "--mixed_precision", "bf16", "--max_hours", "1e-9") == 75
    assert call("three", "--mixed_precision", "no") == 0
    precisions = [json.loads((tmp_path / run / "provenance.json").read_text())["hardware"] for run in ("two", "three")]
    assert [made["mixed_precision"] for made in precisions] == ["bf16", "no"]

    # A second Ctrl-C, in the middle of a step; the folder is free afterwards, and nothing is open any more.
    with monkeypatch.context() as patch:
        patch.setattr(train, "clip_gradients", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            call("four")
    assert status(tmp_path / "four")["status"] == "failed" and gc.isenabled()
    assert conditions.user_of(tmp_path) is None
    assert call("four") == 0

    # Out of memory, in a step and in an evaluation: one line with the size that fits.
    for owner, name in ((train, "clip_gradients"), (train.TrainingEvaluation, "run")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried")))
            with pytest.raises(TrainingError, match=r"with 4 sequence.* --batch\.micro_batch_size 2 fits") as caught:
                call("five")
        assert caught.value.exit_code == 1
        failed = {"status": "failed", "pid": 0, "error": str(caught.value), "is_mistake": True}
        assert status(tmp_path / "five") | {"pid": 0} == failed

    # "auto" takes the checkpoint's size again, whatever fits by now.
    auto = ("--batch.micro_batch_size", "auto")
    with monkeypatch.context() as patch:
        patch.setattr(batch, "largest_fitting_batch", lambda sizes, *_: min(sizes[-1], 2))
        assert call("six", *auto) == 0
    assert call("six", *auto, "--max_steps", "4", "--resume", "auto") == 0
    provenance = json.loads((tmp_path / "six" / "provenance.json").read_text())
    assert [made["micro_batch_size"] for made in (*provenance["earlier_launches"], provenance)] == [2, 2]
    assert time.monotonic() - started < 60  # no call has waited for another one


def test_resuming_in_an_evaluation_adds_its_loss_to_the_checkpoint(small, tmp_path, monkeypatch):
    """Also where no checkpoint would be due: `best` looks for the loss there."""
    output, calls, stops = tmp_path / "run", itertools.count(), []
    run = train.TrainingEvaluation.run
    monkeypatch.setattr(train, "StopRequest", lambda *args: stops.append(StopRequest(*args)) or stops[-1])

    def run_until_stopped(evaluation, *args, **kwargs):
        if next(calls) == 1:
            assert not gc.isenabled()  # from the first step to the end
            stops[-1].reason = "SIGTERM"
            return None
        return run(evaluation, *args, **kwargs)

    monkeypatch.setattr(train.TrainingEvaluation, "run", run_until_stopped)
    arguments = ["--config", str(small), "--output_dir", str(output), *QUICK, "--max_steps", "4", "--save_every", "4"]
    assert train.train(arguments) == 75  # stopped in the evaluation of step 2
    state = output / "checkpoints" / "step_000002" / "training_state" / "state.json"
    assert json.loads(state.read_text())["val_loss"] is None
    gc.disable()
    try:
        assert train.train([*arguments, "--resume", "auto"]) == 0 and not gc.isenabled()  # as it was
    finally:
        gc.enable()
    assert json.loads(state.read_text())["val_loss"] > 0


def test_train_in_a_thread(small, tmp_path, monkeypatch):
    """A thread gets no signals; the console does not have `\u00fc`."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", console)
    arguments = ["--config", str(small), "--output_dir", str(tmp_path / "r\u00fcn"), *QUICK]
    before, codes = handlers(), []
    thread = threading.Thread(target=lambda: codes.append(train.train(arguments)))
    thread.start()
    thread.join()
    assert codes == [0] and handlers() == before
    printed = console.buffer.getvalue().decode("ascii")
    assert "training in a thread, which gets no signals" in printed and r"r\xfcn" in printed


def test_a_handler_that_python_did_not_install(monkeypatch):
    with StopRequest(None, 0.0) as stop:
        stop._handlers_before[signal.SIGUSR1] = None
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_held_folder_is_refused_at_once_where_waiting_is_of_no_use(tmp_path, capsys):
    run = tmp_path / "run"
    make_checkpoint(run / "checkpoints" / "step_000010", 5.0)
    with RunFolder(run) as holder:
        holder.lock(None)
        started = time.monotonic()
        for resume in (None, str(run), str(tmp_path / "nowhere")):
            with pytest.raises(TrainingError, match="another process is training in"):
                RunFolder(run).lock(resume)
        assert time.monotonic() - started < 1 and not capsys.readouterr().out


def test_a_run_that_could_go_on_waits(tmp_path, capsys):
    run = tmp_path / "run"
    make_checkpoint(run / "checkpoints" / "step_000010", 5.0)
    with RunFolder(run) as holder:
        holder.lock(None)
        waiting = RunFolder(run)
        thread = threading.Thread(target=lambda: waiting.lock("auto"))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(10)
    (line,) = capsys.readouterr().out.splitlines()
    assert not thread.is_alive() and "waiting for it to leave" in line


# ---------------------------------------------------------------------------------------------------------------
# status.json after an exception.


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("a bug\nin two lines"), "RuntimeError: a bug in two lines"),
        (MemoryError(), "MemoryError: MemoryError"),
        (KeyboardInterrupt(), "interrupted (Ctrl-C)"),
        (SystemExit("from deep inside"), "SystemExit: from deep inside"),
        (TrainingError("lower optim.lr"), "lower optim.lr"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_exception_becomes_the_status(error, says, tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.finish(LoopState(step=7), "SIGTERM")
    with pytest.raises(type(error)), run:  # before the run began
        raise error
    assert status(tmp_path) == {"status": "resume me", "pid": os.getpid(), "step": 7, "exit_code": 75}

    for rank in ("0", "1"):  # any process may be the one that knows
        monkeypatch.setenv("RANK", "0")
        run.mark_running()
        with pytest.raises(type(error)), run:
            monkeypatch.setenv("RANK", rank)
            raise error
        assert status(tmp_path)["status"] == "failed"
        assert status(tmp_path)["error"].startswith(says)
        assert getattr(error, "exit_code", 1) == 1

    with pytest.raises(RuntimeError), run:  # a process that lost the others: the first one's reason stays
        run.mark_running()  # which writes on the main process only
        raise RuntimeError("connection closed by peer")
    assert status(tmp_path)["error"].startswith(says)


@pytest.mark.parametrize(
    ("end", "error"),
    [
        ({"stop_reason": None}, RuntimeError()),
        ({"stop_reason": "SIGTERM"}, RuntimeError()),
        (None, MainProcessFailed(1)),
    ],
)
def test_a_status_that_stays(end, error, tmp_path):
    """An error after the last checkpoint does not undo it; MainProcessFailed does not say what went wrong."""
    run = RunFolder(tmp_path)
    with pytest.raises(type(error)), run:
        run.mark_running()
        if end is not None:
            run.finish(LoopState(val_loss=3.0), *end)
        raise error
    assert status(tmp_path)["status"] != "failed"


def test_a_bug_in_training_keeps_its_traceback(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "clip_gradients", mock.Mock(side_effect=ZeroDivisionError("unforeseen")))
    with pytest.raises(ZeroDivisionError):
        train.main(["--config", str(small), "--output_dir", str(tmp_path / "run"), *QUICK])
    assert status(tmp_path / "run")["status"] == "failed"
    assert status(tmp_path / "run")["error"] == "ZeroDivisionError: unforeseen"
