"""Which rewards an evaluation runs: the scorers of a benchmark, those that share a reward and its options together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stage_grpo.benchmarks import Benchmark, Scorer
from stage_grpo.evaluation.official_scores import OFFICIAL, official_lacking, official_options
from stage_grpo.rewards.registry import build_reward, lacking


@dataclass(frozen=True)
class Job:
    """Scorers that one run of one reward serves.

    Attributes:
        reward: Name of the reward; None for the benchmark's official code.
        options: Its options.
        scorers: The scorers.
    """

    reward: str | None
    options: dict[str, Any]
    scorers: tuple[Scorer, ...]

    def columns(self, benchmark: Benchmark) -> tuple[str, ...]:
        """Categories that it is run on."""
        wanted = {column for scorer in self.scorers for column in scorer.columns or benchmark.columns}
        return tuple(column for column in benchmark.columns if column in wanted)

    def names(self) -> list[str]:
        """What `Scores.missing` calls what it measures."""
        return [f"{s.measure}/{c}" if c else s.measure for s in self.scorers for c in s.columns or ("",)]

    def lacking(self) -> str | None:
        """What it needs and this machine lacks, and how to get it; None if nothing."""
        if self.reward is None:
            found = official_lacking(self.options, (self.scorers[0].columns or ("",))[0])
        else:
            found = lacking(self.reward, self.options)
        return "; ".join(_told(what, remedy) for what, remedy in found) or None


def _told(what: str, remedy: str) -> str:
    remedy = f"get it by: {remedy}" if remedy.startswith("stage ") else remedy
    return f"{what}; {remedy}" if what else remedy


def plan_jobs(
    benchmark: Benchmark, measures: Sequence[str] | None, options: Mapping[str, Mapping[str, Any]]
) -> list[Job]:
    """The runs that the chosen measures of a benchmark need.

    Args:
        benchmark: The benchmark.
        measures: Names of measures; None for all.
        options: Reward to options, on top of the benchmark's own.

    Raises:
        ValueError: A measure or reward that the benchmark does not have, or options that the reward refuses.
    """
    if unknown := sorted(set(measures or ()) - set(benchmark.measures)):
        raise ValueError(f"{benchmark.name!r} has no measure {unknown}; choose from {', '.join(benchmark.measures)}")
    rewards = {scorer.reward or OFFICIAL for scorer in benchmark.scorers}
    if unknown := sorted(set(options) - rewards):
        known = ", ".join(sorted(rewards))
        raise ValueError(f"options are given for {unknown}, which {benchmark.name!r} does not use; it uses {known}")
    jobs: dict[str, Job] = {}
    for scorer in _split(benchmark.scorers):
        if measures is not None and scorer.measure not in measures:
            continue
        given = {**scorer.options, **options.get(scorer.reward or OFFICIAL, {})}
        given = given if scorer.reward is not None else official_options(given)
        own = scorer.columns if scorer.reward is None else None
        key = json.dumps([scorer.reward, given, own], sort_keys=True, default=str)
        shared = jobs[key].scorers if key in jobs else ()
        jobs[key] = Job(scorer.reward, given, (*shared, scorer))
    for job in jobs.values():
        if job.reward is not None and job.reward in options:
            build_reward(job.reward, job.options)  # a wrong option is an error, and not a reward that is missing
    return list(jobs.values())


def _split(scorers: Sequence[Scorer]) -> list[Scorer]:
    """Scorers by the official code one a category: there each is a run of its own, which may fail by itself."""
    return [
        part
        for scorer in scorers
        for part in (
            [replace(scorer, columns=(column,)) for column in scorer.columns or ()]
            if scorer.reward is None
            else [scorer]
        )
    ]
