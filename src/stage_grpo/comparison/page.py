"""A comparison as one HTML page: no script, no outside resource, good to print."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from stage_grpo.comparison import text
from stage_grpo.comparison.compare import Comparison, DifferenceTable, is_model
from stage_grpo.evaluation.scores import HELDOUT, OVERALL, label
from stage_grpo.evaluation.statistics import Estimate
from stage_grpo.pages import charts
from stage_grpo.pages.render import render

Triple = tuple[float, float, float]
_NOTHING: Triple = (math.nan, math.nan, math.nan)


def to_html(comparison: Comparison) -> str:
    """The comparison as a page.

    Args:
        comparison: What `stage_grpo.comparison.compare.compare_sides` returned.

    Returns:
        HTML.
    """
    first, *others = (side.name for side in comparison.sides)
    settings = text.settings_grid(comparison)
    return render(
        "comparison",
        title=f"{', '.join(others)} against {first}",
        benchmark=comparison.benchmark.title,
        is_paired=comparison.is_paired,
        by_category=comparison.benchmark.overall == "categories",
        has_heldout=any(line.name == HELDOUT for table in comparison.tables for line in table.lines),
        cards=[_card(table) for table in comparison.tables if _total(table) is not None],
        measures=[_measure(comparison, name) for name in comparison.measures],
        verdict=text.verdict_on_settings(comparison),
        is_doubtful=not all(is_model(name) for name in comparison.settings),
        settings=settings if comparison.settings else [],
        footnotes=text.footnotes(comparison),
    )


def _measure(comparison: Comparison, measure: str) -> dict[str, Any]:
    tables = [table for table in comparison.tables if table.measure == measure]
    rows = [row for row in comparison.published if row.measure == measure]
    published = text.published_grid(comparison, rows) if rows else []
    has_lines = any(table.lines for table in tables)
    return {
        "name": measure,
        "tables": [_table(table) for table in tables if table.lines],
        "scores": Markup(_score_chart(comparison, measure)) if has_lines else "",
        "differences": Markup(_difference_chart(tables)) if has_lines else "",
        "published": {
            "unit": rows[0].unit if rows else "",
            "head": published[0] if rows else [],
            "ours": published[1 : 1 + len(comparison.sides)],
            "theirs": published[1 + len(comparison.sides) :],
            "sources": text.sources(rows),
        },
    }


def _table(table: DifferenceTable) -> dict[str, Any]:
    rows = [
        {
            "name": label(line.name),
            "is_total": line.name in (OVERALL, HELDOUT),
            "num_images": text.num_images(line),
            "before": f"{line.before.value:.3f}",
            "before_interval": text.interval(line.before),
            "after": f"{line.after.value:.3f}",
            "after_interval": text.interval(line.after),
            "change": f"{line.difference.value:+.3f}",
            "interval": text.interval(line.difference, signed=True),
            "trend": "up" if line.difference.low > 0 else "down" if line.difference.high < 0 else "flat",
            "p_value": text.p_value(line.difference.p_value),
        }
        for line in table.lines
    ]
    return {"before": table.before.name, "after": table.after.name, "rows": rows}


def _total(table: DifferenceTable) -> Any:
    return next((line for line in table.lines if line.name == OVERALL), None)


def _card(table: DifferenceTable) -> dict[str, str]:
    """The overall difference of a table, to see first."""
    line = _total(table)
    change = line.difference
    return {
        "value": f"{change.value:+.3f}",
        "trend": "up" if change.low > 0 else "down" if change.high < 0 else "flat",
        "name": f"{table.measure}, overall: {table.after.name}",
        "detail": (
            f"{line.before.value:.3f} to {line.after.value:.3f}; 95 % interval {change.low:+.3f} to "
            f"{change.high:+.3f}, p {text.p_value(change.p_value)}"
        ),
    }


def _score_chart(comparison: Comparison, measure: str) -> str:
    """Every side with its own interval."""
    tables = [table for table in comparison.tables if table.measure == measure]
    names = _line_names(tables)
    sides: dict[str, dict[str, Triple]] = {}
    for table in tables:
        for line in table.lines:
            sides.setdefault(table.before.name, {})[line.name] = _triple(line.before)
            sides.setdefault(table.after.name, {})[line.name] = _triple(line.after)
    values = [value for points in sides.values() for triple in points.values() for value in triple]
    in_unit = all(math.isnan(value) or 0 <= value <= 1 for value in values)
    points = {_legend(side): [found.get(name, _NOTHING) for name in names] for side, found in sides.items()}
    limits = (-0.02, 1.02) if in_unit else None
    return charts.interval_chart([label(name) for name in names], points, salt=f"{measure} scores", limits=limits)


def _difference_chart(tables: list[DifferenceTable]) -> str:
    """Every later side's difference from the first."""
    names = _line_names(tables)
    points = {}
    for table in tables:
        found = {line.name: _triple(line.difference) for line in table.lines}
        title = f"{table.after.name} - {table.before.name}"
        points[_legend(title)] = [found.get(name, _NOTHING) for name in names]
    rows, salt = [label(name) for name in names], f"{tables[0].measure} differences"
    return charts.interval_chart(rows, points, salt=salt, limits=None, zero=True, colors=charts.SIDES[1:])


def _legend(name: str) -> str:
    """A name that matplotlib shows as it stands: dollars would begin a formula, an underscore in front hide it."""
    return ("\N{ZERO WIDTH SPACE}" if name.startswith("_") else "") + name.replace("$", r"\$")


def _line_names(tables: list[DifferenceTable]) -> list[str]:
    return list(dict.fromkeys(line.name for table in tables for line in table.lines))


def _triple(estimate: Estimate) -> Triple:
    return estimate.value, estimate.low, estimate.high
