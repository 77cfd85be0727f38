"""Prompts of the shapes world in the six GenEval categories, and scenes that satisfy them.

Held out are combinations, never words. These never stand together in a training caption, neither in
pretraining nor in reinforcement learning:

* `HELDOUT_PAIRS`, two of the ten unordered pairs of shapes (two objects, position, colour attribution);
* `HELDOUT_BINDINGS`, five of the thirty (shape, colour) bindings (colours, colour attribution);
* about a fifth of the other (shape, relation, shape) triples, each together with its mirror image ("a circle
  left of a square" is "a square right of a circle");
* about a fifth of the other colour attributions, in both orders.

``single_object`` and ``counting`` have too few combinations to hold some out; both splits share them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np

from stage_grpo.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    sample_centers,
)
from stage_grpo.types import PromptRow

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""The six categories of GenEval, in its order."""
SHARED_CATEGORIES = ("single_object", "counting")
"""Categories whose prompts stand in both splits: report them apart from truly held-out ones."""
NUMBERS = {2: "two", 3: "three", 4: "four"}
MIRRORS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
"""Each relation with the one that says the same of the objects in exchanged roles."""
HELDOUT_PAIRS = (frozenset({"circle", "triangle"}), frozenset({"square", "ring"}))
HELDOUT_BINDINGS = frozenset(
    {("circle", "blue"), ("square", "purple"), ("triangle", "yellow"), ("ring", "green"), ("cross", "red")}
)
_HELDOUT_SHARE = 0.2
_MIN_OFFSET = 16.0
_MAX_DRAWS = 1000


def rows(split: str) -> list[PromptRow]:
    """All prompts of a split, in a fixed order.

    Args:
        split: "train" or "heldout".

    Returns:
        Prompts with GenEval-style metadata (see `stage_grpo.types.PromptRow`).

    Raises:
        ValueError: unknown split.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r} is unknown: use 'train' or 'heldout'")
    wanted = split == "heldout"
    chosen = []
    for metadata in _enumerate():
        if metadata["tag"] in SHARED_CATEGORIES or is_heldout(metadata) == wanted:
            chosen.append(PromptRow(metadata["prompt"], metadata))
    return chosen


def mixed_rows(split: str, ratio: Sequence[int], num_rows: int) -> list[PromptRow]:
    """A fixed list of prompts in a given mix, category by category.

    Categories with fewer prompts than their share repeat them; larger ones are cut after a fixed shuffle.

    Args:
        split: "train" or "heldout".
        ratio: share of each of the six categories, in their order.
        num_rows: rows in all, a multiple of the ratio's sum.

    Raises:
        ValueError: unknown split, not six shares of which one is above 0, or rows that do not divide.
    """
    if len(ratio) != len(CATEGORIES) or min(ratio) < 0 or sum(ratio) == 0:
        raise ValueError(f"ratio={list(ratio)} must give a share of 0 or more to each of {', '.join(CATEGORIES)}")
    if num_rows < 1 or num_rows % sum(ratio):
        raise ValueError(f"{num_rows} rows cannot be mixed as {list(ratio)}: use a multiple of {sum(ratio)}")
    chosen = []
    for tag, share in zip(CATEGORIES, ratio):
        pool = sorted(rows_of(tag, split), key=lambda row: _digest("evaluation", row.prompt))
        chosen += [pool[i % len(pool)] for i in range(share * num_rows // sum(ratio))]
    return chosen


def rows_of(tag: str, split: str) -> list[PromptRow]:
    """The rows of one category of a split.

    Raises:
        ValueError: unknown category or split.
    """
    if tag not in CATEGORIES:
        raise ValueError(f"category {tag!r} is unknown: use one of {', '.join(CATEGORIES)}")
    return [row for row in rows(split) if row.metadata["tag"] == tag]


def is_heldout(metadata: dict[str, Any]) -> bool:
    """Whether a prompt contains a held-out combination (never true of single objects and counts)."""
    tag, include = metadata["tag"], metadata["include"]
    if tag in SHARED_CATEGORIES:
        return False
    bindings = {(clause["class"], clause["color"]) for clause in include if "color" in clause}
    pair = frozenset(clause["class"] for clause in include)
    if pair in HELDOUT_PAIRS or bindings & HELDOUT_BINDINGS:
        return True
    if tag == "position":
        (b, a), relation = (clause["class"] for clause in include), include[1]["position"][0]
        canonical = (a, relation, b) if relation in ("left of", "above") else (b, MIRRORS[relation], a)
        return canonical in _heldout_triples()
    if tag == "color_attr":
        return _digest("color_attr", *(" ".join(b) for b in sorted(bindings))) < _HELDOUT_SHARE
    return False


def sample_scene(row: PromptRow, rng: np.random.Generator) -> Scene:
    """A random scene that shows what a prompt asks for and nothing else.

    Args:
        row: a row of `rows`.
        rng: the only source of randomness; unnamed colours, sizes, places and the background come from it.

    Raises:
        ValueError: the prompt asks for more objects than fit into a picture.
    """
    clauses = [clause for clause in row.metadata["include"] for _ in range(clause["count"])]
    sizes = [str(name) for name in rng.choice(list(SIZES), len(clauses))]
    colors = [clause.get("color") or str(rng.choice(list(COLORS))) for clause in clauses]
    centers = _sample_related_centers(row.metadata["include"], sizes, rng)
    objects = [
        SceneObject(clause["class"], color, size, x, y)
        for clause, color, size, (x, y) in zip(clauses, colors, sizes, centers)
    ]
    return Scene(tuple(objects), int(rng.integers(BACKGROUNDS[0], BACKGROUNDS[1] + 1)))


def write_prompts(path: str | os.PathLike[str], prompt_rows: list[PromptRow]) -> None:
    """Write rows as JSON lines, one GenEval-style object with its "prompt" a line.

    Raises:
        OSError: the file cannot be written.
    """
    lines = [json.dumps({**row.metadata, "prompt": row.prompt}, ensure_ascii=False) for row in prompt_rows]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _enumerate() -> list[dict[str, Any]]:
    """Metadata of every prompt of the world, both splits together."""
    found: list[dict[str, Any]] = []
    found += [_metadata("single_object", [_clause(a)], f"a {a}") for a in SHAPES]
    for a, b in permutations(SHAPES, 2):
        found.append(_metadata("two_object", [_clause(a), _clause(b)], f"a {a} and a {b}"))
    for a in SHAPES:
        for n, word in NUMBERS.items():
            plural = f"{word} {a}es" if a.endswith("s") else f"{word} {a}s"
            counted = _metadata("counting", [_clause(a, n)], plural)
            found.append(counted | {"exclude": [{"class": a, "count": n + 1}]})
    found += [_metadata("colors", [_clause(a, color=c)], f"a {c} {a}") for a in SHAPES for c in COLORS]
    for a, b in permutations(SHAPES, 2):
        for relation in MIRRORS:
            include = [_clause(b), _clause(a) | {"position": [relation, 0]}]
            found.append(_metadata("position", include, f"a {a} {relation} a {b}"))
    for a, b in permutations(SHAPES, 2):
        for c, d in permutations(COLORS, 2):
            include = [_clause(a, color=c), _clause(b, color=d)]
            found.append(_metadata("color_attr", include, f"a {c} {a} and a {d} {b}"))
    return found


def _metadata(tag: str, include: list[dict[str, Any]], what: str) -> dict[str, Any]:
    return {"tag": tag, "include": include, "prompt": f"a photo of {what}"}


def _clause(shape: str, count: int = 1, color: str | None = None) -> dict[str, Any]:
    return {"class": shape, "count": count} | ({"color": color} if color else {})


def _heldout_triples() -> set[tuple[str, str, str]]:
    """A fifth of the (A, "left of" or "above", B) triples whose pair is not itself held out."""
    pairs = [pair for pair in combinations(SHAPES, 2) if frozenset(pair) not in HELDOUT_PAIRS]
    triples = [(a, r, b) for p in pairs for a, b in (p, p[::-1]) for r in ("left of", "above")]
    triples.sort(key=lambda triple: _digest("position", *triple))
    return set(triples[: round(_HELDOUT_SHARE * len(triples))])


def _digest(*words: str) -> float:
    """A fixed pseudo-random number in [0, 1) made of the words alone, so that no library can change it."""
    return int.from_bytes(hashlib.sha256("|".join(words).encode()).digest()[:8]) / 2**64


def _sample_related_centers(
    include: list[dict[str, Any]], sizes: list[str], rng: np.random.Generator
) -> list[tuple[float, float]]:
    """Free centres that stand in every asked relation (relations are only asked of single objects)."""
    for _ in range(_MAX_DRAWS):
        centers = sample_centers(rng, sizes)
        asked = [
            (centers[i], clause["position"][0], centers[clause["position"][1]])
            for i, clause in enumerate(include)
            if clause.get("position")
        ]
        if all(_stands(a, relation, b) for a, relation, b in asked):
            return centers
    raise ValueError(f"no placement satisfies {include}: ask for relations that can hold together")


def _stands(a: tuple[float, float], relation: str, b: tuple[float, float]) -> bool:
    """Whether A is clearly in the relation to B: about a block of tokens away, mainly along its axis."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along >= _MIN_OFFSET - 2 and along > abs(across)
