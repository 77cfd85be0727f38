"""The rules of the gdino reward: boxes by hand, and T2I-R1's own scoring functions for what they publish."""

import gzip
import json

import numpy as np
import pytest

from original_gdino import FIXTURES
from stage_grpo.rewards.grounding_rules import (
    NEAR_DISTANCE,
    build_caption,
    judge,
    numeracy_score,
    object_score,
    overlap,
    position_score,
    spatial_score,
    without_duplicates,
)
from stage_grpo.rewards.t2i_r1_rows import NumeracyInfo, SpatialInfo, parse_row
from stage_grpo.types import Box

LEFT, RIGHT = Box(0.1, 0.4, 0.3, 0.6, 0.9), Box(0.6, 0.4, 0.8, 0.6, 0.8)
TOP, BOTTOM = Box(0.4, 0.1, 0.6, 0.3, 0.9), Box(0.4, 0.6, 0.6, 0.8, 0.8)


def test_captions_and_spans():
    caption = build_caption(["cup", "ice cream cone", "cup", "red apple"])
    assert caption.text == "cup . ice cream cone . red apple."
    assert caption.phrases == ("cup", "ice cream cone", "red apple")
    assert [[caption.text[a:b] for a, b in parts] for parts in caption.spans] == [
        ["cup"],
        ["ice cream cone"],
        ["red apple"],
    ]
    published = build_caption(["cup", "ice cream cone", "cup"], legacy=True)
    assert published.text == "cup . ice cream cone . cup."
    assert published.phrases == ("cup", "ice cone", "cup")


def test_overlap_by_hand():
    # Two 0.4 x 0.4 squares that share 0.2 x 0.4: 0.08 / (0.16 + 0.16 - 0.08).
    assert overlap(Box(0, 0, 0.4, 0.4, 1), Box(0.2, 0, 0.6, 0.4, 1)) == pytest.approx(1 / 3, abs=1e-6)
    assert overlap(LEFT, RIGHT) == 0.0
    assert overlap(Box(0.5, 0.5, 0.5, 0.5, 1), Box(0.5, 0.5, 0.5, 0.5, 1)) == 0.0


def test_duplicates_are_removed_by_confidence():
    sure, same = Box(0, 0, 0.4, 0.4, 0.9), Box(0.02, 0, 0.42, 0.4, 0.95)
    # sure and other overlap by 1/3, which is not above one half.
    other = Box(0.2, 0, 0.6, 0.4, 0.5)
    assert without_duplicates([sure, same, other]) == [same, other]
    assert without_duplicates([]) == []


@pytest.mark.parametrize(
    ("first", "second", "locality", "expected"),
    [
        (LEFT, RIGHT, "left of", 1.0),
        (LEFT, RIGHT, "on the right of", 0.0),
        (RIGHT, LEFT, "right of", 1.0),
        (TOP, BOTTOM, "above", 1.0),
        (TOP, BOTTOM, "on top of", 1.0),
        (TOP, BOTTOM, "on the top of", 1.0),
        (BOTTOM, TOP, "on the bottom of", 1.0),
        (BOTTOM, TOP, "above", 0.0),
        (LEFT, RIGHT, "above", 0.0),
        (LEFT, LEFT, "left of", 0.0),
        # Overlap 1/3 beyond 0.1: 0.1 / (1/3).
        (Box(0, 0, 0.4, 0.4, 1), Box(0.2, 0, 0.6, 0.4, 1), "left of", 0.3),
        # Centres 0.5 apart along x, 0 along y: the published rule asks for one axis alone.
        (LEFT, RIGHT, "next to", 1.0),
        # 0.6 apart along both: (150 / 512) / 0.6.
        (Box(0, 0, 0.2, 0.2, 1), Box(0.6, 0.6, 0.8, 0.8, 1), "near", 150 / 512 / 0.6),
        # 0.2 and 0.25 apart: within 0.29.
        (Box(0, 0, 0.2, 0.2, 1), Box(0.2, 0.25, 0.4, 0.45, 1), "on side of", 1.0),
    ],
)
def test_position_by_hand(first, second, locality, expected):
    assert position_score(first, second, locality) == pytest.approx(expected, abs=1e-6)


def test_mirrored_boxes_swap_left_and_right():
    rng = np.random.default_rng(0)
    for _ in range(50):
        x, y, w, h = rng.uniform(0, 0.5, (4, 2))
        first, second = (Box(*map(float, (x[i], y[i], x[i] + w[i], y[i] + h[i], 1))) for i in range(2))
        mirrored = [Box(1 - box.x2, box.y1, 1 - box.x1, box.y2, 1) for box in (first, second)]
        turned = [Box(box.y1, box.x1, box.y2, box.x2, 1) for box in (first, second)]
        left = position_score(first, second, "left of")
        assert position_score(*mirrored, "right of") == pytest.approx(left, abs=1e-6)
        assert position_score(second, first, "right of") == pytest.approx(left, abs=1e-6)
        assert position_score(*turned, "above") == pytest.approx(left, abs=1e-6)


def test_spatial_score_by_hand():
    asked = SpatialInfo("cat", "dog", "left of")
    assert spatial_score({}, asked) == 0.0
    assert spatial_score({"cat": [LEFT], "dog": []}, asked) == pytest.approx(0.2, abs=1e-6)
    assert spatial_score({"cat": [RIGHT], "dog": [LEFT]}, asked) == pytest.approx(0.4, abs=1e-6)
    # The less confident cat on the wrong side does not count.
    cats = [Box(0.8, 0.4, 1.0, 0.6, 0.4), LEFT]
    assert spatial_score({"cat": cats, "dog": [RIGHT]}, asked) == pytest.approx(0.9, abs=1e-6)


def test_numeracy_and_presence_by_hand():
    asked = (NumeracyInfo("cat", 2), NumeracyInfo("dog", 1), NumeracyInfo("cow", 1))
    double = LEFT._replace(x1=0.11, confidence=0.5)
    # Two cats, one seen twice: right; two dogs instead of one: 0.2; no cow: 0.
    found = {"cat": [LEFT, double, RIGHT], "dog": [LEFT, RIGHT]}
    assert numeracy_score(found, asked) == pytest.approx(1.2 / 3, abs=1e-6)
    assert object_score(found, ["cat", "cow", "dog"]) == pytest.approx(2 / 3, abs=1e-6)


def test_what_the_published_code_gets_wrong():
    assert position_score(TOP, BOTTOM, "above", legacy=True) == 0.0
    assert position_score(TOP, BOTTOM, "on top of", legacy=True) == 0.0
    assert position_score(TOP, BOTTOM, "on the top of", legacy=True) == 1.0
    far = Box(0, 0, 0.1, 0.1, 1), Box(0.9, 0.9, 1, 1, 1)
    assert position_score(*far, "near", legacy=True) == 1.0
    assert position_score(*far, "near") == pytest.approx(NEAR_DISTANCE / 0.9, abs=1e-6)
    # One cat found twice: read as corners, centre and extent (0.7, 0.7, 0.2, 0.2) overlap with nothing.
    twice = {"cat": [Box(0.6, 0.6, 0.8, 0.8, 0.9), Box(0.61, 0.6, 0.81, 0.8, 0.8)]}
    assert numeracy_score(twice, [NumeracyInfo("cat", 1)]) == 1.0
    assert numeracy_score(twice, [NumeracyInfo("cat", 1)], legacy=True) == pytest.approx(0.2, abs=1e-6)
    # A name of three words is never found.
    assert build_caption(["ice cream cone"], legacy=True).phrases == ("ice cone",)


def test_legacy_equals_the_published_functions():
    cases = json.loads(gzip.decompress((FIXTURES / "gdino_legacy.json.gz").read_bytes()))
    assert len(cases) == 360
    differs = 0
    for case in cases:
        found = {
            phrase: [Box(x - w / 2, y - h / 2, x + w / 2, y + h / 2, c) for x, y, w, h, c in boxes]
            for phrase, boxes in case["found"].items()
        }
        row = parse_row(case["row"])
        assert judge(row, found, legacy=True) == pytest.approx(case["score"], abs=1e-6), case["row"]
        differs += abs(judge(row, found) - case["score"]) > 1e-6
    assert differs == 34  # above, on top of, near, and counts: the traps are in the cases
