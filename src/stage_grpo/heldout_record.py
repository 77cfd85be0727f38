"""What held-out evaluations leave in a run folder: ``heldout.jsonl``, ``heldout/step-N/`` and ``best/``."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stage_grpo.evaluation.scores import Scores, compare
from stage_grpo.evaluation.statistics import Difference
from stage_grpo.heldout_plan import HeldoutPlan
from stage_grpo.run_checkpoints import PARTIAL, SET_ASIDE, defect, publish, seal
from stage_grpo.run_folder import BEST, RECORDS, STEPS, write_atomically

logger = logging.getLogger(__name__)

IMAGES = "images"
"""Name of a step's images in its folder."""
MAX_DROP = 1000.0
"""Most standard errors that are told of."""
MIN_UNITS = 10
"""Prompts of a category below which a bootstrap's standard error, 5 % too small with ten, says nothing."""


@dataclass(frozen=True)
class HeldoutRecord:
    """The score of one policy on the held-out prompts.

    Attributes:
        step: Optimizer steps taken.
        score: The score to follow, in the benchmark's unit; higher is better.
        ci95: Its 95 % interval over prompts.
        measure: Its measure.
        line: Its line of the table: ``heldout`` or ``overall``.
        scores: Every measure's table: category, ``overall`` or ``heldout`` to value.
        diversity: ``unique_share``, ``pairwise_distance`` and the ``space`` of the latter, as far as known.
        num_images: Images scored.
        num_unscored: Images that the measure has no score for.
        seconds: Wall time of generating and scoring.
        plan: Fingerprint of the plan; records with another one do not compare.
        best_step: Step of the best score before this one, of equal ones the first; None for the first test.
        drop: How far this score is below that one, in standard errors of the paired difference (same prompts, same
            random numbers); negative if it is above. None where it is not known.
    """

    step: int
    score: float
    ci95: list[float | None]
    measure: str
    line: str
    scores: dict[str, dict[str, float | None]]
    diversity: dict[str, Any]
    num_images: int
    num_unscored: int
    seconds: float
    plan: str
    best_step: int | None = None
    drop: float | None = None

    @classmethod
    def of(cls, scores: Scores, plan: HeldoutPlan, step: int, seconds: float) -> HeldoutRecord:
        """Take from an evaluation what the run follows.

        Raises:
            ValueError: If there is no score, because no image of a category could be scored.
        """
        score = scores.scores.get(plan.measure, {}).get(plan.line)
        if score is None:
            why = "; ".join([*scores.missing.values(), *scores.problems][:3]) or "no image of a category was scored"
            raise ValueError(f"the held-out images have no {plan.measure}/{plan.line}: {why}")
        return cls(
            step,
            score,
            scores.ci95[plan.measure][plan.line],
            plan.measure,
            plan.line,
            scores.scores,
            scores.diversity,
            scores.num_images,
            scores.num_unscored.get(plan.measure, 0),
            seconds,
            plan.fingerprint,
        )

    def metrics(self) -> dict[str, float]:
        """What is logged: numbers by name."""
        named: dict[str, Any] = {"heldout/score": self.score, "heldout/seconds": self.seconds}
        named |= {"heldout/unscored": self.num_unscored}
        named |= {"heldout/best_step": self.best_step, "heldout/drop": self.drop}
        named |= {f"heldout/{m}/{line}": value for m, table in self.scores.items() for line, value in table.items()}
        named |= {f"heldout/diversity/{name}": value for name, value in self.diversity.items()}
        return {name: float(value) for name, value in named.items() if isinstance(value, int | float)}


def read_records(run: str | Path) -> list[HeldoutRecord]:
    """All held-out scores of a run, by step; lines that are no records are left out.

    Args:
        run: Output folder of the run.
    """
    path = Path(run) / RECORDS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [record for line in lines if (record := _record(line)) is not None]
    return sorted(found, key=lambda record: record.step)


def best_test(records: Iterable[HeldoutRecord]) -> HeldoutRecord | None:
    """The best of some scores, of equal ones the first. One without all images is none: it is another number."""
    return max((known for known in records if not known.num_unscored), key=lambda known: known.score, default=None)


def _record(text: str) -> HeldoutRecord | None:
    try:
        record = HeldoutRecord(**json.loads(text))
        return record if math.isfinite(record.score) and isinstance(record.step, int) else None
    except (TypeError, ValueError):
        return None


class HeldoutFolder:
    """The part of a run folder that held-out evaluations write; for the main process alone.

    Args:
        run: Output folder of the run.
        plan: Fingerprint of the plan.

    Attributes:
        records: Scores so far, by step.
        best: The best of them whose policy is kept, if one is.
    """

    def __init__(self, run: str | Path, plan: str):
        self.run = Path(run)
        self.plan = plan
        self.records: list[HeldoutRecord] = []
        self.best: HeldoutRecord | None = None

    def begin(self, step: int | None) -> None:
        """Take up what earlier parts of the run left, and remove what is not of this run.

        A run that begins at the beginning keeps nothing. One that resumes at a step drops what was measured beyond it,
        as it takes these steps again, and what was measured in another way; its best policy stays the best.

        Args:
            step: Optimizer steps of the checkpoint that the run goes on from; None for a new run.
        """
        found = [] if step is None else read_records(self.run)
        self.records = [record for record in found if record.step <= (step or 0) and record.plan == self.plan]
        if others := {record.step for record in found if record.plan != self.plan}:
            logger.warning("held-out scores of steps %s were measured in another way; dropped", sorted(others))
        if found or (self.run / RECORDS).exists():
            self._write()
        known = {self.step_folder(record.step) for record in self.records}
        for folder in set((self.run / STEPS).glob("step-*")) - known:
            shutil.rmtree(folder)
        self.best = None if step is None else self._kept_best()

    def _kept_best(self) -> HeldoutRecord | None:
        folder, aside = self.run / BEST, self.run / PARTIAL / f"{SET_ASIDE}{BEST}"
        if aside.is_dir() and not folder.exists():
            aside.rename(folder)  # killed between the two renames of publish()
        if not folder.is_dir():
            return None
        wrong = defect(folder, hashes=False)
        path = folder / f"{BEST}.json"
        record = _record(path.read_text(encoding="utf-8")) if wrong is None and path.is_file() else None
        if record is None or record.plan != self.plan:
            logger.warning("%s %s; it will be replaced", folder, wrong or "holds no policy scored like this")
            return None
        return record

    def step_folder(self, step: int) -> Path:
        """Folder of one evaluation."""
        return self.run / STEPS / f"step-{step:06d}"

    def is_best(self, record: HeldoutRecord) -> bool:
        """Whether a policy is better than the best so far; of equal ones the first is the best.

        One with images that could not be scored is not: the mean over the others is another number.
        """
        if record.num_unscored:
            logger.warning(
                "step %d has %d held-out images without a score; not kept as the best",
                record.step,
                record.num_unscored,
            )
            return False
        return self.best is None or record.score > self.best.score

    def keep_best(self, record: HeldoutRecord, partial: Path) -> None:
        """Make a saved policy the best one, whole or not at all.

        Args:
            record: Its score.
            partial: Folder that it was saved to, below ``.partial``.
        """
        write_atomically(partial / f"{BEST}.json", json.dumps(asdict(record), indent=2) + "\n")
        seal(partial)
        publish(partial, self.run / BEST)
        if not any(partial.parent.iterdir()):
            partial.parent.rmdir()
        self.best = record

    def compared(self, record: HeldoutRecord) -> HeldoutRecord:
        """Say how far a score is below the best one before it, from the records of the images of both."""
        before = best_test(known for known in self.records if known.step < record.step)
        if before is None:
            return record
        try:
            best, last = (Scores.load(self.step_folder(step) / "scores.json") for step in (before.step, record.step))
            difference = compare(best, last, record.measure)[record.line]
        except (OSError, ValueError, KeyError) as error:
            logger.warning("the tests of steps %d and %d do not compare: %s", before.step, record.step, error)
            return replace(record, best_step=before.step)
        if difference.num_units < MIN_UNITS:
            logger.warning(
                "a category of the held-out test has %d prompts; below %d losses are not judged, by the guard either: "
                "give more in heldout_prompts",
                difference.num_units,
                MIN_UNITS,
            )
        return replace(record, best_step=before.step, drop=_in_standard_errors(-difference.value, difference))

    def add(self, record: HeldoutRecord, keep_images: bool) -> None:
        """Add a score to ``heldout.jsonl``, and remove the images of all but the first, the best and this step.

        Args:
            record: The score.
            keep_images: Keep all images.
        """
        self.records = [*(known for known in self.records if known.step != record.step), record]
        self._write()
        if not keep_images:
            best = self.best or max(self.records, key=lambda known: known.score)
            _remove_images(self.step_folder(r.step) for r in self.records[1:-1] if r.step != best.step)

    def _write(self) -> None:
        lines = [json.dumps(asdict(record)) + "\n" for record in self.records]
        write_atomically(self.run / RECORDS, "".join(lines))


def _in_standard_errors(value: float, difference: Difference) -> float | None:
    """Where all images changed alike there is no spread to compare with: then a change is as large as can be said."""
    if math.isnan(value) or difference.num_units < MIN_UNITS:
        return None
    error = max(difference.standard_error, abs(value) / MAX_DROP)
    return value / error if error > 0 else 0.0


def _remove_images(folders: Iterable[Path]) -> None:
    for folder in folders:
        for images in folder.glob(f"{IMAGES}*"):
            shutil.rmtree(images)
