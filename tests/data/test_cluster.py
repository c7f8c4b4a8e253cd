"""Preparation on several machines: the same bytes, SLURM's scripts, and no pickle in the folder of shards."""

from functools import partial

import pytest
from shard_folders import DOCUMENTS, content_of, jsonl_folder

from data import DataError
from data.cluster import Cluster, run_rank
from data.plan import rank_lock
from data.prepare import prepare
from data.sources import FileSource


class Local(Cluster):
    """Run the ranks in processes of this machine."""

    def run(self, work, join):
        from datatrove.executor.local import LocalPipelineExecutor

        step = partial(run_rank, work, 2)
        LocalPipelineExecutor([step], tasks=2, workers=2, logging_dir=str(self.logging_dir), skip_completed=False).run()
        assert {path.stem for path in (work.out / "tasks").glob("*.json")} == {f"{n:06d}" for n in range(5)}
        return True


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr("data.plan.TASK_BYTES", 1)  # a task of each file
    source = FileSource([jsonl_folder(tmp_path / "text", DOCUMENTS, 5)])
    return lambda name, **options: prepare(source, tmp_path / name, name="t", val_fraction=0.1, **options)


def test_a_running_rank_keeps_others_out(run, tmp_path):
    (tmp_path / "out").mkdir()
    with rank_lock(tmp_path / "out", 3), pytest.raises(DataError, match="another process is preparing"):
        run("out")
    run("out")
    assert not [*(tmp_path / "out").glob(".lock*")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Local, Cluster])
def test_machines_make_the_same_bytes(run, tmp_path, kind):
    pytest.importorskip("datatrove", reason='needs pip install -e ".[cluster]"')
    if kind is Cluster:
        pytest.importorskip("ray", reason='needs pip install -e ".[cluster]"')
    run("here", shard_tokens=700)
    run("there", shard_tokens=700, cluster=kind("ray", 2, tmp_path / "logs", {}))
    assert content_of(tmp_path / "here") == content_of(tmp_path / "there")
    assert (tmp_path / "logs" / "completions" / "00001").exists()


def test_slurm_gets_two_jobs_and_the_folder_no_pickle(run, tmp_path, monkeypatch):
    pytest.importorskip("datatrove", reason='needs pip install -e ".[cluster]"')
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho Submitted batch job 7\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(sbatch.parent), prepend=":")
    options = {"time": "02:00:00", "partition": "cpu", "cpus_per_task": 32}
    assert not run("out", cluster=Cluster("slurm", 3, tmp_path / "logs", options)).shards
    script = (tmp_path / "logs" / "tasks" / "launch_script.slurm").read_text()
    for text in ("--partition=cpu", "--cpus-per-task=32", "--array=0-2", "--time=02:00:00", "PYTHONPATH="):
        assert text in script
    assert "--dependency=afterok:7" in (tmp_path / "calls").read_text()
    assert (tmp_path / "logs" / "join" / "executor.pik").exists()
    assert not [*(tmp_path / "out").rglob("*.pik*")]
    run("out")  # the plain command finishes it


def test_slurm_without_sbatch_is_refused(run, tmp_path, monkeypatch):
    pytest.importorskip("datatrove", reason='needs pip install -e ".[cluster]"')
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="sbatch was not found"):
        run("out", cluster=Cluster("slurm", 3, tmp_path / "logs", {}))
