"""
The model card: what a checkpoint is, said once for people (README.md) and once for machines (its YAML head).

Everything in it is read from the checkpoint, from the run that it is in (provenance.json, metrics.jsonl) and from the
files that `python -m eval --output` wrote. What is not known is left out.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCardData
from transformers import GPT2Config

from hub import HubError
from training import TrainingError
from training.metrics import read_metrics

# What reading a file raises that is not there, or is not as it was written.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, TrainingError)

# The data sets whose scores can stand beside others': Hub id, split, name.
_TASK_DATA = {
    "hellaswag": ("Rowan/hellaswag", "validation", "HellaSwag"),
    "lambada": ("EleutherAI/lambada_openai", "test", "LAMBADA (OpenAI)"),
}

# Settings that change nothing about what was learnt, some of them folders and names of the trainer's.
_NOT_THE_RUN = ("output_dir", "resume", "dry_run", "push_to_hub", "push_every_save", "push_public")

_CITATION = """\
@techreport{radford2019language,
  title  = {Language Models are Unsupervised Multitask Learners},
  author = {Radford, Alec and Wu, Jeffrey and Child, Rewon and Luan, David and Amodei, Dario and Sutskever, Ilya},
  year   = {2019},
  institution = {OpenAI},
  url    = {https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf}
}"""


class Run:
    """What is known of the run that a checkpoint is in; nothing is, of a checkpoint that stands alone."""

    def __init__(self, checkpoint):
        """
        Args:
            checkpoint: Path of runs/x/checkpoints/step_..., or of any other folder.

        Raises:
            HubError: the run's files are there and cannot be read.
        """
        checkpoint = checkpoint.resolve()
        folder = (
            checkpoint.parents[1] if len(checkpoint.parents) > 1 and checkpoint.parent.name == "checkpoints" else None
        )
        self.folder = folder if folder is not None and (folder / "provenance.json").is_file() else None
        self.provenance, self.step, self.evaluation, self.seconds, self.tokens = {}, None, None, None, None
        self.curves = None
        self.init_from = None
        """whose weights it began from: a Hub id, or a folder's name; None: nobody's, or not known"""
        self.base_model = None
        """that, where it is a Hub id"""
        self.is_from_scratch = False  # known to be
        self.has_own_license = any(path.stem.upper() == "LICENSE" for path in checkpoint.glob("*"))
        if self.folder is None:
            return
        try:
            self.provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
            state = json.loads((checkpoint / "training_state" / "state.json").read_text(encoding="utf-8"))
            self.step, self.tokens = int(state["step"]), int(state["tokens"])
            records = [record for record in read_metrics(folder / "metrics.jsonl") if record["step"] <= self.step]
            if records:
                self.seconds = sum(r["ms"] / 1000 if "ms" in r else r.get("seconds", 0) for r in records)
            self.evaluation = next((r for r in records if r["step"] == self.step and "val_loss" in r), None)
            launches = [*self.provenance.get("earlier_launches", []), self.provenance]
            begun = next((launch for launch in launches if launch["config"].get("init_from")), None)
            if begun is not None:
                self.base_model = None if self._is_folder(begun) else begun["config"]["init_from"]
                self.init_from = self.base_model or _no_folder(begun["config"]["init_from"])
            # Not where the first launch is not there any more: what the checkpoint began from is written down in it.
            self.is_from_scratch = begun is None and not launches[0].get("from_step")
        except UNREADABLE as error:
            raise HubError(
                f"the run {str(folder)!r} cannot be read ({type(error).__name__}: {error}), and the model card is "
                "about it; mend it, or copy the checkpoint out of it: then its card says nothing of a run"
            ) from error
        self.curves = folder / "curves.png" if (folder / "curves.png").is_file() else None

    def _is_folder(self, launch):
        if "init_from_is_folder" in launch:
            return launch["init_from_is_folder"]
        init_from = launch["config"]["init_from"]
        # Runs from before that was written down: a folder may look like a Hub id, from where the run was started.
        return not re.fullmatch(r"[\w.-]+/[\w.-]+", init_from) or any(
            (start / init_from).exists() for start in (Path.cwd(), *self.folder.parents)
        )

    @property
    def license_id(self):
        """As the Hub knows it, "mit"; None where the licence is somebody else's to name, or not known."""
        return "mit" if self.is_from_scratch and not self.has_own_license else None

    def data_source(self):
        """{} or what the manifest of the training data says of where it came from."""
        return (self.provenance.get("data") or {}).get("source") or {}


class Results(NamedTuple):
    """What a file of `python -m eval --output` says, as a card shows it."""

    tasks: list
    rows: list
    """(figure, value with its standard error, a published one, protocol)"""
    notes: list
    """a line a task: what was scored"""
    entries: list
    """EvalResult, for the card's head"""


def read_results(path, checkpoint, weights):
    """
    Args:
        path: a file that `python -m eval --output` wrote.
        checkpoint: Path, whose results they must be.
        weights: `eval.checkpoint.weights_sha256` of it.

    Returns:
        Results

    Raises:
        HubError: it is no such file, or of other weights.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        results = Results(list(result["results"]), _rows(result), _notes(result), _entries(result))
        scored, found = result["model"]["name"], result["model"].get("weights_sha256")
    except UNREADABLE as error:
        raise HubError(
            f"--results {str(path)!r} is no file of `python -m eval --output` ({type(error).__name__}: {error})"
        ) from error
    if found is None:
        raise HubError(f"--results {str(path)!r} does not say of which weights it is: score {str(checkpoint)!r} again")
    if found != weights:  # whatever its name: a link that has moved on, a folder that was written anew
        raise HubError(f"--results {str(path)!r} is of other weights ({scored}): score {str(checkpoint)!r} again")
    return results


def model_card(repo_id, *, config, parameters, run, results):
    """
    Args:
        repo_id: "owner/name".
        config: the checkpoint's, of a GPT-2.
        parameters: int.
        run: Run.
        results: list of Results.

    Returns:
        str, README.md.
    """
    name = repo_id.partition("/")[2]
    dataset = run.data_source().get("dataset")
    data = ModelCardData(
        language="en",
        license=run.license_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2-repro", "causal-lm"],
        datasets=[dataset] if dataset else None,
        base_model=run.base_model,  # not a model that was only trained like it
        model_name=name,
        eval_results=[*_loss_entries(run, dataset), *(entry for r in results for entry in r.entries)] or None,
    )
    sections = [
        f"# {name}\n\n{_what_it_is(config, parameters, run)}",
        f"## Use\n\n{_use(repo_id, config, run)}",
        _training_data(run),
        _training(run),
        _results(results, run),
        f"## Limitations\n\n{_limitations(config, run)}",
        f"## Citation\n\nThe architecture is GPT-2's:\n\n```bibtex\n{_CITATION}\n```",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _what_it_is(config, parameters, run):
    shape = f"{config.n_layer} layers, {config.n_embd} wide, {config.n_head} heads"
    whose = "GPT-2's" if config.vocab_size == GPT2Config().vocab_size else "a"
    text = (
        f"A GPT-2 (Radford et al. 2019) of {parameters:,} parameters: {shape}, a context of {config.n_positions:,} "
        f"tokens, {whose} vocabulary of {config.vocab_size:,}."
    )
    if run.folder is not None:
        start = f" from the weights of {run.init_from}" if run.init_from else ""
        start = " from a random start" if run.is_from_scratch else start
        text += f" Trained{start} on {run.tokens:,} tokens (step {run.step:,}) with gpt2-repro."
    return text


def _use(repo_id, config, run):
    is_plain = config.model_type == "gpt2"
    trust = "" if is_plain else ", trust_remote_code=True"
    text = f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{repo_id}"{trust})
inputs = tokenizer("Hello, I'm a language model,", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=50, do_sample=True, top_k=50, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(output[0]))
```"""
    if is_plain:
        return f"{text}\n\nThis is transformers' own `GPT2LMHeadModel`: any engine that knows GPT-2 opens it."
    of_code = "" if run.license_id or run.has_own_license else " LICENSE is theirs, not the weights'."
    return f"""\
{text}

`trust_remote_code` runs the modeling files of this repository; they import torch and transformers alone. Without it,
transformers asks on the terminal, for the tokenizer too, since it opens the model's config first. Where gpt2-repro is
installed, `import modeling_gpt2repro` registers the model with the Auto classes, and the argument is not
needed.{of_code}

For engines and servers that know GPT-2 and not this code (`transformers serve` is one), write the same weights as
transformers' own `GPT2LMHeadModel`; its logits are equal:

```python
model.to_gpt2().save_pretrained("plain-gpt2")
tokenizer.save_pretrained("plain-gpt2")
```"""


def _training_data(run):
    if run.folder is None:
        return None
    data, source = run.provenance["data"], run.data_source()
    dataset, revision = source.get("dataset"), source.get("revision")
    if dataset:
        where = f"[{dataset}](https://huggingface.co/datasets/{dataset})"
        where += f", subset `{source['subset']}`" if source.get("subset") else ""
        where += f", revision `{revision}`" if revision else ""
    elif source.get("kind") == "sample":
        where = (
            f"the offline sample corpus of gpt2-repro: the documentation and docstrings of Python {source['python']}, "
            "a text for trying things out"
        )
    elif source.get("paths"):
        where = "files: " + ", ".join(f"`{Path(path).name}`" for path in source["paths"])
    else:
        where = "shards whose source is not written down"
    lines = [
        f"- Source: {where}",
        f"- Tokens: {data['train_tokens']:,} for training, {data['val_tokens']:,} for validation (GPT-2's BPE)",
    ]
    if data.get("manifest_sha256"):
        lines.append(f"- SHA-256 of the shards' manifest: `{data['manifest_sha256']}`")
    return "## Training data\n\n" + "\n".join(lines)


def _training(run):
    if run.folder is None:
        return None
    provenance = run.provenance
    settings, hardware = provenance["config"], provenance["hardware"]
    lines = [
        f"- Run: `{run.folder.name}`, step {run.step:,} of {settings['max_steps']:,}, "
        f"{settings['batch']['tokens_per_step']:,} tokens a step, seed {settings['seed']}",
        f"- Hardware: {hardware['processes']} x {hardware['device']}, mixed precision {hardware['mixed_precision']}",
    ]
    if run.seconds is not None:
        hours = run.seconds / 3600
        took = f"{hours:.1f} hours" if hours >= 1 else f"{run.seconds / 60:.0f} minutes"
        lines.append(f"- Time: {took} of training and evaluation")
        if price := hardware.get("dollars_an_hour"):
            dollars = hours * price * hardware["processes"]
            lines.append(f"- Cost: about ${dollars:,.2f}, an estimate at ${price:.2f} an hour and device")
    if code := provenance.get("code"):
        changed = ", with uncommitted changes" if code["dirty"] else ""
        lines.append(f"- Code: gpt2-repro at commit `{code['commit']}`{changed}")
    lines.append("- Versions: " + ", ".join(f"{name} {v}" for name, v in provenance["versions"].items() if v))
    if provenance.get("earlier_launches"):
        lines.append(
            f"- Resumed {len(provenance['earlier_launches'])} times; hardware and versions are the last launch's"
        )
    if run.curves is not None:
        lines.append("\n![losses and HellaSwag over training tokens](curves.png)")
    shown = {key: value for key, value in settings.items() if key not in _NOT_THE_RUN}
    items = settings["eval"].get("hellaswag")
    shown |= {
        "data": settings["data"] | {"path": _no_folder(settings["data"]["path"])},
        "eval": settings["eval"] | {"hellaswag": items and _no_folder(items)},
        "init_from": run.init_from,
    }
    dump = yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, allow_unicode=True)
    lines.append(f"\n<details><summary>All settings</summary>\n\n```yaml\n{dump}```\n\n</details>")
    return "## Training\n\n" + "\n".join(lines)


def _no_folder(path):
    """A path's last part, with what is said behind a comma: "/home/me/x.jsonl, all 40 items" is "x.jsonl, all ..."."""
    return re.sub(r".*[/\\](?=[^,/\\])", "", path)


def _results(results, run):
    rows, notes = [], []
    if run.evaluation is not None and run.evaluation["val_loss"] is not None:
        tokens = min(run.provenance["data"]["val_tokens"], run.provenance["config"]["eval"]["val_tokens"])
        loss = run.evaluation["val_loss"]
        rows.append(
            ("validation loss", f"{loss:.4f}", "", f"nats a token, over {tokens:,} tokens of the validation split")
        )
        scores = run.evaluation["hellaswag"]
        if scores and not any("hellaswag" in result.tasks for result in results):
            of = "items of gpt2-repro's own sample, NOT HellaSwag" if scores["is_sample"] else "items of HellaSwag"
            rows.append(
                (
                    "HellaSwag acc_norm",
                    f"{scores['acc_norm']:.4f} ± {scores['acc_norm_stderr']:.4f}",
                    "",
                    f"the most probable ending a token, as the lecture scores it; {scores['n']:,} {of}",
                )
            )
    for result in results:
        rows += result.rows
        notes += result.notes
    if not rows:
        return None
    header = ("figure", "value", "published", "protocol")
    columns = range(4) if any(row[2] for row in rows) else (0, 1, 3)
    lines = ["| " + " | ".join(row[c] for c in columns) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(columns))
    text = "## Results\n\n" + "\n".join(lines) + "\n\n± is one standard error."
    if notes:
        text += " Scored with `python -m eval` of gpt2-repro:\n\n" + "\n".join(notes)
    return text


def _figures(result):
    """(task, figure, value, standard error or None) of each figure with a protocol."""
    for task, values in result["results"].items():
        for figure in result["tasks"][task]["figures"]:
            value, error = values.get(figure), values.get(f"{figure}_stderr")
            if isinstance(value, int | float) and math.isfinite(value):
                yield task, figure, value, error if isinstance(error, int | float) else None


def _rows(result):
    rows, (whose, published) = [], next(iter((result.get("published") or {}).items()), (None, {}))
    for task, figure, value, error in _figures(result):
        shown = f"{value:,.4f}" + ("" if error is None else f" ± {error:,.4f}")
        theirs = published.get(task, {}).get(figure)
        other = "" if theirs is None else f"{theirs:.4f} ({whose})"
        rows.append((f"{task} {figure}", shown, other, result["tasks"][task]["figures"][figure]))
    return rows


def _notes(result):
    notes = []
    for task, about in result["tasks"].items():
        n = result["results"][task].get("n")
        count = f", {n:,} items" if n else ""
        notes.append(f"- {task}, version {about['version']}: {_source(task, about['data'])}{count}")
    return notes


def _source(task, data):
    """Where items came from, without the folders of this machine."""
    if data["is_sample"]:
        return data["source"].partition(" (")[0]  # and not what the Hub answered
    if _is_of_the_hub(task, data):
        return data["source"]
    return _no_folder(data["source"])


def _is_of_the_hub(task, data):
    return task in _TASK_DATA and data["source"].startswith(f"{_TASK_DATA[task][0]} (")


def _entries(result):
    """For the card's head, what can stand beside others' numbers: whole sets, from where everybody has them."""
    entries = []
    for task, figure, value, error in _figures(result):
        about, n = result["tasks"][task], result["results"][task].get("n")
        if not _is_of_the_hub(task, about["data"]) or n is None or n != about["full_size"]:
            continue
        dataset, split, pretty = _TASK_DATA[task]
        args = {"n": n, "stderr": error, "task_version": about["version"]}
        entries.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset,
                dataset_name=pretty,
                dataset_split=split,
                metric_type=figure,
                metric_name=about["figures"][figure],
                metric_value=value,
                metric_args={key: value for key, value in args.items() if value is not None},
            )
        )
    return entries


def _loss_entries(run, dataset):
    if run.evaluation is None or run.evaluation["val_loss"] is None or not dataset:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=f"{dataset}, gpt2-repro's validation split",
            dataset_revision=run.data_source().get("revision"),
            metric_type="loss",
            metric_name="validation loss, nats a token",
            metric_value=run.evaluation["val_loss"],
        )
    ]


def _limitations(config, run):
    text = (
        "A language model that continues text, and nothing more: it was not trained to follow instructions or to be "
        "safe, it states falsehoods in the same voice as facts, and it repeats the biases of the text it learnt from. "
        f"It reads {config.n_positions:,} tokens at most. Fit for research and teaching; not for advice to people "
        "or decisions about them."
    )
    if run.data_source().get("kind") == "sample":
        text += " Its text was one for trying things out: expect none of GPT-2's abilities."
    return text
