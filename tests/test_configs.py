"""The files of accelerate_configs/ and recipes/."""

import dataclasses
import os
import re
import socket
import subprocess
import sys

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from killing import status
from tiny_run import ROOT, clean_environment, losses

from training.batch import batch_arithmetic
from training.config import load_config

HARDWARE = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_recipes_and_accelerate_configs_exist():
    names = {path.stem for path in HARDWARE}
    assert names == {
        *("cpu", "cpu_2proc", "single_gpu", "ddp_8gpu", "multi_node_ddp", "fsdp2", "mps"),
    }
    assert {path.stem for path in RECIPES} == {
        *("sample", "shakespeare", "gpt2_124m", "gpt2_124m_lecture", "gpt2_124m_fast"),
        *("gpt2_124m_adamw", "gpt2_350m", "gpt2_774m", "gpt2_1558m"),
    }


@pytest.mark.parametrize("path", HARDWARE, ids=lambda p: p.stem)
def test_accelerate_takes_it(path, monkeypatch):
    """Every key is one that accelerate knows and none is lost; the launcher accepts them together."""
    asked = yaml.safe_load(path.read_text())
    config = load_config_from_file(str(path)).to_dict()
    for key, value in asked.items():
        assert config[key] == value, key
    monkeypatch.setattr(os, "environ", dict(os.environ))
    args = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    args, default, _ = _validate_launch_command(args)
    assert default.mixed_precision == asked.get("mixed_precision")
    for key in asked.keys() - {"compute_environment", "distributed_type", "fsdp_config"}:
        assert getattr(args, key) == asked[key], key  # accelerate ignores a file's key that has a default
    assert bool(args.use_fsdp) == (asked["distributed_type"] == "FSDP")
    if asked["distributed_type"] == "FSDP":
        for key, value in asked["fsdp_config"].items():
            assert str(getattr(args, key)).lower() == str(value).lower(), key


def test_commands_in_their_heads_name_real_files():
    for path in [
        *HARDWARE,
        *RECIPES,
        *(ROOT / "accelerate_configs").glob("*.slurm"),
        ROOT / "recipes" / "reproduce.sh",
    ]:
        for name in re.findall(r"(?:accelerate_configs|recipes)/\w+\.(?:yaml|slurm|sh)", path.read_text()):
            assert (ROOT / name).is_file(), f"{path.name} names {name}"


@pytest.mark.parametrize("script", ["accelerate_configs/multi_node_ddp.slurm", "recipes/reproduce.sh"])
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)


# The GPT-3 paper, table 2.1 (batch, learning rate) and appendix B; the sizes are the GPT-2 paper's.
PUBLISHED = {
    "gpt2_124m": (124_439_808, 2**19, 6e-4),
    "gpt2_124m_lecture": (124_439_808, 2**19, 6e-4),
    "gpt2_350m": (354_823_168, 2**19, 3e-4),
    "gpt2_774m": (774_030_080, 2**19, 2.5e-4),
    "gpt2_1558m": (1_557_611_200, 2**20, 2e-4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_settings(name):
    config = load_config(["--config", str(ROOT / "recipes" / f"{name}.yaml")])
    _, tokens_per_step, lr = PUBLISHED[name]
    assert (config.batch.tokens_per_step, config.optim.lr) == (tokens_per_step, lr)
    assert config.optim.warmup_steps == pytest.approx(375e6 / tokens_per_step, abs=1)
    optim = config.optim
    assert (optim.betas, optim.eps, optim.grad_clip, optim.weight_decay) == ((0.9, 0.95), 1e-8, 1.0, 0.1)
    assert optim.final_lr_fraction == 0.1
    for processes in (1, 8, 16):
        batch_arithmetic(config.batch, processes)


def test_the_fast_recipe_and_its_opponent_differ_in_how_they_learn_alone():
    plain, adamw, fast = (
        load_config(["--config", str(ROOT / "recipes" / f"gpt2_124m{kind}.yaml")]) for kind in ("", "_adamw", "_fast")
    )
    differing = {f.name for f in dataclasses.fields(plain) if getattr(plain, f.name) != getattr(adamw, f.name)}
    assert differing == {"optim", "max_steps", "output_dir"}
    differing = {f.name for f in dataclasses.fields(plain) if getattr(plain, f.name) != getattr(fast, f.name)}
    assert differing == {"optim", "max_steps", "output_dir", "model"}
    assert dataclasses.replace(fast.model, residual_in_autocast_dtype=False) == plain.model
    assert fast.max_steps / plain.max_steps == pytest.approx(0.55, abs=1e-3)
    assert fast.optim.grad_clip == plain.optim.grad_clip


SEVERAL = """
import sys, train
for path in sys.argv[1:]:
    assert train.train(["--config", path, "--output_dir", "/nowhere/run", "--data.path", "/nowhere", "--dry_run"]) == 0
"""


def test_every_recipe_dry_runs(launch):
    done = launch(SEVERAL, *RECIPES, script="-c")
    plans = dict(zip([path.stem for path in RECIPES], done.stdout.split("model     ")[1:], strict=True))
    for name, (parameters, _, _) in PUBLISHED.items():
        assert f"{parameters:,} parameters" in plans[name]
        for words in ("tokens per step", "GB per process", "A100", "H100", "H200", "estimated", "dry run"):
            assert words in plans[name], (name, words)


def test_two_machines(finished_small, small, tmp_path):
    """Two launches that find each other over the network, here the loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    machines = [
        subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-m",
                    "accelerate.commands.launch",
                    "--config_file",
                    "accelerate_configs/cpu_2proc.yaml",
                ),
                *("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)),
                *("--main_process_ip", "127.0.0.1", "--main_process_port", str(port)),
                *("train.py", "--config", small, "--output_dir", tmp_path / "run"),
            ],
            cwd=ROOT,
            env=clean_environment(tmp_path),
            stdout=(tmp_path / f"{rank}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    for rank, machine in enumerate(machines):
        assert machine.wait(timeout=240) == 0, (tmp_path / f"{rank}.log").read_text()
    assert "x 2 process(es)" in (tmp_path / "0.log").read_text()
    assert "process(es)" not in (tmp_path / "1.log").read_text()  # one machine speaks
    assert losses(tmp_path / "run") == pytest.approx(losses(finished_small), abs=2e-5)
    assert status(tmp_path / "run")["status"] == "finished"
