"""What a run prints about itself, against numbers worked out by hand."""

import os
import re
import select
import struct
import sys

import pytest

from training.progress import Progress


@pytest.fixture
def lines():
    return []


def progress(lines, **changes):
    settings = {
        "step": 0,
        "max_steps": 1000,
        "log_every": 10,
        "eval_every": 100,
        "tokens_per_step": 5000,
        "flops_per_token": 1e9,
        "peak_flops": 1e13,
        "dollars_an_hour": 18.0,
    }
    return Progress(lines.append, **settings | changes)


def record(step, ms):
    return {"step": step, "loss": 3.21, "lr": 6e-4, "grad_norm": 0.5, "ms": ms, "tokens_per_s": 5000 / ms * 1000}


def test_a_line_for_the_first_step_and_one_a_log_interval(lines):
    shown = progress(lines)
    for step in range(1, 21):
        shown.stepped(record(step, 20_000 if step == 1 else 1000))
    assert len(lines) == 3  # steps 1, 10 and 20
    # 5000 tokens a second of the 10,000 that the peak allows. 980 s are left at the pace of the steps after the first,
    # which compiles; at $18 an hour $4.90.
    assert lines[2] == (
        "step     20/1,000   2% | loss 3.2100 | lr 6.00e-04 | norm 0.50 | 1,000 ms | 5,000 tok/s | 50.0% of peak | "
        "0:16:20, $4.90 left"
    )
    assert shown.training_seconds == 39


def test_the_mean_of_the_interval_and_the_evaluations_to_come(lines):
    shown = progress(lines, step=980, log_every=5, eval_every=10, dollars_an_hour=None)
    shown.evaluated({"step": 980, "val_loss": 3.5, "hellaswag": None, "seconds": 40.0})
    shown.evaluated({"step": 980, "val_loss": 3.5, "hellaswag": None, "seconds": 60.0})
    for step in range(981, 986):
        shown.stepped(record(step, 1000 * (step - 980)))
    # Steps 982 to 985, those since the last line, took 2 to 5 s. Two more evaluations, and 15 steps of 3.5 s.
    assert lines[-1].endswith("| 3,500 ms | 1,429 tok/s | 14.3% of peak | 0:02:32 left")


def test_an_evaluation_says_whose_items_they_are(lines):
    scores = {"acc_norm": 0.2955, "acc_norm_stderr": 0.0046, "is_sample": False, "n": 10042, "num_truncated": 0}
    shown = progress(lines)
    record = {"step": 250, "val_loss": 3.29243, "hellaswag": scores, "hellaswag_seconds": 8.06, "seconds": 12.34}
    shown.evaluated(record)
    shown.evaluated(record | {"hellaswag": scores | {"is_sample": True, "num_truncated": 7}})
    assert lines == [
        f"step    250 | val loss 3.2924 | hellaswag acc_norm 0.2955 ± 0.0046 ({what}) | 12.3 s"
        for what in ("items, n=10042, 8.1 s", "SAMPLE items, n=10042, 7 cut, 8.1 s")
    ]


def test_on_a_terminal_the_lines_come_with_a_bar(lines, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    shown = progress(lines)
    for step in range(1, 11):
        shown.stepped(record(step, 1000))
    shown.close()
    assert len(lines) == 2
    assert "10/1000" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal is made with pty")
@pytest.mark.parametrize("max_steps", [1000, 19073, 1_000_000])
def test_the_bar_has_the_lines_estimate_and_fits_50_columns(lines, monkeypatch, max_steps):
    import fcntl
    import pty
    import termios

    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        shown = progress(lines, max_steps=max_steps, dollars_an_hour=None)
        shown._bar.mininterval = 0  # every step
        shown.evaluated({"step": 0, "val_loss": 10.8, "hellaswag": None, "seconds": 60.0})
        for step in range(1, 21):
            shown.stepped(record(step, 60_000 if step == 1 else 4000))
        shown.close()
        text = ""
        while f"20/{max_steps} " not in text and select.select([ours], [], [], 5)[0]:  # it comes in pieces
            text += os.read(ours, 1_000_000).decode()
    os.close(ours)
    bars = [bar.rstrip() for bar in re.split(r"[\r\n]", text) if "left" in bar]
    assert len(bars) >= 20
    assert all(len(bar) <= 50 and bar.endswith(" left") for bar in bars), bars
    for line in lines[1:]:
        step, left = re.search(r"step +(\d+)/.*\| (.*) left$", line).groups()
        shown_too = [bar for bar in bars if bar.startswith(f"{step}/{max_steps} ") and bar.endswith(f", {left} left")]
        assert shown_too, (line, bars)
