"""One picture of a grid, for documents: curves in bands and scores, or maps over two axes."""

from __future__ import annotations

import io
import math
from dataclasses import astuple
from itertools import cycle

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stage_grpo.ablation.page import COLORS, variant_maps
from stage_grpo.ablation.results import DISTANCE, Results, scored
from stage_grpo.ablation.table import COLUMNS, score_names
from stage_grpo.pages import charts

DPI = 150


def to_png(results: Results) -> bytes:
    """Draw the picture.

    With two axes: a map of every variant, of the headline score and of the share of collapsed runs. Otherwise training
    reward and KL over the steps, mean over seeds in a band from lowest to highest, and the scores after training with
    95 % intervals over seeds; instead of scores the distance of images of one prompt, where a prompt has several.

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
    return _maps(results) if len(results.grid.axes) == 2 else _curves_and_scores(results)


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


def _curves_and_scores(results: Results) -> Figure:
    lines = [line for line in results.lines if line.cell.variant in _pictured(results)]
    colors = dict(zip([line.cell.label for line in lines], cycle(COLORS)))
    rewards = [name for name in results.quantities if name.startswith("rewards/") and name.endswith("/mean")]
    reward = next((name for name in rewards if name != "rewards/entropy/mean"), "reward")
    figure = Figure(figsize=(11.5, max(3.2, 0.3 * len(lines) + 1.5)), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, title, name in ((left, "Training reward", reward), (middle, "KL, nats a token", "kl")):
        series = {line.cell.label: [run.record.series(name) for run in line.runs] for line in lines}
        charts.draw_bands(axes, series, colors)
        axes.set_title(title, fontsize=9)
    _draw_scores(right, results, colors)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 5), frameon=False, fontsize=8)
    return figure


def _draw_scores(axes: Axes, results: Results, colors: dict[str, str]) -> None:
    """The last of the scores, which counts held-out prompts alone where there are such; where measured, diversity."""
    name = DISTANCE if DISTANCE in results.quantities else score_names(results)[-1]
    means = {line.cell.label: line.means[name] for line in results.lines if name in line.means}
    labels = [label for label in colors if label in means]
    for place, label in enumerate(labels):
        value, low, high = (math.nan if end is None else end for end in astuple(means[label])[:3])
        axes.hlines(place, low, high, color=colors[label], linewidth=2.2, alpha=0.45)
        axes.plot(value, place, "o", color=colors[label], markersize=5)
    for scores in results.befores.values():
        before = scored(results.grid, scores).get(name)
        axes.axvline(math.nan if before is None else before, color=charts.GREY, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=5)
    axes.set_title(f"{COLUMNS.get(name, name)} (dashed: before training)", fontsize=9)
    charts.tidy(axes)
