"""GenEval's rules: hand-worked verdicts, the traps of public re-implementations, the official rule replayed."""

import gzip
import json
from pathlib import Path

import pytest

from stage_grpo.rewards.geneval import RELATIONS, judge, parse_metadata, relations
from stage_grpo.types import Box

FIXTURE = Path(__file__).parent / "fixtures" / "geneval_rules.json.gz"


def box(x, y, confidence=0.9, size=10):
    return Box(x, y, x + size, y + size, confidence)


def no_colors(name, boxes):
    raise AssertionError(f"asked for the colour of {name}, though no colour is asked for")


def colored(**names):
    """Colours by class, for the class's boxes in falling confidence."""
    return lambda name, boxes: list(names[name][: len(boxes)])


LEFT_OF = {
    "include": [
        {"class": "cat", "count": 1},
        {"class": "dog", "count": 1, "position": ["left of", 0]},
    ]
}


def test_one_object_as_asked():
    verdict = judge({"cat": [box(0, 0)]}, {"include": [{"class": "cat", "count": 1}]}, no_colors)
    assert (verdict.correct, verdict.score, verdict.reasons) == (True, 1.0, [])


@pytest.mark.parametrize(
    ("num_found", "score"),
    # max(0, 1 - |n - 2| / 2)
    [(0, 0.0), (1, 0.5), (2, 1.0), (3, 0.5), (4, 0.0), (5, 0.0), (9, 0.0)],
)
def test_count_falls_on_both_sides_and_never_below_zero(num_found, score):
    metadata = {"include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
    verdict = judge({"cat": [box(20 * i, 0) for i in range(num_found)]}, metadata, no_colors)
    assert verdict.score == pytest.approx(score, abs=1e-6)
    assert verdict.correct is (num_found == 2)
    assert len(verdict.reasons) == (num_found != 2)


def test_surplus_without_exclude_is_correct_yet_not_full_score():
    verdict = judge({"cat": [box(0, 0), box(20, 0)]}, {"include": [{"class": "cat", "count": 1}]}, no_colors)
    assert verdict.correct
    assert verdict.score == pytest.approx(0.0, abs=1e-6)


def test_null_color_and_position_are_none_asked():
    metadata = {
        "include": [{"class": "cat", "count": 1, "color": None, "position": None}],
        "exclude": None,
    }
    verdict = judge({"cat": [box(0, 0)]}, metadata, no_colors)
    assert (verdict.correct, verdict.score) == (True, 1.0)


@pytest.mark.parametrize(
    ("found", "names", "correct", "score"),
    [
        # Two red cats asked for; terms: count, colour share.
        (2, ["red", "red"], True, 1.0),
        (2, ["red", "blue"], False, (1 + 0.5) / 2),
        (2, ["blue", "blue"], False, (1 + 0) / 2),
        (1, ["red"], False, (0.5 + 0) / 2),
        # One too many: colour term 0, while the two most confident still satisfy the benchmark.
        (3, ["red", "red", "blue"], True, (0.5 + 0) / 2),
        (3, ["blue", "red", "red"], False, (0.5 + 0) / 2),
    ],
)
def test_color_terms(found, names, correct, score):
    metadata = {"include": [{"class": "cat", "count": 2, "color": "red"}]}
    boxes = [box(20 * i, 0, confidence=0.9 - 0.1 * i) for i in range(found)]
    verdict = judge({"cat": boxes}, metadata, colored(cat=names))
    assert verdict.correct is correct
    assert verdict.score == pytest.approx(score, abs=1e-6)


def test_failed_position_is_one_zero_term():
    # Terms: count cat 1, count dog 1, position 0. Appending another 1 for the clause would give 3/4.
    verdict = judge({"cat": [box(0, 0)], "dog": [box(30, 0)]}, LEFT_OF, no_colors)
    assert verdict.score == pytest.approx(2 / 3, abs=1e-6)
    assert verdict.reasons == ["expected dog left of target, found it right of target"]


def test_position_as_asked():
    verdict = judge({"cat": [box(30, 0)], "dog": [box(0, 0)]}, LEFT_OF, no_colors)
    assert (verdict.correct, verdict.score) == (True, 1.0)


def test_position_share_counts_boxes_in_the_relation_to_all_targets():
    metadata = {
        "include": [
            {"class": "cat", "count": 2},
            {"class": "dog", "count": 2, "position": ["left of", 0]},
        ]
    }
    cats = [box(60, 0), box(40, 0)]
    # The dog at 0 is left of both cats, the one at 50 of the first alone: terms 1, 1, 1/2.
    verdict = judge({"cat": cats, "dog": [box(0, 0), box(50, 0)]}, metadata, no_colors)
    assert not verdict.correct
    assert verdict.score == pytest.approx((1 + 1 + 0.5) / 3, abs=1e-6)


def test_position_needs_a_target_that_matched():
    verdict = judge({"dog": [box(0, 0)]}, LEFT_OF, no_colors)
    # Terms: count cat 0, count dog 1, position 0.
    assert verdict.score == pytest.approx(1 / 3, abs=1e-6)
    assert verdict.reasons == ["expected at least 1 cat, found 0", "no target for dog to be left of"]


def test_position_is_zero_when_the_target_has_the_wrong_color():
    metadata = {
        "include": [
            {"class": "cat", "count": 1, "color": "red"},
            {"class": "dog", "count": 1, "position": ["left of", 0]},
        ]
    }
    objects = {"cat": [box(30, 0)], "dog": [box(0, 0)]}
    # Terms: count 1, colour 0, count 1, position 0 though dog stands left of the cat.
    verdict = judge(objects, metadata, colored(cat=["blue"]))
    assert verdict.score == pytest.approx(2 / 4, abs=1e-6)
    assert not verdict.correct
    assert judge(objects, metadata, colored(cat=["red"])).score == pytest.approx(1.0, abs=1e-6)


def test_position_is_zero_when_a_count_is_off():
    # A second dog: terms 1, 0, 0. The benchmark looks at the most confident dog alone.
    objects = {"cat": [box(30, 0)], "dog": [box(0, 0, 0.9), box(0, 20, 0.8)]}
    verdict = judge(objects, LEFT_OF, no_colors)
    assert verdict.correct
    assert verdict.score == pytest.approx(1 / 3, abs=1e-6)
    # A second cat: terms 0, 1, 0.
    objects = {"cat": [box(30, 0, 0.9), box(0, 40, 0.8)], "dog": [box(0, 0)]}
    verdict = judge(objects, LEFT_OF, no_colors)
    assert verdict.correct
    assert verdict.score == pytest.approx(1 / 3, abs=1e-6)


def test_most_confident_boxes_decide():
    cats = [box(30, 0, 0.9)]
    near, far = box(0, 0, 0.9), box(60, 0, 0.8)
    assert judge({"cat": cats, "dog": [near, far]}, LEFT_OF, no_colors).correct
    swapped = [far._replace(confidence=0.9), near._replace(confidence=0.8)]
    assert not judge({"cat": cats, "dog": swapped}, LEFT_OF, no_colors).correct


def test_chain_of_positions_stops_at_the_first_failure():
    metadata = {
        "include": [
            {"class": "cat", "count": 1},
            {"class": "dog", "count": 1, "position": ["left of", 0]},
            {"class": "cup", "count": 1, "position": ["left of", 1]},
        ]
    }
    verdict = judge({"cat": [box(0, 0)], "dog": [box(30, 0)], "cup": [box(0, 0)]}, metadata, no_colors)
    # The dog is misplaced, so the strict rule has no target for the cup; the graded rule asks for the dog's count
    # and colour alone: terms 1, 1, 0, 1, 1.
    assert verdict.reasons[1] == "no target for cup to be left of"
    assert verdict.score == pytest.approx(4 / 5, abs=1e-6)


def test_exclude_of_another_class():
    metadata = {"include": [{"class": "cat", "count": 1}], "exclude": [{"class": "dog", "count": 1}]}
    assert judge({"cat": [box(0, 0)]}, metadata, no_colors).correct
    verdict = judge({"cat": [box(0, 0)], "dog": [box(0, 0)]}, metadata, no_colors)
    assert (verdict.correct, verdict.score) == (False, 1.0)


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        # Boxes of 10 px: an axis shrinks by 0.1 * (10 + 10) = 2 px.
        (-20, 0, {"left of"}),
        (20, 0, {"right of"}),
        (0, -20, {"above"}),
        (0, 20, {"below"}),
        # (20 - 2) / hypot(20, 20) = 0.636 along both axes.
        (-20, 20, {"left of", "below"}),
        # Along x (20 - 2) / hypot(20, 12) = 0.772, along y (12 - 2) / 23.3 = 0.429.
        (20, 12, {"right of"}),
        # (3 - 2) / 3 is a third.
        (3, 0, set()),
        # (4 - 2) / 4 is exactly a half, which is not beyond it.
        (4, 0, set()),
        (5, 0, {"right of"}),
        (2, 0, set()),
        (0, 0, set()),
    ],
)
def test_relations_by_hand(dx, dy, expected):
    assert relations(box(50 + dx, 50 + dy), box(50, 50)) == expected


def test_relations_mirror():
    mirrors = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    a, b = Box(3, 4, 20, 30, 1.0), Box(40, 10, 47, 15, 1.0)
    assert {mirrors[name] for name in relations(a, b)} == relations(b, a)
    assert set(RELATIONS) == set(mirrors)


def test_official_rule_agrees_on_every_stored_case():
    cases = json.loads(gzip.decompress(FIXTURE.read_bytes()))["cases"]
    assert len(cases) >= 2000
    verdicts = []
    for metadata, boxes, names, correct in cases:
        objects = {
            name: [Box(*map(float, corners), 1 - 0.01 * rank) for rank, corners in enumerate(found)]
            for name, found in boxes.items()
        }
        verdicts.append((judge(objects, metadata, colored(**names)).correct, bool(correct)))
    assert sum(ours != theirs for ours, theirs in verdicts) == 0
    assert 0.3 < sum(theirs for _, theirs in verdicts) / len(verdicts) < 0.7


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "no 'include' clause"),
        ({"include": None}, "no 'include' clause"),
        ({"include": []}, "no 'include' clause"),
        ({"include": "cat"}, "'cat'"),
        ({"include": ["cat"]}, "'cat'"),
        ({"include": [{"count": 1}]}, "class None"),
        ({"include": [{"class": "", "count": 1}]}, "class ''"),
        ({"include": [{"class": "cat"}]}, "count None"),
        ({"include": [{"class": "cat", "count": 0}]}, "count 0"),
        ({"include": [{"class": "cat", "count": 1.5}]}, "count 1.5"),
        ({"include": [{"class": "cat", "count": True}]}, "count True"),
        ({"include": [{"class": "cat", "count": 1, "color": 3}]}, "color 3"),
        ({"include": [{"class": "cat", "count": 1, "colour": "red"}]}, "'colour'"),
        ({"include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]}, "clause 0"),
        ({"include": [{"class": "cat", "count": 1, "position": "left of"}]}, "'left of'"),
        ({"exclude": [{"class": "cat", "count": 1}]}, "no 'include' clause"),
    ],
)
def test_malformed_metadata_name_the_value(metadata, message):
    with pytest.raises(ValueError, match=message):
        parse_metadata(metadata)


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (["on top of", 0], "unknown relation 'on top of'"),
        (["left of", 1], r"include\[1\] is placed relative to clause 1"),
        (["left of", 2], "clause 2"),
        (["left of", -1], "clause -1"),
        (["left of", "0"], "index '0'"),
        (["left of"], r"position \['left of'\]"),
    ],
)
def test_malformed_positions_name_the_value(position, message):
    include = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": position}]
    with pytest.raises(ValueError, match=message):
        judge({}, {"include": include}, no_colors)


def test_exclude_clauses_take_no_color():
    metadata = {
        "include": [{"class": "cat", "count": 1}],
        "exclude": [{"class": "cat", "count": 2, "color": "red"}],
    }
    with pytest.raises(ValueError, match=r"exclude\[0\].*red"):
        parse_metadata(metadata)


def test_unsorted_boxes_and_missing_colors_are_errors():
    metadata = {"include": [{"class": "cat", "count": 2, "color": "red"}]}
    with pytest.raises(ValueError, match="'cat' are not sorted"):
        judge({"cat": [box(0, 0, 0.5), box(0, 0, 0.6)]}, metadata, no_colors)
    with pytest.raises(ValueError, match="1 colours for 2 boxes"):
        judge({"cat": [box(0, 0), box(0, 0)]}, metadata, lambda name, boxes: ["red"])
