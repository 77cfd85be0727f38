"""GenEval's rules: does a set of detected objects show what the metadata ask for?

Pure functions on boxes. Any detector can feed them: Mask2Former on photographs, the shapes detector on the
embedded world. Source: arXiv:2310.11513 and the benchmark's own evaluation rule, restated here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np

from stage_grpo.types import Box

RELATIONS = ("left of", "right of", "above", "below")
POSITION_SHRINK = 0.1
"""Each axis of an offset is shrunk towards 0 by this share of the two extents along it."""
POSITION_SHARE = 0.5
"""An axis counts as a relation beyond this share of the whole offset."""

_CLAUSE_KEYS = {"class", "count", "color", "position"}

Colors = Callable[[str, list[Box]], list[str]]
"""Names the colour of each given box of a class."""


@dataclass(frozen=True)
class Clause:
    """One ``include`` or ``exclude`` clause: ``count`` boxes of class ``name``, maybe coloured and placed.

    ``position`` is a relation and the index of the earlier ``include`` clause it refers to.
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Requirements:
    """The checked form of one prompt's metadata."""

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]


@dataclass(frozen=True)
class Verdict:
    """What :func:`judge` found: ``correct`` is the benchmark's rule, ``score`` in [0, 1] the graded reward.

    ``reasons`` says, one line a failed check, why ``correct`` is false; it is empty when ``correct`` is true.
    """

    correct: bool
    score: float
    reasons: list[str]


def parse_metadata(metadata: Mapping[str, Any]) -> Requirements:
    """Checks GenEval metadata and returns its clauses.

    A value of None counts as absent everywhere: columnar formats fill the keys that a row lacks with nulls.

    Args:
        metadata: ``{"include": [{"class", "count", "color"?, "position"?: [relation, index]}], "exclude"?}``;
            keys beside these two, such as ``tag`` and ``prompt``, are not looked at.

    Raises:
        ValueError: no ``include`` clause, or a clause with an unknown key, an empty class, a count below
            1, an unknown relation, or a position that does not refer to an earlier clause.
    """
    include = _clauses(metadata, "include")
    if not include:
        raise ValueError(f"metadata have no 'include' clause: {dict(metadata)!r}; name at least one object")
    for index, clause in enumerate(include):
        if clause.position is not None and not 0 <= clause.position[1] < index:
            raise ValueError(
                f"include[{index}] is placed relative to clause {clause.position[1]}; "
                "give the index of an earlier include clause, and put the object referred to first"
            )
    exclude = _clauses(metadata, "exclude")
    for index, clause in enumerate(exclude):
        if clause.color is not None or clause.position is not None:
            raise ValueError(
                f"exclude[{index}] asks for a color or a position: {clause!r}; give 'class' and 'count' only"
            )
    return Requirements(include, exclude)


def judge(objects: Mapping[str, Sequence[Box]], metadata: Mapping[str, Any], colors: Colors) -> Verdict:
    """Judges detected objects by GenEval's rule, strict and graded.

    ``correct``: the ``count`` most confident boxes of each include clause exist, all have the colour
    asked for, and each stands in the asked relation to every box of the clause it refers to, which must
    itself have matched; no exclude clause reaches its count.

    ``score``: the mean over all terms of all include clauses, n being *all* boxes of the class.

    * Count: ``max(0, 1 - |n - count| / count)``, so never below 0.
    * Colour, if asked for: 0 unless n = count, else the share of boxes with it.
    * Position, if asked for: 0 unless n = count and the clause referred to has its count and colours, else
      the share of boxes in the relation to all its boxes.

    A failed term is counted once. Exclude clauses do not enter ``score``: the count falls with every box
    too many.

    Args:
        objects: boxes of each class, in pixels, sorted by falling confidence.
        metadata: see :func:`parse_metadata`.
        colors: names the colour of each given box of a class; called only where a colour is asked for.

    Raises:
        ValueError: malformed metadata, boxes that are not sorted, or a wrong number of colour names.

    Source: arXiv:2310.11513, section 3; graded as in the training reward of arXiv:2509.25027.
    """
    wanted = parse_metadata(metadata)
    for name, boxes in objects.items():
        if any(a.confidence < b.confidence for a, b in pairwise(boxes)):
            raise ValueError(f"boxes of {name!r} are not sorted by falling confidence; sort them first")
    outcomes: list[_Outcome] = []
    for clause in wanted.include:
        target = outcomes[clause.position[1]] if clause.position else None
        outcomes.append(_judge_clause(clause, list(objects.get(clause.name, ())), target, colors))
    reasons = [reason for outcome in outcomes for reason in outcome.reasons]
    for clause in wanted.exclude:
        num_found = len(objects.get(clause.name, ()))
        if num_found >= clause.count:
            reasons.append(f"expected fewer than {clause.count} {clause.name}, found {num_found}")
    terms = [term for outcome in outcomes for term in outcome.terms]
    return Verdict(correct=not reasons, score=sum(terms) / len(terms), reasons=reasons)


def relations(box: Box, other: Box) -> set[str]:
    """Names the relations in which ``box`` stands to ``other``, both in pixels, y growing downwards.

    The offset of the centres is shrunk along each axis towards 0 by 0.1 times the sum of the two extents,
    then divided by the length of the offset as it was; an axis counts beyond 0.5, so at most one relation
    along each axis holds. None holds when both shrunk axes are under 1e-3.
    """
    corners = np.array([box[:4], other[:4]], dtype=np.float64).reshape(2, 2, 2)
    centers = corners.mean(axis=1)
    extents = np.abs(corners[:, 1] - corners[:, 0])
    offset = centers[0] - centers[1]
    shrunk = np.maximum(np.abs(offset) - POSITION_SHRINK * extents.sum(axis=0), 0) * np.sign(offset)
    if np.all(np.abs(shrunk) < 1e-3):
        return set()
    dx, dy = shrunk / np.linalg.norm(offset)
    checks = {
        "left of": dx < -POSITION_SHARE,
        "right of": dx > POSITION_SHARE,
        "above": dy < -POSITION_SHARE,
        "below": dy > POSITION_SHARE,
    }
    return {name for name, holds in checks.items() if holds}


@dataclass(frozen=True)
class _Outcome:
    """One include clause, judged: what later clauses and the totals need of it."""

    terms: list[float]
    reasons: list[str]
    top: list[Box]
    """The ``count`` most confident boxes: those that ``correct`` looks at."""
    complete: bool
    """n = count, and all have the colour asked for."""

    @property
    def matched(self) -> bool:
        return not self.reasons


def _judge_clause(clause: Clause, boxes: list[Box], target: _Outcome | None, colors: Colors) -> _Outcome:
    top = boxes[: clause.count]
    exact = len(boxes) == clause.count
    terms = [max(0.0, 1.0 - abs(len(boxes) - clause.count) / clause.count)]
    reasons: list[str] = []
    hits = len(top)
    if len(top) < clause.count:
        reasons.append(f"expected at least {clause.count} {clause.name}, found {len(top)}")
    elif clause.color is not None:
        hits = _num_colored(clause, top, colors)
        if hits < clause.count:
            reasons.append(f"expected {clause.count} {clause.color} {clause.name}, found {hits}")
    if clause.color is not None:
        terms.append(hits / clause.count if exact else 0.0)
    if clause.position is not None and target is not None:
        relation = clause.position[0]
        placed = exact and target.complete
        terms.append(_share_placed(boxes, relation, target.top) if placed else 0.0)
        # As in the benchmark's rule, a clause that already failed is not looked at again.
        reasons += [] if reasons else _misplaced(clause.name, top, relation, target)
    return _Outcome(terms, reasons, top, exact and hits == clause.count)


def _num_colored(clause: Clause, boxes: list[Box], colors: Colors) -> int:
    names = colors(clause.name, boxes)
    if len(names) != len(boxes):
        raise ValueError(f"colors() named {len(names)} colours for {len(boxes)} boxes; name one per box")
    return sum(name == clause.color for name in names)


def _share_placed(boxes: list[Box], relation: str, targets: list[Box]) -> float:
    placed = [all(relation in relations(box, target) for target in targets) for box in boxes]
    return sum(placed) / len(placed)


def _misplaced(name: str, boxes: list[Box], relation: str, target: _Outcome) -> list[str]:
    """At most one line: the first box that is out of place."""
    if not target.matched:
        return [f"no target for {name} to be {relation}"]
    for box, other in product(boxes, target.top):
        found = relations(box, other)
        if relation not in found:
            seen = " and ".join(sorted(found)) or "in no relation to"
            return [f"expected {name} {relation} target, found it {seen} target"]
    return []


def _clauses(metadata: Mapping[str, Any], key: str) -> tuple[Clause, ...]:
    value = metadata.get(key)
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise ValueError(f"metadata[{key!r}] is {value!r}; give a list of clauses like {{'class': ..., 'count': ...}}")
    return tuple(_clause(entry, f"{key}[{index}]") for index, entry in enumerate(value))


def _clause(entry: object, where: str) -> Clause:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is {entry!r}; give an object like {{'class': ..., 'count': ...}}")
    unknown = sorted(str(key) for key in set(entry) - _CLAUSE_KEYS)
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; known are {sorted(_CLAUSE_KEYS)}")
    name, count, color = entry.get("class"), entry.get("count"), entry.get("color")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} has class {name!r}; give the name of a class")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{where} has count {count!r}; give a whole number of at least 1")
    if color is not None and (not isinstance(color, str) or not color):
        raise ValueError(f"{where} has color {color!r}; give the name of a colour, or leave it out")
    return Clause(name, count, color, _position(entry.get("position"), where))


def _position(value: object, where: str) -> tuple[str, int] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{where} has position {value!r}; give [relation, index of an earlier include clause]")
    relation, target = value
    if relation not in RELATIONS:
        raise ValueError(f"{where} has the unknown relation {relation!r}; known are {', '.join(RELATIONS)}")
    if not isinstance(target, int) or isinstance(target, bool):
        raise ValueError(f"{where} has position index {target!r}; give the index of an earlier include clause")
    return relation, target
