"""Prompt rows of T2I-R1: which objects a prompt names, with which attributes, where and how many.

``git`` and ``gdino`` score by them. Source: arXiv:2505.00703 and the rows of its training file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TASK_TYPES = ("color", "shape", "texture", "object", "spatial", "numeracy", "complex", "non")
"""What a prompt is about; ``non`` is a relation that is not spatial, such as holding."""

LOCALITIES = {
    "left of": "left",
    "on the left of": "left",
    "right of": "right",
    "on the right of": "right",
    "above": "above",
    "top of": "above",
    "on top of": "above",
    "on the top of": "above",
    "below": "below",
    "on the bottom of": "below",
    "next to": "near",
    "on side of": "near",
    "near": "near",
}
"""Words of ``locality``, and the relation of the first object to the second that they mean."""


@dataclass(frozen=True)
class SpatialInfo:
    """``first`` stands in the place ``locality``, a key of ``LOCALITIES``, of ``second``."""

    first: str
    second: str
    locality: str


@dataclass(frozen=True)
class NumeracyInfo:
    """There are ``count`` objects called ``name``."""

    name: str
    count: int


@dataclass(frozen=True)
class T2IR1Row:
    """The checked form of one row.

    Attributes:
        task_type: One of ``TASK_TYPES``.
        nouns: Objects that should be there; may be empty, and may name one twice.
        attr_nouns: Objects with their attributes, e.g. ``"red apple"``; None if the row has no such list.
        spatial: Where two of the nouns stand; every ``spatial`` row has it, some ``complex`` rows do.
        numeracy: How many there are of each noun; every ``numeracy`` row has it, else it is empty.
    """

    task_type: str
    nouns: tuple[str, ...]
    attr_nouns: tuple[str, ...] | None = None
    spatial: SpatialInfo | None = None
    numeracy: tuple[NumeracyInfo, ...] = ()


def parse_row(metadata: Mapping[str, Any]) -> T2IR1Row:
    """Checks the metadata of a T2I-R1 row.

    A value of None counts as absent: columnar formats fill the keys that a row lacks with nulls. Keys that are not
    named here are left alone.

    Args:
        metadata: ``{"task_type", "nouns": [...], "attr_nouns"?: [...], "spatial_info"?: {"obj1", "obj2", "locality"},
            "numeracy_info"?: [{"obj_name", "num"}]}``.

    Raises:
        ValueError: A missing or unknown ``task_type``, a list that holds no names, relations or counts that are
            incomplete or speak of an object that is not among the nouns. The message names value and remedy.
    """
    task_type = metadata.get("task_type")
    if task_type is None:
        raise ValueError(
            f"metadata {dict(metadata)!r} have no 'task_type'; give rows of T2I-R1 (`stage data fetch t2i_r1`), "
            "with task_type and nouns"
        )
    if task_type not in TASK_TYPES:
        raise ValueError(f"task_type={task_type!r} is unknown; use one of {', '.join(TASK_TYPES)}")
    nouns = _names("nouns", metadata.get("nouns"))
    if nouns is None:
        raise ValueError(f"a row of task_type={task_type!r} has no 'nouns'; list the objects, or write []")
    row = T2IR1Row(
        task_type,
        nouns,
        _names("attr_nouns", metadata.get("attr_nouns")),
        _spatial(metadata.get("spatial_info"), nouns),
        _numeracy(metadata.get("numeracy_info"), nouns),
    )
    if task_type == "spatial" and row.spatial is None:
        raise ValueError(f"a spatial row of {list(nouns)} has no 'spatial_info'; give obj1, obj2 and locality")
    if task_type == "numeracy" and not row.numeracy:
        raise ValueError(f"a numeracy row of {list(nouns)} has no 'numeracy_info'; list obj_name and num of each")
    return row


def _names(key: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise ValueError(f"{key}={value!r} is no list; write a list of names")
    for name in value:
        # A full stop or question mark separates phrases in a detector's caption.
        if not isinstance(name, str) or not name or name != " ".join(name.split()) or set(".?") & set(name):
            raise ValueError(
                f"{key}={value!r} holds {name!r}; write names in single spaces, without full stop and question mark"
            )
    return tuple(value)


def _spatial(value: Any, nouns: tuple[str, ...]) -> SpatialInfo | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not {"obj1", "obj2", "locality"} <= value.keys():
        raise ValueError(f"spatial_info={value!r} is incomplete; give obj1, obj2 and locality")
    for key in ("obj1", "obj2"):
        _check_among(f"spatial_info's {key}", value[key], nouns)
    locality = value["locality"]
    if not isinstance(locality, str) or locality not in LOCALITIES:
        raise ValueError(f"locality={locality!r} is unknown; use one of {', '.join(LOCALITIES)}")
    return SpatialInfo(value["obj1"], value["obj2"], locality)


def _numeracy(value: Any, nouns: tuple[str, ...]) -> tuple[NumeracyInfo, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise ValueError(f"numeracy_info={value!r} is no list; list obj_name and num of each object")
    found = []
    for item in value:
        if not isinstance(item, Mapping) or not {"obj_name", "num"} <= item.keys():
            raise ValueError(f"numeracy_info holds {item!r}; give obj_name and num")
        _check_among("numeracy_info's obj_name", item["obj_name"], nouns)
        count = item["num"]
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"num={count!r} of {item['obj_name']!r} must be a whole number of at least 1")
        found.append(NumeracyInfo(item["obj_name"], count))
    return tuple(found)


def _check_among(what: str, name: Any, nouns: tuple[str, ...]) -> None:
    if name not in nouns:
        raise ValueError(f"{what} is {name!r}, which is not among nouns={list(nouns)}; add it there")
