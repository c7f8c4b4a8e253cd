import json

import pytest

from common.errors import UserError
from common.metrics import read_metrics, recover_metrics
from training.curves import plot_curves
from training.metrics import MetricsLog, until

RECORDS = [
    {"step": 0, "tokens": 0, "val_loss": 10.8, "hellaswag": None},
    {"step": 1, "tokens": 8, "loss": 10.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 5.0},
    {"step": 2, "tokens": 16, "loss": 9.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 5.0},
    {"step": 2, "tokens": 16, "val_loss": 9.5, "hellaswag": None},
    {"step": 3, "tokens": 24, "loss": 8.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 5.0},
]


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for record in RECORDS:
        log.write(record)
    log.close()
    return path


def test_one_object_a_line(log):
    assert [json.loads(line) for line in log.read_text().splitlines()] == RECORDS
    assert read_metrics(log) == RECORDS


def test_resuming_drops_what_came_after_the_checkpoint(log):
    MetricsLog(log, earlier=until(RECORDS, 2, is_evaluated=True)).close()
    assert read_metrics(log) == RECORDS[:4]
    # An evaluation that was broken off before the checkpoint is made again, one that came in the lost stretch too.
    assert until(RECORDS, 2, is_evaluated=False) == RECORDS[:3]
    assert until(RECORDS, 0, is_evaluated=False) == []


def test_a_torn_last_line_is_left_out_and_a_torn_middle_is_not(log):
    text = log.read_text()
    log.write_text(text[:-10])
    assert read_metrics(log) == RECORDS[:4]
    log.write_text(text.replace('"step": 1,', '"step":'))
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is not the record"):
        read_metrics(log)


@pytest.mark.parametrize(
    ("garbage", "line"),
    [
        ("not JSON\n", 6),
        ("not JSON", 6),
        ("[1, 2]\n", 6),
        ('{"loss": 1.0}\n', 6),
        ('{"step": "3"}\n', 6),
        ('{"step": 3,\n', 6),
        ("\0\0\0\0", 6),
        ("[" * 5000 + "\n", 6),
        ("\n\n", 6),
    ],
)
def test_damaged_lines_are_left_out_and_the_file_is_kept(log, tmp_path, garbage, line):
    warnings = []
    text = log.read_text() + garbage
    log.write_text(text)
    assert recover_metrics(log, tmp_path, warnings.append) == RECORDS
    assert (tmp_path / "metrics.damaged-1.jsonl").read_text() == text
    log.write_bytes(b"\xff\xfe" + log.read_bytes())  # and once more: the first copy stays
    assert recover_metrics(log, tmp_path, warnings.append) == RECORDS[1:]
    assert (tmp_path / "metrics.damaged-1.jsonl").read_text() == text
    assert (tmp_path / "metrics.damaged-2.jsonl").is_file()
    assert f"metrics.jsonl:{line} " in warnings[0] and "metrics.damaged-1.jsonl" in warnings[0]
    assert "metrics.jsonl:1 " in warnings[1]


@pytest.mark.parametrize("tail", ["", '{"step": 4, "lo', '{"step"'])
def test_a_file_cut_short_is_not_damaged(log, tmp_path, tail):
    log.write_text(log.read_text() + tail)
    assert recover_metrics(log, tmp_path, pytest.fail) == RECORDS
    assert not list(tmp_path.glob("*damaged*"))


def test_metrics_that_cannot_be_read(tmp_path):
    assert recover_metrics(tmp_path / "nowhere.jsonl", tmp_path, pytest.fail) == []
    with pytest.raises(UserError, match=str(tmp_path)):
        read_metrics(tmp_path)


def test_picture(log, tmp_path):
    score = {"acc": 0.3, "acc_stderr": 0.05, "acc_norm": 0.25, "acc_norm_stderr": 0.05, "n": 40, "is_sample": True}
    scored = [r | {"hellaswag": score} if "val_loss" in r else r for r in RECORDS]
    for number, records in enumerate((RECORDS, scored)):
        path = tmp_path / f"{number}.png"
        plot_curves(records, path, title="t", loss_lines={"unigram": 7.0}, hellaswag_lines={"GPT-3": 0.3})
        assert path.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "1.png").stat().st_size > (tmp_path / "0.png").stat().st_size  # the second panel
    assert not list(tmp_path.glob(".*.partial"))
