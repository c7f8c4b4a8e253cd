# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Train on Hugging Face Jobs, and push the last checkpoint to your account.

    hf jobs uv run --flavor a10g-large --timeout 12h --secrets HF_TOKEN cloud/hf_job.py REPOSITORY USER/NAME \
        --max_hours 11 --text roneneldan/TinyStories --config recipes/gpt2_124m.yaml

REPOSITORY is the address of a clone of this project; what follows USER/NAME goes to train.py. A job's disk is gone when
it ends, so choose --max_hours below the job's timeout: a run that it stops is pushed too, from its last checkpoint, and
so is one that fails.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

ATTEMPTS, PAUSE_SECONDS = 10, 60  # of pushing, while the Hub does not answer


def main(repository: str, hub_id: str, *options: str) -> None:
    """Clone, install, train and push. Exits with the code of a command that fails."""
    if any(option.startswith("--output_dir") for option in options):
        sys.exit("leave out --output_dir: the run is looked for in runs/")
    run(["git", "clone", "--depth", "1", repository, "gpt2-repro"], cwd=".")
    run([sys.executable, "-m", "venv", ".venv"])
    run([".venv/bin/pip", "install", "-q", "-c", "constraints.txt", "-e", "."])
    train = [".venv/bin/accelerate", "launch", "train.py", "--push_to_hub", hub_id, *options]
    code = subprocess.run(train, cwd="gpt2-repro").returncode
    path = next(Path("gpt2-repro").glob("runs/*/status.json"), None)
    if path is None:  # train.py ended before the run began
        sys.exit(code)
    status = json.loads(path.read_text())["status"]
    if code != 0 or status == "resume me":  # train.py pushes finished runs only, and this disk is gone afterwards
        push_newest(path.parent, hub_id)
    sys.exit(code if status == "failed" else 0)


def push_newest(run_folder: Path, hub_id: str) -> None:
    """Push a run's newest checkpoint, for some minutes if the Hub does not answer."""
    steps = [step for step in run_folder.glob("checkpoints/step_*") if step.name[5:].isdigit()]
    if not steps:
        sys.exit("ended before its first checkpoint: nothing to push")
    newest = max(steps, key=lambda step: int(step.name[5:])).relative_to("gpt2-repro")
    is_public = json.loads((run_folder / "provenance.json").read_text())["config"]["push_public"]
    push = [".venv/bin/python", "-m", "hub", "push", str(newest), hub_id, *(["--public"] if is_public else [])]
    run([*push, "--dry_run"])  # refuses what no attempt could push, such as weights that are not finite
    for _ in range(ATTEMPTS - 1):
        if subprocess.run(push, cwd="gpt2-repro").returncode == 0:
            return
        time.sleep(PAUSE_SECONDS)
    run(push)


def run(command: list[str], cwd: str = "gpt2-repro") -> None:
    """Run a command, or exit with its code. Its arguments are not printed: an address may hold a token."""
    if code := subprocess.run(command, cwd=cwd).returncode:
        sys.exit(code)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: hf_job.py REPOSITORY USER/NAME [options of train.py]")
    main(*sys.argv[1:])
