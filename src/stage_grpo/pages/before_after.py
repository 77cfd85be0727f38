"""What a report shows of a before/after pair: the headline, the table, the plot and the image pairs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stage_grpo.benchmarks import STRICT, get_benchmark
from stage_grpo.evaluation.scores import OVERALL, Scores, compare, label, selections
from stage_grpo.images.folders import load_image
from stage_grpo.pages import charts
from stage_grpo.run_record import RunRecord


def headline(before: Scores, after: Scores, run: RunRecord, seconds: float) -> list[dict[str, str]]:
    """The few numbers to see first.

    Args:
        before: Scores before training.
        after: Scores after training, of the same prompts.
        run: The training run.
        seconds: Wall time in all.

    Returns:
        Cards of value, name and detail.

    Raises:
        ValueError: The two sides do not pair.
    """
    cards = []
    for measure in before.scores:
        if OVERALL not in before.scores[measure]:
            continue
        gain = compare(before, after, measure)[OVERALL]
        sides = (_cell(scores, measure, OVERALL)["value"] for scores in (before, after))
        detail = f"{gain.value:+.3f}, 95 % interval {gain.low:+.3f} to {gain.high:+.3f}, paired"
        cards.append({"value": " → ".join(sides), "name": f"{label(measure)} score, overall", "detail": detail})
    shares = [scores.diversity["unique_share"] for scores in (before, after)]
    if None not in shares:
        cards.append(
            {
                "value": " → ".join(f"{share:.0%}" for share in shares),
                "name": "different images of one prompt",
                "detail": "a fall means that the policy repeats itself",
            }
        )
    detail = f"{run.num_steps} training steps, {after.num_images} images scored on each side"
    return [*cards, {"value": duration(seconds), "name": "in all", "detail": detail}]


def comparison_table(before: Scores, after: Scores, measure: str) -> dict[str, Any]:
    """Both sides and their paired difference, with intervals.

    Args:
        before: Scores before training.
        after: Scores after training, of the same prompts.
        measure: A measure of both.

    Returns:
        The measure and one row a category, formatted.

    Raises:
        ValueError: The two sides do not pair, or lack the measure.
    """
    rows = []
    differences = compare(before, after, measure)
    for name, columns in selections(get_benchmark(before.benchmark)).items():
        if name not in differences:
            continue
        change = differences[name]
        rows.append(
            {
                "name": label(name),
                "total": len(columns) > 1,
                "num_images": sum(record["tag"] in columns for record in before.per_image),
                "before": _cell(before, measure, name),
                "after": _cell(after, measure, name),
                "change": f"{change.value:+.3f}",
                "interval": f"{change.low:+.3f} to {change.high:+.3f}",
                "trend": "up" if change.low > 0 else "down" if change.high < 0 else "flat",
                "p_value": "< 0.001" if change.p_value < 0.001 else f"{change.p_value:.3f}",
            }
        )
    return {"measure": measure, "rows": rows}


def dots(before: Scores, after: Scores) -> str:
    """Both sides as points with intervals, in the headline measure.

    Args:
        before: Scores before training.
        after: Scores after training.

    Returns:
        An ``<svg>`` element.
    """
    measure = before.headline
    names = [n for n in selections(get_benchmark(before.benchmark)) if n in before.scores[measure]]
    sides = {}
    for side, scores in (("before", before), ("after", after)):
        points = [[scores.scores[measure][n], *scores.ci95[measure][n]] for n in names]
        sides[side] = [tuple(float("nan") if x is None else x for x in point) for point in points]
    return charts.interval_chart([label(n) for n in names], sides, salt="dots")


def pairs(
    before: Scores, after: Scores, before_images: Path, after_images: Path, per_category: int
) -> list[dict[str, Any]]:
    """For each category, evenly spaced images of both sides with their verdicts.

    Args:
        before: Scores before training.
        after: Scores after training, of the same prompts.
        before_images: Image folder that ``before`` was computed from.
        after_images: Image folder that ``after`` was computed from.
        per_category: Pairs of each category, chosen by place and not by result.

    Returns:
        One entry a category: its name and its pairs.

    Raises:
        ValueError: An image is missing or torn.
    """
    groups = []
    for column in before.columns:
        found = [
            {
                "prompt": before.per_image[i]["prompt"],
                "sides": [
                    _verdict(scores.per_image[i], folder)
                    for scores, folder in ((before, before_images), (after, after_images))
                ],
            }
            for i in _evenly_spaced(before, column, per_category)
        ]
        if found:
            groups.append({"name": label(column), "pairs": found})
    return groups


def picture(
    before: Scores, after: Scores, before_images: Path, after_images: Path, per_category: int = 1, tile: int = 144
) -> Image.Image:
    """One picture of both sides: before above, after below, one column a prompt, green where correct.

    Args:
        before: Scores before training.
        after: Scores after training, of the same prompts.
        before_images: Image folder that ``before`` was computed from.
        after_images: Image folder that ``after`` was computed from.
        per_category: Columns of each category, chosen by place and not by result.
        tile: Width and height of an image in the picture, pixels.

    Returns:
        RGB.

    Raises:
        ValueError: An image is missing or torn.
    """
    chosen = [i for column in before.columns for i in _evenly_spaced(before, column, per_category)]
    font, margin, header, side_bar = ImageFont.load_default(size=12), 8, 40, 52
    width = side_bar + len(chosen) * (tile + margin)
    sheet = Image.new("RGB", (width, header + 2 * (tile + margin)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(("before", "after")):
        draw.text((margin, header + row * (tile + margin) + tile // 2 - 8), name, fill="dimgray", font=font)
    for place, i in enumerate(chosen):
        x = side_bar + place * (tile + margin)
        draw.multiline_text((x, 5), textwrap.fill(before.per_image[i]["prompt"], tile // 6), fill="black", font=font)
        for row, (scores, folder) in enumerate(((before, before_images), (after, after_images))):
            image = load_image(_image_path(scores.per_image[i], folder)).resize((tile, tile), Image.Resampling.NEAREST)
            y = header + row * (tile + margin)
            sheet.paste(image, (x, y))
            color = "#2a9d6f" if scores.per_image[i]["scores"].get(STRICT) == 1.0 else "#c9ced8"
            draw.rectangle((x, y, x + tile - 1, y + tile - 1), outline=color, width=3)
    return sheet


def duration(seconds: float) -> str:
    """Seconds in words, e.g. "4 min 05 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _cell(scores: Scores, measure: str, name: str) -> dict[str, str]:
    value, (low, high) = scores.scores[measure][name], scores.ci95[measure][name]
    if value is None or low is None or high is None:
        return {"value": "-", "interval": ""}
    return {"value": f"{value:.3f}", "interval": f"{low:.2f} to {high:.2f}"}


def _verdict(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    image, strict = load_image(_image_path(record, folder)), record["scores"].get(STRICT)
    shown = [f"{value:.2f}" for measure, value in record["scores"].items() if measure != STRICT and value is not None]
    return {
        "uri": charts.data_uri(image),
        "correct": None if strict is None else strict == 1.0,
        "score": shown[0] if shown else "not scored",
        "reasons": record["reasons"],
    }


def _image_path(record: Mapping[str, Any], folder: Path) -> Path:
    return folder / record["path"]


def _evenly_spaced(scores: Scores, column: str, count: int) -> list[int]:
    """Indices of ``count`` images of a category, spread over its list."""
    members = [i for i, record in enumerate(scores.per_image) if record["tag"] == column]
    if not members:
        return []
    places = np.linspace(0, len(members) - 1, min(count, len(members))).round().astype(int)
    return [members[place] for place in places]
