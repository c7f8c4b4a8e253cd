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
    """Clone, install, train and push. Raises CalledProcessError if a command fails."""
    subprocess.run(["git", "clone", "--depth", "1", repository, "gpt2-repro"], check=True)
    for command in (
        [sys.executable, "-m", "venv", ".venv"],
        [".venv/bin/pip", "install", "-q", "-c", "constraints.txt", "-e", "."],
    ):
        subprocess.run(command, cwd="gpt2-repro", check=True)
    train = [".venv/bin/accelerate", "launch", "train.py", "--push_to_hub", hub_id, *options]
    done = subprocess.run(train, cwd="gpt2-repro")
    for path in Path("gpt2-repro").glob("runs/*/status.json"):
        if json.loads(path.read_text())["status"] == "resume me":  # stopped: train.py pushes finished runs only
            newest = max(path.parent.glob("checkpoints/step_*")).relative_to("gpt2-repro")
            subprocess.run([".venv/bin/python", "-m", "hub", "push", str(newest), hub_id], cwd="gpt2-repro", check=True)
            return
    done.check_returncode()


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: hf_job.py REPOSITORY USER/NAME [options of train.py]")
    main(*sys.argv[1:])
