"""Jobs in processes, so many at a time, with one progress bar over the steps of all; ended when the caller ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from stage_grpo.ablation.job import LOG, Job, write_job
from stage_grpo.devices import num_cores

POLL_SECONDS = 0.5
GRACE_SECONDS = 120
"""What a job gets to end its step and save a checkpoint."""
_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
_TAIL = 65536


@dataclass(frozen=True)
class Failure:
    """A job that did not end well.

    Attributes:
        folder: Its folder, with the whole story in ``run.log``.
        reason: Last line of the log, or the signal that killed it.
    """

    folder: Path
    reason: str


def default_parallel() -> int:
    """Jobs at a time: one a GPU, or one a core where there is none."""
    import torch

    return torch.cuda.device_count() or num_cores()


def run_jobs(jobs: Sequence[Job], num_parallel: int, keep_weights: bool = False) -> list[Failure]:
    """Do all jobs that are not finished, going on when one fails.

    SIGTERM and SIGINT end the running ones after their step, each with a checkpoint.

    Args:
        jobs: The jobs, in the order in which they are started.
        num_parallel: Processes at a time; each gets its share of the cores, and one GPU if there are any.
        keep_weights: Whether trained weights stay after the test.

    Returns:
        The jobs that failed.

    Raises:
        KeyboardInterrupt: A signal came; everything can be continued by calling again.
    """
    waiting = [job for job in jobs if not job.is_finished]
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    failures: list[Failure] = []
    with _interrupted_by_sigterm(), _Progress(jobs) as progress:
        try:
            while waiting or running:
                for slot in range(num_parallel):
                    if waiting and slot not in running:
                        job = waiting.pop(0)
                        running[slot] = job, _start(job, slot, num_parallel, keep_weights)
                time.sleep(POLL_SECONDS)
                for slot, (job, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        failures += _failure(job, process.returncode)
                progress.show([job for job, _ in running.values()], failures)
        finally:
            _end([process for _, process in running.values()])
    return failures


def _start(job: Job, slot: int, num_parallel: int, keep_weights: bool) -> subprocess.Popen[bytes]:
    write_job(job, keep_weights)
    threads = str(max(1, num_cores() // num_parallel))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, **_one_gpu(slot)}
    with (job.folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "stage_grpo.ablation.worker", str(job.folder)],
            stdin=subprocess.PIPE,  # never written to: its end tells the job that we are gone
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )


def _one_gpu(slot: int) -> dict[str, str]:
    """Environment that shows a process one GPU: with several, transformers would split batches over them."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[slot % count]}


def _failure(job: Job, code: int) -> list[Failure]:
    if code == 0 and job.is_finished:
        return []
    lines = (job.folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")
    return [Failure(job.folder, f"killed by {signal.Signals(-code).name}" if code < 0 else said)]


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes, gently first; whoever is asked twice is killed."""
    for process in processes:
        process.terminate()
    try:
        deadline = time.monotonic() + GRACE_SECONDS
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        for process in processes:
            process.kill()
    for process in processes:
        process.wait()


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does; outside the main thread Python allows no handlers."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Progress:
    """One bar over the optimizer steps of all jobs; tests take time as well, and are in the average a step takes."""

    def __init__(self, jobs: Sequence[Job]):
        self.jobs = jobs
        done = sum(job.num_steps for job in jobs if job.is_finished)
        total = sum(job.num_steps for job in jobs)
        # smoothing=0: time left from the average, because jobs start and end in waves.
        self.bar = tqdm(total=total, initial=done, desc="ablate", bar_format=_BAR, smoothing=0)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def show(self, running: Sequence[Job], failures: Sequence[Failure]) -> None:
        """Bring the bar up to date.

        Args:
            running: Jobs at work.
            failures: Jobs that failed so far; their steps are taken off.
        """
        failed = {failure.folder for failure in failures}
        finished = [job for job in self.jobs if job.is_finished]
        self.bar.total = sum(job.num_steps for job in self.jobs if job.folder not in failed)
        self.bar.n = sum(job.num_steps for job in finished) + sum(_steps_done(job) for job in running)
        parts = [f"{len(finished)} of {len(self.jobs)} jobs finished"]
        parts += [f"{len(failures)} failed"] if failures else []
        self.bar.set_postfix_str(", ".join(parts), refresh=True)


def _steps_done(job: Job) -> int:
    """The last step in a job's ``metrics.jsonl``, of which only the end is read."""
    if job.is_finished or not job.num_steps:
        return 0
    try:
        with (job.folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            rows = file.read().split(b"\n")
        return min(job.num_steps, int(json.loads(rows[-2])["step"]))
    except (OSError, IndexError, KeyError, TypeError, ValueError):
        return 0
