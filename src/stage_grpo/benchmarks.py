"""The table of benchmarks: what `stage generate` draws for each and what `stage evaluate` counts.

A benchmark is a line of `BENCHMARKS`; nothing else in the project knows a benchmark by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

GENEVAL_CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: What `--benchmark` is called with.
        title: What tables and reports call it.
        columns: Categories in the order of the table. Each image belongs to the category that its metadata
            name as ``tag``; the overall score is the mean of the category means.
        reward: Name in `stage_grpo.rewards.registry.REWARDS` of the reward that scores an image.
        reward_options: Options of that reward.
        images_per_prompt: How many images a prompt gets in the benchmark's own protocol.
        shared_columns: Categories whose prompts are trained on too; the held-out score leaves them out.
        source: Where the benchmark is defined.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    reward: str
    images_per_prompt: int
    source: str
    reward_options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    shared_columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the line.

        Raises:
            ValueError: A repeated or missing column, an unknown shared column, fewer than 1 image a prompt.
        """
        if not self.columns or len(set(self.columns)) != len(self.columns):
            raise ValueError(f"benchmark {self.name!r} has columns {self.columns}; give each one once.")
        unknown = sorted(set(self.shared_columns) - set(self.columns))
        if unknown:
            raise ValueError(f"benchmark {self.name!r} shares {unknown}; choose from {self.columns}.")
        if self.images_per_prompt < 1:
            raise ValueError(f"benchmark {self.name!r} draws {self.images_per_prompt} images a prompt; use 1 or more.")


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="shapes",
            title="Shapes world",
            columns=GENEVAL_CATEGORIES,
            reward="shapes",
            images_per_prompt=1,
            shared_columns=("single_object", "counting"),
            source="stage_grpo.shapes.prompts: GenEval's six categories on the embedded world",
        ),
        Benchmark(
            name="geneval",
            title="GenEval",
            columns=GENEVAL_CATEGORIES,
            reward="geneval",
            images_per_prompt=4,
            source="arXiv:2310.11513, github.com/djghosh13/geneval: 553 prompts",
        ),
    )
}


def get_benchmark(name: str) -> Benchmark:
    """Look a benchmark up.

    Args:
        name: A name of `BENCHMARKS`.

    Returns:
        The benchmark.

    Raises:
        ValueError: No such benchmark.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; known are {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]
