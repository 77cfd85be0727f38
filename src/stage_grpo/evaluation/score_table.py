"""Scores as a table of plain text."""

from __future__ import annotations

from stage_grpo.benchmarks import get_benchmark
from stage_grpo.evaluation.scores import OVERALL, Scores, label, selections

_MEASURES_A_BLOCK = 3
_NUM_PROBLEMS = 10


def format_table(scores: Scores) -> str:
    """The scores as a table of plain text.

    Args:
        scores: What `stage_grpo.evaluation.evaluate.evaluate` returned.

    Returns:
        One line a category, the overall lines, and what they were made of; no trailing newline.
    """
    measures = list(scores.scores)
    blocks = [measures[i : i + _MEASURES_A_BLOCK] for i in range(0, len(measures), _MEASURES_A_BLOCK)]
    lines = [line for block in blocks for line in [*_block(scores, block), ""]][:-1]
    unique, distance = scores.diversity["unique_share"], scores.diversity["pairwise_distance"]
    notes = [f"{scores.num_images} images of {scores.num_prompts} prompts"]
    notes += [f"{measure} not scored: {count}" for measure, count in scores.num_unscored.items() if count]
    notes += [] if unique is None else [f"different images of one prompt: {unique:.1%}"]
    notes += [] if distance is None else [f"their mean distance: {distance:.3f} ({scores.diversity['space']})"]
    lines.append("; ".join(notes))
    lines += [f"{what} is missing: {remedy}" for what, remedy in scores.missing.items()]
    if scores.partial:
        lines.append("PARTIAL: the image set is not whole, so these are not the benchmark's numbers:")
        lines += [f"  {problem}" for problem in scores.problems[:_NUM_PROBLEMS]]
        more = len(scores.problems) - _NUM_PROBLEMS
        lines += [f"  and {more} more lines"] if more > 0 else []
    return "\n".join(lines)


def _block(scores: Scores, measures: list[str]) -> list[str]:
    benchmark = get_benchmark(scores.benchmark)
    width = max(16, *(len(label(name)) + 2 for name in selections(benchmark)))
    mark = "PARTIAL" if scores.partial else ""
    lines = [f"{mark:{width}}" + "".join(f"{f'{m}  [95 % interval]':>30}" for m in measures) + f"{'images':>9}"]
    for name, columns in selections(benchmark).items():
        if name == OVERALL:
            lines.append("-" * len(lines[0]))
        cells = "".join(f"{_cell(scores, measure, name):>30}" for measure in measures)
        num_images = sum(record["tag"] in columns for record in scores.per_image)
        lines.append(f"{label(name):{width}}{cells}{num_images:>9}")
    return lines


def _cell(scores: Scores, measure: str, name: str) -> str:
    value = scores.scores[measure].get(name)
    if value is None:
        return "-"
    digits = 3 if abs(value) < 10 else 2
    low, high = ("-" if bound is None else f"{bound:.{digits}f}" for bound in scores.ci95[measure][name])
    return f"{value:.{digits}f}  [{low}, {high}]"
