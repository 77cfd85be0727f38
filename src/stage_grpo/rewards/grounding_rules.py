"""Are the objects of a T2I-R1 row there, in the asked relation, in the asked number? Pure functions on boxes.

Boxes are in shares of the picture's sides: corners and distances in [0, 1], y grows downwards.
Source: arXiv:2505.00703, whose position rule is that of T2I-CompBench, arXiv:2307.06350.

The published code deviates from its own rules in places; ``legacy=True`` does as it does:

* "above" and "on top of" never hold;
* "next to", "near" and "on side of" always hold, because 150 pixels are compared with shares of a side;
* duplicates are removed as if (centre x, centre y, width, height) were corners, so counts are wrong;
* a name of three and more words is looked for by its first and last one, and never found;
* a row that names no object scores 1, and one that asks for two equal objects in a relation 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stage_grpo.rewards.t2i_r1_rows import LOCALITIES, NumeracyInfo, SpatialInfo, T2IR1Row
from stage_grpo.types import Box

PRESENCE_SCORE = 0.2
"""For each of two related objects that is there; the relation itself counts 0.5, so 0.9 is the most."""
POSITION_WEIGHT = 0.5
WRONG_COUNT_SCORE = 0.2
"""Of an object that is there in another number than asked."""
MAX_OVERLAP = 0.1
"""Intersection over union up to which two objects count as apart; beyond it a relation's score falls off."""
DUPLICATE_OVERLAP = 0.5
NEAR_DISTANCE = 150 / 512
"""How far the centres of neighbours may be apart: the published 150 pixels, of the 512 of T2I-CompBench's pictures."""

_LEGACY_NEAR_DISTANCE = 150.0
_LEGACY_UNKNOWN = ("above", "on top of")


@dataclass(frozen=True)
class Caption:
    """What a phrase detector is asked.

    Attributes:
        text: All phrases, separated by full stops.
        phrases: Each phrase as the detector's finds are called by.
        spans: For each phrase its parts, as first and behind-last character in ``text``.
    """

    text: str
    phrases: tuple[str, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]


def build_caption(nouns: Sequence[str], legacy: bool = False) -> Caption:
    """Puts names into one caption, e.g. ``"red apple . cup."``; a name that comes twice is asked once.

    Args:
        nouns: At least one name.
        legacy: Ask duplicates twice, and look for the first and last word of a name alone.
    """
    names = list(nouns) if legacy else list(dict.fromkeys(nouns))
    text = " . ".join(names) + "."
    spans: list[tuple[tuple[int, int], ...]] = []
    start = 0
    for name in names:
        end = start + len(name)
        first, *rest = name.split(" ")
        if legacy and rest:
            spans.append(((start, start + len(first)), (end - len(rest[-1]), end)))
        else:
            spans.append(((start, end),))
        start = end + len(" . ")
    phrases = tuple(" ".join(text[begin:end] for begin, end in parts) for parts in spans)
    return Caption(text, phrases, tuple(spans))


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, in [0, 1]; 0 for boxes without area."""
    width = max(0.0, min(a.x2, b.x2) - max(a.x1, b.x1))
    height = max(0.0, min(a.y2, b.y2) - max(a.y1, b.y1))
    areas = [(box.x2 - box.x1) * (box.y2 - box.y1) for box in (a, b)]
    union = sum(areas) - width * height
    return width * height / union if union else 0.0


def without_duplicates(boxes: Sequence[Box], max_overlap: float = DUPLICATE_OVERLAP) -> list[Box]:
    """Non-maximum suppression: boxes by falling confidence, each that does not overlap a kept one by more."""
    kept: list[Box] = []
    for box in sorted(boxes, key=lambda box: -box.confidence):
        if all(overlap(box, other) <= max_overlap for other in kept):
            kept.append(box)
    return kept


def position_score(
    first: Box, second: Box, locality: str, near_distance: float = NEAR_DISTANCE, legacy: bool = False
) -> float:
    """How well the first box stands to the second as ``locality`` says, in [0, 1].

    Left, right, above and below: the offset of the centres along the relation's axis must be positive and larger than
    across it; the score is 1 for an overlap below 0.1, else 0.1 / overlap. Near: 1 if the centres are closer than
    ``near_distance`` along *one* axis, as in T2I-CompBench, else ``near_distance`` divided by the larger distance.

    Args:
        first: Box of the first object.
        second: Box of the second object.
        locality: A key of ``LOCALITIES``.
        near_distance: In shares of a side.
        legacy: As published, see the module.
    """
    across_x = (second.x1 + second.x2) / 2 - (first.x1 + first.x2) / 2
    across_y = (second.y1 + second.y2) / 2 - (first.y1 + first.y2) / 2
    relation = LOCALITIES[locality]
    if relation == "near":
        limit = _LEGACY_NEAR_DISTANCE if legacy else near_distance
        if min(abs(across_x), abs(across_y)) < limit:
            return 1.0
        return limit / max(abs(across_x), abs(across_y))
    if legacy and locality in _LEGACY_UNKNOWN:
        return 0.0
    along, across = {
        "left": (across_x, across_y),
        "right": (-across_x, across_y),
        "above": (across_y, across_x),
        "below": (-across_y, across_x),
    }[relation]
    if along <= abs(across):
        return 0.0
    shared = overlap(first, second)
    return 1.0 if shared < MAX_OVERLAP else MAX_OVERLAP / shared


def spatial_score(
    found: Mapping[str, Sequence[Box]],
    asked: SpatialInfo,
    near_distance: float = NEAR_DISTANCE,
    legacy: bool = False,
) -> float:
    """0.2 for each of the two objects that is there, and half the position score of their most confident boxes."""
    if legacy and asked.first == asked.second:
        return 0.0
    boxes = [found.get(name) for name in (asked.first, asked.second)]
    score = PRESENCE_SCORE * sum(map(bool, boxes))
    if not (boxes[0] and boxes[1]):
        return score
    first, second = (max(choices, key=lambda box: box.confidence) for choices in (boxes[0], boxes[1]))
    return score + POSITION_WEIGHT * position_score(first, second, asked.locality, near_distance, legacy)


def numeracy_score(found: Mapping[str, Sequence[Box]], asked: Sequence[NumeracyInfo], legacy: bool = False) -> float:
    """Mean over the objects: 1 for the right number of boxes without duplicates, 0.2 for another, 0 for none."""
    total = 0.0
    for item in asked:
        boxes = [_misread(box) if legacy else box for box in found.get(item.name) or ()]
        if boxes:
            total += 1.0 if len(without_duplicates(boxes)) == item.count else WRONG_COUNT_SCORE
    return total / len(asked)


def object_score(found: Mapping[str, Sequence[Box]], nouns: Sequence[str]) -> float:
    """Share of the names that are there."""
    return sum(bool(found.get(noun)) for noun in nouns) / len(nouns)


def obstacle(row: T2IR1Row) -> str | None:
    """Why a row cannot be scored, if so."""
    if not row.nouns:
        return "not applicable: the row names no object"
    if row.task_type == "spatial" and row.spatial and row.spatial.first == row.spatial.second:
        return f"not applicable: the row relates two objects that are both called {row.spatial.first!r}"
    return None


def judge(
    row: T2IR1Row,
    found: Mapping[str, Sequence[Box]],
    near_distance: float = NEAR_DISTANCE,
    legacy: bool = False,
) -> float:
    """Score of one row in [0, 1]: by relation for ``spatial``, by number for ``numeracy``, else by presence.

    Args:
        row: A row that names objects, see :func:`obstacle`.
        found: Boxes by phrase, those that the detector is confident of alone.
        near_distance: In shares of a side.
        legacy: As published, see the module.
    """
    if row.task_type == "spatial" and row.spatial is not None:
        return spatial_score(found, row.spatial, near_distance, legacy)
    if row.task_type == "numeracy":
        return numeracy_score(found, row.numeracy, legacy)
    return object_score(found, row.nouns)


def _misread(box: Box) -> Box:
    """Centre and extent of a box in the places of its corners."""
    centre_x, centre_y = (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2
    return Box(centre_x, centre_y, box.x2 - box.x1, box.y2 - box.y1, box.confidence)
