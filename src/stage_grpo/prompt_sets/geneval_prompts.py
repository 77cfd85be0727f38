"""GenEval-style training prompts, made here from the benchmark's vocabulary; none of its own prompts is among them.

Vocabulary, templates and metadata are those of arXiv:2310.11513: 80 COCO names, ten colours, four relations, six
categories. Two prompts that ask for the same picture in another order of words ("a and b" and "b and a", "a left of
b" and "b right of a") count as one prompt: at most one of them is made, and none if the benchmark has either.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations, islice, permutations
from pathlib import Path
from typing import Any

from stage_grpo.benchmarks import GENEVAL_CATEGORIES
from stage_grpo.prompt_sets.benchmark_prompts import is_benchmark_prompt
from stage_grpo.prompt_sets.vocabulary import (
    COLORS,
    MAX_COUNT,
    MIRRORS,
    NUMBERS,
    OBJECT_NAMES,
    PLURALS,
    plural,
    with_article,
)
from stage_grpo.rewards.geneval import RELATIONS
from stage_grpo.types import Metadata, PromptRow


@dataclass(frozen=True)
class PromptRecipe:
    """What to make. The rows follow from these values alone, on every machine and every version of Python.

    Attributes:
        ratio: Shares of the six categories, in the order of ``GENEVAL_CATEGORIES``.
        num: Rows in all; each category gets its share, rounded by largest remainder.
        seed: Chooses the prompts and their order.
        max_count: Largest number in a counting prompt; 4 is the benchmark's, 10 the most.
        plurals: "english" ("two benches") or "benchmark" (its own rule: "es" after s, else "s": "two benchs").
        repeat: Whether a category that runs out of prompts begins again, instead of being an error.
    """

    ratio: tuple[int, ...]
    num: int
    seed: int = 0
    max_count: int = 4
    plurals: str = "english"
    repeat: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: Not six shares, a negative share, no share above 0, ``num`` below 1, ``max_count`` outside 2
                to 10, or unknown ``plurals``.
        """
        if len(self.ratio) != len(GENEVAL_CATEGORIES) or min(self.ratio) < 0 or sum(self.ratio) < 1:
            raise ValueError(
                f"ratio={':'.join(map(str, self.ratio))} must be six whole numbers of at least 0, not all 0, "
                f"one for each of {':'.join(GENEVAL_CATEGORIES)}"
            )
        if self.num < 1:
            raise ValueError(f"num={self.num} must be at least 1")
        if not 2 <= self.max_count <= MAX_COUNT:
            raise ValueError(f"max_count={self.max_count} must be in 2 to {MAX_COUNT}")
        if self.plurals not in PLURALS:
            raise ValueError(f"plurals={self.plurals!r} is unknown; use one of {', '.join(PLURALS)}")


def parse_ratio(text: str) -> tuple[int, ...]:
    """Reads ``0:1:7:1:4:5``.

    Raises:
        ValueError: The text is not whole numbers with colons between.
    """
    try:
        return tuple(int(share) for share in text.split(":"))
    except ValueError:
        raise ValueError(
            f"ratio {text!r} is not whole numbers with colons between; write it like 0:1:7:1:4:5"
        ) from None


def build_rows(recipe: PromptRecipe) -> list[PromptRow]:
    """Training prompts with GenEval metadata, shuffled.

    No two rows ask for the same picture (unless ``recipe.repeat``) and none asks for what a benchmark prompt asks
    for. A larger ``num`` keeps, within a category, what a smaller one chose.

    Returns:
        ``recipe.num`` rows; the metadata are accepted by :func:`stage_grpo.rewards.geneval.parse_metadata`.

    Raises:
        ValueError: A category has too few prompts for its share; the message says how many exist.
    """
    wanted = num_per_category(recipe.ratio, recipe.num)
    found = {tag: list(islice(unseen_rows(tag, recipe), num)) for tag, num in wanted.items()}
    for tag, rows in found.items():
        if len(rows) < wanted[tag] and not (recipe.repeat and rows):
            raise ValueError(_too_few(recipe, tag, wanted[tag], len(rows)))
    rows = [rows[i % len(rows)] for tag, rows in found.items() for i in range(wanted[tag])]
    return [rows[i] for i in _Stream(recipe.seed, "order").permutation(len(rows))]


def num_per_category(ratio: Sequence[int], num: int) -> dict[str, int]:
    """Rows of each category: its share of ``num``, rounded by largest remainder, ties to the earlier category."""
    total = sum(ratio)
    counts = [share * num // total for share in ratio]
    by_remainder = sorted(range(len(ratio)), key=lambda i: -(ratio[i] * num % total))
    for i in by_remainder[: num - sum(counts)]:
        counts[i] += 1
    return dict(zip(GENEVAL_CATEGORIES, counts))


def unseen_rows(tag: str, recipe: PromptRecipe) -> Iterator[PromptRow]:
    """All prompts of a category that the benchmark does not ask for, one a picture, in an order of the seed's.

    Raises:
        ValueError: Unknown category.
    """
    if tag not in GENEVAL_CATEGORIES:
        raise ValueError(f"category {tag!r} is unknown; use one of {', '.join(GENEVAL_CATEGORIES)}")
    axes = _axes(tag, recipe.max_count)
    stream = _Stream(recipe.seed, tag)
    for index in stream.permutation(math.prod(map(len, axes))):
        choice = _choose(axes, index)
        forms = _forms(tag, choice, recipe.plurals)
        metadata = forms[stream.below(len(forms))]
        # In the benchmark's own plurals, since "two benches" is its "two benchs".
        if any(is_benchmark_prompt(form["prompt"]) for form in _forms(tag, choice, "benchmark")):
            continue
        yield PromptRow(metadata["prompt"], metadata)


def write_rows(path: str | os.PathLike[str], rows: Sequence[PromptRow]) -> None:
    """Writes rows as JSON lines, the whole file or nothing.

    Raises:
        ValueError: The name does not end in ``.jsonl``, so that no loader would read it.
        OSError: The file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        raise ValueError(f"{path}: prompts are written as JSON lines; give a name that ends in .jsonl")
    lines = [json.dumps({**row.metadata, "prompt": row.prompt}, ensure_ascii=False) for row in rows]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error.strerror}); choose another by --out") from error


def _too_few(recipe: PromptRecipe, tag: str, wanted: int, exist: int) -> str:
    problem = f"{tag}: {wanted} prompts asked for, but only {exist} exist that the benchmark does not ask for"
    share = recipe.ratio[GENEVAL_CATEGORIES.index(tag)]
    if not exist:
        return f"{problem}; give {tag} the share 0 in --ratio"
    remedies = [f"give {tag} a smaller share in --ratio", "pass --repeat to use prompts more than once"]
    fitting = exist * sum(recipe.ratio) // share
    while num_per_category(recipe.ratio, fitting + 1)[tag] <= exist:
        fitting += 1
    remedies.insert(0, f"lower --num to {fitting}")
    if tag == "counting" and recipe.max_count < MAX_COUNT:
        remedies.insert(1, f"raise --max-count (up to {MAX_COUNT})")
    return f"{problem}; {', '.join(remedies[:-1])}, or {remedies[-1]}"


def _axes(tag: str, max_count: int) -> list[Sequence[Any]]:
    """What a prompt of a category chooses: one entry of each axis."""
    # As in the benchmark, a person has no colour.
    things = [name for name in OBJECT_NAMES if name != "person"]
    pairs = list(combinations(OBJECT_NAMES, 2))
    axes: dict[str, list[Sequence[Any]]] = {
        "single_object": [OBJECT_NAMES],
        "two_object": [pairs],
        "counting": [OBJECT_NAMES, range(2, max_count + 1)],
        "colors": [things, COLORS],
        "position": [pairs, RELATIONS],
        "color_attr": [list(combinations(things, 2)), list(permutations(COLORS, 2))],
    }
    return axes[tag]


def _choose(axes: list[Sequence[Any]], index: int) -> tuple[Any, ...]:
    """The index-th element of the product of the axes, which is too large to be held."""
    choice = []
    for axis in reversed(axes):
        index, place = divmod(index, len(axis))
        choice.append(axis[place])
    return tuple(reversed(choice))


def _forms(tag: str, choice: tuple[Any, ...], plurals: str) -> list[Metadata]:
    """Metadata of every prompt that asks for the chosen picture: one, or two where words can change places."""
    if tag == "single_object":
        return [_metadata(tag, [_clause(choice[0])], with_article(choice[0]))]
    if tag == "counting":
        name, count = choice
        counted = {"include": [_clause(name, count)], "exclude": [_clause(name, count + 1)]}
        prompt = f"a photo of {NUMBERS[count - 2]} {plural(name, plurals)}"
        return [{"tag": tag, **counted, "prompt": prompt}]
    if tag == "colors":
        name, color = choice
        return [_metadata(tag, [_clause(name, color=color)], f"{with_article(color)} {name}")]
    if tag == "position":
        (a, b), relation = choice
        return [
            _metadata(tag, [_clause(y), _clause(x, position=[r, 0])], f"{with_article(x)} {r} {with_article(y)}")
            for x, r, y in ((a, relation, b), (b, MIRRORS[relation], a))
        ]
    names, colors = choice if tag == "color_attr" else (choice[0], (None, None))
    ends = list(zip(names, colors))
    return [
        _metadata(
            tag,
            [_clause(name, color=color) for name, color in order],
            " and ".join(with_article(f"{color} {name}" if color else name) for name, color in order),
        )
        for order in (ends, ends[::-1])
    ]


def _metadata(tag: str, include: list[Metadata], what: str) -> Metadata:
    return {"tag": tag, "include": include, "prompt": f"a photo of {what}"}


def _clause(name: str, count: int = 1, **asked: Any) -> Metadata:
    return {"class": name, "count": count} | {key: value for key, value in asked.items() if value is not None}


class _Stream:
    """Pseudo-random numbers from SHA-256 of seed and name: no library's generator can change them."""

    def __init__(self, seed: int, name: str) -> None:
        self._key = f"{seed}|{name}|"
        self._num_drawn = 0

    def below(self, bound: int) -> int:
        """A number in [0, bound)."""
        digest = hashlib.sha256(f"{self._key}{self._num_drawn}".encode()).digest()
        self._num_drawn += 1
        return int.from_bytes(digest[:8], "big") % bound

    def permutation(self, size: int) -> Iterator[int]:
        """All of [0, size) in random order, at the cost of those taken: Fisher and Yates, remembering the moved."""
        moved: dict[int, int] = {}
        for i in range(size):
            j = i + self.below(size - i)
            last = moved.pop(i, i)
            yield last if j == i else moved.get(j, j)
            if j != i:
                moved[j] = last
