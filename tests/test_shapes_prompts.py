"""Prompts: the split's promises, GenEval's form, and scenes that satisfy their prompt."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from stage_grpo.data import load_rows
from stage_grpo.rewards.geneval import judge
from stage_grpo.shapes.prompts import (
    CATEGORIES,
    HELDOUT_BINDINGS,
    HELDOUT_PAIRS,
    MIRRORS,
    SHARED_CATEGORIES,
    is_heldout,
    mixed_rows,
    rows,
    rows_of,
    sample_scene,
    write_prompts,
)
from stage_grpo.shapes.scenes import COLORS, bounding_box
from stage_grpo.types import Box


def relation_of(row) -> tuple[str, str, str]:
    """The triple a position prompt states, in the direction that uses "left of" or "above"."""
    b, a = (clause["class"] for clause in row.metadata["include"])
    relation = row.metadata["include"][1]["position"][0]
    return (a, relation, b) if relation in ("left of", "above") else (b, MIRRORS[relation], a)


def attribution_of(row) -> frozenset:
    return frozenset((clause["class"], clause["color"]) for clause in row.metadata["include"])


def test_counts_add_up_to_the_whole_world():
    # 5 shapes; 5 x 4 ordered pairs; 5 x 3 counts; 5 x 6 bindings; 20 x 4 relations; 20 x (6 x 5) attributions.
    total = {"single_object": 5, "two_object": 20, "counting": 15, "colors": 30, "position": 80, "color_attr": 600}
    train, heldout = (Counter(row.metadata["tag"] for row in rows(split)) for split in ("train", "heldout"))
    for tag in CATEGORIES:
        shared = tag in SHARED_CATEGORIES
        assert (train[tag] + heldout[tag] == total[tag]) != shared
        assert (train[tag] == heldout[tag] == total[tag]) == shared
    # 2 of 10 pairs in both orders; 5 bindings; 16 from the pairs and 2 x 6 of the remaining 64 in mirrored couples.
    assert [heldout[tag] for tag in ("two_object", "colors", "position")] == [4, 5, 28]


def test_held_out_combinations_never_stand_together_in_a_training_caption():
    for row in rows("train"):
        if row.metadata["tag"] in SHARED_CATEGORIES:
            continue
        words = row.prompt.split()
        for pair in HELDOUT_PAIRS:
            assert not pair <= set(words), row.prompt
        for shape, color in HELDOUT_BINDINGS:
            assert f"{color} {shape}" not in row.prompt
    trained, heldout = (rows_of("position", split) for split in ("train", "heldout"))
    assert not {relation_of(row) for row in trained} & {relation_of(row) for row in heldout}
    trained, heldout = (rows_of("color_attr", split) for split in ("train", "heldout"))
    assert not {attribution_of(row) for row in trained} & {attribution_of(row) for row in heldout}
    # A fifth of the attributions that the pairs and bindings leave over is held out as well.
    spare = [r for r in heldout if not attribution_of(r) & HELDOUT_BINDINGS]
    spare = [r for r in spare if frozenset(c["class"] for c in r.metadata["include"]) not in HELDOUT_PAIRS]
    assert 0.15 < len(spare) / (len(spare) + len(trained)) < 0.25


def test_every_word_of_a_held_out_prompt_is_known_from_training():
    known = {word for row in rows("train") for word in row.prompt.split()}
    assert {word for row in rows("heldout") for word in row.prompt.split()} <= known


def test_metadata_follow_geneval():
    by_prompt = {row.prompt: row.metadata for split in ("train", "heldout") for row in rows(split)}
    assert by_prompt["a photo of three crosses"] == {
        "tag": "counting",
        "include": [{"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
        "prompt": "a photo of three crosses",
    }
    assert by_prompt["a photo of a ring left of a cross"] == {
        "tag": "position",
        "include": [{"class": "cross", "count": 1}, {"class": "ring", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a ring left of a cross",
    }
    assert by_prompt["a photo of a red circle and a blue square"]["include"] == [
        {"class": "circle", "count": 1, "color": "red"},
        {"class": "square", "count": 1, "color": "blue"},
    ]
    assert by_prompt["a photo of a circle and a square"]["include"][1] == {"class": "square", "count": 1}


@pytest.mark.parametrize("tag", CATEGORIES)
def test_sampled_scenes_satisfy_their_prompt_by_the_rules_of_geneval(tag):
    rng = np.random.default_rng(3)
    chosen = [row for split in ("train", "heldout") for row in rows_of(tag, split)]
    for i in rng.integers(0, len(chosen), 60):
        scene = sample_scene(chosen[i], rng)
        boxes = [(obj, Box(*bounding_box(obj), 1.0)) for obj in scene.objects]
        found: dict[str, list[Box]] = {}
        for obj, box in boxes:
            found.setdefault(obj.shape, []).append(box)
        colors = {(obj.shape, box): obj.color for obj, box in boxes}
        verdict = judge(found, chosen[i].metadata, lambda name, own, colors=colors: [colors[name, box] for box in own])
        assert verdict.correct and verdict.score == 1.0, (chosen[i].prompt, verdict.reasons)
        assert len(scene.objects) == sum(clause["count"] for clause in chosen[i].metadata["include"])


def test_what_a_prompt_leaves_open_varies():
    row = rows_of("single_object", "train")[0]
    scenes = [sample_scene(row, np.random.default_rng(seed)) for seed in range(200)]
    assert {scene.objects[0].color for scene in scenes} == set(COLORS)
    assert len({(scene.objects[0].x, scene.objects[0].y) for scene in scenes}) > 100
    assert sample_scene(row, np.random.default_rng(7)) == scenes[7]


def test_mixed_rows_are_balanced_held_out_and_fixed():
    chosen = mixed_rows("heldout", [1] * 6, 180)
    assert Counter(row.metadata["tag"] for row in chosen) == dict.fromkeys(CATEGORIES, 30)
    allowed = {row.prompt for row in rows("heldout")}
    assert {row.prompt for row in chosen} <= allowed
    assert chosen == mixed_rows("heldout", [1] * 6, 180)
    # Small categories repeat evenly: 4 prompts of two objects over 30 rows.
    counts = Counter(row.prompt for row in chosen if row.metadata["tag"] == "two_object")
    assert sorted(counts.values()) == [7, 7, 8, 8]


def test_prompts_survive_their_file(tmp_path):
    chosen = mixed_rows("heldout", [1] * 6, 12)
    write_prompts(tmp_path / "prompts.jsonl", chosen)
    lines = (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [row.metadata for row in chosen]


def test_unknown_names_and_counts_are_named():
    with pytest.raises(ValueError, match="split='test'"):
        rows("test")
    with pytest.raises(ValueError, match="category 'shapes'"):
        rows_of("shapes", "train")
    with pytest.raises(ValueError, match="0 rows cannot be mixed"):
        mixed_rows("heldout", [1] * 6, 0)


def test_mixed_rows_follow_the_ratio():
    chosen = mixed_rows("train", [0, 3, 2, 1, 4, 4], 28)
    tags = [row.metadata["tag"] for row in chosen]
    assert [tags.count(tag) for tag in CATEGORIES] == [0, 6, 4, 2, 8, 8]
    assert not any(is_heldout(row.metadata) for row in chosen)


@pytest.mark.parametrize(("ratio", "num"), [([1, 1], 2), ([0] * 6, 6), ([-1, 1, 1, 1, 1, 1], 4), ([1] * 6, 7)])
def test_mixes_that_cannot_be_are_refused(ratio, num):
    with pytest.raises(ValueError, match=r"ratio=|cannot be mixed"):
        mixed_rows("train", ratio, num)


def test_shipped_prompt_files_are_what_the_code_writes():
    """assets/shapes/*.jsonl come from `stage shapes prompts`."""
    root = Path(__file__).parents[1] / "assets/shapes"
    expected = {"train": mixed_rows("train", [1] * 6, 600), "heldout": mixed_rows("heldout", [1] * 6, 600)}
    for split, wanted in expected.items():
        assert load_rows(root / f"{split}.jsonl") == wanted
