"""What of a run's planned files is on the disk already, from an earlier start of it or from a run that it replaces."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from stage_grpo.config import StageConfig
from stage_grpo.planning.work import Work, steps_between_saves
from stage_grpo.run_checkpoints import PARTIAL, defect
from stage_grpo.run_folder import BEST


def held_bytes(config: StageConfig, work: Work) -> int:
    """Bytes of the output folder that are part of what the run may take there.

    Each file is replaced or deleted only when its successor is whole: so there must be room for one more checkpoint
    and one more set of weights whatever is there.

    Args:
        config: The configuration.
        work: What the run does.

    Returns:
        At most ``work.disk_bytes``; 0 for a new folder.
    """
    run = Path(str(config.output_dir))
    checkpoints = sum(_bytes_below(folder) for folder in _own_checkpoints(run, config, work))
    weights = _bytes_below(run / BEST) + sum(_size(path) for path in _weights_in(run))
    partial = _bytes_below(run / PARTIAL) if work.num_checkpoints else 0  # removed before the next checkpoint
    return (
        min(checkpoints, max(0, work.num_checkpoints - 1) * work.checkpoint_bytes)
        + min(weights, work.final_bytes - work.weights_bytes)
        + min(partial, work.checkpoint_bytes)
    )


def _own_checkpoints(run: Path, config: StageConfig, work: Work) -> list[Path]:
    """Whole checkpoints that the run keeps, overwrites or deletes; torn ones stay."""
    folders = [path for path in run.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    if config.save_total_limit is None:  # nothing is deleted: those of other steps stay as well
        every = math.ceil(steps_between_saves(config, work.num_steps))
        last = work.num_steps
        steps = {path: int(path.name.split("-")[-1]) for path in folders}
        folders = [path for path, step in steps.items() if step == last or step % every == 0]
    return [path for path in folders if defect(path, hashes=False) is None]


def _weights_in(folder: Path) -> Iterable[Path]:
    return (path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))


def _bytes_below(folder: Path) -> int:
    return sum(_size(path) for path in folder.rglob("*"))


def _size(path: Path) -> int:
    """Bytes of a file; 0 of anything else, and of what is gone by now."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0
