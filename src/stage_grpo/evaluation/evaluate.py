"""Score a folder of generated images on a benchmark, with confidence intervals.

Reads images from disk and never loads a policy: any model, of any project, can be evaluated. Which rewards make which
number stands in the table of benchmarks; nothing here knows a particular one.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage_grpo.benchmark_rows import benchmark_rows, check_categories
from stage_grpo.benchmarks import Benchmark, get_benchmark
from stage_grpo.evaluation.diversity import measure_diversity
from stage_grpo.evaluation.jobs import Job, plan_jobs
from stage_grpo.evaluation.measuring import MeasureCache, Outcome, cache_key, measure_images, without_secrets
from stage_grpo.evaluation.official_scores import OfficialCodeError, official_outcomes
from stage_grpo.evaluation.scores import Scores, clusters, measured, strata, table_lines
from stage_grpo.evaluation.statistics import Estimate, bootstrap_mean
from stage_grpo.images.sets import ImageSet, SetImage, read_image_set
from stage_grpo.prompt_sets.fetch import presence
from stage_grpo.prompt_sets.sources import get_prompt_set
from stage_grpo.rewards.registry import build_reward
from stage_grpo.types import PromptRow
from stage_grpo.versions import package_versions
from stage_grpo.weights import MissingWeightsError

_SHOWN = ("objects", "colors")
_PACKAGES = ("stage-grpo", "torch", "transformers", "numpy", "pillow", "scipy", "rapidocr", "onnxruntime")


@dataclass(frozen=True)
class Measured:
    """What the rewards said of a set.

    Attributes:
        records: One an image.
        missing: What could not be measured, and how to get it.
        failures: Measure to the reasons why images have no score, counted.
    """

    records: list[dict[str, Any]]
    missing: dict[str, str]
    failures: Mapping[str, Counter[str]]


def evaluate(
    benchmark: str | Benchmark,
    images_dir: str | Path,
    *,
    prompts: str | Path | None = None,
    categories: Sequence[str] | None = None,
    num_images: int | None = None,
    measures: Sequence[str] | None = None,
    reward_options: Mapping[str, Mapping[str, Any]] | None = None,
    allow_partial: bool = False,
    batch_size: int = 64,
    num_resamples: int = 4000,
    seed: int = 0,
    diversity_space: str = "auto",
    cache_dir: str | Path | None = None,
) -> Scores:
    """Score the images of a folder.

    Args:
        benchmark: Name of a benchmark, or the benchmark itself.
        images_dir: Images in the benchmark's layout, see `stage_grpo.images.layouts`.
        prompts: Prompt file, or folder of them; by default the official prompts, else what the set says of itself.
        categories: The categories that were generated, where not all were.
        num_images: Images of each prompt; by default what the set says, or what most prompts have.
        measures: Names of the measures to compute; by default all of the benchmark's.
        reward_options: Reward to options, e.g. ``{"deqa": {"url": "http://..."}}``.
        allow_partial: Score what there is of a set that is not whole; the scores are marked as such.
        batch_size: Images read at a time; changes memory, never a score.
        num_resamples: Bootstrap resamples of each interval, which draw prompts inside each category.
        seed: Seed of the bootstrap.
        diversity_space: Where distances are measured, see `stage_grpo.evaluation.diversity.measure_diversity`.
        cache_dir: Folder that keeps every reward's outcomes as they come, so that a later call goes on from there.

    Returns:
        Scores with intervals; what lacks its weights, package or server is named in ``missing``.

    Raises:
        ValueError: An unknown benchmark, category, measure or option, a number out of range, an image set that is not
            whole (every kind of problem is listed), or nothing that can be measured.
    """
    _check_numbers(batch_size=batch_size, num_images=num_images, num_resamples=num_resamples)
    line = get_benchmark(benchmark) if isinstance(benchmark, str) else benchmark
    jobs = plan_jobs(line, measures, reward_options or {})
    image_set = read_image_set(line, images_dir, _rows(line, prompts, categories), num_images)
    if not (allow_partial and image_set.images):
        image_set.check_whole()
    settings = {"prompts": _origin(image_set, prompts), "num_resamples": num_resamples, "seed": seed}
    settings |= _chosen(line, image_set, categories)
    measured_set = _measure(line, jobs, image_set, batch_size, cache_dir)
    return _summarise(line, jobs, image_set, measured_set, settings, diversity_space)


def _check_numbers(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1.")


def _summarise(
    benchmark: Benchmark,
    jobs: list[Job],
    image_set: ImageSet,
    measured_set: Measured,
    settings: dict[str, Any],
    diversity_space: str,
) -> Scores:
    """Means and intervals of what was measured, with everything that a reader needs to judge them."""
    records, missing = measured_set.records, measured_set.missing
    tables, unscored = _tables(benchmark, jobs, measured_set, settings["num_resamples"], settings["seed"])
    if not tables:
        raise ValueError(_nothing_measured(benchmark, missing))
    if image_set.problems:
        settings = {"num_problems": image_set.num_problems, **settings}
    return Scores(
        benchmark=benchmark.name,
        columns=list(benchmark.columns),
        scores={m: {c: _json_number(e.value) for c, e in table.items()} for m, table in tables.items()},
        ci95={m: {c: [_json_number(e.low), _json_number(e.high)] for c, e in t.items()} for m, t in tables.items()},
        num_images=len(records),
        num_unscored=unscored,
        num_prompts=len({record["index"] for record in records}),
        diversity=measure_diversity(image_set, diversity_space),
        missing=missing,
        partial=bool(image_set.problems),
        problems=image_set.problems,
        settings=_settings(benchmark, jobs, image_set) | settings,
        versions=package_versions(_PACKAGES),
        per_image=records,
    )


def _rows(
    benchmark: Benchmark, prompts: str | Path | None, categories: Sequence[str] | None
) -> list[PromptRow] | None:
    """The prompts, if they are given or the official ones were fetched."""
    check_categories(benchmark, categories)
    is_official = benchmark.prompt_set is not None and presence(get_prompt_set(benchmark.prompt_set)) != "missing"
    return benchmark_rows(benchmark, prompts, categories) if prompts is not None or is_official else None


def _chosen(benchmark: Benchmark, image_set: ImageSet, categories: Sequence[str] | None) -> dict[str, Any]:
    """The setting that says which categories were generated, where not all were.

    Raises:
        ValueError: The set, which says itself what it holds, holds others too.
    """
    if categories is None:
        return {}
    others = {image.metadata["tag"] for image in image_set.images} - set(categories)
    if others:
        raise ValueError(
            f"{image_set.folder} also holds images of {', '.join(sorted(others))}, which --categories "
            f"{' '.join(categories)} leaves out; name them too"
        )
    return {"categories": [column for column in benchmark.columns if column in categories]}


def _measure(
    benchmark: Benchmark, jobs: list[Job], image_set: ImageSet, batch_size: int, cache_dir: str | Path | None
) -> Measured:
    records = [_record(image) for image in image_set.images]
    cache_dir = None if cache_dir is None else Path(cache_dir)
    lacked = [job.lacking() for job in jobs]
    missing = {name: remedy for job, remedy in zip(jobs, lacked) if remedy for name in job.names()}
    failures: dict[str, Counter[str]] = defaultdict(Counter)
    if all(lacked):
        raise ValueError(_nothing_measured(benchmark, missing))
    for job, remedy in zip(jobs, lacked):
        places = [i for i, record in enumerate(records) if record["tag"] in job.columns(benchmark)]
        if remedy or not places:
            continue
        try:
            outcomes = _outcomes(job, image_set, [image_set.images[i] for i in places], batch_size, cache_dir)
        except (MissingWeightsError, OfficialCodeError) as error:
            missing.update(dict.fromkeys(job.names(), str(error)))
            continue
        for i, outcome in zip(places, outcomes):
            for measure, reason in _fill(records[i], job, outcome).items():
                failures[measure][reason] += 1
    return Measured(records, missing, failures)


def _outcomes(
    job: Job, image_set: ImageSet, images: list[SetImage], batch_size: int, cache_dir: Path | None
) -> list[Outcome]:
    if job.reward is None:
        return official_outcomes(job.options, image_set, images)
    reward = build_reward(job.reward, job.options)
    details = [*_SHOWN, "reasons", *(scorer.detail for scorer in job.scorers if scorer.detail)]
    cache = MeasureCache(cache_dir, job.reward, cache_key(image_set, job.reward, job.options, reward, details))
    return measure_images(reward, image_set, images, details, cache, batch_size)


def _record(image: SetImage) -> dict[str, Any]:
    place = {"path": image.path, "index": image.index, "sample": image.sample}
    about = {"prompt": image.prompt, "tag": image.metadata["tag"]}
    return {**place, **about, "scores": {}, "reasons": [], "objects": None}


def _fill(record: dict[str, Any], job: Job, outcome: Outcome) -> dict[str, str]:
    """Write what a reward said of an image into its record; returns by measure why there is no score."""
    details, failed = outcome["details"], {}
    who = job.reward or "official code"
    for scorer in job.scorers:
        if scorer.columns is not None and record["tag"] not in scorer.columns:
            continue
        value = outcome["score"] if scorer.detail is None else details.get(scorer.detail)
        record["scores"][scorer.measure] = None if value is None else scorer.scale * float(value)
        if value is None:
            reason = outcome["reason"] or f"the reward gave no detail {scorer.detail!r}"
            failed[scorer.measure] = f"{who}: {reason}"
    given = [] if outcome["reason"] is None else [f"{who}: {outcome['reason']}"]
    record["reasons"] += [*(details.get("reasons") or []), *dict.fromkeys([*given, *failed.values()])]
    for name in _SHOWN:
        if isinstance(details.get(name), dict):
            record[name] = details[name]
    return failed


def _tables(
    benchmark: Benchmark, jobs: list[Job], measured_set: Measured, num_resamples: int, seed: int
) -> tuple[dict[str, dict[str, Estimate]], dict[str, int]]:
    """Every measure's lines with intervals, and how many images it could not score; notes what scored nothing."""
    records = measured_set.records
    tables, unscored, lines = {}, {}, table_lines(benchmark, records)
    for measure in dict.fromkeys(scorer.measure for job in jobs for scorer in job.scorers):
        asked = [record for record in records if measure in record["scores"]]
        num_failed = sum(record["scores"][measure] is None for record in asked)
        if asked and num_failed == len(asked):
            reason, _ = measured_set.failures[measure].most_common(1)[0]
            measured_set.missing[measure] = f"no image could be scored ({reason})"
            continue
        covered = {record["tag"] for record in asked if record["scores"][measure] is not None}
        table = {}
        for name, members in lines.items():
            chosen = [records[i] for i in members]
            # A mean that leaves categories out would pass for the mean of all.
            if {record["tag"] for record in chosen} <= covered:
                table[name] = bootstrap_mean(
                    measured(chosen, measure),
                    strata(benchmark, chosen),
                    clusters(chosen),
                    num_resamples=num_resamples,
                    seed=seed,
                )
        if table:
            tables[measure], unscored[measure] = table, num_failed
    return tables, unscored


def _nothing_measured(benchmark: Benchmark, missing: Mapping[str, str]) -> str:
    listed = "; ".join(f"{name}: {remedy}" for name, remedy in missing.items())
    return f"nothing of {benchmark.name!r} can be measured: {listed or 'the set has no image of its categories'}"


def _origin(image_set: ImageSet, prompts: str | Path | None) -> str:
    """Where the prompts come from: a file, "official", "manifest" or "folders"."""
    if prompts is not None:
        return str(prompts)
    return "official" if image_set.source == "prompts" else image_set.source


def _settings(benchmark: Benchmark, jobs: list[Job], image_set: ImageSet) -> dict[str, Any]:
    """How the numbers were made."""
    scorers = [
        {
            "measure": scorer.measure,
            "reward": job.reward,
            "options": without_secrets(job.options),
            "detail": scorer.detail,
            "columns": scorer.columns and list(scorer.columns),
            "scale": scorer.scale,
        }
        for job in jobs
        for scorer in job.scorers
    ]
    counts = Counter(image.index for image in image_set.images)
    (usual, _), *_ = Counter(counts.values()).most_common(1)
    return {
        "scorers": scorers,
        "images_per_prompt": usual,
        "official_images_per_prompt": benchmark.images_per_prompt,
        "image_set": image_set.fingerprint,
        "generation": image_set.generation,
    }


def _json_number(value: float) -> float | None:
    """JSON knows no NaN."""
    return None if math.isnan(value) else value
