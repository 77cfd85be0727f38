"""GenEval-style training prompts: worded as the benchmark words them, one of each picture, none of the benchmark's."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from stage_grpo.benchmarks import GENEVAL_CATEGORIES
from stage_grpo.data import load_rows
from stage_grpo.prompt_sets import geneval_prompts
from stage_grpo.prompt_sets.benchmark_prompts import FINGERPRINTS, is_benchmark_prompt
from stage_grpo.prompt_sets.command import main_build_geneval
from stage_grpo.prompt_sets.geneval_prompts import PromptRecipe, build_rows, num_per_category, unseen_rows
from stage_grpo.prompt_sets.vocabulary import COLORS, OBJECT_NAMES, plural, with_article
from stage_grpo.rewards.geneval import parse_metadata
from stage_grpo.types import PromptRow

OFFICIAL = Path(__file__).parents[2] / "shared" / "data" / "geneval"
OPPOSITE = {"right of": "left of", "below": "above"}
RATIO = (0, 1, 7, 1, 4, 5)
GOLDEN = [
    "a photo of a toilet and a bird",
    "a photo of three potted plants",
    "a photo of four bottles",
    "a photo of a pink bear and an orange knife",
    "a photo of a surfboard right of a chair",
    "a photo of four computer mice",
]
"""The first six of 300 prompts with seed 0: they must never change."""
NUMBER = {2: "two", 3: "three", 4: "four"}


def picture(metadata):
    """What a prompt asks for, however it words it: an oracle that shares nothing with the generator."""
    clauses = [(clause["class"], clause["count"], clause.get("color")) for clause in metadata["include"]]
    position = metadata["include"][-1].get("position")
    if position is None:
        return frozenset(clauses)
    target, placed = clauses
    relation = position[0]
    return (target, OPPOSITE[relation], placed) if relation in OPPOSITE else (placed, relation, target)


def worded(metadata):
    """The benchmark's template of each category, from the metadata alone."""
    parts = []
    for clause in metadata["include"]:
        name = f"{clause['color']} {clause['class']}" if "color" in clause else clause["class"]
        parts.append(("an " if name[0] in "aeiou" else "a ") + name)
    first = metadata["include"][0]
    if metadata["tag"] == "counting":
        ending = "es" if first["class"][-1] == "s" else "s"
        return f"a photo of {NUMBER[first['count']]} {first['class']}{ending}"
    if metadata["tag"] == "position":
        return f"a photo of {parts[1]} {metadata['include'][1]['position'][0]} {parts[0]}"
    return "a photo of " + " and ".join(parts)


def rows_of(tag, num=None, **options):
    return list(islice(unseen_rows(tag, PromptRecipe(RATIO, 1, **options)), num))


def test_vocabulary_is_cocos():
    assert len(OBJECT_NAMES) == len(set(OBJECT_NAMES)) == 80
    assert OBJECT_NAMES[:2] == ("person", "bicycle") and OBJECT_NAMES[-2:] == ("hair drier", "toothbrush")
    assert len(set(COLORS)) == 10


@pytest.mark.parametrize(
    ("name", "english", "benchmark"),
    [
        ("giraffe", "giraffes", "giraffes"),
        ("bus", "buses", "buses"),
        ("wine glass", "wine glasses", "wine glasses"),
        ("bench", "benches", "benchs"),
        ("toothbrush", "toothbrushes", "toothbrushs"),
        ("knife", "knives", "knifes"),
        ("sheep", "sheep", "sheeps"),
        ("person", "people", "persons"),
        ("computer mouse", "computer mice", "computer mouses"),
        ("scissors", "pairs of scissors", "scissorses"),
    ],
)
def test_plurals(name, english, benchmark):
    assert plural(name) == english
    assert plural(name, "benchmark") == benchmark


def test_articles():
    names = ["apple", "bench", "orange", "umbrella", "skis", "hair drier"]
    assert [with_article(name) for name in names] == [
        "an apple",
        "a bench",
        "an orange",
        "an umbrella",
        "a skis",
        "a hair drier",
    ]


def test_shares_are_rounded_by_largest_remainder():
    # Of 18 shares, 100 rows: 5.56, 38.89, 5.56, 22.22, 27.78; floors make 97, the rest goes to .89, .78 and .56.
    assert list(num_per_category(RATIO, 100).values()) == [0, 6, 39, 5, 22, 28]
    assert list(num_per_category((1, 1, 1, 1, 1, 1), 8).values()) == [2, 2, 1, 1, 1, 1]


def test_rows_follow_from_the_seed_alone():
    prompts = [row.prompt for row in build_rows(PromptRecipe(RATIO, 300))]
    assert prompts[:6] == GOLDEN
    assert prompts == [row.prompt for row in build_rows(PromptRecipe(RATIO, 300))]
    assert set(prompts) != {row.prompt for row in build_rows(PromptRecipe(RATIO, 300, seed=1))}


def test_more_rows_keep_those_of_fewer():
    few, many = ({row.prompt for row in build_rows(PromptRecipe(RATIO, num))} for num in (90, 360))
    assert few < many


@pytest.mark.parametrize("plurals", ["english", "benchmark"])
def test_every_row_says_what_its_metadata_ask_for(plurals):
    rows = build_rows(PromptRecipe(RATIO, 413, plurals=plurals))
    assert Counter(row.metadata["tag"] for row in rows) == {
        tag: num for tag, num in num_per_category(RATIO, 413).items() if num
    }
    for row in rows:
        parse_metadata(row.metadata)
        assert row.metadata["prompt"] == row.prompt
        if plurals == "benchmark" or row.metadata["tag"] != "counting":
            assert row.prompt == worded(row.metadata)
        if row.metadata["tag"] == "counting":
            (asked,) = row.metadata["include"]
            assert row.metadata["exclude"] == [{"class": asked["class"], "count": asked["count"] + 1}]


@pytest.mark.parametrize(
    ("tag", "exist"), [("single_object", 0), ("two_object", 3160 - 99), ("counting", 240 - 80), ("colors", 790 - 94)]
)
def test_all_pictures_but_the_benchmarks_exist_once(tag, exist):
    rows = rows_of(tag)
    assert len(rows) == len({picture(row.metadata) for row in rows}) == len({row.prompt for row in rows}) == exist
    assert not any(is_benchmark_prompt(row.prompt) for row in rows)


@pytest.mark.parametrize("tag", ["position", "color_attr"])
def test_pictures_of_two_objects_exist_once(tag):
    rows = rows_of(tag, 1500)
    assert len(rows) == len({picture(row.metadata) for row in rows}) == 1500
    for row in rows:
        one, other = row.metadata["include"]
        assert one["class"] != other["class"]
        assert tag == "position" or (one["color"] != other["color"] and "person" not in (one["class"], other["class"]))


@pytest.mark.parametrize("tag", GENEVAL_CATEGORIES[1:])
def test_a_benchmark_picture_is_left_out_in_every_wording(tag, monkeypatch):
    before = rows_of(tag, 20)
    gone = before[7]
    named = [clause["class"] for clause in gone.metadata["include"]]
    # The benchmark says it the other way round, or in its own plural.
    monkeypatch.setattr(
        geneval_prompts,
        "is_benchmark_prompt",
        lambda prompt: is_benchmark_prompt(prompt) or prompt == mirrored(gone.metadata, named),
    )
    pictures = [picture(row.metadata) for row in rows_of(tag, 19)]
    assert pictures == [picture(row.metadata) for row in before if row is not gone]


def mirrored(metadata, named):
    if len(named) == 1:
        return worded(metadata)
    one, other = metadata["include"]
    if "position" in other:
        both = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        swapped = [{**other, "position": None}, {**one, "position": [both[other["position"][0]], 0]}]
    else:
        swapped = [other, one]
    return worded({**metadata, "include": swapped})


def test_fingerprints_are_of_553_prompts():
    assert len(FINGERPRINTS) == 553
    assert is_benchmark_prompt("a photo of a bench") and is_benchmark_prompt(" A photo of  two clocks.\n")
    assert not is_benchmark_prompt("a photo of a unicorn") and not is_benchmark_prompt("")


def test_official_prompts_are_all_kept_out():
    """On the benchmark's own file, where it lies beside the repository; without it, on what is known of it."""
    path = OFFICIAL / "evaluation_metadata.jsonl"
    official = load_rows(path) if path.exists() else [PromptRow("a photo of a bench", {})]
    assert all(is_benchmark_prompt(row.prompt) for row in official)
    taken = {picture(row.metadata) for row in official if row.metadata}
    for tag in GENEVAL_CATEGORIES:
        assert not taken & {picture(row.metadata) for row in rows_of(tag, 1500)}


def test_official_names_are_ours():
    path = OFFICIAL / "object_names.txt"
    official = path.read_text().split("\n") if path.exists() else list(OBJECT_NAMES)
    assert tuple(name for name in official if name) == OBJECT_NAMES


def test_larger_counts_are_words_too():
    rows = rows_of("counting", max_count=10)
    assert len(rows) == 80 * 9 - 80
    assert "a photo of ten benches" in {row.prompt for row in rows}
    assert {row.metadata["include"][0]["count"] for row in rows} == set(range(2, 11))


def test_repeat_uses_every_prompt_before_any_twice():
    rows = build_rows(PromptRecipe(RATIO, 1800, repeat=True))
    times = Counter(row.prompt for row in rows if row.metadata["tag"] == "counting")
    assert sum(times.values()) == 700 and len(times) == 160 and set(times.values()) == {4, 5}
    assert max(Counter(row.prompt for row in rows if row.metadata["tag"] != "counting").values()) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num": 1000}, r"^counting: 389 prompts asked for, but only 160 exist .*; lower --num to 413, raise --max-c"),
        ({"num": 12000, "ratio": (1, 0, 0, 0, 0, 0)}, r"^single_object: 12000 .* only 0 exist .* share 0 in --ratio$"),
        ({"num": 12, "ratio": (1, 1, 1, 1, 1, 1), "repeat": True}, r"^single_object: 2 prompts .* only 0 exist"),
        ({"num": 697, "ratio": (0, 0, 0, 1, 0, 0)}, r"^colors: 697 .* only 696 exist .*; lower --num to 696, give"),
        ({"num": 5, "ratio": (1, 2, 3)}, r"^ratio=1:2:3 must be six whole numbers"),
        ({"num": 5, "ratio": (0, 0, 0, 0, 0, 0)}, r"^ratio=0:0:0:0:0:0 must be .* not all 0"),
        ({"num": 5, "ratio": (0, -1, 7, 1, 4, 5)}, r"^ratio=0:-1:7:1:4:5 must be"),
        ({"num": 0}, r"^num=0 must be at least 1"),
        ({"num": 5, "max_count": 11}, r"^max_count=11 must be in 2 to 10"),
        ({"num": 5, "plurals": "german"}, r"^plurals='german' is unknown; use one of english, benchmark"),
    ],
)
def test_impossible_recipes_name_the_value(values, message):
    with pytest.raises(ValueError, match=message):
        build_rows(PromptRecipe(**({"ratio": RATIO} | values)))


def test_the_number_an_error_proposes_is_the_largest_that_works():
    assert len(build_rows(PromptRecipe(RATIO, 413))) == 413
    with pytest.raises(ValueError, match="lower --num to 413"):
        build_rows(PromptRecipe(RATIO, 414))


def test_command_writes_what_the_loader_reads(tmp_path):
    out = tmp_path / "new" / "train.jsonl"
    words = ["--ratio", "0:1:7:1:4:5", "--num", "18", "--seed", "3", "--out", str(out)]
    said = main_build_geneval("stage data build-geneval", words)
    assert said == f"wrote 18 prompts to {out}: 1 two_object, 7 counting, 1 colors, 4 position, 5 color_attr"
    assert load_rows(out) == [
        PromptRow(row.prompt, json.loads(json.dumps(row.metadata)))
        for row in build_rows(PromptRecipe(RATIO, 18, seed=3))
    ]
    assert [path.name for path in out.parent.iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num", "5"], "the following arguments are required: --out"),
        (["--num", "5", "--out", "p.txt"], r"p\.txt: prompts are written as JSON lines"),
        (["--num", "5", "--out", "p.jsonl", "--ratio", "1:x"], "ratio '1:x' is not whole numbers"),
        (["--num", "five", "--out", "p.jsonl"], "argument --num: invalid int value: 'five'"),
        (["--num", "999", "--out", "p.jsonl"], "only 160 exist"),
    ],
)
def test_a_wrong_command_writes_nothing(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        main_build_geneval("stage data build-geneval", words)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "taken.jsonl").mkdir()
    for out in (tmp_path / "taken.jsonl", tmp_path / "taken.jsonl" / "sub" / ("x" * 300 + ".jsonl")):
        with pytest.raises(OSError, match=rf"^cannot write {out} \(.*\); choose another by --out$"):
            main_build_geneval("stage data build-geneval", ["--num", "5", "--out", str(out)])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
