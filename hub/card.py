"""The model card of a checkpoint: its facts, gathered here, and card.md.jinja, which shows them.

The facts come from the checkpoint, from the run it belongs to (provenance.json, metrics.jsonl) and from the files that
`python -m eval --output` wrote. The card leaves out what is not known.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from transformers import GPT2Config, PreTrainedConfig

from common.metrics import read_metrics
from common.weights import weights_sha256
from eval.lm_eval_bridge import PREFIX
from eval.published import describe_published
from hub import HubError

_TEMPLATE = Path(__file__).with_name("card.md.jinja")

# Raised by reading a file that is missing or does not have the expected form.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)

# Public data sets whose scores are comparable between models: Hub id, split, display name.
_PUBLIC_DATASETS = {
    "hellaswag": ("Rowan/hellaswag", "validation", "HellaSwag"),
    "lambada": ("EleutherAI/lambada_openai", "test", "LAMBADA (OpenAI)"),
    "blimp": ("nyu-mll/blimp", "train", "BLiMP"),
    "wikitext": ("EleutherAI/wikitext_document_level", "test", "WikiText"),
}

# Settings that do not change the weights; some of them are folders or account names.
_NOT_SHOWN = ("output_dir", "resume", "dry_run", "push_to_hub", "push_every_save", "push_public")


Run: TypeAlias = dict[str, Any]
"""a training run's own records about one of its checkpoints, see `_parse_run`"""


class Results(NamedTuple):
    """Content of files written by `python -m eval --output`."""

    scores: list[dict[str, Any]]
    """rows for the template"""
    footnotes: list[str]
    """one per task: its version, its items, and the published results that it can be compared with"""
    metadata: list[EvalResult]
    """the scores that are comparable with those of other models"""
    entries: dict[str, list[EvalResultEntry]]
    """the same by task, for the benchmarks' leaderboards on the Hub"""


def read_run(checkpoint: Path) -> Run | None:
    """Read what a run recorded about a checkpoint; None outside a run. Raises HubError if its files are damaged."""
    checkpoint = checkpoint.resolve()
    folder = checkpoint.parent.parent
    if checkpoint.parent.name != "checkpoints" or not (folder / "provenance.json").is_file():
        return None
    try:
        return _parse_run(folder, checkpoint)
    except _UNREADABLE as error:
        raise HubError(
            f"run {str(folder)!r}: provenance.json, metrics.jsonl or the checkpoint's state.json cannot be read "
            f"({type(error).__name__}: {error}). Repair the file, or copy the checkpoint out of the run: "
            "then the model card leaves out the run"
        ) from error


def describe_progress(checkpoint: Path) -> list[str]:
    """Return lines on how far a checkpoint is trained and on what; none if its files do not say so or are damaged."""
    try:
        run = read_run(checkpoint)
        state = _read_json(checkpoint / "training_state" / "state.json")
        val_loss = state.get("val_loss") if run is None else run["val_loss"]
        loss = "" if val_loss is None else f", validation loss {val_loss:.4f}"
        lines = [f"step {int(state['step']):,}, {int(state['tokens']):,} tokens{loss}"]
    except (HubError, *_UNREADABLE):
        return []
    if run is None:
        return lines
    data = None
    if run["dataset"]:
        data = ", ".join(filter(None, [run["dataset"], run["subset"]]))
    elif run["sample_python"]:
        data = f"the documentation of Python {run['sample_python']}"
    elif run["files"]:
        data = ", ".join([*run["files"][:3], *(["..."] if len(run["files"]) > 3 else [])])
    elif run["mix"]:
        data = f"a mixture of {', '.join(run['mix'])}"
    return [*lines, f"trained on {data}"] if data else lines


def _parse_run(folder: Path, checkpoint: Path) -> Run:
    provenance = _read_json(folder / "provenance.json")
    state = _read_json(checkpoint / "training_state" / "state.json")
    config, hardware, data = provenance["config"], provenance["hardware"], provenance["data"]
    code, source = provenance.get("code"), data.get("source") or {}
    step = int(state["step"])

    records = [record for record in read_metrics(folder / "metrics.jsonl") if record["step"] <= step]
    evaluation = next((r for r in records if r["step"] == step and "val_loss" in r), None)
    seconds = sum(r["ms"] / 1000 if "ms" in r else r.get("seconds", 0) for r in records)

    earlier = list(provenance.get("earlier_launches", []))
    launches = [*earlier, provenance]
    init_from, base_model = _initial_weights(launches, folder)
    items = config["eval"].get("hellaswag")
    paths = {task: _file_name(path) for task, path in (config["eval"].get("task_data") or {}).items()}
    mix = _name_folders(config["data"].get("mix") or {})
    settings = {key: value for key, value in config.items() if key not in _NOT_SHOWN} | {
        "data": {key: value for key, value in config["data"].items() if key not in ("path", "mix", "text")}
        | ({"mix": mix} if mix else {"path": _file_name(config["data"]["path"])}),
        "eval": config["eval"] | {"hellaswag": items and _file_name(items), **({"task_data": paths} if paths else {})},
        "init_from": init_from,
    }
    return {
        "name": folder.name,
        "step": step,
        "tokens": int(state["tokens"]),
        "max_steps": int(config["max_steps"]),
        "tokens_per_step": int(config["batch"]["tokens_per_step"]),
        "seed": config["seed"],
        "device": hardware["device"],
        "num_processes": hardware["processes"],
        "mixed_precision": hardware["mixed_precision"],
        "dollars_per_hour": hardware.get("dollars_per_hour", hardware.get("dollars_an_hour")),
        "hours": seconds / 3600 if records else None,
        "commit": code["commit"] if code else None,
        "is_dirty": code and code["dirty"],
        "versions": {name: version for name, version in provenance["versions"].items() if version},
        "num_resumes": len(earlier),
        "settings": yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, allow_unicode=True),
        "train_tokens": int(data["train_tokens"]),
        "val_tokens": int(data["val_tokens"]),
        "tokenizer": _file_name(data.get("tokenizer", "gpt2")),
        "val_loss_tokens": None if mix else min(int(data["val_tokens"]), int(config["eval"]["val_tokens"])),
        "manifest_sha256": data.get("manifest_sha256"),
        "subset": source.get("subset"),
        "sample_python": source["python"] if source.get("kind") == "sample" else None,
        "files": [_file_name(path) for path in source.get("paths") or []],
        "mix": mix,
        "hellaswag": evaluation["hellaswag"] if evaluation else None,
        "init_from": init_from,
        # id on the Hub of the model whose weights the run started from
        "base_model": base_model,
        # False if that is unknown because the first launch is not listed: the run continued another run's checkpoint
        "is_from_scratch": init_from is None and not launches[0].get("from_step"),
        "dataset": source.get("dataset"),  # id on the Hub
        "revision": source.get("revision"),
        "curves": path if (path := folder / "curves.png").is_file() else None,
        "is_evaluated": evaluation is not None,
        # nats per token; None if this step was not evaluated or its loss was not finite
        "val_loss": evaluation["val_loss"] if evaluation else None,
    }


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _initial_weights(launches: Sequence[dict[str, Any]], folder: Path) -> tuple[str | None, str | None]:
    """Return (Hub id or folder's name of the weights that a run started from, the same if it is a Hub id)."""
    for launch in launches:
        if init_from := launch["config"].get("init_from"):
            # Older runs did not record whether it was a folder. A path, relative to where the run was started, may look
            # like a Hub id.
            looks_like_folder = not re.fullmatch(r"[\w.-]+/[\w.-]+", init_from) or any(
                (start / init_from).exists() for start in (Path.cwd(), *folder.parents)
            )
            if launch.get("init_from_is_folder", looks_like_folder):
                return _file_name(init_from), None
            return init_from, init_from
    return None, None


def _file_name(text: str) -> str:
    """Return a path without its folders, and any text after a comma: "/home/me/x.jsonl, 40 items" -> "x.jsonl, ..."."""
    return re.sub(r".*[/\\](?=[^,/\\])", "", text)


def _name_folders(mix: dict[str, float]) -> dict[str, float]:
    """Shorten the folders of a mixture to their last parts, as many of them as tell the folders apart."""
    parts = {path: re.split(r"[/\\]", path) for path in mix}
    for count in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {"/".join(parts[path][-count:]): weight for path, weight in mix.items()}
        if len(names) == len(mix):
            return names
    return mix


def has_license_file(checkpoint: Path) -> bool:
    """Return True if the folder has a LICENSE file of its own, with any suffix."""
    return any(path.stem.upper() == "LICENSE" for path in checkpoint.glob("*"))


def license_id(run: Run | None, checkpoint: Path) -> str | None:
    """Return "mit" for weights trained from scratch by a run of this project; None if the license is not known."""
    return "mit" if run is not None and run["is_from_scratch"] and not has_license_file(checkpoint) else None


def read_results(paths: Sequence[str | Path], checkpoint: Path) -> Results:
    """Read files of `python -m eval --output`. Raises HubError if one is not such a file, or scores other weights."""
    results = Results([], [], [], {})
    expected_sha256, again = weights_sha256(checkpoint) if paths else None, f"score {str(checkpoint)!r} again"
    for path in paths:
        try:
            result = _read_json(Path(path))
            _add_result(results, result)
            name, sha256 = result["model"]["name"], result["model"].get("weights_sha256")
        except _UNREADABLE as error:
            raise HubError(
                f"--results {str(path)!r} is not a file of `python -m eval --output` ({type(error).__name__}: {error})"
            ) from error
        if sha256 is None:
            raise HubError(f"--results {str(path)!r} does not record the scored weights: {again}")
        if sha256 != expected_sha256:  # compare weights, not names: links move and folders are overwritten
            raise HubError(f"--results {str(path)!r} scores other weights ({name}): {again}")
    return results


def _add_result(results: Results, result: dict[str, Any]) -> None:
    reference, published = next(iter((result.get("published") or {}).items()), ("", {}))
    for task, values in result["results"].items():
        about, n = result["tasks"][task], values.get("n")
        version, source = about["version"], about["data"]["source"]
        # A task of the user's own is lm-eval:FOLDER/NAME: leave out the folder.
        shown = PREFIX + _file_name(task.removeprefix(PREFIX)) if task.startswith(PREFIX) else task
        dataset, split, dataset_name = _PUBLIC_DATASETS.get(task, ("", "", ""))
        is_public = bool(dataset) and source.startswith(f"{dataset} (")
        found = re.search(r"revision ([0-9a-f]{40})", source)
        revision = found[1] if found else None
        entries = []
        for metric, protocol in about["figures"].items():
            value, stderr = values.get(metric), values.get(f"{metric}_stderr")
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            other = published.get(task, {}).get(metric)
            row = {"task": shown, "metric": metric, "value": value, "stderr": stderr, "protocol": protocol}
            results.scores.append(row | {"published": "" if other is None else f"{other:.4f} ({reference})"})
            if not is_public or n is None or n != about["full_size"]:
                continue
            args = {"n": n, "stderr": stderr, "task_version": version}
            results.metadata.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=dataset,
                    dataset_name=dataset_name,
                    dataset_split=split,
                    dataset_revision=revision,
                    metric_type=metric,
                    metric_name=protocol,
                    metric_value=value,
                    metric_args={name: arg for name, arg in args.items() if arg is not None},
                )
            )
            error = "" if stderr is None else f", standard error {stderr:.4f}"
            command = f"gpt2-repro, task version {version}: python -m eval --model MODEL --tasks {task}"
            entries.append(
                EvalResultEntry(
                    dataset_id=dataset,
                    task_id=metric,
                    value=value,
                    dataset_revision=revision,
                    date=result.get("date"),
                    notes=f"{protocol}; {n:,} items of {split}{error}; {command}",
                )
            )
        if entries:
            results.entries[task] = entries
        if about["data"]["is_sample"]:
            source = source.partition(" (")[0]  # in parentheses: why the Hub could not be reached
        elif not is_public:
            source = _file_name(source)
        items = f", {n:,} items" if n else ""
        results.footnotes.append(f"{shown}, version {version}: {source}{items}; {describe_published(task, about, n)}")


def eval_results_files(results: Results) -> dict[str, bytes]:
    """Return {path: content} of .eval_results/TASK.yaml, which the Hub shows on the pages of model and benchmark."""
    return {
        f".eval_results/{task}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False).encode()
        for task, entries in results.entries.items()
    }


def model_card(
    repo_id: str,
    *,
    config: PreTrainedConfig,
    num_parameters: int,
    run: Run | None = None,
    license: str | None = None,
    has_license_file: bool = False,
    results: Results | None = None,
) -> str:
    """Return the text of README.md.

    Args:
        repo_id: "owner/name".
        license: license of the weights, by the Hub's name for it.
        has_license_file: True if the checkpoint brings a LICENSE file of its own.
        results: scores of these weights.
    """
    name, results = repo_id.partition("/")[2], results or Results([], [], [], {})
    is_gpt2 = config.vocab_size == GPT2Config().vocab_size and (run is None or run["tokenizer"] == "gpt2")
    metadata = results.metadata
    if run is not None and run["dataset"] is not None and run["val_loss"] is not None:
        val_loss = EvalResult(
            task_type="text-generation",
            dataset_type=run["dataset"],
            dataset_name=f"{run['dataset']}, gpt2-repro's validation split",
            dataset_revision=run["revision"],
            metric_type="loss",
            metric_name="validation loss, nats per token",
            metric_value=run["val_loss"],
        )
        metadata = [val_loss, *metadata]
    data = ModelCardData(
        language="en" if is_gpt2 else None,  # with a tokenizer of its own, it is not known
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2-repro", "causal-lm"],
        datasets=[run["dataset"]] if run and run["dataset"] else None,
        base_model=run["base_model"] if run else None,
        model_name=name,
        eval_results=metadata or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=name,
        repo_id=repo_id,
        config=config,
        has_gpt2_vocabulary=is_gpt2,
        num_parameters=num_parameters,
        run=run,
        is_license_unknown=license is None and not has_license_file,
        scores=results.scores,
        footnotes=results.footnotes,
        number="{:,}".format,  # 1234567 -> 1,234,567
        four_places="{:,.4f}".format,
    )
    return f"{str(card).strip()}\n"
