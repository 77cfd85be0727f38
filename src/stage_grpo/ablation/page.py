"""The page of a grid: one file, no script, no outside resource, good to print."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from stage_grpo.ablation.results import FinishedRun, Line, Results
from stage_grpo.ablation.seeds import SeedMean
from stage_grpo.ablation.table import difference_table, main_table, notes, number, score_names, share
from stage_grpo.images.folders import load_image
from stage_grpo.pages import charts
from stage_grpo.pages.render import render

MAX_IMAGE_COLUMNS = 8
COLORS = (*charts.PALETTE, "#17a2b8", "#7a5c3e", "#b8a000", "#333b49")
"""Ten colours, so that no two variants of a grid share one."""
_CURVES = {
    "KL from the reference": "kl",
    "Entropy of the policy": "entropy/policy",
    "Entropy gap": "entropy/gap",
    "Unique images of a group": "unique_images",
    "Gradient norm": "grad_norm",
    "Mean advantage weight M": "advantage_weights/mean",
    "Held-out score": "heldout/score",
}
_FEW = ("kl", "entropy/gap")
"""Curves that are shown at every point of the axes; the others where there are no axes."""
_NOTHING = SeedMean(None, None, None, None, 0)


def to_html(results: Results) -> str:
    """The page.

    Args:
        results: What `stage_grpo.ablation.results.collect` gave.

    Returns:
        HTML.
    """
    differences = difference_table(results)
    return render(
        "ablation",
        grid=results.grid,
        cards=_cards(results),
        table=main_table(results),
        differences=differences if len(differences) > 1 else [],
        forests=_forests(results),
        references=_legend(_references(results)),
        maps=_maps(results),
        legend=_legend(_colors(results)),
        facets=_facets(results),
        images=_images(results),
        notes=notes(results),
        runs=[_run_row(run) for run in results.runs],
        settings=[(line.cell.label, _settings(line)) for line in results.lines],
    )


def _cards(results: Results) -> list[dict[str, str]]:
    """The headline's difference of every line from the baseline, if they fit on a screen."""
    cards = []
    for line in results.lines:
        for other, found in line.differences.items():
            if other == results.grid.baseline and len(results.lines) <= MAX_IMAGE_COLUMNS:
                cards.append(_card(results.headline, line, other, found.get(results.headline, _NOTHING)))
    return cards


def _card(headline: str, line: Line, other: str, change: SeedMean) -> dict[str, str]:
    num_runs = len(line.runs)
    seeds = share(change, num_runs) if change.num_seeds < num_runs else str(num_runs)
    seeds += " seed" if num_runs == 1 else " seeds"
    why = "the same in all, so no spread to judge by" if change.num_seeds > 1 else "no interval"
    trend, detail = "flat", f"{headline}; {seeds}: {why}"
    if change.low is not None and change.high is not None:
        trend = "up" if change.low > 0 else "down" if change.high < 0 else "flat"
        detail = f"{headline}; 95 % interval over {seeds} {change.low:+.3f} to {change.high:+.3f}"
    name = f"{line.cell.label} against {other}"
    return {"value": number(change.value, signed=True), "trend": trend, "name": name, "detail": detail}


def _forests(results: Results) -> list[dict[str, Any]]:
    """Paired differences with their intervals, for the scores and for the KL."""
    references = _references(results)
    shown = []
    for name in (*score_names(results), "kl"):
        sides = {
            other: [_triple(line.differences.get(other, {}).get(name, _NOTHING)) for line in results.lines]
            for other in references
        }
        values = [value for triples in sides.values() for triple in triples for value in triple]
        if any(math.isfinite(value) for value in values):
            rows = [line.cell.label for line in results.lines]
            svg = charts.interval_chart(
                rows,
                sides,
                salt=f"forest {name}",
                limits=None,
                zero=True,
                colors=list(references.values()),
                width=5.6,
                legend=False,
            )
            shown.append({"title": "KL" if name == "kl" else name, "svg": Markup(svg)})
    return shown


def _references(results: Results) -> dict[str, str]:
    """The variants compared with, the baseline first, and their colours."""
    there = {other for line in results.lines for other in line.differences}
    names = [name for name in dict.fromkeys((results.grid.baseline, *results.grid.controls)) if name in there]
    return dict(zip(names, charts.PALETTE * len(names)))


def _triple(mean: SeedMean) -> tuple[float, float, float]:
    if mean.value is None:
        return (math.nan, math.nan, math.nan)
    return (mean.value, mean.value if mean.low is None else mean.low, mean.value if mean.high is None else mean.high)


def _maps(results: Results) -> list[dict[str, Any]]:
    """With two axes, a map of every variant: score, KL, and how many runs collapsed."""
    if len(results.grid.axes) != 2:
        return []
    shown = []
    for title, name in ((results.headline, results.headline), ("KL at the end", "kl"), ("collapsed, share", None)):
        tables, limits = variant_maps(results, name)
        first, second = results.grid.axes
        names = list(results.grid.axes[first]), list(results.grid.axes[second])
        for variant, table in tables.items():
            svg = charts.heat_map(table, names, (first, second), limits, salt=f"map {title} {variant}")
            shown.append({"title": f"{variant}: {title}{_of_fewer(results, variant, name)}", "svg": Markup(svg)})
    return shown


def _of_fewer(results: Results, variant: str, name: str | None) -> str:
    """Where a variant's map shows means of fewer seeds than there are runs."""
    means = [(line, line.means.get(name or "", _NOTHING)) for line in results.lines if line.cell.variant == variant]
    few = [
        f"{share(mean, len(line.runs))} at {_place(line)}"
        for line, mean in means
        if 0 < mean.num_seeds < len(line.runs)
    ]
    return f" ({'; '.join(few)})" if few else ""


def variant_maps(results: Results, name: str | None) -> tuple[dict[str, np.ndarray], tuple[float, float]]:
    """Means of a quantity over the two axes of a grid.

    Args:
        results: Of a grid with two axes.
        name: The quantity; None for the share of collapsed runs.

    Returns:
        Variant to its (rows, columns) table, NaN where no run is finished; and the ends of a scale for all of them.
    """
    rows, columns = (list(values) for values in results.grid.axes.values())
    first, second = results.grid.axes
    tables = {variant: np.full((len(rows), len(columns)), np.nan) for variant in results.grid.variants}
    for line in results.lines:
        place = rows.index(line.cell.point[first]), columns.index(line.cell.point[second])
        tables[line.cell.variant][place] = _map_value(line, name)
    finite = np.concatenate([table[np.isfinite(table)] for table in tables.values()])
    return tables, (0.0, 1.0) if name is None or not finite.size else (float(finite.min()), float(finite.max()))


def _map_value(line: Line, name: str | None) -> float:
    if name is None:
        return line.num_collapsed / len(line.runs)
    value = line.means.get(name, _NOTHING).value
    return math.nan if value is None else value


def _colors(results: Results) -> dict[str, str]:
    return dict(zip(results.grid.variants, itertools.cycle(COLORS)))


def _legend(colors: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "color": color} for name, color in colors.items()]


def _facets(results: Results) -> list[dict[str, Any]]:
    """Curves, a row of charts for every point of the axes."""
    rewards = [name for name in results.quantities if name.startswith("rewards/") and name.endswith("/mean")]
    rewards = {f"Reward {name.split('/')[1]}": name for name in rewards if name != "rewards/entropy/mean"}
    curves = rewards | {title: metric for title, metric in _CURVES.items() if not results.grid.axes or metric in _FEW}
    points = list(dict.fromkeys(_place(line) for line in results.lines))
    facets = []
    for point in points:
        lines = [line for line in results.lines if _place(line) == point]
        shown = []
        for title, metric in curves.items():
            series = {line.cell.variant: [run.record.series(metric) for run in line.runs] for line in lines}
            if any(run[0] for runs in series.values() for run in runs):
                svg = charts.band_chart(series, salt=f"{point} {metric}", colors=_colors(results))
                shown.append({"title": title, "svg": Markup(svg)})
        facets.append({"title": point, "charts": shown})
    return facets


def _place(line: Line) -> str:
    return ", ".join(f"{axis} = {value}" for axis, value in line.cell.point.items())


def _images(results: Results) -> dict[str, Any]:
    """The same prompts and random streams before and after, of the first seed, one prompt a category."""
    seed = results.seeds[0]
    point = results.lines[0].cell.point
    runs = {
        line.cell.variant: run
        for line in results.lines
        if line.cell.point == point
        for run in line.runs
        if run.plan.seed == seed
    }
    runs = dict(list(runs.items())[: MAX_IMAGE_COLUMNS - 1])
    if not runs:
        return {"seed": seed, "head": [], "rows": []}
    before = next(iter(runs.values()))
    sides = {"before": (before.plan.before.folder, before.before)}
    sides |= {name: (run.plan.job.folder, run.after) for name, run in runs.items()}
    firsts: dict[str, int] = {}
    for i, record in enumerate(before.before.per_image):
        firsts.setdefault(record["tag"], i)
    rows = []
    for i in firsts.values():
        cells = [_picture(folder, scores.per_image[i], scores.headline) for folder, scores in sides.values()]
        rows.append({"prompt": before.before.per_image[i]["prompt"], "cells": [cell for cell in cells if cell]})
    return {"seed": seed, "head": list(sides), "rows": rows}


def _picture(folder: Path, record: dict[str, Any], headline: str) -> dict[str, str]:
    score = number(record["scores"].get(headline))
    try:
        return {"uri": charts.data_uri(load_image(folder / "images" / record["path"])), "score": score}
    except ValueError:  # images are large, and may have been deleted: its place stays empty
        return {"uri": charts.data_uri(Image.new("RGBA", (1, 1))), "score": f"{score}, no image"}


def _run_row(run: FinishedRun) -> dict[str, str]:
    gain = run.gains.get(run.after.headline)
    return {
        "name": f"{run.plan.cell.label}, seed {run.plan.seed}",
        "score": number(run.after.overall),
        "gain": "-" if gain is None else f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]",
        "collapse": ", ".join(run.collapse) or "no",
        "folder": run.plan.job.folder.name,
    }


def _settings(line: Line) -> str:
    return ", ".join(f"{name}: {value}" for name, value in line.cell.overrides.items()) or "as the base"
