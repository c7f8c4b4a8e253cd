"""The runs of a plan (benchmarks/race.py): train each one once, and keep its result as one small JSON file."""

import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.harness import machine_name
from common.errors import UserError
from common.files import read_json, write_json, write_text_atomically
from common.metrics import read_metrics
from data.manifest import dataset_fingerprint
from training.config import WITHOUT_EFFECT, Config, OptimConfig, load_config

ROOT = Path(__file__).resolve().parent.parent
_KEYS = {"settings", "sizes", "seeds", "recipes"}
_NUM_EVALUATIONS = 5
_RECIPE = "recipe.yaml"  # in a run's folder: its settings
# Facts about the data that a result keeps; its paths are this machine's.
_DATA = ("train_sha256", "train_tokens", "val_tokens", "tokenizer_sha256", "vocab_size")
# The code that decides the losses. The tests of golden losses hold the rest.
_SOURCES = ("modeling_gpt2repro/*.py", "training/optim.py", "data/loader.py", "data/windows.py", "data/permutation.py")


class Run(NamedTuple):
    """A run of a plan."""

    size: str
    recipe: str
    share: float
    """of the size's tokens"""
    seed: int
    settings: dict[str, Any]
    """for train.py, by dotted name"""

    @property
    def name(self) -> str:
        """Name of the run's folder and of its result."""
        return f"{self.size}-{label(self.recipe, self.share)}-{self.seed}"


def label(recipe: str, share: float) -> str:
    """Return the name of a recipe with a share of the tokens."""
    return recipe if share == 1 else f"{recipe}@{share:g}"


class Plan(NamedTuple):
    """A plan: its name, its runs, and {task: data} of the tasks that score each run's last checkpoint."""

    name: str
    runs: list[Run]
    scores: dict[str, str]


def read_plan(path: Path) -> Plan:
    """Read a plan, a YAML file; benchmarks/race.py describes it.

    Raises:
        UserError: the file is missing, or a key of it is missing or unknown.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    keys = set(content) if isinstance(content, dict) else set()
    if not _KEYS <= keys <= _KEYS | {"scores"}:
        raise UserError(
            f"{path}: a plan has the keys {', '.join(sorted(_KEYS))} and perhaps scores, got {sorted(keys)}"
        )
    runs = []
    for size, of_size in content["sizes"].items():
        for seed in content["seeds"]:  # a seed's runs are neighbors, so that a stopped race can be compared
            for recipe, of_recipe in content["recipes"].items():
                merged = {**content["settings"], **of_size, **(of_recipe or {})}
                for share in merged.pop("shares", [1]):
                    settings = _with_steps(merged, share, path)
                    runs.append(Run(size, recipe, share, seed, {**settings, "seed": seed}))
    return Plan(path.stem, runs, content.get("scores", {}))


def _with_steps(merged: dict[str, Any], share: float, path: Path) -> dict[str, Any]:
    """Return the settings with steps in place of `tokens` and `warmup`."""
    settings = dict(merged)
    try:
        tokens, warmup = settings.pop("tokens"), settings.pop("warmup")
        steps = round(float(tokens) * share / settings["batch.tokens_per_step"])
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing: it belongs in settings, sizes or recipes") from None
    return {
        **settings,
        "max_steps": steps,
        "optim.warmup_steps": round(float(warmup) * steps),
        "eval_every": max(1, steps // _NUM_EVALUATIONS),
    }


class Trainer:
    """Trains runs, and keeps a result per run.

    Args:
        num_jobs: runs that train at the same time and share the cores.
        launch: options of `accelerate launch`; none: one process, without it.
        scores: {task: data} of the tasks that score the last checkpoint.
    """

    def __init__(self, results: Path, out: Path, num_jobs: int, launch: Sequence[str], scores: dict[str, str]) -> None:
        self._results, self._out, self._num_jobs, self._launch = results, out, num_jobs, launch
        self._scores = scores
        threads = str(max(1, (os.cpu_count() or 1) // num_jobs))
        self._environment = {**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}

    def result(self, run: Run) -> dict[str, Any] | None:
        """Return a run's result, or None if there is none with its settings, its data and its scores.

        The data is compared only where it is here. A run is not trained again for another code fingerprint, since tests
        hold that changes to the code keep the losses; `race` prints a warning.
        """
        settings = effective_settings(run)  # an invalid one is found before hours of training
        result = read_json(self._results / f"{run.name}.json")
        if not result:
            return None
        folder = Path(settings["data"]["path"])
        has_data = folder.is_dir()
        is_same = (
            _with_defaults(result["settings"], dataclasses.asdict(Config())) == settings
            and not (has_data and result["data"]["train_sha256"] != dataset_fingerprint(folder)["train_sha256"])
            and self._scores.keys() <= result["scores"].get("results", {}).keys()
        )
        return result if is_same else None

    def rate(self, run: Run) -> float:
        """Return the tokens per second of a run, from its first steps."""
        folder = self._out / f"rate-{run.size}"
        shutil.rmtree(folder, ignore_errors=True)
        self._launch_training(run, folder, "--max_steps", "6", "--eval_every", "100", "--eval.val_tokens", "1024")
        milliseconds = [record["ms"] for record in read_metrics(folder / "metrics.jsonl") if "ms" in record]
        if not milliseconds:
            raise UserError(f"{run.name} does not start: see {folder / 'console.log'}")
        return 1000 * run.settings["batch.tokens_per_step"] / statistics.median(milliseconds[1:])

    def train_all(self, runs: Iterable[Run]) -> Iterator[tuple[Run, dict[str, Any]]]:
        """Train and score runs, `num_jobs` at a time, and yield each with its result. Started again, resume.

        Raises:
            UserError: a run ended without a result, other than by diverging.
        """
        with ThreadPoolExecutor(self._num_jobs) as executor:
            futures = [(run, executor.submit(self._train, run)) for run in runs]
            try:
                for run, future in futures:
                    yield run, future.result()
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)
                raise

    def _train(self, run: Run) -> dict[str, Any]:
        folder = self._out / run.name
        if not _belongs_to(folder, run):  # settings or data that the plan had before
            shutil.rmtree(folder, ignore_errors=True)
        if outcome(folder, run) is None:
            (folder / "status.json").unlink(missing_ok=True)  # of an earlier attempt
            self._launch_training(run, folder, "--resume", "auto")
        has_finished = outcome(folder, run)
        if has_finished is None:
            raise UserError(f"{folder}: the run did not finish; see console.log there, then start the race again")
        provenance = read_json(folder / "provenance.json")
        curve, seconds = validation_curve(read_metrics(folder / "metrics.jsonl"))
        result = {
            **{"size": run.size, "recipe": run.recipe, "share": run.share, "seed": run.seed},
            "outcome": "finished" if has_finished else "diverged",
            "losses": curve,
            "seconds": round(seconds, 1),
            "scores": self._score(folder, run) if has_finished else {"results": dict.fromkeys(self._scores)},
            "parameters": provenance["model"]["parameters"],
            "flops": curve[-1][0] * provenance["model"]["flops_per_token"],
            "settings": effective_settings(run),
            "data": {name: provenance["data"][name] for name in _DATA},
            "code": {"sha256": code_fingerprint(), "commit": (provenance["code"] or {}).get("commit")},
            "machine": machine_name(),
            "threads": provenance["hardware"]["cpu_threads"],
        }
        self._results.mkdir(parents=True, exist_ok=True)
        write_json(self._results / f"{run.name}.json", result)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return result

    def _launch_training(self, run: Run, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / _RECIPE, yaml.safe_dump(run.settings))
        # Without the launcher, which train.py takes for the owner of all cores when several runs share them.
        launcher = ["-m", "accelerate.commands.launch", *self._launch] if self._launch else []
        command = [sys.executable, *launcher, "train.py", "--config", str(folder / _RECIPE)]
        command += ["--output_dir", str(folder), *options]
        self._run(command, folder)

    def _run(self, command: Sequence[str], folder: Path) -> int:
        with (folder / "console.log").open("a") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=self._environment)
        return done.returncode

    def _score(self, folder: Path, run: Run) -> dict[str, Any]:
        """Score the last checkpoint in a process of its own, and return what `python -m eval --output` writes."""
        if not self._scores:
            return {}
        checkpoint = folder / "checkpoints" / f"step_{run.settings['max_steps']:06d}"
        command = [sys.executable, "-m", "eval", "--model", str(checkpoint), "--output", str(folder / "scores.json")]
        command += ["--tasks", *self._scores, "--data", *(f"{task}={data}" for task, data in self._scores.items())]
        if self._run(command, folder) != 0:
            raise UserError(f"{folder}: the checkpoint cannot be scored; see console.log there")
        scores = read_json(folder / "scores.json")
        return {name: scores[name] for name in ("results", "tasks", "date")}  # the rest is in the run's own result


def _belongs_to(folder: Path, run: Run) -> bool:
    """Return True if a run's folder was made with its settings and its data."""
    recipe, provenance = folder / _RECIPE, read_json(folder / "provenance.json")
    if not recipe.is_file() or recipe.read_text(encoding="utf-8") != yaml.safe_dump(run.settings):
        return False
    sha256 = dataset_fingerprint(run.settings["data.path"])["train_sha256"]
    return not provenance or provenance["data"]["train_sha256"] == sha256


def effective_settings(run: Run) -> dict[str, Any]:
    """Return all settings that can change a run's losses; raises UserError if one is invalid."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(run.settings), encoding="utf-8")
        config = json.loads(json.dumps(dataclasses.asdict(load_config(["--config", str(recipe)]))))
    return {name: value for name, value in config.items() if name not in WITHOUT_EFFECT}


def _with_defaults(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return a result's settings with the defaults of those that train.py did not have when the run was trained."""
    filled = {name: default for name, default in defaults.items() if name not in WITHOUT_EFFECT} | settings
    return {
        name: _with_defaults(value, defaults[name]) if isinstance(value, dict) and defaults.get(name) else value
        for name, value in filled.items()
    }


def outcome(folder: Path, run: Run) -> bool | None:
    """Return True if the run in a folder has finished, False if it diverged, otherwise None."""
    status = read_json(folder / "status.json").get("status")
    if status == "finished":
        return True
    last = (read_metrics(folder / "metrics.jsonl") or [{}])[-1]
    gave_up = last.get("skipped", {}).get("in_a_row", 0) >= OptimConfig.max_skipped_steps
    ended_without_loss = last.get("step") == run.settings["max_steps"] and last.get("val_loss", 0.0) is None
    return False if status == "failed" and (gave_up or ended_without_loss) else None


def validation_curve(records: Iterable[dict[str, Any]]) -> tuple[list[tuple[int, float]], float]:
    """Return (tokens, validation loss) of each evaluation, infinite if it was not finite, and the seconds of the steps.

    Evaluations and saving do not count as seconds.
    """
    curve, seconds = [], 0.0
    for record in records:
        seconds += record.get("ms", 0.0) / 1000
        if "val_loss" in record:
            loss = record["val_loss"]
            curve.append((record["tokens"], math.inf if loss is None else loss))
    return curve, seconds


def code_fingerprint() -> str:
    """Return a hash of the sources that decide a run's losses."""
    digest = sha256()
    for pattern in _SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
