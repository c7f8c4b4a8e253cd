"""recipes/reproduce.sh, with stand-ins for training, preparation and scoring."""

import os
import shutil
import subprocess
import sys

import pytest
from tiny_run import ROOT

# Each launch of train.py takes the next line of `launches`: the status that it writes ("-": none), and its exit code.
ACCELERATE = """#!/bin/bash
read -r status code < <(sed -n "$(($(wc -l < launched) + 1))p" launches)
echo "$@" >> launched
mkdir -p runs/small/checkpoints/step_$(wc -l < launched)
/bin/sleep 0.02 # status.json must be newer than the start
[ "$status" = bug ] && printf '{"status": "failed", "is_mistake": false}' > runs/small/status.json && exit "$code"
[ "$status" = - ] || printf '{"status": "%s", "checkpoint": "the/checkpoint"}' "${status/_/ }" > runs/small/status.json
exit "$code"
"""
PYTHON = f"""#!/bin/bash
[ "$1" = -c ] && exec {sys.executable} "$@"
echo "$@" >> commands
[ "$2" = data.prepare ] && mkdir -p shards/small && touch shards/small/manifest.json
[ "$2" = eval ] && echo scores > runs/small/hellaswag.json
exit 0
"""


@pytest.fixture
def reproduce(tmp_path):
    """reproduce(launches) runs the script; the folder has the commands that it ran."""
    for name, text in {
        "recipes/small.yaml": "model: {n_layer: 1}\ndata:\n  # a comment\n  path: 'shards/small'  # another\n",
        ".venv/bin/accelerate": ACCELERATE,
        ".venv/bin/python": PYTHON,
        "bin/sleep": "#!/bin/bash\n",
        "launched": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    shutil.copy(ROOT / "recipes" / "reproduce.sh", tmp_path / "recipes")
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RECIPE": "small", "HARDWARE": "cpu"}

    def run(launches, **more):
        (tmp_path / "launches").write_text("".join(f"{line}\n" for line in launches))
        command = ["bash", "recipes/reproduce.sh"]
        return subprocess.run(command, cwd=tmp_path, env=environment | more, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    ("launches", "code", "num_launches"),
    [
        (["finished 0"], 0, 1),
        (["running 1", "running 1", "finished 0"], 0, 3),  # two crashes
        (["bug 1", "finished 0"], 0, 2),  # an exception that is not the user's mistake
        (["resume_me 1"], 75, 1),
        (["failed 1"], 1, 1),
        (["- 1"], 1, 1),  # a mistake in the settings: the run did not start
    ],
)
def test_training_is_resumed_after_crashes_only(launches, code, num_launches, reproduce, tmp_path):
    done = reproduce(launches)
    assert done.returncode == code, done.stderr
    launched = (tmp_path / "launched").read_text().splitlines()
    assert len(launched) == num_launches
    assert all("accelerate_configs/cpu.yaml train.py --config recipes/small.yaml" in line for line in launched)
    assert all("--data.path shards/small --output_dir runs/small --resume auto" in line for line in launched)


def test_stages_that_are_done_are_not_repeated_and_the_checkpoint_is_pushed(reproduce, tmp_path):
    assert reproduce(["finished 0"]).returncode == 0
    assert reproduce([], HUB_ID="me/model").returncode == 0
    assert (tmp_path / "commands").read_text().splitlines() == [
        "-m data.prepare pretokenized kjj0/finewebedu10B-gpt2 --out shards/small",
        "-m eval --model the/checkpoint --tasks hellaswag --output runs/small/hellaswag.json",
        "-m hub push the/checkpoint me/model --results runs/small/hellaswag.json",
    ]


def test_crashes_after_the_same_checkpoint_end_the_script(reproduce, tmp_path):
    (tmp_path / "bin" / "ls").write_text("#!/bin/bash\necho step_1\n")  # no newer checkpoint
    (tmp_path / "bin" / "ls").chmod(0o755)
    assert reproduce(["running 1"] * 9).returncode == 1
    assert len((tmp_path / "launched").read_text().splitlines()) == 5


def test_preparation_is_the_one_of_the_recipes_or_of_the_user(reproduce, tmp_path):
    small = tmp_path / "recipes" / "small.yaml"
    shutil.copy(small, small.with_stem("gpt2_350m"))
    for more, prepare in (
        ({"RECIPE": "gpt2_350m"}, "fineweb-edu --subset sample-100BT"),
        ({"PREPARE": "fineweb-edu"}, "fineweb-edu"),
    ):
        (tmp_path / "shards" / "small" / "manifest.json").unlink(missing_ok=True)
        reproduce(["failed 1"], **more)
        commands = (tmp_path / "commands").read_text().splitlines()
        assert commands[-1] == f"-m data.prepare {prepare} --out shards/small"


def test_default_data_is_that_of_the_readme_and_the_rented_machine():
    command = "data.prepare pretokenized kjj0/finewebedu10B-gpt2 --out shards/fineweb-edu"
    for path in ("README.md", "cloud/skypilot.yaml"):
        assert command in (ROOT / path).read_text(encoding="utf-8"), path
