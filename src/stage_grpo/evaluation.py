"""Score a folder of generated images on a benchmark, with confidence intervals.

Reads images from disk and never loads a policy: any model, of any project, can be evaluated. The benchmark's
reward comes from the registry by name, so nothing here knows a particular benchmark or detector.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from stage_grpo.benchmarks import Benchmark, get_benchmark
from stage_grpo.image_folders import PromptFolder, load_image, read_prompt_folders
from stage_grpo.rewards.base import Reward
from stage_grpo.rewards.registry import build_reward
from stage_grpo.scores import GRADED, STRICT, Scores, measured, selections
from stage_grpo.statistics import Estimate, bootstrap_mean

_BATCH_SIZE = 64


def evaluate(
    benchmark: str | Benchmark,
    images_dir: str | Path,
    *,
    batch_size: int = _BATCH_SIZE,
    num_resamples: int = 4000,
    seed: int = 0,
) -> Scores:
    """Score the images of a folder.

    Args:
        benchmark: Name of a benchmark, or the benchmark itself.
        images_dir: Images in GenEval's layout (see `stage_grpo.image_folders`).
        batch_size: Images scored at a time; changes memory, never a score.
        num_resamples: Bootstrap resamples of each interval.
        seed: Seed of the bootstrap.

    Returns:
        Scores with intervals that resample prompt folders, with all their images, inside each category.

    Raises:
        ValueError: Unknown benchmark or reward, ``batch_size`` below 1, or anything wrong with the folder
            (missing, empty, torn images, missing metadata, ...), listing the first ten problems.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    line = get_benchmark(benchmark) if isinstance(benchmark, str) else benchmark
    reward = build_reward(line.reward, dict(line.reward_options))
    folders = read_prompt_folders(Path(images_dir), tags=line.columns)
    per_image = _score_images(reward, folders, batch_size)
    measures = [measure for measure in (STRICT, GRADED) if measure in per_image[0]]
    tables = {m: _summarise(line, per_image, m, num_resamples, seed) for m in measures}
    return Scores(
        benchmark=line.name,
        columns=list(line.columns),
        scores={m: {c: _json_number(e.value) for c, e in tables[m].items()} for m in measures},
        ci95={m: {c: [_json_number(e.low), _json_number(e.high)] for c, e in tables[m].items()} for m in measures},
        num_images=len(per_image),
        num_unscored=sum(record[GRADED] is None for record in per_image),
        num_prompts=len(folders),
        diversity=_diversity(folders),
        per_image=per_image,
        settings={
            "reward": line.reward,
            "reward_options": dict(line.reward_options),
            "num_resamples": num_resamples,
            "seed": seed,
        },
        versions=_versions(),
    )


def _score_images(reward: Reward, folders: list[PromptFolder], batch_size: int) -> list[dict[str, Any]]:
    """One record an image. Images are read batch by batch: a benchmark at full size does not fit in memory."""
    flat = [(folder, path) for folder in folders for path in folder.images]
    records = []
    for start in range(0, len(flat), batch_size):
        batch = flat[start : start + batch_size]
        images = [load_image(path) for _, path in batch]
        prompts = [folder.metadata["prompt"] for folder, _ in batch]
        result = reward.score(images, prompts, [folder.metadata for folder, _ in batch])
        correct = result.details.get("correct")
        reasons = result.details.get("reasons")
        for i, (folder, path) in enumerate(batch):
            record = {"folder": folder.name, "file": path.name, "prompt": prompts[i], "tag": folder.metadata["tag"]}
            record[GRADED] = _json_number(float(result.scores[i]))
            if correct is not None:
                record[STRICT] = None if correct[i] is None else float(correct[i])
            record["reasons"] = list(reasons[i]) if reasons is not None else []
            records.append(record)
    return records


def _summarise(
    benchmark: Benchmark, per_image: list[dict[str, Any]], measure: str, num_resamples: int, seed: int
) -> dict[str, Estimate]:
    """The lines of the table, but those that lack images of one of their columns."""
    table = {}
    for name, columns in selections(benchmark).items():
        chosen = [record for record in per_image if record["tag"] in columns]
        # The mean of some categories only would pass for the benchmark's own overall score.
        if {record["tag"] for record in chosen} == set(columns):
            tags, clusters = ([record[key] for record in chosen] for key in ("tag", "folder"))
            table[name] = bootstrap_mean(
                measured(chosen, measure), tags, clusters, num_resamples=num_resamples, seed=seed
            )
    return table


def _diversity(folders: list[PromptFolder]) -> float | None:
    """Mean over prompts of unique images / images; equal prompts in several folders count as one prompt."""
    digests: dict[str, list[str]] = defaultdict(list)
    for folder in folders:
        for path in folder.images:
            image = load_image(path)
            content = repr(image.size).encode() + image.tobytes()
            digests[folder.metadata["prompt"]].append(hashlib.sha256(content).hexdigest())
    shares = [len(set(found)) / len(found) for found in digests.values() if len(found) > 1]
    return float(np.mean(shares)) if shares else None


def _json_number(value: float) -> float | None:
    """JSON knows no NaN."""
    return None if math.isnan(value) else value


def _versions() -> dict[str, str]:
    names = ("stage-grpo", "numpy", "pillow", "scipy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
