"""What the guard leaves in a run folder: ``guard.jsonl``, and ``rolled_back/`` with what was taken back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stage_grpo.guard_rules import HELDOUT_END, HELDOUT_RULES
from stage_grpo.resuming import mark_of
from stage_grpo.run_checkpoints import defect
from stage_grpo.run_folder import write_atomically

if TYPE_CHECKING:
    from stage_grpo.config import StageConfig

RECORDS, ROLLED_BACK = "guard.jsonl", "rolled_back"
"""Names in a run folder."""


@dataclass(frozen=True)
class GuardRecord:
    """One line of ``guard.jsonl``.

    Attributes:
        step: Optimizer steps taken.
        rule: The rule that was broken, or ``not_finite``.
        action: ``warn``, ``skip``, ``stop``, ``rollback`` or ``fail``.
        value: What the rule measured; None for ``not_finite``.
        threshold: Its threshold; for ``not_finite`` the steps in a row that end the run.
        message: One line for people.
        rollbacks: Rollbacks of the run before this line.
        checkpoint: Where a rollback went, the name of a checkpoint of the run.
        learning_rate_factor: Factor of the learning rate since the start of the run, after this line.
        beta_factor: That of beta.
    """

    step: int
    rule: str
    action: str
    value: float | None
    threshold: float
    message: str
    rollbacks: int = 0
    checkpoint: str | None = None
    learning_rate_factor: float = 1.0
    beta_factor: float = 1.0


def read_guard(run: str | Path) -> list[GuardRecord]:
    """What the guard of a run told and did, in order; lines that are no records are left out.

    Args:
        run: Output folder of the run.
    """
    path = Path(run) / RECORDS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return [record for line in lines if (record := _record(line)) is not None]


def _record(line: str) -> GuardRecord | None:
    try:
        return GuardRecord(**json.loads(line))
    except (TypeError, ValueError):
        return None


def append_guard(run: str | Path, record: GuardRecord) -> None:
    """Add a line to ``guard.jsonl``."""
    Path(run).mkdir(parents=True, exist_ok=True)
    with (Path(run) / RECORDS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def keep_guard(run: str | Path, step: int | None, rollbacks: int) -> None:
    """Leave out the lines that are not of the run as it goes on now, and what was said of its end: it is said again.

    Args:
        run: Output folder of the run.
        step: Optimizer steps that it goes on from; None if it begins anew.
        rollbacks: Rollbacks that it knows of; lines from before the last of them stay.
    """

    def stays(record: GuardRecord) -> bool:
        is_earlier = step is not None and record.step <= step and record.rule != HELDOUT_END.name
        return is_earlier or record.rollbacks < rollbacks

    path = Path(run) / RECORDS
    if path.is_file():
        kept = [json.dumps(asdict(record)) + "\n" for record in read_guard(run) if stays(record)]
        write_atomically(path, "".join(kept))


def rollback_to(run: str | Path, checkpoint: Path) -> GuardRecord | None:
    """The last rollback that went to a checkpoint of this name, which may have been written anew since.

    Args:
        run: Output folder of the run.
        checkpoint: The checkpoint that a run continues from; of another run, the answer is None.
    """
    if checkpoint.resolve().parent != Path(run).resolve():
        return None
    found = [record for record in read_guard(run) if record.action == "rollback"]
    return next((record for record in reversed(found) if record.checkpoint == checkpoint.name), None)


def newest_whole_until(run: str | Path, step: int, lineage: Collection[str], hashes: bool = True) -> Path | None:
    """The checkpoint of a training with the most steps that is whole, of those with at most so many.

    Args:
        run: Output folder of the run.
        step: Optimizer steps.
        lineage: Marks of the training's checkpoints.
        hashes: Whether to read and hash the files.
    """
    by_step = sorted(((number, path) for number, path in _checkpoints(run) if number <= step), reverse=True)
    own = (path for _, path in by_step if mark_of(path) in lineage)
    return next((path for path in own if defect(path, hashes) is None), None)


def before_trouble(args: StageConfig, step: int) -> int:
    """The last step before what the rules see at a step: a window earlier, or the beginning.

    Trouble that comes back within a window of where the last rollback went to began before that: then it is a window
    earlier still, so that a run does not go back to the same ill checkpoint until its rollbacks are used up.
    """
    until = step - args.guard_window
    went_to = [record.checkpoint for record in read_guard(str(args.output_dir)) if record.action == "rollback"]
    if went_to and went_to[-1] is not None:
        last = int(went_to[-1].removeprefix("checkpoint-"))
        until = last - args.guard_window if until - last < args.guard_window else until
    return max(0, until)


def way_back(
    args: StageConfig, step: int, rule: str, best: int | None, rollbacks: int, lineage: Collection[str]
) -> tuple[Path | None, str]:
    """Where a rollback goes to.

    Args:
        args: The configuration.
        step: Optimizer steps taken.
        rule: The rule that was broken.
        best: Step of the best held-out test, which the rules of these tests go back to; None without any.
        rollbacks: Rollbacks of the run so far.
        lineage: Marks of the training's checkpoints.

    Returns:
        The newest whole checkpoint from before the trouble, or None; and what the guard says of it.
    """
    if rollbacks >= args.guard_max_rollbacks:
        return None, f"; all {rollbacks} rollbacks are used up"
    to_best = best if rule in HELDOUT_RULES else None
    until = before_trouble(args, step) if to_best is None else to_best
    checkpoint = newest_whole_until(str(args.output_dir), until, lineage)
    if checkpoint is None and to_best is None:
        until = max(0, step - args.guard_window)  # then where the last rollback went: the rate is smaller now
        checkpoint = newest_whole_until(str(args.output_dir), until, lineage)
    if checkpoint is None:
        return None, f"; no whole checkpoint is of step {until} or older"
    factor = args.guard_lr_factor if args.guard_remedy == "learning_rate" else args.guard_beta_factor
    return checkpoint, f"; back to {checkpoint.name} with {args.guard_remedy} x {factor:g}"


def set_aside(run: str | Path, step: int, number: int, clear: bool) -> None:
    """Move the checkpoints beyond a step where no resume looks for them.

    Args:
        run: Output folder of the run.
        step: Optimizer steps of the checkpoint that the run goes on from.
        number: Which rollback it is, from 1: the folder below ``rolled_back``.
        clear: Delete those of earlier rollbacks: a limit was set to the disk that checkpoints may fill.
    """
    folder = Path(run) / ROLLED_BACK / str(number)
    shutil.rmtree(folder.parent if clear else folder, ignore_errors=True)
    for found, path in _checkpoints(run):
        if found > step:
            folder.mkdir(parents=True, exist_ok=True)
            path.rename(folder / path.name)


def _checkpoints(run: str | Path) -> list[tuple[int, Path]]:
    found: list[Any] = [(path.name.removeprefix("checkpoint-"), path) for path in Path(run).glob("checkpoint-*")]
    return [(int(number), path) for number, path in found if number.isdigit() and path.is_dir()]
