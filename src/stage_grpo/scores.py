"""What an evaluation says: the scores of one model, their comparison with another's, and both as text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from stage_grpo.benchmarks import Benchmark, get_benchmark
from stage_grpo.statistics import Difference, paired_difference

OVERALL = "overall"
HELDOUT = "heldout"
STRICT = "strict"
GRADED = "graded"
_PAIRS = "generate both sides from the same prompt file with the same number of images."


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model scored on a benchmark.

    Attributes:
        benchmark: Name of the benchmark.
        columns: Categories in the order of the table.
        scores: Measure ("strict": share of images right by the benchmark's own rule; "graded": the reward, in the
            reward's unit) to column, "overall" (mean of the category means) or "heldout" (the same without the
            categories that share prompts with training) to score. A line is absent if one of its categories has no
            image.
        ci95: The same keys, to the 95 % bootstrap interval [low, high].
        num_images: Images scored.
        num_unscored: Images that the reward could not score; left out of every mean.
        num_prompts: Prompt folders.
        diversity: Share of different images among those of one prompt, averaged over prompts that have at least
            two; 1 if all differ, None if no prompt has two.
        per_image: One record an image: folder, file, prompt, tag, a score a measure, reasons (why not correct).
        settings: How the numbers were made: reward and options, seed and resamples of the intervals.
        versions: Versions of what took part.
    """

    benchmark: str
    columns: list[str]
    scores: dict[str, dict[str, float | None]]
    ci95: dict[str, dict[str, list[float | None]]]
    num_images: int
    num_unscored: int
    num_prompts: int
    diversity: float | None
    per_image: list[dict[str, Any]]
    settings: dict[str, Any]
    versions: dict[str, str]

    @property
    def overall(self) -> float | None:
        """The overall score: strict where the reward has such a rule, else graded; None if a category is missing."""
        return self.scores[STRICT if STRICT in self.scores else GRADED].get(OVERALL)

    @property
    def reward(self) -> float | None:
        """The overall graded score: the mean of the category means of the reward; None if a category is missing."""
        return self.scores[GRADED].get(OVERALL)

    def save(self, path: Path) -> None:
        """Write the scores as JSON.

        Args:
            path: The file; its folder is made if need be.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what `save` wrote.

        Args:
            path: A JSON file.

        Returns:
            The scores.

        Raises:
            ValueError: The file is missing, is no JSON, or lacks a field.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**content)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path} holds no scores ({error}); write them with `stage evaluate`.") from error


def compare(
    before: Scores, after: Scores, measure: str = STRICT, *, num_resamples: int = 4000, seed: int = 0
) -> dict[str, Difference]:
    """Paired differences ``after - before``, image by image (same prompt, same seed).

    Args:
        before: Scores of one model.
        after: Scores of the other, of images made from the same prompts in the same order.
        measure: "strict" or "graded".
        num_resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        Column, "overall" or "heldout" to the difference with its 95 % interval and p-value; lines that lack images of
        one of their categories are left out.

    Raises:
        ValueError: The two do not hold the same prompts and files, or lack the measure.
    """
    for side, scores in (("before", before), ("after", after)):
        if measure not in scores.scores:
            raise ValueError(f"{side} has no measure {measure!r}; it has {', '.join(scores.scores)}.")
    for left, right in zip(before.per_image, after.per_image):
        if (left["folder"], left["file"], left["prompt"]) != (right["folder"], right["file"], right["prompt"]):
            raise ValueError(f"{left['folder']}/{left['file']} pairs with {right['folder']}/{right['file']}: {_PAIRS}")
    if len(before.per_image) != len(after.per_image):
        raise ValueError(f"{len(before.per_image)} images before and {len(after.per_image)} after: {_PAIRS}")
    differences = {}
    for name, columns in selections(get_benchmark(before.benchmark)).items():
        chosen = [i for i, record in enumerate(before.per_image) if record["tag"] in columns]
        if {before.per_image[i]["tag"] for i in chosen} != set(columns):
            continue
        left, right = (measured([side.per_image[i] for i in chosen], measure) for side in (before, after))
        tags, clusters = ([before.per_image[i][key] for i in chosen] for key in ("tag", "folder"))
        differences[name] = paired_difference(left, right, tags, clusters, num_resamples=num_resamples, seed=seed)
    return differences


def selections(benchmark: Benchmark) -> dict[str, tuple[str, ...]]:
    """Each line of a benchmark's table: the columns it averages.

    Args:
        benchmark: The benchmark.

    Returns:
        Every column, then "overall", then "heldout" if some columns share prompts with training.
    """
    selections = {column: (column,) for column in benchmark.columns} | {OVERALL: benchmark.columns}
    if benchmark.shared_columns:
        selections[HELDOUT] = tuple(c for c in benchmark.columns if c not in benchmark.shared_columns)
    return selections


def measured(records: list[dict[str, Any]], measure: str) -> Float[np.ndarray, " N"]:
    """One measure of per-image records as an array, NaN where an image was not scored."""
    return np.array([np.nan if record[measure] is None else record[measure] for record in records], dtype=float)


def format_table(scores: Scores) -> str:
    """The scores as a table of plain text.

    Args:
        scores: What `stage_grpo.evaluation.evaluate` returned.

    Returns:
        One line a category, the overall lines, and what they were made of; no trailing newline.
    """
    measures = list(scores.scores)
    lines = [f"{'':16}" + "".join(f"{f'{m}  [95 % interval]':>26}" for m in measures) + f"{'images':>9}"]
    for name in selections(get_benchmark(scores.benchmark)):
        cells = "".join(f"{_cell(scores, measure, name):>26}" for measure in measures)
        lines.append(f"{label(name):16}{cells}{_num_images(scores, name):>9}")
    lines.insert(len(scores.columns) + 1, "-" * len(lines[0]))
    diversity = "" if scores.diversity is None else f"; different images of one prompt: {scores.diversity:.1%}"
    unscored = f"; not scored: {scores.num_unscored}" if scores.num_unscored else ""
    lines.append(f"{scores.num_images} images of {scores.num_prompts} prompt folders{unscored}{diversity}")
    return "\n".join(lines)


def format_comparison(before: Scores, after: Scores, measure: str = STRICT) -> str:
    """Both sides and their paired difference as a table of plain text.

    Args:
        before: Scores of one model.
        after: Scores of the other, of the same prompts and seeds.
        measure: "strict" or "graded".

    Returns:
        One line a category and the overall lines; no trailing newline.

    Raises:
        ValueError: The two do not pair, see `compare`.
    """
    lines = [f"{measure:16}{'before':>8}{'after':>8}   {'difference [95 % interval]':26}{'p':>8}"]
    for name, d in compare(before, after, measure).items():
        sides = (side.scores[measure][name] for side in (before, after))
        cells = "".join(f"{'-' if value is None else format(value, '.3f'):>8}" for value in sides)
        interval = f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
        lines.append(f"{label(name):16}{cells}   {interval:26}{d.p_value:>8.4f}")
    return "\n".join(lines)


def label(name: str) -> str:
    """What a table calls a column: "held-out only" for "heldout", spaces for underscores."""
    return "held-out only" if name == HELDOUT else name.replace("_", " ")


def _cell(scores: Scores, measure: str, name: str) -> str:
    value = scores.scores[measure].get(name)
    if value is None:
        return "-"
    low, high = scores.ci95[measure][name]
    return f"{value:.3f}  [{low:.3f}, {high:.3f}]"


def _num_images(scores: Scores, name: str) -> int:
    columns = selections(get_benchmark(scores.benchmark))[name]
    return sum(record["tag"] in columns for record in scores.per_image)
