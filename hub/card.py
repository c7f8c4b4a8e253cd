"""
The model card of a checkpoint: its facts, gathered in dataclasses, and card.md.jinja, which shows them.

The facts come from the checkpoint, from the run it belongs to (provenance.json, metrics.jsonl) and from the files that
`python -m eval --output` wrote. The card leaves out what is not known.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import GPT2Config, PreTrainedConfig

from common.metrics import read_metrics
from hub import HubError

_TEMPLATE = Path(__file__).with_name("card.md.jinja")

# Raised by reading a file that is missing or does not have the expected form.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)

# Public data sets whose scores are comparable between models: Hub id, split, display name.
_PUBLIC_DATASETS = {
    "hellaswag": ("Rowan/hellaswag", "validation", "HellaSwag"),
    "lambada": ("EleutherAI/lambada_openai", "test", "LAMBADA (OpenAI)"),
}

# Settings that do not change the weights; some of them are folders or account names.
_NOT_SHOWN = ("output_dir", "resume", "dry_run", "push_to_hub", "push_every_save", "push_public")


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Training data, as the run recorded it."""

    train_tokens: int
    val_tokens: int
    manifest_sha256: str | None
    dataset: str | None
    """id on the Hub"""
    subset: str | None
    revision: str | None
    sample_python: str | None
    """Python version of the offline sample corpus, if that is the data"""
    files: list[str]
    """names of the files that were tokenized, without their folders"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run's own records about one of its checkpoints."""

    name: str
    """name of the run's folder"""
    step: int
    max_steps: int
    tokens: int
    """tokens trained on up to this step"""
    tokens_per_step: int
    seed: int
    device: str
    num_processes: int
    mixed_precision: str
    dollars_per_hour: float | None
    """price of one device"""
    seconds: float | None
    """time spent on training and evaluation up to this step"""
    commit: str | None
    """commit of gpt2-repro"""
    is_dirty: bool
    """True if the code had uncommitted changes"""
    versions: dict[str, str]
    """{package: version} of the last launch"""
    num_resumes: int
    settings: str
    """all settings as YAML, without folders of the training machine"""
    data: TrainingData
    is_evaluated: bool
    """True if the run evaluated this step"""
    val_loss: float | None
    """nats per token; None if the step was not evaluated or its loss was not finite"""
    val_loss_tokens: int
    """validation tokens that an evaluation scores"""
    hellaswag: dict[str, Any] | None
    """HellaSwag scores of this step: acc_norm, acc_norm_stderr, n, is_sample"""
    is_from_scratch: bool
    """True if the run is known to have started from random weights"""
    init_from: str | None
    """model whose weights the run started from: a Hub id or a folder's name"""
    base_model: str | None
    """`init_from`, if it is a Hub id"""
    curves: Path | None
    """curves.png of the run"""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of the card's table of results."""

    metric: str
    value: float
    stderr: float | None = None
    published: str = ""
    """a published value of the same metric"""
    protocol: str
    entry: EvalResult | None = None
    """for the card's metadata, if the value is comparable with those of other models"""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Content of a file written by `python -m eval --output`."""

    scores: list[Score]
    footnotes: list[str]
    """one line per task: its version and items"""


def read_run(checkpoint: Path) -> Run | None:
    """
    Read what a run recorded about a checkpoint of its checkpoints/ folder. None for a checkpoint outside a run.

    Raises:
        HubError: the run's files exist but cannot be read.
    """
    checkpoint = checkpoint.resolve()
    if len(checkpoint.parents) < 2 or checkpoint.parent.name != "checkpoints":
        return None
    folder = checkpoint.parents[1]
    if not (folder / "provenance.json").is_file():
        return None
    try:
        return _parse_run(folder, checkpoint)
    except _UNREADABLE as error:
        raise HubError(
            f"run {str(folder)!r}: provenance.json, metrics.jsonl or the checkpoint's state.json cannot be read "
            f"({type(error).__name__}: {error}). Repair the file, or copy the checkpoint out of the run: "
            "then the model card leaves out the run"
        ) from error


def _parse_run(folder: Path, checkpoint: Path) -> Run:
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    state = json.loads((checkpoint / "training_state" / "state.json").read_text(encoding="utf-8"))
    config, hardware, data = provenance["config"], provenance["hardware"], provenance["data"]
    source, code = data.get("source") or {}, provenance.get("code")
    step = int(state["step"])

    records = [record for record in read_metrics(folder / "metrics.jsonl") if record["step"] <= step]
    evaluation = next((r for r in records if r["step"] == step and "val_loss" in r), None)
    seconds = sum(r["ms"] / 1000 if "ms" in r else r.get("seconds", 0) for r in records) if records else None

    earlier = list(provenance.get("earlier_launches", []))
    launches = [*earlier, provenance]
    initialized = next((launch for launch in launches if launch["config"].get("init_from")), None)
    init_from = initialized and initialized["config"]["init_from"]
    base_model = None if initialized is None or _is_folder(initialized, folder) else init_from

    items = config["eval"].get("hellaswag")
    settings = {key: value for key, value in config.items() if key not in _NOT_SHOWN} | {
        "data": config["data"] | {"path": _file_name(config["data"]["path"])},
        "eval": config["eval"] | {"hellaswag": items and _file_name(items)},
        "init_from": base_model or (init_from and _file_name(init_from)),
    }
    return Run(
        name=folder.name,
        step=step,
        max_steps=int(config["max_steps"]),
        tokens=int(state["tokens"]),
        tokens_per_step=int(config["batch"]["tokens_per_step"]),
        seed=config["seed"],
        device=hardware["device"],
        num_processes=hardware["processes"],
        mixed_precision=hardware["mixed_precision"],
        dollars_per_hour=hardware.get("dollars_per_hour", hardware.get("dollars_an_hour")),
        seconds=seconds,
        commit=code["commit"] if code else None,
        is_dirty=bool(code and code["dirty"]),
        versions={name: version for name, version in provenance["versions"].items() if version},
        num_resumes=len(earlier),
        settings=yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, allow_unicode=True),
        data=TrainingData(
            train_tokens=int(data["train_tokens"]),
            val_tokens=int(data["val_tokens"]),
            manifest_sha256=data.get("manifest_sha256"),
            dataset=source.get("dataset"),
            subset=source.get("subset"),
            revision=source.get("revision"),
            sample_python=source["python"] if source.get("kind") == "sample" else None,
            files=[_file_name(path) for path in source.get("paths") or []],
        ),
        is_evaluated=evaluation is not None,
        val_loss=evaluation["val_loss"] if evaluation else None,
        val_loss_tokens=min(int(data["val_tokens"]), int(config["eval"]["val_tokens"])),
        hellaswag=evaluation["hellaswag"] if evaluation else None,
        # Unknown if the first launch is not listed: the run continued the checkpoint of another run.
        is_from_scratch=initialized is None and not launches[0].get("from_step"),
        init_from=settings["init_from"],
        base_model=base_model,
        curves=path if (path := folder / "curves.png").is_file() else None,
    )


def _is_folder(launch: dict[str, Any], folder: Path) -> bool:
    """Return True if the weights of `init_from` came from a folder, not from the Hub."""
    if "init_from_is_folder" in launch:
        return launch["init_from_is_folder"]
    init_from = launch["config"]["init_from"]
    # Older runs did not record this. A folder's path may look like a Hub id, relative to where the run was started.
    return not re.fullmatch(r"[\w.-]+/[\w.-]+", init_from) or any(
        (start / init_from).exists() for start in (Path.cwd(), *folder.parents)
    )


def _file_name(text: str) -> str:
    """Return a path without its folders, and any text after a comma: "/home/me/x.jsonl, 40 items" -> "x.jsonl, ..."."""
    return re.sub(r".*[/\\](?=[^,/\\])", "", text)


def has_license_file(checkpoint: Path) -> bool:
    """Return True if the folder has a LICENSE file of its own, with any suffix."""
    return any(path.stem.upper() == "LICENSE" for path in checkpoint.glob("*"))


def license_id(run: Run | None, checkpoint: Path) -> str | None:
    """Return "mit" for weights trained from scratch by a run of this project; None if the license is not known."""
    return "mit" if run is not None and run.is_from_scratch and not has_license_file(checkpoint) else None


def read_results(path: str | Path, checkpoint: Path, weights_sha256: str | None) -> Results:
    """
    Read a file written by `python -m eval --output`.

    Args:
        path: the file.
        checkpoint: the scored checkpoint, for messages.
        weights_sha256: `common.weights.weights_sha256` of the checkpoint.

    Raises:
        HubError: the file has another form, or scores other weights.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        results = _parse_results(result)
        scored, found = result["model"]["name"], result["model"].get("weights_sha256")
    except _UNREADABLE as error:
        raise HubError(
            f"--results {str(path)!r} is not a file of `python -m eval --output` ({type(error).__name__}: {error})"
        ) from error
    if found is None:
        raise HubError(f"--results {str(path)!r} does not record the scored weights: score {str(checkpoint)!r} again")
    if found != weights_sha256:  # compare weights, not names: links move and folders are overwritten
        raise HubError(f"--results {str(path)!r} scores other weights ({scored}): score {str(checkpoint)!r} again")
    return results


def _parse_results(result: dict[str, Any]) -> Results:
    reference, published = next(iter((result.get("published") or {}).items()), ("", {}))
    scores, footnotes = [], []
    for task, values in result["results"].items():
        about, n = result["tasks"][task], values.get("n")
        source = about["data"]["source"]
        dataset, split, name = _PUBLIC_DATASETS.get(task, ("", "", ""))
        is_public = bool(dataset) and source.startswith(f"{dataset} (")
        for metric, protocol in (about["metrics"] if "metrics" in about else about["figures"]).items():
            value, stderr = values.get(metric), values.get(f"{metric}_stderr")
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            args = {"n": n, "stderr": stderr, "task_version": about["version"]}
            entry = _entry(
                *(dataset, name, metric, protocol, value),
                dataset_split=split,
                metric_args={key: arg for key, arg in args.items() if arg is not None},
            )
            theirs = published.get(task, {}).get(metric)
            scores.append(
                Score(
                    metric=f"{task} {metric}",
                    value=value,
                    stderr=stderr,
                    published="" if theirs is None else f"{theirs:.4f} ({reference})",
                    protocol=protocol,
                    entry=entry if is_public and n is not None and n == about["full_size"] else None,
                )
            )
        if about["data"]["is_sample"]:
            source = source.partition(" (")[0]  # in parentheses: why the Hub could not be reached
        elif not is_public:
            source = _file_name(source)
        footnotes.append(f"{task}, version {about['version']}: {source}" + (f", {n:,} items" if n else ""))
    return Results(scores=scores, footnotes=footnotes)


def _run_scores(run: Run, results: list[Results]) -> list[Score]:
    """Return what the run itself measured at this step; its HellaSwag only if no file of results has that task."""
    if run.val_loss is None:
        return []
    dataset, s = run.data.dataset, run.hellaswag
    entry = dataset and _entry(
        *(dataset, f"{dataset}, gpt2-repro's validation split", "loss", "validation loss, nats per token"),
        run.val_loss,
        dataset_revision=run.data.revision,
    )
    protocol = f"nats per token, over {run.val_loss_tokens:,} tokens of the validation split"
    scores = [Score(metric="validation loss", value=run.val_loss, protocol=protocol, entry=entry)]
    if s and not any(score.metric.startswith("hellaswag ") for r in results for score in r.scores):
        items = "items of gpt2-repro's own sample, NOT HellaSwag" if s["is_sample"] else "items of HellaSwag"
        protocol = f"most probable ending by mean log-likelihood per token, {s['n']:,} {items}"
        scores.append(
            Score(metric="HellaSwag acc_norm", value=s["acc_norm"], stderr=s["acc_norm_stderr"], protocol=protocol)
        )
    return scores


def _entry(dataset: str, name: str, metric: str, description: str, value: float, **more: Any) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=name,
        metric_type=metric,
        metric_name=description,
        metric_value=value,
        **more,
    )


def model_card(
    repo_id: str,
    *,
    config: PreTrainedConfig,
    num_parameters: int,
    run: Run | None = None,
    license: str | None = None,
    has_license_file: bool = False,
    results: list[Results] | None = None,
) -> str:
    """
    Return the text of README.md.

    Args:
        repo_id: "owner/name".
        config: config of a GPT-2, gpt2repro or gpt2.
        license: license of the weights, by the Hub's name for it.
        has_license_file: True if the checkpoint brings a LICENSE file of its own.
        results: scores of these weights.
    """
    results = results or []
    scores = [*(_run_scores(run, results) if run else []), *(score for r in results for score in r.scores)]
    name = repo_id.partition("/")[2]
    dataset = run.data.dataset if run else None
    data = ModelCardData(
        language="en",
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2-repro", "causal-lm"],
        datasets=[dataset] if dataset else None,
        base_model=run.base_model if run else None,
        model_name=name,
        eval_results=[score.entry for score in scores if score.entry] or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=name,
        repo_id=repo_id,
        config=config,
        has_gpt2_vocabulary=config.vocab_size == GPT2Config().vocab_size,
        num_parameters=num_parameters,
        run=run,
        license=license,
        has_license_file=has_license_file,
        scores=scores,
        footnotes=[footnote for r in results for footnote in r.footnotes],
        number="{:,}".format,  # 1234567 -> 1,234,567
    )
    return f"{str(card).strip()}\n"
