"""The table of a grid as cells of text, for the Markdown file and the page."""

from __future__ import annotations

from collections.abc import Sequence

from stage_grpo.ablation.collapse import KL_OVER_ENTROPY
from stage_grpo.ablation.results import (
    ALARMS,
    BELOW_BEST,
    DISTANCE,
    MAX_KL,
    OTHER,
    ROLLBACKS,
    SECONDS,
    TRAINED,
    UNIQUE,
    Results,
    scored,
)
from stage_grpo.ablation.seeds import SeedMean

COLUMNS = {
    TRAINED: TRAINED,
    OTHER: OTHER,
    UNIQUE: "different images",
    DISTANCE: "distance of images",
    "kl": "KL",
    MAX_KL: "largest KL",
    "entropy/policy": "entropy",
    "entropy/gap": "entropy gap",
    "unique_images": "unique in training",
    "advantage_weights/mean": "mean M",
    ALARMS: "alarms",
    ROLLBACKS: "rollbacks",
    BELOW_BEST: "below its best",
    SECONDS: "s a step",
}
_COMPARED = (TRAINED, OTHER, DISTANCE, "kl", "entropy/gap")
Grid2D = list[list[str]]


def score_names(results: Results) -> list[str]:
    """The scores that every table shows: all measures, and the held-out part of the first."""
    measures = list(results.runs[0].after.scores)
    return [*measures, *(name for name in results.quantities if name == f"{results.headline} held-out")]


def main_table(results: Results) -> Grid2D:
    """Means over seeds, a line a cell, first of all the policy before training.

    Args:
        results: The results.

    Returns:
        Rows of text, the head first.
    """
    names = score_names(results) + [
        name for name in COLUMNS if any(line.means.get(name, _NOTHING).value is not None for line in results.lines)
    ]
    axes = list(results.grid.axes)
    rows = [["variant", *axes, "seeds", *(COLUMNS.get(name, name) for name in names), "collapsed"]]
    for folder, scores in results.befores.items():
        found = scored(results.grid, scores)
        label = "before training" if len(results.befores) == 1 else f"before training ({folder.name})"
        rows.append([label, *("" for _ in axes), "", *(number(found.get(name)) for name in names), ""])
    for line in results.lines:
        count = len(line.runs)
        cells = [estimate(line.means.get(name, _NOTHING), count, name in score_names(results)) for name in names]
        place = [line.cell.point[axis] for axis in axes]
        rows.append([line.cell.variant, *place, str(count), *cells, f"{line.num_collapsed} of {count}"])
    return rows


def difference_table(results: Results) -> Grid2D:
    """Paired differences over seeds, of every line from the baseline and from each control.

    Args:
        results: The results.

    Returns:
        Rows of text, the head first; the head alone if there is nothing to compare.
    """
    names = score_names(results) + [name for name in _COMPARED if name in results.quantities]
    rows = [["difference", *(heading for name in names for heading in (COLUMNS.get(name, name), "p"))]]
    for line in results.lines:
        for other, found in line.differences.items():
            cells = [found.get(name, _NOTHING) for name in names]
            count = len(line.runs)
            texts = [text for mean in cells for text in (estimate(mean, count, True, signed=True), p_value(mean))]
            rows.append([f"{line.cell.label} - {other}", *texts])
    return rows


def notes(results: Results) -> list[str]:
    """What a reader must know to judge the numbers."""
    num_seeds, commits = len(results.seeds), {run.record.about.get("commit") for run in results.runs}
    steps = sorted({run.plan.config.max_steps for run in results.runs})
    test = results.grid.test
    found = [
        f"Seeds {', '.join(map(str, results.seeds))}; {' or '.join(map(str, steps))} steps a run; test: "
        f"{results.runs[0].after.num_images} images of {test.benchmark}, the same random streams before and after.",
        "Intervals are 95 % t intervals over seeds; differences pair runs of equal seed. A score or difference "
        "without one is of one seed, or the same in all: there is no spread to judge by. "
        "p values are not corrected for the number of comparisons."
        if num_seeds > 1
        else "One seed: there is no interval over seeds, and nothing here says how another training would end.",
        "KL, entropy, unique images and M are means over the last tenth of the steps.",
        "Collapsed: the graded score fell below that before training by its whole paired interval over images, or KL "
        f"at the end is above {KL_OVER_ENTROPY:g} times the reference's entropy, or a number is none.",
    ]
    if len(commits) > 1:
        found.append(f"The runs are of {len(commits)} versions of the source; results.json says which.")
    if results.missing:
        found.append(f"Not finished or not to be read, and left out: {', '.join(results.missing)}.")
    return found


def to_markdown(results: Results) -> str:
    """The tables as a Markdown document."""
    grid = results.grid
    parts = [f"# {grid.title}", grid.claim, f"Source: {grid.source}", _markdown(main_table(results))]
    differences = difference_table(results)
    if len(differences) > 1:
        parts += ["## Paired differences over seeds", _markdown(differences)]
    return "\n\n".join([*parts, "\n".join(f"* {note}" for note in notes(results))]) + "\n"


def number(value: float | None, signed: bool = False) -> str:
    """A number with three digits after the point; a dash for none."""
    if value is None:
        return "-"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def estimate(mean: SeedMean, num_runs: int, with_interval: bool, signed: bool = False) -> str:
    """A mean, with its interval where there is one and it is asked for.

    Args:
        mean: The mean.
        num_runs: Runs of its line; where some had no value, the text tells how many had one.
        with_interval: Whether to give the interval.
        signed: Whether to give a plus sign.
    """
    text = number(mean.value, signed)
    if with_interval and mean.low is not None:
        text += f" [{number(mean.low, signed)}, {number(mean.high, signed)}]"
    return text if mean.value is None or mean.num_seeds >= num_runs else f"{text} ({share(mean, num_runs)})"


def share(mean: SeedMean, num_runs: int) -> str:
    """How many of a line's runs a mean is of, e.g. ``1 of 2``."""
    return f"{mean.num_seeds} of {num_runs}"


def p_value(mean: SeedMean) -> str:
    """A p value; a dash where there is none."""
    return number(mean.p_value)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


_NOTHING = SeedMean(None, None, None, None, 0)
