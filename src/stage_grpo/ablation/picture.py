"""One picture of a grid, for documents: curves in bands and scores, or maps over two axes."""

from __future__ import annotations

import io
import math
from itertools import cycle

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stage_grpo.ablation.page import COLORS, variant_maps
from stage_grpo.ablation.results import DISTANCE, Line, Results, scored
from stage_grpo.ablation.table import COLUMNS, score_names, share
from stage_grpo.pages import charts

DPI = 150
MOST_CURVES = 6
"""Lines of a grid that are still told apart as curves in one chart."""


def to_png(results: Results) -> bytes:
    """Draw the picture.

    With two axes: a map of every variant, of the headline score and of the share of collapsed runs. Otherwise training
    reward and KL over the steps, mean over seeds in a band from lowest to highest, and the scores after training with
    95 % intervals over seeds; instead of scores the distance of images of one prompt, where a prompt has several. With
    axes and more than six lines, where curves hide each other: headline score, that score of held-out prompts and KL
    at the end, all with intervals.

    Args:
        results: What `stage_grpo.ablation.results.collect` gave.

    Returns:
        A PNG on white.
    """
    with matplotlib.rc_context(charts.STYLE):
        buffer = io.BytesIO()
        draw(results).savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return buffer.getvalue()


def draw(results: Results) -> Figure:
    """The figure that `to_png` saves."""
    if len(results.grid.axes) == 2:
        return _maps(results)
    if results.grid.axes and len(_lines(results)) > MOST_CURVES:
        return _means_along_the_axes(results)
    return _curves_and_scores(results)


def _pictured(results: Results) -> tuple[str, ...]:
    return results.grid.pictured or tuple(results.grid.variants)


def _maps(results: Results) -> Figure:
    variants = _pictured(results)
    first, second = results.grid.axes
    names = list(results.grid.axes[first]), list(results.grid.axes[second])
    width = 1.3 + 0.8 * len(names[1])
    figure = Figure(figsize=(width * len(variants), 2 * (1.2 + 0.45 * len(names[0]))), layout="constrained")
    grid = figure.subplots(2, len(variants), squeeze=False)
    shown = ((results.headline, results.headline, ".3f"), ("collapsed", None, ".0%"))
    for row, (title, name, number) in zip(grid, shown):
        tables, limits = variant_maps(results, name)
        for axes, variant in zip(row, variants):
            charts.draw_map(axes, tables[variant], names, (first, second), limits, number)
            axes.set_title(f"{variant}: {title}", fontsize=9)
    return figure


def _means_along_the_axes(results: Results) -> Figure:
    """A row a line of the grid, in blocks of one place on the axes, coloured by variant."""
    lines = sorted(_lines(results), key=lambda line: _place(results, line))
    places = [_place(results, line) for line in lines]
    of_variant = dict(zip(_pictured(results), cycle(COLORS)))
    colors = {line.cell.label: of_variant[line.cell.variant] for line in lines}
    names = list(dict.fromkeys([results.headline, score_names(results)[-1], "kl"]))
    width = 11.5 + 1.5 * (len(results.grid.axes) - 1)  # names of rows are longer then
    figure = Figure(figsize=(width, 0.24 * len(lines) + 1), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), sharey=True), names):
        _draw_means(axes, results, name, colors)
        for row in range(1, len(places)):
            if places[row] != places[row - 1]:
                axes.axhline(row - 0.5, color=charts.GREY, linewidth=0.5)
    return figure


def _place(results: Results, line: Line) -> list[int]:
    """Where a line stands on each axis; lists of this order as the grid does."""
    return [list(values).index(line.cell.point[axis]) for axis, values in results.grid.axes.items()]


def _lines(results: Results) -> list[Line]:
    return [line for line in results.lines if line.cell.variant in _pictured(results)]


def _curves_and_scores(results: Results) -> Figure:
    lines = _lines(results)
    colors = dict(zip([line.cell.label for line in lines], cycle(COLORS)))
    rewards = [name for name in results.quantities if name.startswith("rewards/") and name.endswith("/mean")]
    reward = next((name for name in rewards if name != "rewards/entropy/mean"), "reward")
    figure = Figure(figsize=(11.5, max(3.2, 0.3 * len(lines) + 1.5)), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, title, name in ((left, "Training reward", reward), (middle, "KL, nats a token", "kl")):
        series = {line.cell.label: [run.record.series(name) for run in line.runs] for line in lines}
        charts.draw_bands(axes, series, colors)
        axes.set_title(title, fontsize=9)
    distance_or_score = DISTANCE if DISTANCE in results.quantities else score_names(results)[-1]
    _draw_means(right, results, distance_or_score, colors)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 5), frameon=False, fontsize=8)
    return figure


def _draw_means(axes: Axes, results: Results, name: str, colors: dict[str, str]) -> None:
    """A quantity after training, a row a label, with 95 % intervals over seeds and, where known, the value before."""
    lines = {line.cell.label: line for line in results.lines if name in line.means}
    places = {label: place for place, label in enumerate(colors)}
    for label, place in places.items():
        if label not in lines:
            continue
        mean, num_runs = lines[label].means[name], len(lines[label].runs)
        value, low, high = (math.nan if end is None else end for end in (mean.value, mean.low, mean.high))
        axes.hlines(place, low, high, color=colors[label], linewidth=2.2, alpha=0.45)
        axes.plot(value, place, "o", color=colors[label], markersize=5)
        if 0 < mean.num_seeds < num_runs:
            beside = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 6}
            axes.annotate(share(mean, num_runs), (value, place), **beside)
    befores = [scored(results.grid, scores).get(name) for scores in results.befores.values()]
    known = [before for before in befores if before is not None]
    for before in known:
        axes.axvline(before, color=charts.GREY, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(places)), list(places))
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=5)
    axes.set_title(COLUMNS.get(name, name) + (" (dashed: before training)" if known else ""), fontsize=9)
    charts.tidy(axes)
