"""What the finished runs of a grid say: every run's numbers, and every line's means and paired differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stage_grpo.ablation.collapse import collapse_reasons, end_mean
from stage_grpo.ablation.grid import Cell, Grid
from stage_grpo.ablation.job import SCORES, read_result
from stage_grpo.ablation.plan import PlannedRun
from stage_grpo.ablation.seeds import SeedMean, mean_over_seeds, paired_over_seeds
from stage_grpo.benchmarks import GRADED
from stage_grpo.evaluation.scores import HELDOUT, OVERALL, Scores, compare
from stage_grpo.evaluation.statistics import Difference
from stage_grpo.guard_record import read_guard
from stage_grpo.guard_rules import PASSIVE_RULES
from stage_grpo.run_record import RunRecord, read_run

TRAINED, OTHER = "trained categories", "other categories"
UNIQUE, DISTANCE = "unique_share", "pairwise_distance"
MAX_KL, SECONDS = "kl/max", "seconds/step"
ALARMS, ROLLBACKS, BELOW_BEST = "guard/told", "guard/rollbacks", "heldout/below_best"


@dataclass(frozen=True)
class FinishedRun:
    """A run that was trained and tested.

    Attributes:
        plan: What it was to be.
        record: What the training left.
        before: Scores before training.
        after: Scores after it, of the same prompts and random streams.
        gains: Measure to the paired overall difference over images.
        quantities: Name to number: scores, diversity, and the end-of-run mean of every logged metric.
        collapse: Why it counts as collapsed; empty if it does not.
    """

    plan: PlannedRun
    record: RunRecord
    before: Scores
    after: Scores
    gains: dict[str, Difference]
    quantities: dict[str, float | None]
    collapse: list[str]


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        cell: Variant and place on the axes.
        runs: Its finished runs, one a seed.
        means: Quantity to its mean over seeds.
        differences: Variant compared with (at the same place) to quantity to the paired difference over seeds.
    """

    cell: Cell
    runs: list[FinishedRun]
    means: dict[str, SeedMean]
    differences: dict[str, dict[str, SeedMean]]

    @property
    def num_collapsed(self) -> int:
        """Runs that count as collapsed."""
        return sum(bool(run.collapse) for run in self.runs)


@dataclass(frozen=True)
class Results:
    """A grid and what came of it.

    Attributes:
        grid: The grid.
        runs: Finished runs.
        missing: Names of the runs that did not finish; of those that cannot be read path, reason and remedy.
        lines: Lines of the table, in the order of the grid; a line without finished runs is left out.
    """

    grid: Grid
    runs: list[FinishedRun]
    missing: list[str]
    lines: list[Line]

    @property
    def headline(self) -> str:
        """The benchmark's first measure."""
        return self.runs[0].after.headline

    @cached_property
    def quantities(self) -> list[str]:
        """All names of quantities."""
        return list(dict.fromkeys(name for run in self.runs for name in run.quantities))

    @property
    def seeds(self) -> list[int]:
        """Training seeds with a finished run."""
        return sorted({run.plan.seed for run in self.runs})

    @property
    def befores(self) -> dict[Path, Scores]:
        """Tests before training: one, unless runs are tested differently."""
        return {run.plan.before.folder: run.before for run in self.runs}

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        return {
            "grid": dataclasses.asdict(self.grid),
            "seeds": self.seeds,
            "missing": self.missing,
            "before": {folder.name: scores.scores for folder, scores in self.befores.items()},
            "runs": [_run_json(run) for run in self.runs],
            "table": [_line_json(line) for line in self.lines],
        }


def collect(grid: Grid, runs: Sequence[PlannedRun]) -> Results:
    """Read the finished runs of a grid and put them together.

    Args:
        grid: The grid.
        runs: Its runs.

    Returns:
        The results, without the runs whose files cannot be read: one damaged file takes no other run along.

    Raises:
        ValueError: No run is finished and can be read.
    """
    finished, missing = [], []
    for run in runs:
        found = _read_run(grid, run)
        finished += [found] if isinstance(found, FinishedRun) else []
        missing += [found] if isinstance(found, str) else []
    if not finished:
        logs = f"{runs[0].job.folder.parent}/*/run.log"
        raise ValueError(f"grid {grid.name!r} has no finished run that can be read: {', '.join(missing)}; see {logs}")
    by_cell = {cell.label: [run for run in finished if run.plan.cell.label == cell.label] for cell in grid.cells}
    lines = [_line(grid, cell, by_cell) for cell in grid.cells if by_cell[cell.label]]
    return Results(grid, finished, missing, lines)


def _read_run(grid: Grid, plan: PlannedRun) -> FinishedRun | str:
    """A run; or why it is left out, for ``missing``."""
    if not (plan.job.is_finished and plan.before.is_finished):
        return plan.job.folder.name
    folder = plan.before.folder
    try:
        before = _scores(folder)
        folder = plan.job.folder
        return _finished_run(grid, plan, before, _scores(folder))
    except (OSError, ValueError) as error:
        return f"{plan.job.folder} ({error}; delete {folder} to run it again)"


def _scores(folder: Path) -> Scores:
    try:
        return Scores.load(folder / SCORES)
    except ValueError as error:
        # Without the remedy of the message: a finished run is not scored again.
        raise ValueError(f"{folder / SCORES} cannot be read: {error.__cause__}") from error


def _finished_run(grid: Grid, plan: PlannedRun, before: Scores, after: Scores) -> FinishedRun:
    record = read_run(plan.job.folder)
    if not record.metrics:
        raise ValueError(f"{plan.job.folder / 'metrics.jsonl'} holds no step")
    gains = {
        measure: found[OVERALL]
        for measure in after.scores
        if measure in before.scores and OVERALL in (found := compare(before, after, measure))
    }
    # A graded score moves before the verdict does.
    graded = gains.get(GRADED, gains.get(after.headline))
    quantities = scored(grid, after) | _logged(record)
    return FinishedRun(plan, record, before, after, gains, quantities, collapse_reasons(record.metrics, graded))


def scored(grid: Grid, scores: Scores) -> dict[str, float | None]:
    """Scores and diversity of a test by the names of the table.

    Args:
        grid: The grid, for the categories that were trained on.
        scores: The scores.
    """
    headline = scores.scores[scores.headline]
    found: dict[str, float | None] = {measure: lines.get(OVERALL) for measure, lines in scores.scores.items()}
    found |= {f"{scores.headline} held-out": headline[HELDOUT]} if HELDOUT in headline else {}
    if grid.train_categories:
        trained = [headline.get(column) for column in scores.columns if column in grid.train_categories]
        others = [headline.get(column) for column in scores.columns if column not in grid.train_categories]
        found |= {TRAINED: _mean(trained), OTHER: _mean(others)}
    found |= {f"{scores.headline} {column}": headline.get(column) for column in scores.columns}
    if grid.test.num_images > 1:
        found |= {name: scores.diversity[name] for name in (UNIQUE, DISTANCE)}
    return found


def _logged(record: RunRecord) -> dict[str, float | None]:
    rows = [row for row in record.metrics if "loss" in row]
    names = dict.fromkeys(name for row in rows for name in row if name not in ("step", "epoch"))
    found = {name: end_mean(rows, name) for name in names}
    drift = [row["kl"] for row in rows if row.get("kl") is not None]
    seconds = [row["step_time"] for row in rows if row.get("step_time") is not None]
    return found | {MAX_KL: max(drift, default=None), SECONDS: _mean(seconds)} | guarded(record)


def guarded(record: RunRecord) -> dict[str, float | None]:
    """What the guard of a run told, and what the run lost.

    Args:
        record: The run.

    Returns:
        Lines of ``guard.jsonl`` by rules that act; with ``guard: rollback`` how often it went back; with held-out
        tests how far the last score lies below the best one, of what was taken back too; None if the last score is
        not of the last step.
    """
    told = [known for known in read_guard(record.path) if known.rule not in PASSIVE_RULES]
    found: dict[str, float | None] = {ALARMS: len(told)}
    if record.config.get("guard") == "rollback":
        found[ROLLBACKS] = sum(known.action == "rollback" for known in told)
    steps, kept = record.series("heldout/score")
    if kept:
        taken_back = [row["heldout/score"] for row in record.abandoned if row.get("heldout/score") is not None]
        found[BELOW_BEST] = max([*kept, *taken_back]) - kept[-1] if steps[-1] == record.num_steps else None
    return found


def _line(grid: Grid, cell: Cell, by_cell: dict[str, list[FinishedRun]]) -> Line:
    runs = by_cell[cell.label]
    names = dict.fromkeys(name for run in runs for name in run.quantities)
    means = {name: mean_over_seeds([run.quantities.get(name) for run in runs]) for name in names}
    differences = {}
    others = list(dict.fromkeys((grid.baseline, *grid.controls)))
    # Of two that others are compared with, the later one's line has their difference.
    for other in others[: others.index(cell.variant)] if cell.variant in others else others:
        if against := by_cell.get(Cell(other, cell.point, {}).label, []):
            differences[other] = {
                name: paired_over_seeds(
                    {run.plan.seed: run.quantities.get(name) for run in runs},
                    {run.plan.seed: run.quantities.get(name) for run in against},
                )
                for name in names
            }
    return Line(cell, runs, means, differences)


def _mean(values: Sequence[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return float(np.mean(kept)) if kept and len(kept) == len(values) else None


def _run_json(run: FinishedRun) -> dict[str, Any]:
    cell = run.plan.cell
    return {
        "variant": cell.variant,
        "axes": dict(cell.point),
        "seed": run.plan.seed,
        "settings": cell.overrides,
        "folder": run.plan.job.folder.name,
        "scores": run.after.scores,
        "gain": {measure: dataclasses.asdict(gain) for measure, gain in run.gains.items()},
        "quantities": run.quantities,
        "collapse": run.collapse,
        "commit": run.record.about.get("commit"),
        "versions": run.record.versions,
        "result": read_result(run.plan.job.folder),
    }


def _line_json(line: Line) -> dict[str, Any]:
    return {
        "variant": line.cell.variant,
        "axes": dict(line.cell.point),
        "seeds": [run.plan.seed for run in line.runs],
        "collapsed": line.num_collapsed,
        "means": {name: dataclasses.asdict(mean) for name, mean in line.means.items()},
        "differences": {
            other: {name: dataclasses.asdict(difference) for name, difference in found.items()}
            for other, found in line.differences.items()
        },
    }
