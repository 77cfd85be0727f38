"""What differs between the scores of two or more models, and how sure one can be of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from stage_grpo.benchmarks import Benchmark, get_benchmark
from stage_grpo.comparison.published import PublishedRow, published_rows
from stage_grpo.evaluation.scores import (
    Scores,
    check_benchmark,
    check_pairs,
    clusters,
    compare,
    measured,
    selections,
    strata,
    table_lines,
)
from stage_grpo.evaluation.statistics import Difference, Estimate, unpaired_difference

_MODEL = ("model", "checkpoint", "image_set")
_ABSENT = "not recorded"


@dataclass(frozen=True)
class Side:
    """One model's scores under the name that tables call it."""

    name: str
    scores: Scores


@dataclass(frozen=True)
class Line:
    """One line of a table of differences.

    Attributes:
        name: A column of the benchmark, "overall" or "heldout".
        num_images: Images before and after.
        before: Score of the first side.
        after: Score of the other.
        difference: ``after - before``.
    """

    name: str
    num_images: tuple[int, int]
    before: Estimate
    after: Estimate
    difference: Difference


@dataclass(frozen=True)
class DifferenceTable:
    """One measure of the first side and of another."""

    measure: str
    before: Side
    after: Side
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Comparison:
    """Everything that the terminal, Markdown, HTML and JSON show.

    Attributes:
        benchmark: What all sides were scored on.
        sides: The models; the others are compared with the first.
        tables: For each measure one a later side.
        is_paired: Whether differences are taken image by image.
        settings: Settings and versions that are not the same on all sides, each with its value a side.
        notes: What to know before believing the tables, one sentence each.
        published: Published results of the measures shown.
    """

    benchmark: Benchmark
    sides: tuple[Side, ...]
    tables: tuple[DifferenceTable, ...]
    is_paired: bool
    settings: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]
    published: tuple[PublishedRow, ...] = ()

    @property
    def measures(self) -> tuple[str, ...]:
        """Measures shown, in order."""
        return tuple(dict.fromkeys(table.measure for table in self.tables))


def compare_sides(
    sides: Sequence[Side],
    *,
    measure: str | None = None,
    paired: bool = True,
    with_published: bool = False,
    num_resamples: int = 4000,
    seed: int = 0,
) -> Comparison:
    """Compare scores with those of the first side.

    Args:
        sides: At least two, of one benchmark.
        measure: The one measure to compare; None for all that every side has.
        paired: Take differences image by image; False resamples each side by itself.
        with_published: Also give the published results of the measures shown.
        num_resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        The comparison.

    Raises:
        ValueError: Fewer than two sides, other benchmarks, a measure that a side lacks, nothing in common, or sides
            that do not pair.
    """
    sides = [replace(side, name=f"{side.name} (PARTIAL)") if side.scores.partial else side for side in sides]
    benchmark = _check_sides(sides, paired)
    measures, notes = _measures(sides, benchmark, measure)
    first, *others = sides
    tables = []
    for name in measures:
        for side in others:
            differences = _differences(first, side, name, benchmark, paired, num_resamples, seed)
            tables.append(DifferenceTable(name, first, side, _lines(first, side, name, benchmark, differences)))
    published = [row for name in measures for row in published_rows(benchmark.name, name)] if with_published else []
    if with_published and not published:
        notes.append(f"There are no published results of {benchmark.title} ({', '.join(measures)}).")
    return Comparison(
        benchmark=benchmark,
        sides=tuple(sides),
        tables=tuple(tables),
        is_paired=paired,
        settings=setting_differences(sides),
        notes=(*notes, *_doubts(sides), *_gaps(tables, benchmark), *_diversity(sides)),
        published=tuple(published),
    )


def setting_differences(sides: Sequence[Side]) -> dict[str, tuple[str, ...]]:
    """Settings and versions that are not the same on all sides.

    Args:
        sides: The sides.

    Returns:
        Name (dotted where settings are nested) to the value of each side as text. The model and its checkpoint come
        first: they are what should differ.
    """
    flat = [_flatten(side.scores.settings) | _flatten(side.scores.versions, "versions.") for side in sides]
    names = dict.fromkeys(name for settings in flat for name in settings)
    differing = {}
    for name in sorted(names, key=lambda name: not is_model(name)):
        values = tuple(_plain(settings[name]) if name in settings else _ABSENT for settings in flat)
        if len(set(values)) > 1:
            differing[name] = values
    return differing


def is_model(setting: str) -> bool:
    """Whether a setting says which model was scored, which is what a comparison is about."""
    return setting.rsplit(".", 1)[-1] in _MODEL


def _check_sides(sides: Sequence[Side], paired: bool) -> Benchmark:
    """The benchmark of all sides.

    Raises:
        ValueError: Fewer than two sides, other benchmarks, or sides that do not pair.
    """
    if len(sides) < 2:
        raise ValueError(f"there is {len(sides)} score file to compare; give two or more.")
    first, *others = sides
    for side in others:
        check = check_pairs if paired else check_benchmark
        check(first.scores, side.scores, (first.name, side.name))
    return get_benchmark(first.scores.benchmark)


def _measures(sides: Sequence[Side], benchmark: Benchmark, wanted: str | None) -> tuple[list[str], list[str]]:
    """The measures to compare, and a note for each that only some sides have."""
    available = dict.fromkeys(name for side in sides for name in side.scores.scores)
    lacking = {name: [side.name for side in sides if name not in side.scores.scores] for name in available}
    if wanted is not None and lacking.get(wanted, [sides[0].name]):
        # A measure that no side has is reported as the first side's lack.
        name = lacking.get(wanted, [sides[0].name])[0]
        has = next(side.scores.scores for side in sides if side.name == name)
        raise ValueError(f"{name} has no measure {wanted!r}; it has {', '.join(has)}: evaluate it with that measure.")
    chosen = [wanted] if wanted else [name for name in benchmark.measures if lacking.get(name) == []]
    if not chosen:
        has = "; ".join(f"{side.name} has {', '.join(side.scores.scores)}" for side in sides)
        raise ValueError(f"no measure is in all score files ({has}); evaluate them with one in common.")
    left_out = [] if wanted else [name for name in available if lacking[name]]
    return chosen, [f"{name} is left out: {', '.join(lacking[name])} lacks it." for name in left_out]


def _differences(
    first: Side, other: Side, measure: str, benchmark: Benchmark, paired: bool, num_resamples: int, seed: int
) -> dict[str, Difference]:
    if paired:
        return compare(first.scores, other.scores, measure, num_resamples=num_resamples, seed=seed)
    differences = {}
    members = [table_lines(benchmark, side.scores.per_image) for side in (first, other)]
    for name in members[0]:
        if name not in members[1]:
            continue
        chosen = [[side.scores.per_image[i] for i in m[name]] for side, m in zip((first, other), members)]
        before, after = (measured(records, measure) for records in chosen)
        tags, prompts = ((of(chosen[0]), of(chosen[1])) for of in (partial(strata, benchmark), clusters))
        differences[name] = unpaired_difference(before, after, tags, prompts, num_resamples=num_resamples, seed=seed)
    return differences


def _lines(
    first: Side, other: Side, measure: str, benchmark: Benchmark, differences: Mapping[str, Difference]
) -> tuple[Line, ...]:
    """The lines that both sides have a score of."""
    lines = []
    for name, columns in selections(benchmark).items():
        before, after = _estimate(first.scores, measure, name), _estimate(other.scores, measure, name)
        difference = differences.get(name)
        if before is None or after is None or difference is None or math.isnan(difference.value):
            continue
        counts = [sum(r["tag"] in columns for r in side.scores.per_image) for side in (first, other)]
        lines.append(Line(name, (counts[0], counts[1]), before, after, difference))
    return tuple(lines)


def _estimate(scores: Scores, measure: str, name: str) -> Estimate | None:
    value = scores.scores[measure].get(name)
    if value is None:
        return None
    low, high = (math.nan if bound is None else bound for bound in scores.ci95[measure][name])
    return Estimate(value, low, high)


def _doubts(sides: Sequence[Side]) -> list[str]:
    """What makes a side's scores less than they look."""
    notes = []
    for side in sides:
        if not side.scores.settings.get("generation"):
            notes.append(f"{side.name} does not record how its images were made: guidance, seed and the like.")
        if side.scores.partial:
            found = side.scores.problems
            count = side.scores.settings.get("num_problems", len(found))
            first = f": {found[0]}" if found else ""
            notes.append(f"{side.name} is scored in spite of {count} problems with its images{first}")
        for measure, count in side.scores.num_unscored.items():
            if count:
                notes.append(f"{side.name} has {count} images that {measure} could not score; they are left out.")
    return notes


def _gaps(tables: Sequence[DifferenceTable], benchmark: Benchmark) -> list[str]:
    """One note a table that lacks columns."""
    notes = []
    for table in tables:
        shown = {line.name for line in table.lines}
        if absent := [column for column in benchmark.columns if column not in shown]:
            both = f"{table.before.name} and {table.after.name}"
            notes.append(f"{table.measure}: {both} do not both have a score of {', '.join(absent)}.")
    return notes


def _diversity(sides: Sequence[Side]) -> list[str]:
    """How different the images of one prompt are, where all sides know it in the same space: training reduces it."""
    spaces = {side.scores.diversity.get("space") for side in sides}
    distances = [side.scores.diversity.get("pairwise_distance") for side in sides]
    if len(spaces) != 1 or None in distances:
        return []
    each = ", ".join(f"{side.name} {distance:.3f}" for side, distance in zip(sides, distances))
    return [f"Mean distance of images of one prompt ({spaces.pop()}, 1 - cosine): {each}."]


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in settings.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
