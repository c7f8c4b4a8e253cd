"""
The model card: what a checkpoint is, said once for people (README.md) and once for machines (its YAML head).

Everything in it is read from the checkpoint, from the run that it is in (provenance.json, metrics.jsonl) and from the
files that `python -m eval --output` wrote. What is not known is left out.
"""

import json
import math
import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData

from hub import HubError

# The data sets that tasks read: Hub id, split, name.
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
        if self.folder is None:
            return
        try:
            self.provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
            state = json.loads((checkpoint / "training_state" / "state.json").read_text(encoding="utf-8"))
            self.step, self.tokens = state["step"], state["tokens"]
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            records = [record for record in map(json.loads, lines) if record["step"] <= self.step]
        except (OSError, ValueError, KeyError) as error:
            raise HubError(
                f"the run {str(folder)!r} cannot be read ({error}), and the model card is about it; mend it, or copy "
                "the checkpoint out of it: then its card says nothing of a run"
            ) from error
        self.evaluation = next((r for r in records if r["step"] == self.step and "val_loss" in r), None)
        self.seconds = sum(r["ms"] / 1000 if "ms" in r else r.get("seconds", 0) for r in records)
        self.curves = folder / "curves.png" if (folder / "curves.png").is_file() else None

    def data_source(self):
        """{} or what the manifest of the training data says of where it came from."""
        return (self.provenance.get("data") or {}).get("source") or {}


def read_results(path, checkpoint):
    """
    Args:
        path: a file that `python -m eval --output` wrote.
        checkpoint: Path, whose results they must be.

    Returns:
        dict

    Raises:
        HubError: it is no such file, or of another model.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        scored = result["model"]["name"]
        figures = {task: result["tasks"][task]["figures"] for task in result["results"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HubError(
            f"--results {str(path)!r} is no file of `python -m eval --output` ({type(error).__name__}: {error})"
        ) from error
    if Path(scored).resolve() != checkpoint.resolve():
        raise HubError(f"--results {str(path)!r} is of {scored!r}, not of {str(checkpoint)!r}: score that one")
    return result | {"figures": figures}


def model_card(checkpoint, repo_id, *, config, parameters, run, results, license_id):
    """
    Args:
        checkpoint: Path.
        repo_id: "owner/name", for the lines that load it.
        config: dict, the checkpoint's config.json.
        parameters: int.
        run: Run.
        results: list of dicts, as `read_results` gives them.
        license_id: as the Hub knows it ("mit"); None where the licence is somebody else's to name.

    Returns:
        str, README.md.
    """
    name = repo_id.partition("/")[2]
    source = run.data_source()
    dataset = source.get("dataset")
    init_from = (run.provenance.get("config") or {}).get("init_from")
    data = ModelCardData(
        language="en",
        license=license_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2-repro", "causal-lm"],
        datasets=[dataset] if dataset else None,
        # Not a model that was only trained like it.
        base_model=init_from
        if init_from and re.fullmatch(r"[\w.-]+/[\w.-]+", init_from) and not Path(init_from).exists()
        else None,
        model_name=name,
        eval_results=_eval_results(results, run, dataset) or None,
    )
    sections = [
        f"# {name}\n\n{_what_it_is(config, parameters, run, init_from)}",
        f"## Use\n\n{_use(repo_id, config)}",
        _training_data(run),
        _training(run),
        _results(results, run),
        f"## Limitations\n\n{_limitations(config, run)}",
        f"## Citation\n\nThe architecture is GPT-2's:\n\n```bibtex\n{_CITATION}\n```",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _what_it_is(config, parameters, run, init_from):
    shape = f"{config['n_layer']} layers, {config['n_embd']} wide, {config['n_head']} heads"
    text = (
        f"A GPT-2 (Radford et al. 2019) of {parameters:,} parameters: {shape}, a context of {config['n_positions']:,} "
        f"tokens, GPT-2's vocabulary of {config['vocab_size']:,}."
    )
    if run.folder is not None:
        start = f"from the weights of {_no_folders(init_from)}" if init_from else "from a random start"
        text += f" Trained {start} on {run.tokens:,} tokens (step {run.step:,}) with gpt2-repro."
    return text


def _use(repo_id, config):
    is_plain = config["model_type"] == "gpt2"
    trust = "" if is_plain else ", trust_remote_code=True"
    text = f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
inputs = tokenizer("Hello, I'm a language model,", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=50, do_sample=True, top_k=50, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(output[0]))
```"""
    if is_plain:
        return f"{text}\n\nThis is transformers' own `GPT2LMHeadModel`: any engine that knows GPT-2 opens it."
    return f"""\
{text}

`trust_remote_code` runs the modeling files of this repository; they import torch and transformers alone. With
gpt2-repro installed, `import modeling_gpt2repro` makes the Auto classes know the model, and that argument is not
needed.

For engines that know GPT-2 and not this code, the same weights as transformers' own `GPT2LMHeadModel`, whose logits are
equal:

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
    hours = run.seconds / 3600
    took = f"{hours:.1f} hours" if hours >= 1 else f"{run.seconds / 60:.0f} minutes"
    lines = [
        f"- Recipe: `{run.folder.name}`, step {run.step:,} of {settings['max_steps']:,}, "
        f"{settings['batch']['tokens_per_step']:,} tokens a step, seed {settings['seed']}",
        f"- Hardware: {hardware['processes']} x {hardware['device']}, mixed precision {hardware['mixed_precision']}",
        f"- Time: {took} of training and evaluation",
    ]
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
    shown = json.loads(json.dumps(shown), object_hook=_without_folders)
    dump = yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, allow_unicode=True)
    lines.append(f"\n<details><summary>All settings</summary>\n\n```yaml\n{dump}```\n\n</details>")
    return "## Training\n\n" + "\n".join(lines)


def _without_folders(settings):
    return {key: _no_folders(value) if isinstance(value, str) else value for key, value in settings.items()}


def _no_folders(text):
    """A text without the folders of the paths in it that are of this machine: /home/me/x.txt is x.txt."""
    return re.sub(r"(?<![^\s'\"(])(?:[/~]|\.\.?[/\\]|[A-Za-z]:[/\\])[^\s,'\")]*[/\\](?=[^\s/\\])", "", text)


def _results(results, run):
    rows, notes = [], []
    if run.evaluation is not None and run.evaluation["val_loss"] is not None:
        tokens = min(run.provenance["data"]["val_tokens"], run.provenance["config"]["eval"]["val_tokens"])
        loss = run.evaluation["val_loss"]
        rows.append(
            ("validation loss", f"{loss:.4f}", "", f"nats a token, over {tokens:,} tokens of the validation split")
        )
        scores = run.evaluation["hellaswag"]
        if scores and not any("hellaswag" in result["results"] for result in results):
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
        beside = next(iter(result["published"].items()), (None, {}))
        for task, figure, value, error in _figures(result):
            shown = f"{value:,.4f}" + ("" if error is None else f" ± {error:,.4f}")
            published = beside[1].get(task, {}).get(figure)
            other = "" if published is None else f"{published:.4f} ({beside[0]})"
            rows.append((f"{task} {figure}", shown, other, result["figures"][task][figure]))
        for task, about in result["tasks"].items():
            n = result["results"][task].get("n")
            count = f", {n:,} items" if n else ""
            notes.append(f"- {task}, version {about['version']}: {_no_folders(about['data']['source'])}{count}")
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
        for figure in result["figures"][task]:
            value, error = values.get(figure), values.get(f"{figure}_stderr")
            if isinstance(value, int | float) and math.isfinite(value):
                yield task, figure, value, error if isinstance(error, int | float) else None


def _eval_results(results, run, dataset):
    """For the YAML head: what can stand beside others' numbers, so whole sets, and not this project's own sample."""
    entries = []
    if run.evaluation is not None and run.evaluation["val_loss"] is not None and dataset:
        entries.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset,
                dataset_name=f"{dataset}, gpt2-repro's validation split",
                dataset_revision=run.data_source().get("revision"),
                metric_type="loss",
                metric_name="validation loss, nats a token",
                metric_value=run.evaluation["val_loss"],
            )
        )
    for result in results:
        for task, figure, value, error in _figures(result):
            about, n = result["tasks"][task], result["results"][task].get("n")
            if about["data"].get("is_sample") or about.get("full_size") not in (None, n):
                continue
            dataset_id, split, pretty = _TASK_DATA.get(task, (task, None, task))
            args = {"n": n, "stderr": error, "task_version": about["version"]}
            entries.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=dataset_id,
                    dataset_name=pretty,
                    dataset_split=split,
                    metric_type=figure,
                    metric_name=result["figures"][task][figure],
                    metric_value=value,
                    metric_args={key: value for key, value in args.items() if value is not None},
                )
            )
    return entries


def _limitations(config, run):
    text = (
        "A language model that continues text, and nothing more: it was not trained to follow instructions or to be "
        "safe, it states falsehoods in the same voice as facts, and it repeats the biases of the text it learnt from. "
        f"It reads {config['n_positions']:,} tokens at most. Fit for research and teaching; not for advice to people "
        "or decisions about them."
    )
    if run.data_source().get("kind") == "sample":
        text += " Its text was one for trying things out: expect none of GPT-2's abilities."
    return text
