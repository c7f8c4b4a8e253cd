"""Run a preparation's tasks on several machines that share its folder, through datatrove's executors.

Rank r of n does the plan's entries r, r + n, ... and writes into DIR/tasks. Joining is what `prepare` does with
finished tasks, so the plain command finishes such a folder too. datatrove pickles its executor into the logging
folder, never into DIR. The records in DIR/tasks say what is done, not datatrove's completions, which outlive a removed
DIR.
"""

import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data import DataError
from data.manifest import PREPARING, read_manifest
from data.plan import part_of, part_records, rank_lock
from data.tasks import Work, Workers, finished_tasks, tasks_of

EXECUTORS = ("local", "slurm", "ray")
_ROOT = Path(__file__).resolve().parent.parent


def run_rank(work: Work, num_proc: int, data: object, rank: int, world_size: int) -> None:
    """Run the tasks of a rank that are not done: a step of datatrove's, which gives the last three arguments."""
    with rank_lock(work.out, rank):
        plan = read_manifest(work.out, PREPARING)
        if plan is None:
            raise DataError(f"{work.out} has no plan; run the same data.prepare command again")
        parts = part_records(work.out)
        entries = range(rank, len(plan.inputs), world_size)
        tasks = (task for number in entries for task in tasks_of(work.source, number, plan.inputs[number]))
        finished = {*finished_tasks(work.out)}
        with Workers(work, num_proc=num_proc) as workers:
            for _ in workers.run(tasks, lambda key: key in finished or part_of(parts, key) is not None):
                pass


def _run_join(join: Callable[[], object], data: object, rank: int, world_size: int) -> None:
    join()


@dataclass
class Cluster:
    """Machines that run tasks, as --executor, --num_tasks, --logging_dir and --slurm describe them."""

    executor: str
    num_tasks: int
    logging_dir: Path
    slurm: Mapping[str, Any]

    def check(self) -> None:
        """Raise DataError if something is missing, before any work."""
        if self.num_tasks < 1:
            raise DataError(f"--num_tasks must be at least 1, got {self.num_tasks}")
        try:
            import datatrove.executor  # noqa: F401

            if self.executor == "ray":
                import ray  # noqa: F401
        except ImportError as error:
            raise DataError(f'--executor {self.executor} needs {error.name}: pip install -e ".[cluster]"') from error
        if self.executor != "slurm":
            return
        if shutil.which("sbatch") is None:
            raise DataError("--executor slurm: sbatch was not found; run this on a login node of the cluster")
        for name in ("time", "partition"):
            if name not in self.slurm:
                raise DataError(f"--executor slurm needs --slurm {name}=VALUE")

    def run(self, work: Work, join: Callable[[], object]) -> bool:
        """Run the tasks; return False if they were submitted, with the joining, to run later."""
        if self.executor == "slurm":
            self._submit(work, join)
            return False
        import ray
        from datatrove.executor.ray import RayPipelineExecutor

        if not ray.is_initialized():
            ray.init(runtime_env={"env_vars": {"PYTHONPATH": str(_ROOT)}})
        cores = max(1, min(int(node["Resources"]["CPU"]) for node in ray.nodes() if node["Resources"].get("CPU")))
        step = partial(run_rank, work, cores)
        options = {"tasks": self.num_tasks, "logging_dir": str(self.logging_dir), "cpus_per_task": cores}
        RayPipelineExecutor([step], **options, mem_per_cpu_gb=0, skip_completed=False).run()
        return True

    def _submit(self, work: Work, join: Callable[[], object]) -> None:
        from datatrove.executor.slurm import SlurmPipelineExecutor

        path = f"{shlex.quote(str(Path(sys.executable).parent))}:$PATH"
        options: dict[str, Any] = {"env_command": f"export PYTHONPATH={shlex.quote(str(_ROOT))} PATH={path}", "qos": ""}
        options |= {"skip_completed": False, **self.slurm}
        step = partial(run_rank, work, int(options.get("cpus_per_task", 1)))
        logs = [str(self.logging_dir / name) for name in ("tasks", "join")]
        tasks = SlurmPipelineExecutor([step], self.num_tasks, job_name="tokenize", logging_dir=logs[0], **options)
        SlurmPipelineExecutor(
            [partial(_run_join, join)], 1, job_name="join", depends=tasks, logging_dir=logs[1], **options
        ).run()
