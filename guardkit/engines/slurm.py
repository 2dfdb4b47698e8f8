"""Jobs of a Slurm cluster, through submitit: an array of them, each with its share of the items."""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Generic, TypeVar

from guardkit.checks import check_choice, check_mapping, check_number, check_path, check_whole
from guardkit.engines.base import sending
from guardkit.schema import InputError

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_POLL_S = 1.0
_CLUSTERS = ("slurm", "local")


class SlurmEngine:
    """Works in jobs of a Slurm cluster; see `guardkit.engines.base.Engine`.

    Each job takes every so-manieth item. One that runs out of time is queued again by submitit; one that failed otherwise is submitted again.

    Args:
        workers: jobs of the array.
        cpus, gpus, memory_gb: of each job.
        timeout_min: minutes that a job may take.
        partition: of the cluster; None: its default.
        jobs_dir: where submitit keeps what jobs are sent, and their logs: a folder that all machines share.
        retries: how often the items of failed jobs are submitted again.
        cluster: "slurm", or "local": the same jobs as processes of this machine, to try it out.
        more: further parameters of submitit's executor, such as {"slurm_account": "vision"}; None: none.
    Raises:
        InputError: a wrong value.
    """

    name = "slurm"
    is_here = False

    def __init__(
        self,
        *,
        workers: int = 8,
        cpus: int = 4,
        gpus: int = 0,
        memory_gb: float = 16,
        timeout_min: int = 240,
        partition: str | None = None,
        jobs_dir: str | Path = "guardkit_jobs",
        retries: int = 2,
        cluster: str = "slurm",
        more: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value, least in (
            ("workers", workers, 1),
            ("cpus", cpus, 1),
            ("gpus", gpus, 0),
            ("timeout_min", timeout_min, 1),
            ("retries", retries, 0),
        ):
            check_whole(f"engine.{name}", value, least)
        check_number("engine.memory_gb", memory_gb, "(0, inf)")
        check_choice("engine.cluster", cluster, _CLUSTERS)
        check_mapping("engine.more", more, "{PARAMETER: VALUE}")
        self.workers, self.retries, self.cluster = workers, retries, cluster
        self.jobs_dir = check_path("engine.jobs_dir", jobs_dir)
        self.parameters: dict[str, Any] = {
            "timeout_min": timeout_min,
            "cpus_per_task": cpus,
            "gpus_per_node": gpus,
            "mem_gb": memory_gb,
            "name": "guardkit",
        }
        if cluster == "slurm":
            self.parameters["slurm_array_parallelism"] = workers
            if partition is not None:
                self.parameters["slurm_partition"] = partition
        self.parameters |= dict(more or {})

    def run(self, task: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[int, R]]:
        """See `Engine`. Results come when a job ends; a task that keeps a ledger knows of each item before."""
        try:
            import submitit
        except ImportError as error:
            raise InputError('engine=slurm needs the package submitit; pip install "guardkit[slurm]"') from error
        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise InputError(
                "engine=slurm needs Slurm's sbatch, which is not on the PATH; run it on a login node, or try it out with engine.cluster=local"
            )
        folder = (self.jobs_dir / uuid.uuid4().hex[:12]).absolute()
        left = dict(enumerate(items))
        for attempt in range(self.retries + 1):
            executor = submitit.AutoExecutor(folder, cluster=self.cluster)
            executor.update_parameters(**self.parameters)
            places = list(left)
            shares = [places[first :: self.workers] for first in range(min(self.workers, len(places)))]
            with sending(self.name), _errors_into(folder / "controllers.log") if self.cluster == "local" else nullcontext():
                jobs = executor.map_array(_Several(task), [[(place, left[place]) for place in share] for share in shares])
            why = ""
            try:
                for job in _as_they_end(jobs):
                    failure = job.exception()
                    if failure is None:
                        for place, result in job.result():
                            del left[place]
                            yield place, result
                        continue
                    why = _why(failure)
                    log.warning("job %s of engine=slurm failed (%s)", job.job_id, why)
                    mistake = next((line for line in str(failure).splitlines() if line.startswith(_MISTAKE)), None)
                    if mistake is not None:
                        raise InputError(mistake.removeprefix(_MISTAKE).strip())
            finally:
                for job in jobs:
                    if not job.done():
                        job.cancel()
            if not left:
                shutil.rmtree(folder, ignore_errors=True)
                return
            if attempt < self.retries:
                log.warning("%d item(s) of failed jobs are submitted again", len(left))
        raise InputError(
            f"{len(left)} item(s) were not done in {self.retries + 1} attempts of engine=slurm, the last of which failed with: {why}; what was done "
            f"stays: see the logs in {folder}, and run the same command again"
        )


_MISTAKE = "guardkit.schema.InputError:"  # the last line of a traceback


class _Several(Generic[T, R]):
    """What a job does."""

    def __init__(self, task: Callable[[T], R]) -> None:
        self._task = task

    def __call__(self, items: Sequence[tuple[int, T]]) -> list[tuple[int, R]]:
        return [(place, self._task(item)) for place, item in items]

    def checkpoint(self, items: Sequence[tuple[int, T]]) -> Any:
        """submitit's: what is queued in place of a job whose time is over."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, items)


@contextmanager
def _errors_into(file: Path) -> Iterator[None]:
    """Lets processes that are started in the block write their errors to a file. submitit's controllers of local jobs inherit this process's
    place for them, and write a traceback there whenever they are told to end: at Ctrl-C, and after another job's error."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed: then nobody sees them
        yield
        return
    try:
        with file.open("ab") as log_file:
            os.dup2(log_file.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _as_they_end(jobs: Sequence[Any]) -> Iterator[Any]:
    left = list(jobs)
    while left:
        ended = [job for job in left if job.done()]
        yield from ended
        left = [job for job in left if job not in ended]
        if left and not ended:
            time.sleep(_POLL_S)


def _why(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
