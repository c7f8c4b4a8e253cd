"""report.html, written from run folders made here. test_train.py looks at the one of a real run."""

import json
from html.parser import HTMLParser

import pytest
from plans import make_log

from training.checkpoint import LoopState
from training.report import main, short_number, thin_out, write_report

SCORES = {"acc": 0.28, "acc_stderr": 0.01, "acc_norm": 0.31, "acc_norm_stderr": 0.02, "n": 40, "is_sample": True}
TASKS = {
    "lambada": {"acc": 0.125, "perplexity": 12345.678, "acc_stderr": 0.01, "perplexity_stderr": None, "n": 5000},
    "core": {"core": 0.1, **dict.fromkeys(("arc", "copa", "piqa", "<x>"), 0.5), "n": 9},
}
LAUNCH = {
    "started": "2026-11-27T21:16:41+00:00",
    "from_step": 0,
    "command": "train.py --output_dir 'my run'",
    "config": {
        "model": {"n_layer": 3, "n_head": 2, "n_embd": 32},
        "data": {"path": "shards/sample", "mix": {"shards/<web>": 0.7}},
        "batch": {"tokens_per_step": 256},
        "optim": {"lr": 3e-3, "betas": [0.9, 0.95]},
        "eval": {"prompts": ["The"]},
        "max_steps": 100,
        "output_dir": "my run",
    },
    "model": {"parameters": 124_439_808},
    "data": {"train_tokens": 6400, "val_tokens": 100, "train_sha256": "5ha", "source": {"kind": "files"}},
    "references": {
        "loss": {"bigram & more": 5.0787},
        "hellaswag": {"OpenAI GPT-2 (124M)": 0.2955},
        "core": {"chance": 0.0},
    },
    "code": {"commit": "c0ffee" * 6, "dirty": True},
    "versions": {"python": "3.11.7", "evaluate": None},
    "seed": 1337,
    "hardware": {"device": "NVIDIA H100", "processes": 8, "cpu_threads": 4, "dollars_an_hour": 3.0},
}


class Page(HTMLParser):
    """A page's tags, attributes and text. Raises AssertionError if an element is not closed."""

    def __init__(self, html):
        super().__init__()
        self.text, self.attributes, self.tags, self._open = "", [], set(), []
        self.feed(html)
        assert not self._open
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert tag == self._open.pop()

    def handle_data(self, data):
        self.text += data if self._open[-1:] == ["b"] else f"{data} "


@pytest.fixture
def folder(tmp_path):
    """Folder of a run of 100 steps, resumed at step 20, with every kind of record."""
    records = []
    for step in range(101):
        place = {"step": step, "tokens": 256 * step}
        if step:
            records.append(place | {"loss": 9 - step / 25, "lr": 1e-3, "ms": 3600.0, "tokens_per_s": 71.1})
        if step % 4 == 0:
            samples = [f"The<script>alert({step})</script>\n\0 \N{SNOWMAN}", "no prompt"]
            val_loss = 4.0 if step == 96 else 9.5 - step / 25
            scores = {"hellaswag": SCORES, "seconds": 2.0, "samples": samples}
            if step % 48 == 0:
                scores["scores"] = TASKS
            records.append(place | {"val_loss": val_loss, "val_losses": {"<web>": 5.25, "code": 6.0}} | scores)
    skipped = {"loss": "nan", "grad_norm": "inf", "so_far": 1, "in_a_row": 1, "windows": [{"shard": "<a>", "start": 7}]}
    records[50] |= {"loss": None, "skipped": skipped}
    folder = tmp_path / "my <run>"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    resumed = LAUNCH | {"from_step": 20, "command": "train.py --resume auto", "earlier_launches": [LAUNCH]}
    (folder / "provenance.json").write_text(json.dumps(resumed))
    (folder / "status.json").write_text('{"status": "finished", "step": 100}')
    return folder


def test_report_shows_all_of_a_run(folder, capsys):
    assert main([str(folder.parent / "my*")]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    for text in (
        "my <run> finished 8 x NVIDIA H100 · commit c0ffeec0f with changes · 2026-11-27 21:16 UTC",
        "Validation loss 5.5000 best 4.0000 at step 96",
        "HellaSwag-like 31.0% ± 2.0, 40 items",
        "Parameters 124M 3 layers, 32 wide, 2 heads",
        "Tokens 25.6k step 100 of 100; 4 epochs",
        "Training time 0:06:00 and 0:00:52 of evaluation; $2.75",
        "Tokens/s 71 median; a step takes 3.6 s",
        "96 24.6k 0:06:36 4.0000 0.3100",
        "13 of 26 evaluations",
        "<web> 5.2500",
        "bigram & more 5.0787 this run: +0.4213",
        "OpenAI GPT-2 (124M) 0.2955",
        "lambada, 5,000 items",
        "lambada acc 0.1250 ± 0.0100, 5,000 items, step 96 lambada perplexity 12,345.7 5,000 items, step 96",
        "core 0.1000 9 items, step 96 core chance 0.0000",
        "all scores of core core 0.1000 9 items, step 96 core arc 0.5000",
        "not comparable with published numbers",
        "Samples step 100, validation loss 5.5000 The<script>alert(100)</script>",
        "Skipped steps 1 step with a loss or gradient",
        "nan inf [{'shard': '<a>', 'start': 7}]",
        "optim.lr 0.003 0.0006",
        "data.mix {shards/<web>: 0.7} null",
        f"git checkout {'c0ffee' * 6} # then apply the diff in provenance.json accelerate launch train.py --output_dir",
        "versions python 3.11.7 seed 1337",
        "SHA-256 of the training shards 5ha",
        "2 launches",
    ):
        assert text in page.text
    assert "optim.betas [" not in page.text and "To continue it" not in page.text
    assert page.text.index("step 92, validation loss") > page.text.index("step 100, validation loss")


def test_report_is_one_file_without_scripts_and_escapes_samples(folder):
    html = write_report(folder).read_text(encoding="utf-8")
    page = Page(html)
    assert {"svg", "details"} <= page.tags and not page.tags & {"script", "link", "iframe", "img"}
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name.split(":")[-1] in ("src", "href", "action", "data"):
            assert value.startswith("#"), value
    assert "@import" not in html and "url(http" not in html.replace(" ", "").replace("'", "").replace('"', "")
    assert "The<script>" not in html and "<b>The</b>&lt;script&gt;" in html
    assert not list(folder.glob(".*.partial"))


OLD = {"command": "train.py", "config": {"max_steps": 100}, "code": None, "data": {"source": None}}


@pytest.mark.parametrize("provenance", [json.dumps(OLD), '{"command": "train.py"}', "damaged", None])
def test_report_leaves_out_what_an_old_run_did_not_record(folder, provenance):
    for name in ("status.json", "provenance.json"):
        (folder / name).unlink()
    records = [{"step": 1, "tokens": 8, "loss": 9.0}, {"step": 1, "tokens": 8, "val_loss": 9.5, "hellaswag": None}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if provenance is not None:
        (folder / "provenance.json").write_text(provenance)
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "my <run> no status" in page.text and "Validation loss 9.5000" in page.text
    assert ("To repeat the run: accelerate launch train.py" in page.text) == ("train.py" in str(provenance))
    assert "None" not in page.text and "Samples" not in page.text and "Skipped" not in page.text
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "tokens": 16, "val_loss": null}\n')
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "Validation loss not finite best 9.5000 at step 1" in page.text


def test_report_of_a_long_run_is_small(folder):
    records = [{"step": n, "tokens": n, "loss": 5 + n % 7 / 10, "lr": 0.1} for n in range(20_000)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert write_report(folder).stat().st_size < 200_000


@pytest.mark.parametrize("can_write", [True, False])
def test_failing_run_has_a_report_that_does_not_replace_its_error(tmp_path, monkeypatch, capsys, can_write):
    if not can_write:
        (tmp_path / "report.html").mkdir()
    with pytest.raises(ValueError, match="of the run"), make_log(tmp_path, loss_lines={"bigram": 7.0}) as log:
        log.open(LoopState(), {}, None, None)
        log.log_step(LoopState(step=1), loss=7.5, lr=0.1, grad_norm=1.0, seconds=0.01, windows=[])
        raise ValueError("<error> of the run")
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning: report.html" in line]
    assert len(warnings) == (not can_write)
    if can_write:
        page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
        assert "failed ValueError: <error> of the run" in page.text and "bigram (7.000)" in page.text


def test_thinned_rows_have_both_ends_and_the_ones_to_keep():
    assert thin_out([*range(12)]) == [*range(12)]
    rows = thin_out([*range(1000)], keep=lambda row: row == 501)
    assert len(rows) == 13 and rows[0] == 0 and rows[-1] == 999 and 501 in rows


def test_short_numbers():
    assert [*map(short_number, (0, 999, 999.6, 124_439_808, 1e10))] == ["0", "999", "1k", "124M", "10B"]
