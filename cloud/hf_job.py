# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Train on Hugging Face Jobs, and push the last checkpoint to your account.

    hf jobs uv run --flavor a10g-large --timeout 12h --secrets HF_TOKEN cloud/hf_job.py REPOSITORY USER/NAME \
        --max_hours 11 --text roneneldan/TinyStories --config recipes/gpt2_124m.yaml

REPOSITORY is the address of a clone of this project; what follows USER/NAME goes to train.py. A job's disk is gone when
it ends, so choose --max_hours below the job's timeout: a run that it stops is pushed too, from its last checkpoint.
"""

import json
import subprocess
import sys
from pathlib import Path


def main(repository: str, hub_id: str, *options: str) -> None:
    """Clone, install, train and push. Exits with the code of a command that fails."""
    if any(option.startswith("--output_dir") for option in options):
        sys.exit("leave out --output_dir: the run is looked for in runs/")
    run(["git", "clone", "--depth", "1", repository, "gpt2-repro"], cwd=".")
    run([sys.executable, "-m", "venv", ".venv"])
    run([".venv/bin/pip", "install", "-q", "-c", "constraints.txt", "-e", "."])
    train = [".venv/bin/accelerate", "launch", "train.py", "--push_to_hub", hub_id, *options]
    done = subprocess.run(train, cwd="gpt2-repro")
    for path in Path("gpt2-repro").glob("runs/*/status.json"):
        if json.loads(path.read_text())["status"] == "resume me":  # stopped: train.py pushes finished runs only
            steps = [step for step in path.parent.glob("checkpoints/step_*") if step.name[5:].isdigit()]
            if not steps:
                sys.exit("stopped before its first checkpoint: nothing to push")
            newest = max(steps, key=lambda step: int(step.name[5:])).relative_to("gpt2-repro")
            public = ["--public"] if "--push_public" in options else []
            run([".venv/bin/python", "-m", "hub", "push", str(newest), hub_id, *public])
            return
    sys.exit(done.returncode)


def run(command: list[str], cwd: str = "gpt2-repro") -> None:
    """Run a command, or exit with its code. Its arguments are not printed: an address may hold a token."""
    if code := subprocess.run(command, cwd=cwd).returncode:
        sys.exit(code)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: hf_job.py REPOSITORY USER/NAME [options of train.py]")
    main(*sys.argv[1:])
