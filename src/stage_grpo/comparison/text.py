"""A comparison as plain text for the terminal, as Markdown, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from stage_grpo.comparison.compare import Comparison, DifferenceTable, Line, is_model
from stage_grpo.comparison.published import PublishedRow
from stage_grpo.evaluation.scores import OVERALL, label
from stage_grpo.evaluation.statistics import Estimate

P_VALUES = "p: two-sided bootstrap p-value of no difference; one a line, not corrected for the number of lines."
ONE_RUN = "Intervals and p speak of prompts and images, not of training again with another seed."
PUBLISHED = "Published rows are single figures without an interval, made with their authors' settings."
SAME = "Settings and versions are the same on all sides."
DIFFERENT = "Not the model alone differs: these settings or versions differ too."
MODEL_ONLY = "Of the settings and versions, only the model and its images differ."

Grid = list[list[str]]
"""Rows of cells, the header first."""


def to_text(comparison: Comparison) -> str:
    """The comparison for a terminal.

    Args:
        comparison: What `stage_grpo.comparison.compare.compare_sides` returned.

    Returns:
        Tables and notes; no trailing newline.
    """
    parts = [headline(comparison)]
    for measure in comparison.measures:
        parts += [_align(difference_grid(t)) for t in comparison.tables if t.measure == measure]
        if rows := [row for row in comparison.published if row.measure == measure]:
            parts.append("\n".join([_published_title(rows), _align(published_grid(comparison, rows)), *sources(rows)]))
    if comparison.settings:
        parts.append(verdict_on_settings(comparison) + "\n" + _align(settings_grid(comparison), left=True))
    else:
        parts.append(SAME)
    return "\n\n".join([*parts, "\n".join(footnotes(comparison))])


def to_markdown(comparison: Comparison) -> str:
    """The comparison as GitHub's Markdown.

    Args:
        comparison: What `stage_grpo.comparison.compare.compare_sides` returned.

    Returns:
        Headings, tables and notes, with a trailing newline.
    """
    parts = [f"## {_escape(headline(comparison))}"]
    for measure in comparison.measures:
        parts.append(f"### {_escape(measure)}")
        parts += [_pipes(difference_grid(t, intervals=True)) for t in comparison.tables if t.measure == measure]
        if rows := [row for row in comparison.published if row.measure == measure]:
            parts += [_escape(_published_title(rows)), _pipes(published_grid(comparison, rows))]
            parts.append("  \n".join(_escape(line) for line in sources(rows)))
    if comparison.settings:
        parts += [f"**{verdict_on_settings(comparison)}**", _pipes(settings_grid(comparison), left=True)]
    else:
        parts.append(SAME)
    return "\n\n".join([*parts, "\n".join(f"- {_escape(note)}" for note in footnotes(comparison))]) + "\n"


def to_json(comparison: Comparison) -> str:
    """The comparison as JSON, numbers unrounded.

    Args:
        comparison: What `stage_grpo.comparison.compare.compare_sides` returned.

    Returns:
        An object with a trailing newline; a number that does not exist is null.
    """
    content = {
        "benchmark": comparison.benchmark.name,
        "sides": [side.name for side in comparison.sides],
        "paired": comparison.is_paired,
        "tables": [
            {"measure": t.measure, "before": t.before.name, "after": t.after.name, "lines": _lines(t)}
            for t in comparison.tables
        ],
        "settings": {name: list(values) for name, values in comparison.settings.items()},
        "published": [dataclasses.asdict(row) | {"scores": dict(row.scores)} for row in _bare(comparison.published)],
        "notes": footnotes(comparison),
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def headline(comparison: Comparison) -> str:
    """What is compared with what, and how."""
    first, *others = (side.name for side in comparison.sides)
    how = "paired image by image" if comparison.is_paired else "UNPAIRED, each side resampled by itself"
    return f"{comparison.benchmark.title}: {', '.join(others)} against {first}, {how}"


def difference_grid(table: DifferenceTable, intervals: bool = False) -> Grid:
    """A table of differences as cells.

    Args:
        table: The table.
        intervals: Also show each side's own interval.

    Returns:
        The header and one row a line.
    """
    before, after = table.before.name, table.after.name
    grid = [[table.measure, "images", before, after, f"{after} - {before} [95 % interval]", "p"]]
    for line in table.lines:
        sides = [_estimate(side) if intervals else f"{side.value:.3f}" for side in (line.before, line.after)]
        change = line.difference
        cells = [f"{change.value:+.3f} {interval(change, signed=True)}", p_value(change.p_value)]
        grid.append([label(line.name), num_images(line), *sides, *cells])
    return grid


def published_grid(comparison: Comparison, rows: Sequence[PublishedRow]) -> Grid:
    """One's own sides above the published rows of a measure, as cells.

    Args:
        comparison: The comparison.
        rows: Published rows of one measure.

    Returns:
        The header and one row a model. The overall score of one's own has its interval.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row.scores))
    grid = [["model", *(label(column) for column in columns)]]
    measure = rows[0].measure
    for side in comparison.sides:
        cells = []
        for column in columns:
            value = side.scores.scores[measure].get(column)
            low, high = side.scores.ci95[measure].get(column, (None, None))
            has_interval = column == OVERALL and low is not None and high is not None
            cells.append(_figure(value, 3) + (f" [{low:.3f}, {high:.3f}]" if has_interval else ""))
        grid.append([f"{side.name} (scored here)", *cells])
    return grid + [[row.name, *(_figure(row.scores.get(c), row.decimals) for c in columns)] for row in rows]


def settings_grid(comparison: Comparison) -> Grid:
    """Settings that differ as cells, one column a side."""
    head = ["setting", *(side.name for side in comparison.sides)]
    return [head, *([name, *(_clip(value) for value in values)] for name, values in comparison.settings.items())]


def verdict_on_settings(comparison: Comparison) -> str:
    """Whether more than the model differs between the sides."""
    if not comparison.settings:
        return SAME
    return MODEL_ONLY if all(is_model(name) for name in comparison.settings) else DIFFERENT


def footnotes(comparison: Comparison) -> list[str]:
    """Notes under the tables, one a line."""
    return [*comparison.notes, P_VALUES, ONE_RUN, *([PUBLISHED] if comparison.published else [])]


def sources(rows: Sequence[PublishedRow]) -> list[str]:
    """Where published rows are from and what to know of them, one line each."""
    tables = [f"Source: {row.source}" + (f"; {row.note}" if row.note else "") for row in rows]
    return list(dict.fromkeys([*tables, *(f"{row.name}: {row.row_note}" for row in rows if row.row_note)]))


def num_images(line: Line) -> str:
    """Images of a line: one number, or both if they are not equal."""
    before, after = line.num_images
    return str(before) if before == after else f"{before} / {after}"


def interval(estimate: Estimate, signed: bool = False) -> str:
    """An interval as text, empty if there is none."""
    if math.isnan(estimate.low) or math.isnan(estimate.high):
        return ""
    form = "+.3f" if signed else ".3f"
    return f"[{estimate.low:{form}}, {estimate.high:{form}}]"


def p_value(value: float) -> str:
    """A p-value as text; no bootstrap of a few thousand resamples tells smaller ones than 0.001 apart."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _estimate(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} {interval(estimate)}".rstrip()


def _figure(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def _published_title(rows: Sequence[PublishedRow]) -> str:
    return f"Beside published results: {rows[0].measure} ({rows[0].unit})"


def _clip(text: str) -> str:
    """A setting short enough for a table; of a checksum the beginning tells it apart."""
    length = 12 if re.fullmatch("[0-9a-f]{40,}", text) else 60
    return text if len(text) <= length else text[:length] + "..."


def _align(grid: Grid, left: bool = False) -> str:
    """Columns as wide as their widest cell; the first is set left, the others right unless ``left``."""
    widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
    lines = []
    for row in grid:
        cells = [c.ljust(w) if left or not i else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _pipes(grid: Grid, left: bool = False) -> str:
    rule = ["---"] + ["---" if left else "---:"] * (len(grid[0]) - 1)
    rows = [[_escape(cell) for cell in row] for row in grid]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


def _escape(text: str) -> str:
    """Text that GitHub shows as it stands: no table, tag, emphasis or link comes of it."""
    for sign in "\\|`*_<>[]#":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def _lines(table: DifferenceTable) -> list[dict[str, Any]]:
    return [_no_nan(dataclasses.asdict(line)) for line in table.lines]


def _no_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _no_nan(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _bare(rows: Sequence[PublishedRow]) -> list[PublishedRow]:
    """Rows whose figures can be copied: a mapping proxy cannot."""
    return [dataclasses.replace(row, scores=dict(row.scores)) for row in rows]
