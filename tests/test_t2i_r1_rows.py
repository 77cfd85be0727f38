"""T2I-R1 rows: own ones of every kind, wrong ones, and the published file where it lies beside the repository."""

from collections import Counter
from pathlib import Path

import pytest

from stage_grpo.data import load_rows
from stage_grpo.rewards.grounding_rules import obstacle
from stage_grpo.rewards.t2i_r1_rows import LOCALITIES, NumeracyInfo, SpatialInfo, T2IR1Row, parse_row

OFFICIAL = Path(__file__).parents[2] / "shared" / "data" / "t2i_r1" / "train.jsonl"
SPATIAL = {
    "task_type": "spatial",
    "nouns": ["cup", "dog"],
    "spatial_info": {"obj1": "cup", "obj2": "dog", "locality": "on top of"},
}
NUMERACY = {"task_type": "numeracy", "nouns": ["cup"], "numeracy_info": [{"obj_name": "cup", "num": 3}]}


def test_rows_of_every_kind():
    assert parse_row({"task_type": "object", "nouns": ["cup", "stop sign"], "prompt": "a cup and a stop sign"}) == (
        T2IR1Row("object", ("cup", "stop sign"))
    )
    assert parse_row({"task_type": "color", "nouns": ["cup"], "attr_nouns": ["red cup"]}) == (
        T2IR1Row("color", ("cup",), ("red cup",))
    )
    assert parse_row(SPATIAL) == T2IR1Row("spatial", ("cup", "dog"), spatial=SpatialInfo("cup", "dog", "on top of"))
    assert parse_row(NUMERACY) == T2IR1Row("numeracy", ("cup",), numeracy=(NumeracyInfo("cup", 3),))
    assert parse_row({"task_type": "non", "nouns": []}) == T2IR1Row("non", ())


def test_none_counts_as_absent():
    filled = {**SPATIAL, "attr_nouns": None, "numeracy_info": None}
    assert parse_row(filled) == parse_row(SPATIAL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_type": None}, "no 'task_type'; give rows of T2I-R1"),
        ({"task_type": "colour"}, "task_type='colour' is unknown; use one of color, shape"),
        ({"nouns": None}, "has no 'nouns'"),
        ({"nouns": "cup"}, "nouns='cup' is no list"),
        ({"nouns": ["cup", "dog", ""]}, "holds ''; write names"),
        ({"nouns": ["cup", "dog", 3]}, "holds 3; write names"),
        ({"nouns": ["cup", "dog", "two  words"]}, "holds 'two  words'; write names in single spaces"),
        ({"nouns": ["cup", "dog", "Mr. Cup"]}, "holds 'Mr. Cup'; .* without full stop"),
        ({"attr_nouns": [None]}, "attr_nouns=.* holds None"),
        ({"spatial_info": None}, "spatial row of .* has no 'spatial_info'"),
        ({"spatial_info": {"obj1": "cup", "locality": "near"}}, "spatial_info=.* is incomplete"),
        ({"spatial_info": ["cup", "dog"]}, "spatial_info=.* is incomplete"),
        ({"spatial_info": {**SPATIAL["spatial_info"], "obj2": "cat"}}, "obj2 is 'cat', which is not among nouns="),
        ({"spatial_info": {**SPATIAL["spatial_info"], "locality": "under"}}, "locality='under' is unknown; use one"),
        ({"spatial_info": {**SPATIAL["spatial_info"], "locality": ["near"]}}, r"locality=\['near'\] is unknown"),
        ({"task_type": "numeracy"}, "numeracy row of .* has no 'numeracy_info'"),
        ({"numeracy_info": {"cup": 3}}, "numeracy_info=.* is no list"),
        ({"numeracy_info": [{"obj_name": "cup"}]}, "give obj_name and num"),
        ({"numeracy_info": [{"obj_name": "cat", "num": 1}]}, "obj_name is 'cat', which is not among"),
        ({"numeracy_info": [{"obj_name": "cup", "num": 0}]}, "num=0 of 'cup' must be a whole number of at least 1"),
        ({"numeracy_info": [{"obj_name": "cup", "num": True}]}, "num=True of 'cup'"),
        ({"numeracy_info": [{"obj_name": "cup", "num": "3"}]}, "num='3' of 'cup'"),
    ],
)
def test_wrong_rows_are_explained(change, message):
    with pytest.raises(ValueError, match=message):
        parse_row({**SPATIAL, **change})


def test_all_published_rows_pass():
    """On the official file where it is there; elsewhere the rows above stand for it."""
    if not OFFICIAL.is_file():
        return
    rows = [parse_row(row.metadata) for row in load_rows(OFFICIAL)]
    assert len(rows) == 7223
    assert Counter(row.task_type for row in rows) == {
        "spatial": 2195,
        "numeracy": 1172,
        "color": 879,
        "complex": 700,
        "non": 700,
        "texture": 695,
        "shape": 682,
        "object": 200,
    }
    assert sum(row.spatial is not None for row in rows) == 2195 + 185
    assert sum(row.attr_nouns is not None for row in rows) == 879 + 695 + 682
    asked = Counter(row.spatial.locality for row in rows if row.spatial)
    assert (asked["above"], asked["on top of"]) == (364, 73)
    assert asked.keys() < LOCALITIES.keys()
    assert all(obstacle(row) is None for row in rows)
