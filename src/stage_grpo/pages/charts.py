"""Figures of a report: line charts and interval plots as inline SVG, images as data URIs, weight overlays.

Nothing here needs a display or a network, and equal input gives equal bytes.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2f6fde", "#e07b39", "#2a9d6f", "#8459c9", "#8a93a3"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, "#c2456b", GREY)
SIDES = (GREY, BLUE, ORANGE, GREEN, PURPLE)
_INK, _RULE = "#333b49", "#e3e7ee"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: smaller, selectable, in the page's own font
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
}
"""Settings of matplotlib for every chart."""

Number = int | float
Series = tuple[Sequence[Number], Sequence[Number]]


def line_chart(series: Mapping[str, Series], *, salt: str, dashed: Sequence[str] = ()) -> str:
    """Metrics over training steps: raw values faint, a centred moving average on top.

    Args:
        series: Label to (steps, values); empty ones are left out.
        salt: Any text that differs from chart to chart, so that SVG ids do not clash within one page.
        dashed: Labels to draw dashed, e.g. the reference policy's.

    Returns:
        An ``<svg>`` element.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        axes = figure.subplots()
        for color, (name, (steps, values)) in zip(PALETTE * 9, series.items()):
            if not len(steps):
                continue
            window = max(1, len(values) // 12)
            if window > 1:
                axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
            style = "--" if name in dashed else "-"
            axes.plot(steps, moving_average(values, window), style, color=color, linewidth=1.7, label=name)
        tidy(axes)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.ticklabel_format(axis="y", useOffset=False)
        if len(series) > 1:
            # Above the plot, where no line can run through it.
            axes.legend(
                frameon=False,
                fontsize=8,
                loc="lower left",
                bbox_to_anchor=(-0.02, 1.0),
                ncols=3,
                borderpad=0.0,
                handlelength=1.4,
                columnspacing=1.2,
            )
        return _svg(figure)


def interval_chart(
    rows: Sequence[str],
    sides: Mapping[str, Sequence[tuple[Number, Number, Number]]],
    *,
    salt: str,
    limits: tuple[float, float] | None = (-0.02, 1.02),
    zero: bool = False,
    colors: Sequence[str] = SIDES,
    width: float = 3.7,
    legend: bool = True,
) -> str:
    """Scores with intervals, one row a category, one colour a side.

    Args:
        rows: Names of the rows, top to bottom.
        sides: Name of the side ("before", "after") to (value, low, high) a row.
        salt: See `line_chart`.
        limits: Ends of the axis, by default those of scores in [0, 1]; None fits it to the values.
        zero: Whether 0 has a line of its own and is always on an axis that fits the values.
        colors: One a side, over again if there are more sides.
        width: Of the figure, in inches; long names of rows need more.
        legend: Whether to name the sides above the plot.

    Returns:
        An ``<svg>`` element.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(width, 0.33 * len(rows) + 0.8), layout="constrained")
        axes = figure.subplots()
        spread = min(0.14 * (len(sides) - 1), 0.3)
        shifts = np.linspace(-spread, spread, len(sides))
        for color, shift, (name, triples) in zip(cycle(colors), shifts, sides.items()):
            value, low, high = np.array(triples, dtype=float).T
            at = np.arange(len(rows)) + shift
            axes.hlines(at, low, high, color=color, linewidth=2.2, alpha=0.45)
            axes.plot(value, at, "o", color=color, markersize=5, label=name)
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        tidy(axes)
        axes.grid(axis="x", color=_RULE, linewidth=0.8)
        axes.grid(axis="y", visible=False)
        if zero:
            axes.axvline(0, color=GREY, linewidth=0.9, zorder=0)
        if limits:
            axes.set_xlim(*limits)
        if legend:
            axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=len(sides))
        return _svg(figure)


def band_chart(series: Mapping[str, Sequence[Series]], *, salt: str, colors: Mapping[str, str] | None = None) -> str:
    """A metric over training steps, one colour a variant: the mean over runs in a band from lowest to highest.

    Args:
        series: Label to the (steps, values) of each run; a step that not all runs of a label have is left out.
        salt: See `line_chart`.
        colors: Label to colour; by default the palette in order.

    Returns:
        An ``<svg>`` element.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        draw_bands(figure.subplots(), series, colors or {})
        return _svg(figure)


def draw_bands(axes: Axes, series: Mapping[str, Sequence[Series]], colors: Mapping[str, str]) -> None:
    """Draw what `band_chart` shows."""
    for color, (name, runs) in zip(cycle(PALETTE), series.items()):
        color = colors.get(name, color)
        tables = [dict(zip(*run)) for run in runs if len(run[0])]
        steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
        if not steps:
            continue
        values = np.array([[table[step] for step in steps] for table in tables], dtype=float)
        window = max(1, len(steps) // 12)
        smooth = np.array([moving_average(row.tolist(), window) for row in values])
        axes.fill_between(steps, smooth.min(axis=0), smooth.max(axis=0), color=color, alpha=0.18, linewidth=0)
        axes.plot(steps, smooth.mean(axis=0), color=color, linewidth=1.6, label=name)
    tidy(axes)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(axis="y", useOffset=False)


def heat_map(
    values: Float[np.ndarray, "R C"],
    names: tuple[Sequence[str], Sequence[str]],
    titles: tuple[str, str],
    limits: tuple[float, float],
    *,
    salt: str,
) -> str:
    """Numbers over two axes, written into coloured squares.

    Args:
        values: One a square; NaN leaves it empty.
        names: Names of the rows and of the columns.
        titles: What the rows and the columns are.
        limits: Values at the two ends of the colour scale, so that maps can be compared.
        salt: See `line_chart`.

    Returns:
        An ``<svg>`` element.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        rows, columns = names
        figure = Figure(figsize=(1.3 + 0.8 * len(columns), 0.9 + 0.45 * len(rows)), layout="constrained")
        draw_map(figure.subplots(), values, names, titles, limits)
        return _svg(figure)


def draw_map(
    axes: Axes,
    values: Float[np.ndarray, "R C"],
    names: tuple[Sequence[str], Sequence[str]],
    titles: tuple[str, str],
    limits: tuple[float, float],
    number: str = ".3g",
) -> None:
    """Draw what `heat_map` shows, each value in the format `number`."""
    rows, columns = names
    low, high = limits
    span = (low, high) if high > low else (low - 0.5, low + 0.5)
    axes.imshow(values, cmap="YlGnBu", vmin=span[0], vmax=span[1], aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = (value - span[0]) / (span[1] - span[0]) > 0.6
            axes.text(column, row, format(value, number), ha="center", va="center", color="white" if dark else _INK)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(titles[1])
    axes.set_ylabel(titles[0])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def moving_average(values: Sequence[Number], window: int) -> Float[np.ndarray, " N"]:
    """Centred moving average; near the ends over the values that exist.

    Args:
        values: A series.
        window: Number of values averaged, at least 1.

    Returns:
        As many values.
    """
    kernel = np.ones(min(window, len(values)))
    total = np.convolve(np.asarray(values, dtype=float), kernel, mode="same")
    return total / np.convolve(np.ones(len(values)), kernel, mode="same")


def data_uri(image: Image.Image) -> str:
    """An image as a PNG data URI.

    Args:
        image: Any size; small ones stay small, the page enlarges them.

    Returns:
        ``data:image/png;base64,...``
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def weight_overlay(
    image: Image.Image, weights: Sequence[Number], grid: tuple[int, int], scale: tuple[float, float]
) -> Image.Image:
    """Draw the weight of each token over its place in the image.

    Args:
        image: RGB.
        weights: One a token, row by row.
        grid: Rows and columns of tokens.
        scale: Weights that get the two ends of the colour scale (low, high).

    Returns:
        RGB, at least 192 pixels wide: the image greyed and tinted, dark violet low to yellow high.

    Raises:
        ValueError: The number of weights is not that of the grid.
    """
    if len(weights) != grid[0] * grid[1]:
        raise ValueError(f"{len(weights)} weights do not fill a grid of {grid[0]} x {grid[1]} tokens.")
    low, high = scale
    relative = (np.reshape(np.asarray(weights, dtype=float), grid) - low) / max(high - low, 1e-12)
    tint = matplotlib.colormaps["viridis"](relative.clip(0, 1))[..., :3]
    factor = max(1, -(-192 // image.width))
    size = (image.width * factor, image.height * factor)
    large = image.resize(size, Image.Resampling.NEAREST).convert("L").convert("RGB")
    layer = Image.fromarray((255 * tint).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    return Image.blend(large, layer, 0.6)


def tidy(axes: Axes) -> None:
    """Leave of the frame what helps to read."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    # Inline SVG needs neither the XML prologue nor the metadata, which names an outside vocabulary by URL.
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.strip()
