"""The files and lines of a run's log, against numbers worked out by hand."""

import json
import math
import os
import re
import select
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from plans import make_log
from tiny_run import ROOT

from common.errors import UserError
from common.metrics import read_metrics, recover_metrics
from common.terminal import TerminalTitle
from training import curves
from training.checkpoint import LoopState
from training.curves import moving_average, plot_curves
from training.logging import ConsoleLog, MetricsWriter, records_up_to

RECORDS = [
    {"step": 0, "tokens": 0, "val_loss": 10.8, "hellaswag": None},
    {"step": 1, "tokens": 8, "loss": 10.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 5.0},
    {"step": 2, "tokens": 16, "loss": 9.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 5.0},
    {"step": 2, "tokens": 16, "val_loss": 9.5, "hellaswag": None},
    {"step": 3, "tokens": 24, "loss": 8.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 5.0},
]


@pytest.fixture
def printed(capsys):
    """Return a function that returns the lines printed since its last call."""
    return lambda: capsys.readouterr().out.splitlines()


def console(first_step=0, max_steps=1000, log_every=10, eval_every=100, dollars_per_hour=9.0, compiled=False):
    """Two devices of 5e12 FLOP/s each: 10,000 tokens/s together at most."""
    hardware = SimpleNamespace(peak_flops=5e12, num_processes=2, dollars_per_hour=dollars_per_hour)
    batch = SimpleNamespace(tokens_per_step=5000)
    plan = SimpleNamespace(hardware=hardware, max_steps=max_steps, batch=batch, flops_per_token=1e9, compiled=compiled)
    return ConsoleLog(plan, first_step=first_step, log_every=log_every, eval_every=eval_every)


def record(step, ms):
    return {"step": step, "loss": 3.21, "lr": 6e-4, "grad_norm": 0.5, "ms": ms, "tokens_per_s": 5000 / ms * 1000}


def test_metrics_have_one_object_per_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, history=RECORDS[:2])
    for record in RECORDS[2:]:
        writer.write(record)
    writer.write({"step": 4, "loss": float("nan")})
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*RECORDS, {"step": 4, "loss": None}]


def test_records_after_the_checkpoint_are_dropped():
    """An evaluation of the checkpoint's step is dropped if it was aborted."""
    assert records_up_to(RECORDS, 2, is_evaluated=True) == RECORDS[:4]
    assert records_up_to(RECORDS, 2, is_evaluated=False) == RECORDS[:3]
    assert records_up_to(RECORDS, 0, is_evaluated=False) == []


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def test_reader_ignores_a_line_cut_short_at_the_end_and_refuses_other_damage(metrics):
    assert read_metrics(metrics) == RECORDS
    text = metrics.read_text()
    metrics.write_text(text[:-10])
    assert read_metrics(metrics) == RECORDS[:4]
    metrics.write_text(text.replace('"step": 1,', '"step":'))
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 "):
        read_metrics(metrics)


@pytest.mark.parametrize(
    "garbage",
    [
        *("not JSON\n", "not JSON", "[1, 2]\n", '{"loss": 1.0}\n', '{"step": "3"}\n', '{"step": 3,\n'),
        *("\0\0\0\0", "[" * 5000 + "\n", "\n\n"),
    ],
)
def test_recovery_leaves_out_damaged_lines_and_keeps_a_copy(metrics, tmp_path, garbage, printed):
    text = metrics.read_text() + garbage
    metrics.write_text(text)
    assert recover_metrics(metrics, tmp_path) == RECORDS
    assert (tmp_path / "metrics.damaged-1.jsonl").read_text() == text
    metrics.write_bytes(b"\xff\xfe" + metrics.read_bytes())  # again: the first copy stays
    assert recover_metrics(metrics, tmp_path) == RECORDS[1:]
    assert (tmp_path / "metrics.damaged-1.jsonl").read_text() == text
    assert (tmp_path / "metrics.damaged-2.jsonl").is_file()
    warnings = printed()
    assert "metrics.jsonl:6 " in warnings[0] and "metrics.damaged-1.jsonl" in warnings[0]
    assert "metrics.jsonl:1 " in warnings[1]


@pytest.mark.parametrize("tail", ["", '{"step": 4, "lo', '{"step"'])
def test_recovery_does_not_count_a_line_cut_short_as_damage(metrics, tmp_path, tail, printed):
    metrics.write_text(metrics.read_text() + tail)
    assert recover_metrics(metrics, tmp_path) == RECORDS and not printed()
    assert not list(tmp_path.glob("*damaged*"))


def test_reader_of_a_missing_file_and_of_a_folder(tmp_path):
    assert recover_metrics(tmp_path / "nowhere.jsonl", tmp_path) == []
    with pytest.raises(UserError, match=str(tmp_path)):
        read_metrics(tmp_path)


def test_curves_of_a_long_run_without_lines(tmp_path):
    records = [{"step": n, "tokens": n, "loss": 9.0 - n / 10} for n in range(50)]
    plot_curves(records, tmp_path / "curves.png", title="t", loss_lines={}, score_lines={})
    assert (tmp_path / "curves.png").is_file()


def test_moving_average_starts_with_fewer_values():
    assert moving_average(np.array([4.0, 2.0, 6.0, 1.0]), width=3).tolist() == [4, 3, 4, 3]


def test_curves_have_a_second_panel_for_hellaswag(tmp_path):
    score = {"acc": 0.3, "acc_stderr": 0.05, "acc_norm": 0.25, "acc_norm_stderr": 0.05, "n": 40, "is_sample": True}
    scored = [r | {"hellaswag": score} if "val_loss" in r else r for r in RECORDS]
    for number, records in enumerate((RECORDS, scored)):
        path = tmp_path / f"{number}.png"
        lines = {"hellaswag": {"GPT-3": 0.3}}
        plot_curves(records, path, title="t", loss_lines={"unigram": 7.0}, score_lines=lines)
        assert path.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "1.png").stat().st_size > (tmp_path / "0.png").stat().st_size
    assert not list(tmp_path.glob(".*.partial"))


def test_scores_of_tasks_are_logged_tracked_printed_and_drawn(printed, tmp_path, monkeypatch):
    tracked, drawn = [], []
    common = {"n": 50, "num_truncated": 0, "is_sample": False}
    scores = {
        "lambada": {"acc": 0.25, "perplexity": 12345.678, "acc_stderr": math.nan, "perplexity_stderr": 9.0, **common},
        "core": {"core": -0.125, "core_stderr": 0.5, **dict.fromkeys("abcdef", 0.5), **common},
        "extra": {"loss": 2.5, "num_bytes": 7, **common},
    }
    seconds = dict.fromkeys(scores, 1.26)
    result = {"val_loss": 3.0, "val_losses": None, "hellaswag": None, "hellaswag_seconds": 0.0, "seconds": 2.0}
    result |= {"scores": scores, "score_seconds": seconds, "samples": []}

    def fail(values, step):
        raise RuntimeError("connection lost")  # of a class that only the client knows

    tracker = SimpleNamespace(log=lambda values, step: tracked.append((step, values)), finish=lambda: None, name="x")
    broken = SimpleNamespace(log=fail, finish=lambda: None, name="broken")
    monkeypatch.setattr("training.logging.start_trackers", lambda *_, **__: [broken, tracker])
    draw = curves.draw_scores
    monkeypatch.setattr(curves, "draw_scores", lambda axes, *args: drawn.append(axes) or draw(axes, *args))
    with make_log(tmp_path, score_lines={"core": {"chance": 0.0}}) as log:
        log.open(LoopState(), {}, None, None)
        log.log_evaluation(10, result)
        assert [axes.get_title() for axes in drawn] == [f"{task}, 50 items" for task in scores]
        assert [text.get_text() for text in drawn[1].get_legend().get_texts()] == ["chance (0)", "last: -0.1250"]
    [record] = read_metrics(tmp_path / "metrics.jsonl")
    assert record["scores"]["lambada"] == scores["lambada"] | {"acc_stderr": None}
    assert record["score_seconds"] == seconds and record["hellaswag"] is None and "samples" not in record
    values = {"lambada_acc": 0.25, "lambada_perplexity": 12345.678, "core": -0.125, "extra_loss": 2.5}
    assert tracked == [(10, {"val_loss": 3.0, **values})]
    assert printed() == [
        "warning: broken stops at step 10 (connection lost); metrics.jsonl continues, and broken does when the run is "
        "resumed",
        "step     10 | val loss 3.0000 | 2.0 s",
        "scores      | lambada acc 0.2500 ± nan (n=50, 1.3 s) | core -0.1250 ± 0.5000 (n=50, 1.3 s) | "
        "extra loss 2.5000 (n=50, 1.3 s)",
    ]


@pytest.mark.parametrize(("last_lr", "is_announced"), [(0.1, False), (0.1 + 1e-9, False), (0.2, True)])
def test_resumed_log_continues_the_history_and_announces_another_learning_rate(
    printed, metrics, tmp_path, last_lr, is_announced
):
    output_dir = tmp_path / "branch"
    state = LoopState(step=2, evaluated=True)
    with make_log(output_dir, first_step=2) as log:
        log.open(state, {}, metrics.parent / "checkpoints" / "step_000002", last_lr)
        state.advance(is_finite=True)
        log.log_step(state, loss=7.0, lr=0.1, grad_norm=1.0, seconds=0.01, windows=[])
    expected = RECORDS[4] | {"loss": 7.0, "ms": 10.0, "tokens_per_s": 800.0}
    assert read_metrics(output_dir / "metrics.jsonl") == [*RECORDS[:4], expected]
    lines = printed()
    assert (len(lines) == 2) == is_announced, lines
    assert not is_announced or ("0.1" in lines[0] and "0.2" in lines[0])


def test_console_has_a_line_for_the_first_step_and_one_per_log_interval(printed):
    shown = console()
    for step in range(1, 21):
        shown.log_step(record(step, 20_000 if step == 1 else 1000))
    lines = printed()
    assert len(lines) == 3  # steps 1, 10 and 20
    # 5000 tokens/s of the 10,000 at the peak. 980 s are left at the pace of the steps after the first one, which also
    # compiles: $4.90 at $18 per hour.
    assert lines[2] == (
        "step     20/1,000   2% | loss 3.2100 | lr 6.00e-04 | norm 0.50 | 1,000 ms | 5,000 tok/s | 50.0% of peak | "
        "0:16:20, $4.90 left"
    )
    assert shown.training_seconds == 39


def test_first_compiled_step_has_no_estimate_of_the_time_left(printed):
    shown = console(compiled=True)
    for step in range(1, 11):
        shown.log_step(record(step, 20_000 if step == 1 else 1000))
    first, tenth = printed()
    assert first.endswith(" of peak | first step") and tenth.endswith(" left")


def test_console_has_the_mean_of_the_interval_and_the_time_of_coming_evaluations(printed):
    shown = console(first_step=980, log_every=5, eval_every=10, dollars_per_hour=None)
    shown.log_evaluation({"step": 980, "val_loss": 3.5, "hellaswag": None, "seconds": 40.0})
    shown.log_evaluation({"step": 980, "val_loss": 3.5, "hellaswag": None, "seconds": 60.0})
    for step in range(981, 986):
        shown.log_step(record(step, 1000 * (step - 980)))
    # Steps 982 to 985, those since the last line, took 2 to 5 s. Two more evaluations, and 15 steps of 3.5 s.
    assert printed()[-1].endswith("| 3,500 ms | 1,429 tok/s | 14.3% of peak | 0:02:32 left")


def test_console_marks_sample_items_and_truncated_ones(printed):
    scores = {"acc_norm": 0.2955, "acc_norm_stderr": 0.0046, "is_sample": False, "n": 10042, "num_truncated": 0}
    shown = console()
    record = {"step": 250, "val_loss": 3.29243, "hellaswag": scores, "hellaswag_seconds": 8.06, "seconds": 12.34}
    shown.log_evaluation(record)
    shown.log_evaluation(record | {"hellaswag": scores | {"is_sample": True, "num_truncated": 7}})
    assert printed() == [
        f"step    250 | val loss 3.2924 | hellaswag acc_norm 0.2955 ± 0.0046 ({what}) | 12.3 s"
        for what in ("n=10,042, 8.1 s", "SAMPLE items, n=10,042, 7 truncated, 8.1 s")
    ]


def test_console_shows_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    shown = console()
    for step in range(1, 11):
        shown.log_step(record(step, 1000))
    shown.close()
    assert "10/1000" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal is made with pty")
@pytest.mark.parametrize("max_steps", [1000, 19073, 1_000_000])
def test_bar_and_title_have_the_estimate_of_the_lines_and_the_bar_fits_50_columns(printed, monkeypatch, max_steps):
    import fcntl
    import pty
    import termios

    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setenv("TERM", "xterm-256color")
        shown = console(max_steps=max_steps, dollars_per_hour=None)
        shown._bar.mininterval = 0  # every step
        shown.log_evaluation({"step": 0, "val_loss": 10.8, "hellaswag": None, "seconds": 60.0})
        for step in range(1, 21):
            shown.log_step(record(step, 60_000 if step == 1 else 4000))
        shown.close()
        text = ""
        while "\x1b[23;0t" not in text and select.select([ours], [], [], 5)[0]:  # it comes in pieces
            text += os.read(ours, 1_000_000).decode()
    os.close(ours)
    titles, text = re.findall(r"\x1b]0;(.*?)\x07", text), re.sub(r"\x1b(]0;.*?\x07|\[2[23];0t)", "", text)
    bars = [bar.rstrip() for bar in re.split(r"[\r\n]", text) if "left" in bar]
    assert len(bars) >= 20
    assert all(len(bar) <= 50 and bar.endswith(" left") for bar in bars), bars
    for line in printed()[1:]:
        step, left = re.search(r"step +(\d+)/.*\| (.*) left$", line).groups()
        shown_too = [bar for bar in bars if bar.startswith(f"{step}/{max_steps} ") and bar.endswith(f", {left} left")]
        assert shown_too, (line, bars)
        assert f"gpt2-repro {int(step) / max_steps:.0%} loss 3.21 {left} left" in titles
    assert len(titles) == 4 and titles[-1] == ""  # steps 1, 10 and 20, and the end


@pytest.mark.parametrize(("term", "is_terminal"), [("dumb", True), ("", True), ("linux", True), ("xterm", False)])
def test_title_is_not_written_where_it_would_be_text(monkeypatch, capsys, term, is_terminal):
    monkeypatch.setenv("TERM", term)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: is_terminal, raising=False)
    title = TerminalTitle()
    title.set("gpt2-repro 42%")
    title.restore()
    assert capsys.readouterr() == ("", "")


def test_notebook_without_ipywidgets_has_no_bar_and_no_warning():
    code = """
import sys, types
sys.modules |= {"ipywidgets": None, "ipykernel.zmqshell": types.ModuleType("zmqshell")}
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: None)
from common.terminal import progress_bar
bar = progress_bar(range(3))
assert list(bar) == [0, 1, 2] and bar.disable
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
