"""What an evaluation says: the scores of one model, and their comparison with another's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from stage_grpo.benchmarks import GRADED, Benchmark, get_benchmark
from stage_grpo.checksums import sha256_of
from stage_grpo.evaluation.statistics import Difference, paired_difference
from stage_grpo.images.files import write_whole

OVERALL = "overall"
HELDOUT = "heldout"
_REMEDY = "generate both from the same prompts with the same number of images, or compare them by --unpaired."


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model scored on a benchmark.

    Attributes:
        benchmark: Name of the benchmark.
        columns: Categories in the order of the table.
        scores: Measure to column, "overall" (see `stage_grpo.benchmarks.Benchmark.overall`) or "heldout" (the same
            without the categories that share prompts with training) to score, in the measure's published unit. A
            line is absent if one of its categories has no image or could not be measured, and the overall score where
            the benchmark has none.
        ci95: The same keys, to the 95 % bootstrap interval [low, high].
        num_images: Images scored.
        num_unscored: Measure to images that it could not score; left out of every mean.
        num_prompts: Prompts that these images belong to.
        diversity: "unique_share" (share of different images among those of one prompt, mean over prompts that have at
            least two; 1 if all differ), "pairwise_distance" (1 - cosine, mean over pairs of images of one prompt, then
            over prompts) and "space" ("codes" or "clip": what the cosine is taken of). None where no prompt has two.
        missing: What could not be measured ("deqa", or "value/complex" for a column) to how to get it.
        partial: Whether the image set was not whole; then no number is the benchmark's.
        problems: What was wrong with it.
        settings: How the numbers were made: scorers and their options, prompts, seed and resamples of the intervals,
            and under "generation" how the images were.
        versions: Versions of what took part.
        per_image: One record an image: path, index, sample, prompt, tag, scores by measure (None: not scored),
            reasons (why not correct), objects and colors (what a detector found, if one looked), in the order of the
            prompts. On disk in a file of its own, named in the field "per_image_file".
    """

    benchmark: str
    columns: list[str]
    scores: dict[str, dict[str, float | None]]
    ci95: dict[str, dict[str, list[float | None]]]
    num_images: int
    num_unscored: dict[str, int]
    num_prompts: int
    diversity: dict[str, Any]
    missing: dict[str, str]
    partial: bool
    problems: list[str]
    settings: dict[str, Any]
    versions: dict[str, str]
    per_image: list[dict[str, Any]]

    @property
    def headline(self) -> str:
        """The measure to look at first: the benchmark's, or the first of those there are."""
        return next(iter(self.scores))

    @property
    def overall(self) -> float | None:
        """The overall score of the headline; None if a category is missing or the benchmark has none."""
        return self.scores[self.headline].get(OVERALL)

    @property
    def reward(self) -> float | None:
        """The overall graded score of a benchmark that has one; None if a category is missing."""
        return self.scores[GRADED].get(OVERALL)

    def save(self, path: Path) -> None:
        """Write the scores as JSON, and the images' records as JSON lines beside it. Each appears when it is whole.

        Args:
            path: The file, e.g. ``scores.json``; its folder is made if need be.
        """
        path = Path(path)
        records = records_file(path)
        lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in self.per_image)
        write_whole(records, "".join(lines).encode())
        content = {name: value for name, value in vars(self).items() if name != "per_image"}
        content |= {"per_image_file": records.name, "per_image_sha256": sha256_of(records)}
        write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what `save` wrote.

        Args:
            path: The JSON file; the images' records lie beside it.

        Returns:
            The scores.

        Raises:
            ValueError: A file is missing, is no JSON, or lacks a field, or the two are not of one evaluation.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            records = path.with_name(Path(content.pop("per_image_file")).name)
            if sha256_of(records) != content.pop("per_image_sha256"):
                raise ValueError(f"{records.name} is of another evaluation or was edited")
            per_image = [json.loads(line) for line in records.read_text(encoding="utf-8").split("\n") if line]
            return cls(**content, per_image=per_image)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path} holds no scores ({reason}); write them with `stage evaluate`.") from error


def records_file(path: Path) -> Path:
    """The file of the images' records beside a file of scores."""
    return path.with_suffix(".per_image.jsonl")


def compare(
    before: Scores, after: Scores, measure: str | None = None, *, num_resamples: int = 4000, seed: int = 0
) -> dict[str, Difference]:
    """Paired differences ``after - before``, image by image (same prompt, same seed).

    Args:
        before: Scores of one model.
        after: Scores of the other, of images made from the same prompts in the same order.
        measure: A measure of both; by default the headline.
        num_resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        Column, "overall" or "heldout" to the difference with its 95 % interval and p-value; lines that one side
        lacks are left out.

    Raises:
        ValueError: The two are of different benchmarks, do not hold the same prompts and images, or lack the measure.
    """
    measure = before.headline if measure is None else measure
    for side, scores in (("before", before), ("after", after)):
        if measure not in scores.scores:
            raise ValueError(f"{side} has no measure {measure!r}; it has {', '.join(scores.scores)}.")
    check_pairs(before, after)
    benchmark = get_benchmark(before.benchmark)
    differences = {}
    for name, members in table_lines(benchmark, before.per_image).items():
        if name not in before.scores[measure] or name not in after.scores[measure]:
            continue
        left, right = (measured([side.per_image[i] for i in members], measure) for side in (before, after))
        chosen = [before.per_image[i] for i in members]
        differences[name] = paired_difference(
            left, right, strata(benchmark, chosen), clusters(chosen), num_resamples=num_resamples, seed=seed
        )
    return differences


def check_pairs(before: Scores, after: Scores, names: tuple[str, str] = ("before", "after")) -> None:
    """Refuse scores whose images do not belong to the same places of the same prompts of one benchmark.

    Args:
        before: Scores of one model.
        after: Scores of the other.
        names: What the message calls them.

    Raises:
        ValueError: The benchmarks, the prompts or the numbers of images differ.
    """
    check_benchmark(before, after, names)
    for left, right in zip(before.per_image, after.per_image):
        if any(left[key] != right[key] for key in ("index", "sample", "prompt")):
            both = (f"{name} {record['path']} of {record['prompt']!r}" for name, record in zip(names, (left, right)))
            raise ValueError(f"{' and '.join(both)} do not pair; {_REMEDY}")
    if len(before.per_image) != len(after.per_image):
        counts = f"{names[0]} has {len(before.per_image)} images and {names[1]} {len(after.per_image)}"
        raise ValueError(f"{counts}, so they do not pair; {_REMEDY}")


def check_benchmark(before: Scores, after: Scores, names: tuple[str, str]) -> None:
    """Refuse scores of different benchmarks.

    Raises:
        ValueError: They are.
    """
    if before.benchmark != after.benchmark:
        both = f"{names[0]} is of {before.benchmark!r} and {names[1]} of {after.benchmark!r}"
        raise ValueError(f"{both}; compare scores of one benchmark.")


def selections(benchmark: Benchmark) -> dict[str, tuple[str, ...]]:
    """Each line of a benchmark's table: the columns it averages.

    Args:
        benchmark: The benchmark.

    Returns:
        Every column, then "overall" if the benchmark has such a score, then "heldout" if some columns share prompts
        with training.
    """
    selections: dict[str, tuple[str, ...]] = {column: (column,) for column in benchmark.columns}
    if benchmark.overall != "none":
        selections[OVERALL] = benchmark.columns
    if benchmark.shared_columns:
        selections[HELDOUT] = tuple(c for c in benchmark.columns if c not in benchmark.shared_columns)
    return selections


def table_lines(benchmark: Benchmark, records: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Indices of the images of each line of the table.

    Args:
        benchmark: The benchmark.
        records: Records of images.

    Returns:
        The lines of `selections`, without those of which a category has no image: the mean of the others would pass
        for the benchmark's own.
    """
    lines = {}
    for name, columns in selections(benchmark).items():
        members = [i for i, record in enumerate(records) if record["tag"] in columns]
        if {records[i]["tag"] for i in members} == set(columns):
            lines[name] = members
    return lines


def strata(benchmark: Benchmark, records: list[dict[str, Any]]) -> list[str] | None:
    """The category of each record where means are over categories; None where all images count alike."""
    return [record["tag"] for record in records] if benchmark.overall == "categories" else None


def clusters(records: list[dict[str, Any]]) -> list[int]:
    """The prompt of each record: images of one prompt are not independent."""
    return [record["index"] for record in records]


def measured(records: list[dict[str, Any]], measure: str) -> Float[np.ndarray, " N"]:
    """One measure of per-image records as an array, NaN where an image was not scored."""
    values = [record["scores"].get(measure) for record in records]
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def format_comparison(before: Scores, after: Scores, measure: str | None = None) -> str:
    """Both sides and their paired difference as a table of plain text.

    Args:
        before: Scores of one model.
        after: Scores of the other, of the same prompts and seeds.
        measure: A measure of both; by default the headline.

    Returns:
        One line a category and the overall lines; no trailing newline.

    Raises:
        ValueError: The two do not pair, see `compare`.
    """
    measure = before.headline if measure is None else measure
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
