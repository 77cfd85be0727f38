"""What one process of an ablation has to do, and the files of its folder that others look at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stage_grpo.ablation.grid import HeldoutTest
from stage_grpo.images.files import write_whole

CONFIG, TEST, SCORES, LOG = "config.yaml", "test.json", "scores.json", "run.log"
PROMPTS = "train.jsonl"
RESULT = "result.json"
"""File of a job's folder that is written last."""


@dataclass(frozen=True)
class Job:
    """Work for one process: train and test a policy, or test the one before training.

    Attributes:
        folder: Where it leaves everything; finished once ``result.json`` is there and whole.
        values: The training configuration as a YAML file holds it.
        test: How the policy is tested.
        num_steps: Optimizer steps; 0 tests the model of the configuration as it is.
        prompts: Text of the folder's own prompt file, which the configuration names; None if it names another.
    """

    folder: Path
    values: Mapping[str, Any]
    test: HeldoutTest
    num_steps: int
    prompts: str | None = None

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return read_result(self.folder) is not None


def read_result(folder: Path) -> dict[str, Any] | None:
    """What ``result.json`` of a job's folder says; None if it is missing or torn, for then the job is to be done.

    Args:
        folder: The folder.
    """
    try:
        content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_job(job: Job, keep_weights: bool) -> None:
    """Write what `stage_grpo.ablation.worker` reads.

    Args:
        job: The job.
        keep_weights: Whether the trained weights stay after the test.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    if job.prompts is not None:
        write_whole(job.folder / PROMPTS, job.prompts.encode())
    write_whole(job.folder / CONFIG, yaml.safe_dump(dict(job.values), sort_keys=False).encode())
    test = {"test": vars(job.test), "train": job.num_steps > 0, "keep_weights": keep_weights}
    write_whole(job.folder / TEST, (json.dumps(test, indent=2) + "\n").encode())
