"""A tiny run of train.py that the end-to-end tests look at from all sides."""

import json
import os
import signal
import subprocess
import sys

import pytest
from fresh_process import Forks
from tiny_run import RECIPE, ROOT, clean_environment, scored_task

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before anything imports torch: threads of several tests that wait for each other's take ten times as long.
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A script's background job ignores Ctrl-C, and so would all processes that the tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Whole runs first, which take longest: what is short then fills the last minute of every worker."""
    items.sort(key=lambda item: item.path.parent != ROOT / "tests")


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    """fresh.run(program, *arguments, cwd=folder): a program in a fresh process on a terminal; see fresh_process.py."""
    home = tmp_path_factory.mktemp("fresh")
    with Forks(clean_environment(home), cwd=home) as forks:
        yield forks


@pytest.fixture(scope="session")
def launch(tmp_path_factory, fresh):
    """Return launch(*arguments), which runs `python train.py ...` to its end.

    That is what `accelerate launch` does for one process; launch(..., accelerate=[...]) uses it, with these options.
    `script` replaces train.py; it may be "-c", with a program as the first argument. `environment` has variables for
    the process, in addition to those of a clean environment.
    """
    home = tmp_path_factory.mktemp("home")

    def run(*arguments, accelerate=None, check=True, script="train.py", environment=None):
        command = [str(script), *map(str, arguments)]
        if accelerate is None and not (environment or {}).keys() - {"PYTHONPATH"}:
            done = fresh.run_script(command, cwd=ROOT, environment={"HOME": str(home), **(environment or {})})
        else:
            through = [] if accelerate is None else ["-m", "accelerate.commands.launch", *accelerate]
            done = subprocess.run(
                [sys.executable, *through, *command],
                cwd=ROOT,
                env=clean_environment(home) | (environment or {}),
                capture_output=True,
                text=True,
                timeout=300,
            )
        if check:
            assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A recipe's path and the shards it names: 60 short documents of real text."""
    from data.prepare import prepare
    from data.sources import FileSource, sample_documents

    folder = tmp_path_factory.mktemp("tiny")
    documents = [text[:1500] for text, _ in zip(sample_documents(), range(60), strict=False)]
    (folder / "tiny.jsonl").write_text("".join(f"{json.dumps(text)}\n" for text in documents))
    prepare(FileSource([folder / "tiny.jsonl"]), folder / "shards", name="tiny", val_fraction=0.2)
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE + f"data: {{path: '{folder / 'shards'}'}}\n")
    return recipe


@pytest.fixture(scope="session")
def small(tiny):
    """The recipe and text of `tiny` with a vocabulary of 512 instead of GPT-2's: a step takes an eighth of the time."""
    from data.prepare import prepare
    from data.sources import FileSource
    from data.train_tokenizer import train_tokenizer

    folder, text = tiny.parent / "small", FileSource([tiny.parent / "tiny.jsonl"])
    tokenizer = train_tokenizer(text, folder / "tokenizer", vocab_size=512)
    prepare(text, folder / "shards", name="small", val_fraction=0.2, tokenizer=tokenizer)
    recipe = folder / "small.yaml"
    recipe.write_text(RECIPE + f"data: {{path: '{folder / 'shards'}'}}\n")
    return recipe


@pytest.fixture(scope="session")
def finished_run(launch, tiny, tmp_path_factory):
    """(run folder, console output) of one undisturbed run of 20 steps."""
    output = tmp_path_factory.mktemp("my runs") / "tiny"  # with a space: printed commands must be quoted
    done = launch("--config", tiny, "--output_dir", output, "--trackers", "[tensorboard]", *scored_task(tiny))
    return output, done.stdout


@pytest.fixture(scope="session")
def finished_small(launch, small, tmp_path_factory):
    """The folder of one undisturbed run of 20 steps with the small vocabulary."""
    output = tmp_path_factory.mktemp("runs") / "small"
    launch("--config", small, "--output_dir", output, *scored_task(small))
    return output
