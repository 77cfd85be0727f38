"""A grid of runs as a YAML file tells it: one claim, its variants, the settings they are crossed with, and a test."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from stage_grpo.benchmarks import get_benchmark
from stage_grpo.option_checks import check_count, is_number

Overrides = dict[str, Any]
"""Keys of ``StageConfig`` to values, as a training YAML holds them."""


@dataclass(frozen=True)
class HeldoutTest:
    """How every policy of a grid is tested, before and after its training.

    Attributes:
        benchmark: Name of the benchmark.
        prompts: Its prompt file; None for the official prompts.
        guidance_scale: Guidance of the test's images; None for that of the training.
        num_images: Images of each prompt.

    Raises:
        ValueError: An unknown benchmark, fewer than 1 image a prompt, or a value of the wrong kind.
    """

    benchmark: str
    prompts: str | None = None
    guidance_scale: float | None = None
    num_images: int = 1

    def __post_init__(self) -> None:
        """Check the values."""
        _check_text("test.benchmark", self.benchmark)
        get_benchmark(self.benchmark)
        if self.prompts is not None:
            _check_text("test.prompts", self.prompts)
        if self.guidance_scale is not None and not is_number(self.guidance_scale):
            raise ValueError(
                f"test.guidance_scale={self.guidance_scale!r} must be a number of at least 1, or left out"
            )
        check_count("test.num_images", self.num_images, 1)


@dataclass(frozen=True)
class Cell:
    """One line of a grid's table: a variant at one point of the axes.

    Attributes:
        variant: Its name.
        point: Axis to the name of the value there.
        overrides: What it changes of the base configuration; an axis wins over a variant, a variant over settings.
    """

    variant: str
    point: Mapping[str, str]
    overrides: Overrides

    @property
    def label(self) -> str:
        """The variant and its place, e.g. ``stage, beta=0.05``."""
        return ", ".join([self.variant, *(f"{axis}={value}" for axis, value in self.point.items())])


@dataclass(frozen=True)
class Grid:
    """One question, and the runs that answer it.

    Attributes:
        name: Name of the file without its ending.
        title: Heading of its page.
        claim: What is asked, in one sentence.
        source: Where the claim was made.
        base: Training configuration that all runs start from.
        variants: Name to overrides.
        baseline: The variant that all others are compared with.
        test: How policies are tested.
        seeds: Training seeds; runs of one seed are paired.
        settings: Overrides of all runs.
        axes: Axis to named overrides; every variant runs at every point. In YAML also a key and its list of values.
        controls: Variants that all others are compared with as well, such as plain GRPO at equal strength.
        train_categories: Tags of the training prompts to keep; empty keeps all.
        pictured: Variants in ``picture.png``; empty: all.

    Raises:
        ValueError: A part is missing, empty or of the wrong kind, or a name is unknown.
    """

    name: str
    title: str
    claim: str
    source: str
    base: str
    variants: dict[str, Overrides]
    baseline: str
    test: HeldoutTest
    seeds: tuple[int, ...] = (0, 1, 2)
    settings: Overrides = field(default_factory=dict)
    axes: dict[str, dict[str, Overrides]] = field(default_factory=dict)
    controls: tuple[str, ...] = ()
    train_categories: tuple[str, ...] = ()
    pictured: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what can be checked without the training configuration."""
        for name in ("title", "claim", "source", "base"):
            _check_text(name, getattr(self, name))
        variants: Any = self.variants
        if not isinstance(variants, dict) or not variants or not all(isinstance(v, dict) for v in variants.values()):
            raise ValueError(f"variants={variants!r:.60} must map at least one name to its overrides, {{}} for none")
        for name in variants:
            _check_text("a name in variants", name)
        for key in ("baseline", "controls", "pictured"):
            given = getattr(self, key)
            for name in [given] if key == "baseline" else given:
                if not isinstance(name, str) or name not in variants:
                    raise ValueError(f"{key}: {name!r} is no variant{_nearest(name, variants)}")
        for tag in self.train_categories:
            _check_text("a tag in train_categories", tag)
        if not isinstance(self.settings, dict):
            raise ValueError(f"settings={self.settings!r:.60} must map keys to values")
        check_seeds(self.seeds)

    @property
    def cells(self) -> list[Cell]:
        """All lines of the table, point by point of the axes."""
        names = [[(axis, value) for value in values] for axis, values in self.axes.items()]
        return [
            Cell(variant, dict(point), self._overrides(variant, point))
            for point in itertools.product(*names)
            for variant in self.variants
        ]

    def _overrides(self, variant: str, point: Iterable[tuple[str, str]]) -> Overrides:
        merged = {**self.settings, **self.variants[variant]}
        for axis, value in point:
            merged.update(self.axes[axis][value])
        return merged


def load_grid(path: str | Path) -> Grid:
    """Read a grid.

    Args:
        path: A YAML file, see ``docs/ablation.md``.

    Raises:
        ValueError: The file cannot be read, is no mapping, or holds an unknown, missing or wrong key.
    """
    path = Path(path)
    content = _read(path)
    try:
        _check_keys(content, Grid, "grid", besides={"name"})
        test = content["test"]
        if not isinstance(test, dict):
            raise ValueError(f"test={test!r:.60} must be a mapping with a benchmark")
        _check_keys(test, HeldoutTest, "test")
        content |= {name: _list(name, content[name]) for name in ("seeds", "controls", "pictured") if name in content}
        content["train_categories"] = _list("train_categories", content.get("train_categories", ()))
        content["axes"] = _axes(content.get("axes", {}))
        return Grid(**{**content, "name": path.stem, "test": HeldoutTest(**test)})
    except ValueError as error:
        raise ValueError(f"grid {str(path)!r}: {error}") from error


def check_seeds(seeds: Iterable[Any]) -> None:
    """Refuse seeds that cannot be paired.

    Raises:
        ValueError: None at all, one twice, or one that is no whole number of at least 0.
    """
    seeds = list(seeds)
    if not seeds or any(type(seed) is not int or seed < 0 for seed in seeds) or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds={seeds} must be different whole numbers of at least 0, e.g. 0 1 2")


def check_names(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse names that are not known, with the nearest one.

    Raises:
        ValueError: A name is unknown.
    """
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{where} has an unknown key {name!r}{_nearest(name, known)}")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r:.60} must be a text; quote it if YAML reads something else")


def _nearest(name: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; use one of {', '.join(known)}"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"grid {str(path)!r} cannot be read ({error.strerror}); give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"grid {str(path)!r} is not valid YAML; correct it: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"grid {str(path)!r} holds {content!r:.60} instead of a mapping; see docs/ablation.md")
    return content


def _check_keys(content: dict[str, Any], kind: Any, where: str, besides: Iterable[str] = ()) -> None:
    expected = [part for part in fields(kind) if part.name not in besides]
    check_names(content, [part.name for part in expected], where)
    for part in expected:
        if part.name not in content and part.default is MISSING and part.default_factory is MISSING:
            raise ValueError(f"{where} lacks {part.name!r}; add it")


def _list(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name}={value!r} must be a list")
    return tuple(value)


def _axes(content: Any) -> dict[str, dict[str, Overrides]]:
    if not isinstance(content, dict):
        raise ValueError(
            f"axes={content!r:.60} must map keys to their values, e.g. {{beta: [0.01, 0.05]}}; or leave it out"
        )
    return {str(axis): _axis(str(axis), values) for axis, values in content.items()}


def _axis(axis: str, values: Any) -> dict[str, Overrides]:
    """Names along an axis to what they override: of a list, the axis itself is the key."""
    if isinstance(values, list) and values:
        return {str(value): {axis: value} for value in values}
    if isinstance(values, dict) and values and all(isinstance(value, dict) for value in values.values()):
        return {str(name): overrides for name, overrides in values.items()}
    raise ValueError(f"axis {axis!r} is {values!r:.60}; give a list of values of that key, or names with overrides")
