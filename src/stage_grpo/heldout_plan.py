"""What a run is tested on while it trains: prompts that it does not train on, and a score it does not maximise."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from stage_grpo.benchmark_rows import benchmark_rows
from stage_grpo.benchmarks import Benchmark, Scorer, get_benchmark
from stage_grpo.option_checks import check_count, is_number
from stage_grpo.rewards.registry import lacking
from stage_grpo.sampling import Sampling
from stage_grpo.types import PromptRow

logger = logging.getLogger(__name__)

SEED = 0
"""Seed of the held-out images, whatever the run's own: runs compare, and so does ``stage generate``, whose default it
is."""


@dataclass(frozen=True)
class HeldoutPlan:
    """One held-out evaluation, the same at every step.

    Attributes:
        benchmark: Whose rules score the images.
        measure: The measure to follow, in the benchmark's unit; higher is better.
        rows: Prompts, with their category as ``tag``.
        sampling: How images are drawn.
        num_images: Images of each prompt.
        prompt_template: A name in ``PROMPT_TEMPLATES``.
        reward_options: Options by name of the scoring rewards.
        prompts: Where the prompts came from: a file or folder; None for the official ones.
    """

    benchmark: Benchmark
    measure: str
    rows: tuple[PromptRow, ...]
    sampling: Sampling
    num_images: int = 1
    prompt_template: str = "janus"
    reward_options: dict[str, Any] = field(default_factory=dict)
    prompts: str | None = None

    @property
    def line(self) -> str:
        """Line of the table that is the score: without the categories that training shares, where there are such."""
        return "heldout" if self.benchmark.shared_columns else "overall"

    @property
    def scorers(self) -> tuple[Scorer, ...]:
        """What computes the measure."""
        return tuple(scorer for scorer in self.benchmark.scorers if scorer.measure == self.measure)

    @property
    def measures(self) -> list[str]:
        """The measure, and those that come with it at no cost, being details of the same rewards."""
        rewards = {scorer.reward for scorer in self.scorers}
        others = {m: {s.reward for s in self.benchmark.scorers if s.measure == m} for m in self.benchmark.measures}
        return [self.measure, *(m for m, needed in others.items() if m != self.measure and needed <= rewards)]

    @property
    def fingerprint(self) -> str:
        """Hash of all of it: only scores with the same one compare."""
        content = [self.benchmark.name, self.measure, self.line, self.rows, asdict(self.sampling), self.num_images]
        content += [self.prompt_template, self.reward_options, SEED]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_values(config: Any) -> None:
    """Check the ``heldout_`` fields of a :class:`~stage_grpo.config.StageConfig`, without reading a file.

    Raises:
        ValueError: If a value, or a combination of values, cannot work; the message names field, value and remedy.
    """
    for name in ("heldout_steps", "heldout_num_images"):
        check_count(name, getattr(config, name), 1)
    if config.heldout_benchmark is None:
        for name in ("heldout_prompts", "heldout_measure", "heldout_guidance_scale", "heldout_reward_options"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name}={getattr(config, name)!r} does nothing without heldout_benchmark; set it, e.g. to geneval"
                )
        return
    benchmark = get_benchmark(config.heldout_benchmark)
    if benchmark.overall == "none":
        raise ValueError(
            f"heldout_benchmark={benchmark.name!r} has no overall score to follow; use another, e.g. geneval"
        )
    measure = config.heldout_measure or benchmark.measures[0]
    if measure not in benchmark.measures:
        raise ValueError(
            f"heldout_measure={measure!r} is unknown to {benchmark.name!r}; use one of {', '.join(benchmark.measures)}"
        )
    _ = _sampling(config)
    _check_options(config.heldout_reward_options or {}, benchmark, measure)


def _check_options(options: Any, benchmark: Benchmark, measure: str) -> None:
    if not isinstance(options, dict):
        raise ValueError(f"heldout_reward_options={options!r} must map reward names to their options")
    known = sorted({str(scorer.reward) for scorer in benchmark.scorers if scorer.measure == measure})
    for name in options:
        if name not in known:
            raise ValueError(
                f"heldout_reward_options names {name!r}, but {measure!r} of {benchmark.name!r} is scored by "
                f"{', '.join(known)}"
            )


def _sampling(config: Any) -> Sampling:
    scale = config.heldout_guidance_scale
    if scale is not None and not is_number(scale):
        raise ValueError(f"heldout_guidance_scale={scale!r} must be a number of at least 1, or left out")
    return config.sampling if scale is None else replace(config.sampling, guidance_scale=scale)


def plan_heldout(config: Any, train_rows: Sequence[PromptRow] = ()) -> HeldoutPlan | None:
    """Read what a run is tested on.

    Args:
        config: A :class:`~stage_grpo.config.StageConfig`.
        train_rows: What it trains on.

    Returns:
        The plan; None if the run is not tested.

    Raises:
        ValueError: If the prompts are missing, are no prompts of the benchmark, leave a category of its score without
            one, or are trained on.
    """
    if config.heldout_benchmark is None:
        return None
    benchmark = get_benchmark(config.heldout_benchmark)
    plan = HeldoutPlan(
        benchmark,
        config.heldout_measure or benchmark.measures[0],
        tuple(benchmark_rows(benchmark, config.heldout_prompts)),
        _sampling(config),
        config.heldout_num_images,
        config.prompt_template,
        dict(config.heldout_reward_options or {}),
        config.heldout_prompts,
    )
    _check_rows(plan, train_rows)
    return plan


def warn_if_trained_on(plan: HeldoutPlan, rewards: Iterable[str]) -> None:
    """Log that the measure is what training maximises, if it is.

    Args:
        plan: The plan.
        rewards: Names of the rewards that are trained on.
    """
    shared = {str(scorer.reward) for scorer in plan.scorers if scorer.detail is None} & set(rewards)
    if shared:
        logger.warning(
            "heldout_measure %s is the score of %s, which is also trained on: it tells new prompts from old, but not "
            "the reward being gamed",
            plan.measure,
            ", ".join(sorted(shared)),
        )


def _check_rows(plan: HeldoutPlan, train_rows: Sequence[PromptRow]) -> None:
    shared = plan.benchmark.shared_columns
    counted = [row for row in plan.rows if row.metadata["tag"] not in shared]
    columns = [column for column in plan.benchmark.columns if column not in shared]
    lacks = [column for column in columns if all(row.metadata["tag"] != column for row in counted)]
    if lacks:
        raise ValueError(
            f"the held-out prompts have none of category {', '.join(lacks)}, and the score is that of all "
            "categories; add some to heldout_prompts"
        )
    trained = {_normalised(row.prompt) for row in train_rows}
    overlap = [row.prompt for row in counted if _normalised(row.prompt) in trained]
    if overlap:
        raise ValueError(
            f"{len(overlap)} of the {len(counted)} held-out prompts are trained on, the first is {overlap[0]!r}; "
            "take them out of train_prompts or heldout_prompts"
        )


def _normalised(prompt: str) -> str:
    return " ".join(prompt.lower().split())


def lacking_for(plan: HeldoutPlan) -> Iterator[tuple[str, str]]:
    """What the scoring needs and this machine lacks: each thing, and how to get it."""
    for scorer in plan.scorers:
        if scorer.reward is not None:
            yield from lacking(scorer.reward, {**scorer.options, **plan.reward_options.get(scorer.reward, {})})


def check_heldout(plan: HeldoutPlan) -> None:
    """Make sure that held-out images can be scored.

    Raises:
        ValueError: If a reward lacks weights, a package or its server.
    """
    for what, remedy in lacking_for(plan):
        raise ValueError(f"heldout_benchmark={plan.benchmark.name!r}: {what}; {remedy}")
