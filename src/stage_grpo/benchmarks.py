"""The table of benchmarks: what `stage generate` draws for each, where it puts it, and how `stage evaluate` scores it.

A benchmark is a line of `BENCHMARKS`; nothing else in the project knows a benchmark by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from stage_grpo.images.layouts import LAYOUTS

GENEVAL_CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
T2I_COMPBENCH_CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "non_spatial", "numeracy", "complex")
HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
DRAWBENCH_CATEGORIES = (
    "Colors",
    "Conflicting",
    "Counting",
    "DALL-E",
    "Descriptions",
    "Gary Marcus et al.",
    "Misspellings",
    "Positional",
    "Rare Words",
    "Reddit",
    "Text",
)
OCR_LENGTHS = {"up to 5": 5, "6 to 10": 10, "11 to 20": 20, "over 20": None}
"""Category of an OCR prompt -> the most characters, white space aside, that its quoted text may have.

STAGE's released file calls the first two easy and medium, and the last two together hard.
"""
STRICT = "strict"
GRADED = "graded"


@dataclass(frozen=True)
class Scorer:
    """How one measure of a benchmark is made. Several scorers may fill one measure, each for its own columns.

    Attributes:
        measure: What tables call the number.
        reward: Name in `stage_grpo.rewards.registry.REWARDS`; None for what only the benchmark's official code
            computes, see `stage_grpo.evaluation.t2i_compbench`.
        options: Options of the reward.
        detail: Detail of the reward to take instead of its score.
        columns: Categories that it scores; None for all.
        scale: Factor between the reward's unit and the published one.
    """

    measure: str
    reward: str | None
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    detail: str | None = None
    columns: tuple[str, ...] | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: What `--benchmark` is called with.
        title: What tables and reports call it.
        columns: Categories in the order of the table. Each image belongs to the category that its prompt's metadata
            name as ``tag``.
        scorers: How its measures are made; the first one's measure is the headline.
        images_per_prompt: How many images a prompt gets in the benchmark's own protocol.
        layout: Name in `stage_grpo.images.layouts.LAYOUTS` of the folder that its official scorer reads.
        source: Where the benchmark is defined.
        prompt_set: Name of its official prompts in `stage_grpo.prompt_sets.sources.PROMPT_SETS`; None if it has none.
        overall: Whether the overall score is the mean over "categories" (of their means), over "images" alike, or
            "none", as the benchmark's authors report it.
        shared_columns: Categories whose prompts are trained on too; the held-out score leaves them out.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    scorers: tuple[Scorer, ...]
    images_per_prompt: int
    layout: str
    source: str
    prompt_set: str | None = None
    overall: Literal["categories", "images", "none"] = "categories"
    shared_columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the line.

        Raises:
            ValueError: A repeated or missing column, an unknown shared or scored column, no scorer, an unknown layout,
                fewer than 1 image a prompt.
        """
        if not self.columns or len(set(self.columns)) != len(self.columns):
            raise ValueError(f"benchmark {self.name!r} has columns {self.columns}; give each one once.")
        named = {*self.shared_columns, *(column for scorer in self.scorers for column in scorer.columns or ())}
        if unknown := sorted(named - set(self.columns)):
            raise ValueError(f"benchmark {self.name!r} names columns {unknown}; choose from {self.columns}.")
        if not self.scorers:
            raise ValueError(f"benchmark {self.name!r} has no scorer; give at least one.")
        if self.layout not in LAYOUTS:
            raise ValueError(f"benchmark {self.name!r} has layout {self.layout!r}; choose from {', '.join(LAYOUTS)}.")
        if self.images_per_prompt < 1:
            raise ValueError(f"benchmark {self.name!r} draws {self.images_per_prompt} images a prompt; use 1 or more.")

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of its measures, the headline first."""
        return tuple(dict.fromkeys(scorer.measure for scorer in self.scorers))


def _by_rule(reward: str) -> tuple[Scorer, ...]:
    """Scorers of a benchmark judged by GenEval's rule: its verdict, and the graded reward beside it."""
    return (Scorer(STRICT, reward, detail="correct"), Scorer(GRADED, reward))


_PREFERENCE = (
    Scorer("hps_v2.1", "hps", scale=100.0),
    Scorer("image_reward", "image_reward"),
    Scorer("pickscore", "pickscore"),
    Scorer("aesthetic", "aesthetic"),
    Scorer("deqa", "deqa"),
)

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="shapes",
            title="Shapes world",
            columns=GENEVAL_CATEGORIES,
            scorers=_by_rule("shapes"),
            images_per_prompt=1,
            layout="geneval",
            shared_columns=("single_object", "counting"),
            source="stage_grpo.shapes.prompts: GenEval's six categories on the embedded world",
        ),
        Benchmark(
            name="geneval",
            title="GenEval",
            columns=GENEVAL_CATEGORIES,
            scorers=_by_rule("geneval"),
            images_per_prompt=4,
            layout="geneval",
            prompt_set="geneval",
            source="arXiv:2310.11513, github.com/djghosh13/geneval: 553 prompts",
        ),
        Benchmark(
            name="t2i_compbench",
            title="T2I-CompBench",
            columns=T2I_COMPBENCH_CATEGORIES,
            scorers=(
                Scorer("value", "blip_vqa", MappingProxyType({"legacy": True}), columns=("color", "shape", "texture")),
                Scorer(
                    "value", "clip", MappingProxyType({"weights": "clip-vit-base-patch32"}), columns=("non_spatial",)
                ),
                Scorer("value", None, columns=("spatial", "3d_spatial", "numeracy", "complex")),
            ),
            images_per_prompt=10,
            layout="t2i_compbench",
            prompt_set="t2i_compbench",
            overall="none",
            source="arXiv:2307.06350, github.com/Karine-Huang/T2I-CompBench: 300 prompts in each of 8 categories",
        ),
        Benchmark(
            name="hps",
            title="HPS v2",
            columns=HPS_STYLES,
            scorers=_PREFERENCE,
            images_per_prompt=1,
            layout="hps",
            prompt_set="hps",
            overall="images",
            source="arXiv:2306.09341, github.com/tgxs002/HPSv2: 800 prompts in each of 4 styles",
        ),
        Benchmark(
            name="drawbench",
            title="DrawBench",
            columns=DRAWBENCH_CATEGORIES,
            scorers=(*_PREFERENCE[1:], _PREFERENCE[0]),
            images_per_prompt=1,
            layout="flat",
            prompt_set="drawbench",
            overall="images",
            source="arXiv:2205.11487: 200 prompts",
        ),
        Benchmark(
            name="ocr",
            title="Text rendering",
            columns=tuple(OCR_LENGTHS),
            scorers=(Scorer("ocr", "ocr"),),
            images_per_prompt=1,
            layout="flat",
            prompt_set="ocr",
            overall="images",
            source="arXiv:2505.05470, github.com/yifan123/flow_grpo: 1,018 prompts",
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
