"""Test `python -m eval.miniseries`: its table and plot against the numbers that they are made from."""

import json
import math
import weakref
from pathlib import Path

import numpy as np
import pytest

from data.shards import write_shard
from eval import EvalError, evaluate, miniseries
from eval.bits_per_byte.task import Task as BitsPerByte
from eval.hellaswag.task import Task as HellaSwag
from eval.lambada.task import Task as Lambada
from eval.law import Law, fit_law
from eval.published import GPT2, GPT3

TASKS = {"hellaswag": HellaSwag, "lambada": Lambada, "bits_per_byte": BitsPerByte}
SOURCE = "fineweb-edu, validation split, stride 1024, all 9,000 windows"
# Plausible results of the four sizes.
VALUES = {
    "acc": (0.2905, 0.3250, 0.3610, 0.3910),
    "acc_norm": (0.3071, 0.3890, 0.4510, 0.5020),
    "lm_eval_acc": (0.2938, 0.3300, 0.3700, 0.4050),
    "lm_eval_acc_norm": (0.3190, 0.4020, 0.4600, 0.5220),
    "loss": (3.2710, 2.9900, 2.8400, 2.7400),
    "perplexity": (36.1, 19.2, 13.1, 10.2),
    "bits_per_byte": (0.951, 0.878, 0.830, 0.802),
}


def result_of(size, *tasks):
    """Return what `python -m eval --output` writes for one of the four sizes (0, 1, 2 or 3), scored on all items."""
    model = GPT2[size]
    results, descriptions = {}, {}
    for task in tasks or TASKS:
        kind = TASKS[task]
        results[task] = {name: VALUES[name][size] for name in kind.metrics} | {"n": kind.full_size or 9000}
        if task != "bits_per_byte":
            results[task] |= {f"{name}_stderr": VALUES[name][size] / 64 for name in kind.metrics}
        data = {"source": SOURCE, "sha256": task * 4, "is_sample": False}
        descriptions[task] = {"version": kind.version, "data": data, "figures": kind.metrics}
        descriptions[task]["full_size"] = kind.full_size
    run = f"runs/gpt2_{model.name.split()[-1].lower()}/checkpoints/step_019073"
    shape = {"parameters": model.parameters, "n_layer": model.size[0], "n_embd": model.size[1]}
    return {"results": results, "tasks": descriptions, "model": {"name": run, "revision": None, **shape}}


@pytest.fixture
def run(tmp_path):
    """Return a function that runs the command and returns the written table; `out` names the folder."""

    def run(*arguments, out="out"):
        assert miniseries.main([*map(str, arguments), "--out", str(tmp_path / out)]) == 0
        return (tmp_path / out / "miniseries.md").read_text(encoding="utf-8")

    return run


@pytest.fixture
def written(tmp_path):
    """Return a function that writes {name: result} to files and returns their paths as str."""

    def write(results):
        paths = [tmp_path / f"{name}.json" for name in results]
        for path, result in zip(paths, results.values(), strict=True):
            path.write_text(json.dumps(result), encoding="utf-8")
        return [str(path) for path in paths]

    return write


@pytest.fixture
def fails(capsys, monkeypatch, tmp_path):
    """Return a function that runs the command, which must fail before it loads a model or writes anything, and returns
    the error line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(miniseries.command, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
            assert miniseries.main([str(argument) for argument in arguments]) == 2
        assert not Path("miniseries").exists()
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1
        return output.err

    return run


@pytest.fixture
def drawn(monkeypatch):
    """Return the list of matplotlib Figures that the command draws."""
    figures, draw = [], miniseries.draw

    def spy(*args):
        figures.append(draw(*args))
        return figures[-1]

    monkeypatch.setattr(miniseries, "draw", spy)
    return figures


def cells_of(markdown):
    """Return the rows of a Markdown table: {first cell: [other cells]}."""
    lines = [line[2:-2].split(" | ") for line in markdown.splitlines() if line.startswith("|")]
    return {first: [cell.strip() for cell in cells] for first, *cells in lines}


def curves_of(axes):
    """Return {series: [(x, y, error)]} of a panel."""
    curves = {}
    for container in axes.containers:
        line, _, bars = container.lines
        ends = [segment[:, 1] for segment in bars[0].get_segments()] if bars else [np.zeros(2)] * len(line.get_xdata())
        errors = [(high - low) / 2 for low, high in ends]
        curves[container.get_label()] = list(zip(line.get_xdata(), line.get_ydata(), errors, strict=True))
    return curves


# ----------------------------------------------------------------------------------------------- results


def test_checkpoints_are_scored_with_one_model_in_memory_at_a_time(
    own_checkpoint, checkpoint, tiny_gpt2, tokenizer, run, tmp_path, monkeypatch, capsys
):
    loaded, load_model = [], miniseries.command.load_model

    def spy(*args, **options):
        assert all(model() is None for model in loaded), "the previous model was not freed"
        model = load_model(*args, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(miniseries.command, "load_model", spy)
    options = ("--data", "sample", "--limit", 4, "--device", "cpu", "--published")
    out, name = tmp_path / "out", own_checkpoint.parents[1].name
    out.mkdir()
    (out / "tiny.json").write_text("older")
    text = run(own_checkpoint, checkpoint, *options)
    assert len(loaded) == 2
    expected = evaluate(tiny_gpt2, tokenizer, [HellaSwag(data="sample", limit=4)])["results"]["hellaswag"]
    paths = {out / f"{name}-step_000100.json": own_checkpoint, out / "tiny.json": checkpoint}
    assert set(out.iterdir()) == {*paths, out / "miniseries.md", out / "miniseries.png"}
    for path, model in paths.items():
        result = json.loads(path.read_text())
        assert result["results"]["hellaswag"] == pytest.approx(expected)
        assert (result["model"]["name"], result["published"]) == (str(model), {})

    assert text in capsys.readouterr().out
    cells = cells_of(text)
    assert cells["model"] == ["parameters", *(f"hellaswag {name}" for name in HellaSwag.metrics)]
    numbers = [f"{expected[name]:.4f} ± {expected[f'{name}_stderr']:.4f}" for name in HellaSwag.metrics]
    assert cells[f"{name}/step_000100"] == cells["tiny"] == [f"{tiny_gpt2.num_parameters():,}", *numbers]
    assert "published results are for the task's own items, and these are this project's sample." in text
    assert not [name for name in cells if "published" in name]

    # A result file and a checkpoint together give the same table.
    assert run(next(iter(paths)), checkpoint, *options, out="mixed") == text
    assert {path.name for path in (tmp_path / "mixed").iterdir()} == {"miniseries.md", "miniseries.png", "tiny.json"}


def test_table_and_plot_of_four_sizes_with_published_results(written, run, drawn, tmp_path):
    results = {f"r{size}": result_of(size) for size in (2, 0, 3, 1)}
    cells = cells_of(run(*written(results), "--published", out="new/out"))
    columns = [(task, name) for task, kind in TASKS.items() for name in kind.metrics]
    assert cells["model"] == ["parameters", *map(" ".join, columns)]
    ours = [f"gpt2_{size.lower()}/step_019073 ({size})" for size in ("124M", "350M", "774M", "1558M")]
    published = [f"{model.name} (published)" for model in GPT2 + GPT3]
    assert list(cells) == ["model", "---", *ours, *published]
    for size, label in enumerate(ours):
        numbers = [f"{VALUES[name][size]:.4f}" for _, name in columns]
        errors = [f" ± {VALUES[name][size] / 64:.4f}" if task != "bits_per_byte" else "" for task, name in columns]
        assert cells[label] == [f"{GPT2[size].parameters:,}", *map("".join, zip(numbers, errors, strict=True))]
    for label, model in zip(published, GPT2 + GPT3, strict=True):
        known = model.results | {"bits_per_byte": {"loss": model.losses.get("fineweb-edu")}}
        values = [known.get(task, {}).get(name) for task, name in columns]
        assert cells[label] == [f"{model.parameters:,}", *("" if x is None else f"{x:.4f}" for x in values)]

    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {"miniseries.md", "miniseries.png"}
    assert (tmp_path / "new" / "out" / "miniseries.png").read_bytes().startswith(b"\x89PNG\r\n")
    [figure] = drawn
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_ylabel() for axes in panels] == [name for _, name in columns]
    millions = [model.parameters / 1e6 for model in GPT2]
    for axes, (task, name) in zip(panels, columns, strict=True):
        assert (axes.get_xlabel(), axes.get_xscale()) == ("parameters, millions", "log")
        curves = curves_of(axes)
        errors = [value / 64 if task != "bits_per_byte" else 0.0 for value in VALUES[name]]
        assert np.allclose(curves[miniseries.OURS], list(zip(millions, VALUES[name], errors, strict=True)))
        for series, models in (("OpenAI GPT-2, published", GPT2), ("GPT-3, published", GPT3)):
            published = [m.results.get(task, {}) | {"loss": m.losses.get("fineweb-edu")} for m in models]
            known = [(m.parameters / 1e6, values.get(name), 0.0) for m, values in zip(models, published, strict=True)]
            expected = [point for point in known if point[1] is not None]
            assert curves.get(series, []) == expected
    assert panels[1].get_title().startswith("HellaSwag: 10,042 items")
    assert "validation text: 9,000 windows" in panels[-1].get_title()
    sample = result_of(0, "hellaswag")
    sample["tasks"]["hellaswag"]["data"]["is_sample"] = True
    title = miniseries.draw(miniseries.rows_of([sample]), sample).axes[0].get_title()
    assert title.startswith("own sample items, not HellaSwag: 10,042 items")
    [legend] = figure.legends
    series = [miniseries.OURS, "OpenAI GPT-2, published", "GPT-3, published"]
    assert [text.get_text() for text in legend.get_texts()] == series


@pytest.mark.parametrize("values", [(0.30, 0.31, 0.32, 0.33, 0.34), (0.3,) * 5, (0.5, 0.4, 0.3, 0.29, 0.28)])
def test_labels_do_not_overlap(values):
    """Three of the points are steps of one model, above one another."""
    label, sizes = "gpt2_1558m/step_{}00000 (1558M)", [1.2e8, 3.5e8, 7.7e8, 7.7e8, 7.7e8]
    rows = [
        miniseries.Row(label.format(i), miniseries.OURS, sizes[i], {("lambada", "acc"): (value, 0.01)})
        for i, value in enumerate(values)
    ]
    figure = miniseries.draw(rows, result_of(0, "lambada"))
    figure.draw_without_rendering()
    [axes] = figure.axes
    assert [text.get_text() for text in axes.texts] == [row.label.replace("/", "\n").replace(" ", "\n") for row in rows]
    boxes = [super(type(text), text).get_window_extent() for text in axes.texts]
    for i, box in enumerate(boxes):
        assert box.count_overlaps(boxes) == 1, f"label {i} overlaps another"
        assert axes.bbox.contains(*box.p0) and axes.bbox.contains(*box.p1)


def test_values_that_are_not_finite_are_left_out(written, run, drawn, tmp_path, capsys):
    """JSON has null for infinity and nan; the standard error of one item is nan."""
    result = result_of(0, "lambada")
    result["results"]["lambada"] |= {"perplexity": None, "acc_stderr": math.nan}
    result["results"]["lm-eval:arc"] = {"acc": 0.25, "acc_stderr": None, "n": 7}
    data = {"source": "lm-eval 0.4.9, arc", "sha256": None, "is_sample": False}
    description = {"version": {"arc": "1"}, "data": data, "figures": {"acc": "lm-eval 0.4.9"}}
    result["tasks"]["lm-eval:arc"] = description | {"full_size": None}
    other = result_of(1, "lambada")
    for key in ("results", "tasks"):
        other[key]["lm-eval:arc"] = result[key]["lm-eval:arc"]
    cells = cells_of(run(*written({"a": result, "b": other})))
    assert sorted(cells["model"][1:]) == ["lambada acc", "lambada perplexity", "lm-eval:arc acc"]
    assert cells["gpt2_124m/step_019073 (124M)"][1:] == ["0.2905", "0.2500", ""]
    assert cells["gpt2_350m/step_019073 (350M)"][1:] == ["0.3250 ± 0.0051", "0.2500", "19.2000 ± 0.3000"]
    assert not [name for name in cells if "published" in name]  # without --published
    [figure] = drawn
    assert [len(curves_of(axes)[miniseries.OURS]) for axes in figure.axes] == [2, 2, 1]

    other["results"]["lm-eval:arc"] = result["results"]["lm-eval:arc"] = {"acc": None, "n": 7}
    paths = written({"a": result, "b": other})
    assert miniseries.main([*paths, "--tasks", "lm-eval:arc", "--out", str(tmp_path / "out")]) == 2
    assert "no metric is a finite number" in capsys.readouterr().err


# --------------------------------------------------------------------------------- comparability


@pytest.mark.parametrize(
    ("task", "changes", "footnote"),
    [
        ("hellaswag", {"n": 100}, "hellaswag: published results are for all 10,042 items, and these are for 100."),
        ("lambada", {"n": 5152}, "lambada: published results are for all 5,153 items, and these are for 5,152."),
        ("hellaswag", {"is_sample": True}, "these are this project's sample."),
        ("bits_per_byte", {"source": SOURCE.replace("fineweb", "text")}, "no published results are known for text-edu"),
        ("bits_per_byte", {"source": SOURCE.replace("1024", "512")}, "published losses need the full validation split"),
        ("bits_per_byte", {"source": SOURCE.replace("all", "the first 9 of")}, "need the full validation split"),
        ("bits_per_byte", {"source": "fineweb.txt, stride 1024, all 3 documents"}, "need the full validation split"),
    ],
)
def test_published_results_of_a_task_need_comparable_items(task, changes, footnote):
    """The published results of the other tasks stay."""
    result = result_of(0)
    result["results"][task]["n"] = changes.pop("n", result["results"][task]["n"])
    result["tasks"][task]["data"] |= changes
    rows, footnotes = miniseries.published_rows(result)
    assert rows and task not in {name for row in rows for name, _ in row.metrics}
    assert [line for line in footnotes if footnote in line and line.startswith(f"{task}: ")]
    assert f"- {footnotes[0]}\n" in miniseries.table(miniseries.rows_of([result]), result, footnotes)


@pytest.mark.parametrize(("settings", "is_same"), [({"stride": 1024}, True), ({}, False), ({"limit": 1}, False)])
def test_windows_are_recognized_in_the_tasks_description(tokenizer, tmp_path, settings, is_same):
    """Published losses depend on the windows, and only the description has them."""
    write_shard(tmp_path / "any_val_000000.bin", np.arange(3000))
    data = BitsPerByte(data=str(tmp_path), **settings).load(tokenizer, 1024).data
    result = result_of(0, "bits_per_byte")
    result["tasks"]["bits_per_byte"]["data"]["source"] = f"fineweb {data.description}"
    rows, _ = miniseries.published_rows(result)
    assert [row.metrics["bits_per_byte", "loss"][0] for row in rows] == (
        [model.losses["fineweb"] for model in GPT2] if is_same else []
    )


def test_results_of_different_protocols_are_refused(fails, written):
    results = [result_of(size, "hellaswag", "lambada") for size in range(4)]
    results[2]["tasks"]["hellaswag"]["data"]["sha256"] = "e" * 64
    results[1]["tasks"]["hellaswag"]["version"] = 1
    results[3]["results"]["hellaswag"]["n"] = 40
    paths = written(dict(zip("abcd", results, strict=True)))
    for path, what in zip(paths[1:], ("version 1, 10042", "10042 items, eeeeeeeee", "version 2, 40"), strict=True):
        line = fails(paths[0], path)
        assert f"hellaswag of {paths[0]!r} (version 2, 10042 items, hellaswag) and of {path!r} (" in line
        assert what in line and "score both with the same" in line
    assert miniseries.main([*paths, "--tasks", "lambada"]) == 0  # scored with the same protocol


def test_different_protocols_are_found_before_scoring(fails, written, own_checkpoint):
    [path] = written({"a": result_of(0, "hellaswag")})
    line = fails(path, own_checkpoint, "--data", "sample", "--limit", 4, "--device", "cpu")
    assert f"hellaswag of {path!r} (version 2, 10042 items, " in line
    assert f"and of {str(own_checkpoint)!r} (version 2, 4 items, " in line


# ------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["runs/a/checkpoints/step_000100"], ["a/step_000100"]),
        (["runs/a/checkpoints/step_1", "runs/a/checkpoints/step_2"], ["a/step_1", "a/step_2"]),
        (["x/a/checkpoints/step_1", "y/a/checkpoints/step_1"], ["x/a/step_1", "y/a/step_1"]),
        (["openai-community/gpt2", "me/gpt2-mine"], ["gpt2", "gpt2-mine"]),
        (["openai-community/gpt2", "me/gpt2"], ["openai-community/gpt2", "me/gpt2"]),
        (["/m/a-b/c", "/n/a/b-c", "/o/c", "/o/b-c"], ["m/a-b/c", "n/a/b-c", "o/c", "o/b-c"]),
    ],
)
def test_labels_are_unique(names, labels):
    assert miniseries.unique_labels(names) == labels


def test_repeated_model_is_refused():
    for names in (["me/gpt2", "a", "me/gpt2"], ["b", "a-b", "a/b"]):  # a-b and a/b have the same file name
        with pytest.raises(EvalError, match=f"{names[-1]!r} is listed twice; remove one"):
            miniseries.unique_labels(names)


# ---------------------------------------------------------------------------------- invalid arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json"], "'nowhere.json' cannot be read (No such file or directory); give a file"),
        (["a.json", "runs/of/mine"], "'runs/of/mine': no such folder, nor a Hub id"),
        (["a.json", "--tasks", "helaswag"], "'a.json' has no helaswag; score that model on it too"),
        (["a.json", "--limit", "5"], "--limit: all inputs are results, so nothing is scored; leave it out"),
        (["a.json", "--data", "sample"], "--data: all inputs are results"),
        (["me/nowhere", "--tasks", "helaswag"], "unknown task 'helaswag'; did you mean 'hellaswag'?"),
        (["a.json", "me/nowhere", "--tasks", "bits_per_byte"], "'a.json' has no bits_per_byte"),
        (["a.json", "--out", "a.json/in"], "--out 'a.json/in' cannot be created (Not a directory); choose another"),
        (["a.json", "a.json"], "is listed twice"),
    ],
)
def test_invalid_arguments_are_named(fails, arguments, message):
    Path("a.json").write_text(json.dumps(result_of(0, "hellaswag", "lambada")), encoding="utf-8")
    assert message in fails(*arguments)
    assert [path.name for path in Path().iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b"[" * 100_000])
def test_json_that_is_not_a_result_is_refused(fails, content):
    Path("a.json").write_bytes(content)
    assert "'a.json' is not a result file of `python -m eval --output`; give such a file" in fails("a.json")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "parameters"), None),
        (("model", "name"), None),
        (("results", "lambada", "acc"), "0.3"),
        (("results", "lambada", "n"), None),
        (("tasks", "lambada", "data"), {}),
        (("tasks", "lambada", "figures"), ["acc"]),
    ],
)
def test_damaged_result_is_refused(fails, written, path, value):
    result = place = result_of(0)
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert "is not a result file of `python -m eval --output`" in fails(*written({"a": result}))


def test_all_folders_are_checked_before_scoring(fails, own_checkpoint, tmp_path):
    arguments = [own_checkpoint, tmp_path, "--data", "sample", "--device", "cpu"]
    assert f"{str(tmp_path)!r}: no config.json" in fails(*arguments)
    assert "items 'nowhere.jsonl': no such file" in fails(own_checkpoint, "--data", "nowhere.jsonl", "--device", "cpu")


def test_only_the_main_process_writes(written, own_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(miniseries.command, "join_processes", lambda _: ("cpu", False))
    out = tmp_path / "out"
    assert miniseries.main([str(own_checkpoint), "--data", "sample", "--limit", "2", "--out", str(out)]) == 0
    assert not out.exists()
    assert capsys.readouterr().out == ""


# ----------------------------------------------------------------------------------------------- a series


LAW = Law(1.7, 400.0, 0.34, 410.0, 0.28)


def run_of(parameters, tokens, noise=0.0):
    """Return a result of benchmarks/race.py, whose loss is on the law but for the noise."""
    losses = [[0, 9.0], [tokens, LAW.loss(parameters, tokens) + noise]]
    task = Lambada()
    data = {"source": "lambada.jsonl", "sha256": "lambada", "is_sample": False}
    about = {"version": task.version, "data": data, "figures": task.metrics, "full_size": task.full_size}
    return {
        **{"size": f"{parameters / 1e6:g}M", "recipe": "muon", "seed": 1, "outcome": "finished"},
        "losses": losses,
        "parameters": parameters,
        "data": {"train_sha256": "text"},
        "settings": {"model": {"n_layer": 2, "n_embd": 64}},
        "scores": {
            "results": {"lambada": {"acc": tokens / 1e8, "acc_stderr": 0.01, "perplexity": 40.0, "n": 5153}},
            "tasks": {"lambada": about},
        },
    }


def series_of(rng):
    sizes, budgets = (2_000_000, 4_000_000, 7_000_000, 12_000_000, 20_000_000), (1_000_000, 2_000_000, 4_000_000)
    return {f"{n}-{d}": run_of(n, d, rng.normal() * 0.01) for n in sizes for d in budgets}


def test_series_of_runs_has_a_line_per_budget_and_a_law(written, run, drawn):
    runs = series_of(np.random.default_rng(0))
    text = run(*written(runs), "--published")
    cells = cells_of(text)
    first = runs["2000000-1000000"]["losses"][-1][1]
    assert cells["2M, 1M tokens"][:2] == ["2,000,000", f"{first:.4f}"]
    assert cells["OpenAI GPT-2 124M (published)"][-2:] == ["0.3256", "40.0600"]
    assert "L(N, D) = E + A / N^alpha + B / D^beta, 15 runs" in text and "124M parameters after 10B tokens" in text
    [figure] = drawn
    loss, residual, accuracy = figure.axes
    assert set(curves_of(loss)) == {f"{n}M tokens (± standard error)" for n in (1, 2, 4)}
    assert [x for x, _, _ in curves_of(accuracy)["4M tokens (± standard error)"]] == [2, 4, 7, 12, 20]
    assert len(curves_of(residual)) == 3 and max(abs(y) for y in residual.dataLim.intervaly) < 0.05


def test_law_is_found_with_an_interval_that_holds_the_truth():
    points = [(run["parameters"], *run["losses"][-1]) for run in series_of(np.random.default_rng(0)).values()]
    exact = [(n, d, LAW.loss(n, d)) for n, d, _ in points]
    assert fit_law(exact, num_samples=2).law == pytest.approx(LAW, rel=1e-6)
    fit = fit_law(points)
    low, high = fit.interval(124e6, 10e9)
    assert low < LAW.loss(124e6, 10e9) < high and 0.1 < high - low < 1.5
    assert fit_law([point for point in points if point[1] < 4e6]) is None  # two budgets do not determine beta
    held = 0
    for seed in range(6):  # 95% intervals near the runs
        noise = np.random.default_rng(seed).normal(0, 0.01, len(exact))
        noisy = [(n, d, loss + error) for (n, d, loss), error in zip(exact, noise, strict=True)]
        low, high = fit_law(noisy, num_samples=100).interval(30e6, 8e6)
        held += low < LAW.loss(30e6, 8e6) < high
    assert held >= 5


def test_law_of_a_loss_that_rises_with_size_is_none():
    points = [(n, d, 5 + n / 1e7 - d / 1e8) for n in (2e6, 4e6, 8e6) for d in (1e6, 2e6, 4e6)]
    assert fit_law(points) is None


def test_diverged_runs_are_left_out_and_recipes_are_not_mixed(written, run, fails, capsys):
    runs = {"a": run_of(2_000_000, 1_000_000), "b": run_of(4_000_000, 1_000_000), "c": run_of(4_000_000, 1_000_000)}
    runs["c"] |= {"seed": 2}
    diverged = {**run_of(7_000_000, 1_000_000), "outcome": "diverged", "scores": {"results": {"lambada": None}}}
    diverged["losses"][-1][1] = None
    text = run(*written(runs | {"d": diverged}))
    assert {"2M, 1M tokens", "seed 1/muon/4M, 1M tokens"} & set(cells_of(text)) and "7M" not in text
    capsys.readouterr()
    assert "all of these runs diverged" in fails(*written({"d": diverged}))
    assert "is not a result file" in fails(*written({"d": diverged | {"losses": []}}))
    runs["c"] |= {"recipe": "adamw"}
    assert "runs of 2 recipes (adamw, muon)" in fails(*written(runs))


def test_runs_on_other_text_are_refused(fails, written):
    runs = {"a": run_of(2_000_000, 1_000_000), "b": run_of(4_000_000, 1_000_000)}
    runs["b"]["data"]["train_sha256"] = "other text"
    assert "training of" in fails(*written(runs))
