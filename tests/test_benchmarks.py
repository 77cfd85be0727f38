"""The table of benchmarks, and their prompts: official files where they lie beside us, small ones like them else."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest

from stage_grpo.benchmark_rows import benchmark_rows
from stage_grpo.benchmarks import BENCHMARKS, STRICT, Benchmark, Scorer, get_benchmark
from stage_grpo.images.layouts import LAYOUTS, plan_images
from stage_grpo.prompt_sets.fetch import fetch
from stage_grpo.prompt_sets.sources import PROMPT_SETS
from stage_grpo.rewards.registry import REWARDS
from stage_grpo.shapes import prompts as shapes_prompts

OFFICIAL = Path(__file__).parents[2] / "shared" / "data"
COUNTS = {
    "geneval": dict(zip(BENCHMARKS["geneval"].columns, (80, 99, 80, 94, 100, 100))),
    "t2i_compbench": dict.fromkeys(BENCHMARKS["t2i_compbench"].columns, 300),
    "drawbench": dict(zip(BENCHMARKS["drawbench"].columns, (25, 10, 19, 20, 20, 10, 10, 20, 7, 38, 21))),
    "ocr": {"up to 5": 20, "6 to 10": 147, "11 to 20": 740, "over 20": 111},
}
"""Prompts of each category in the official files."""
FIRST_AND_LAST = {
    "geneval": ("a photo of a bench", "a photo of a purple computer keyboard and a blue scissors"),
    "t2i_compbench": ("a green bench and a blue bowl", None),
    "drawbench": ("A red colored car.", None),
    "ocr": ('A high-fashion runway with a sleek, modern backdrop displaying "Spring Collection 2024".', None),
}


@pytest.mark.parametrize("name", COUNTS)
def test_official_prompts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the official files where they lie beside the repository; elsewhere on files of the same form."""
    benchmark = BENCHMARKS[name]
    monkeypatch.setenv("STAGE_DATA", str(tmp_path / "cache"))
    if (OFFICIAL / name).is_dir():
        fetch(PROMPT_SETS[name], source=OFFICIAL)
        rows, expected = benchmark_rows(benchmark), COUNTS[name]
        assert rows[0].prompt.startswith(FIRST_AND_LAST[name][0])
    else:
        rows, expected = benchmark_rows(benchmark, write_small(name, tmp_path)), dict.fromkeys(benchmark.columns, 1)
    assert Counter(row.metadata["tag"] for row in rows) == expected
    assert all(row.metadata["prompt"] == row.prompt == row.prompt.strip() for row in rows)
    # Every image of the official protocol gets a file of its own.
    planned = plan_images(LAYOUTS[benchmark.layout], rows, benchmark.images_per_prompt)
    assert len({image.path for image in planned}) == len(rows) * benchmark.images_per_prompt


def write_small(name: str, folder: Path) -> Path:
    """A prompt of each category, in files of the official form."""
    columns, place = BENCHMARKS[name].columns, folder / "prompts"
    place.mkdir()
    if name == "geneval":
        rows = [{"tag": c, "include": [{"class": "cow", "count": 1}], "prompt": f"a photo of {c}"} for c in columns]
        (place / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name == "drawbench":
        with (place / "drawbench.csv").open("w", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows(
                [("Prompts", "Category"), *((f"{c}!", c) for c in columns)]
            )
    elif name == "ocr":
        texts = ("Open", "Opening", "Opening hours", "Opening hours of the shop")
        (place / "test.txt").write_text("".join(f'A sign that says "{text}".\n' for text in texts))
    else:
        for column in columns:
            suffix = "json" if name == "hps" else "txt"
            text = json.dumps([f"a cow, {column}"]) if name == "hps" else f"a cow of {column}\n"
            (place / (f"{column}.json" if name == "hps" else f"{column}_val.{suffix}")).write_text(text)
    return place


@pytest.mark.parametrize("name", [*COUNTS, "hps"])
def test_prompts_of_the_official_form(name: str, tmp_path: Path) -> None:
    benchmark = BENCHMARKS[name]
    rows = benchmark_rows(benchmark, write_small(name, tmp_path))
    assert [row.metadata["tag"] for row in rows] == list(benchmark.columns)


def test_lengths_of_texts_are_those_of_the_released_buckets(tmp_path: Path) -> None:
    """White space does not count, and every bucket includes its upper end."""
    texts = ("12345", "1 2 3 4 5 6", "1234567890", "12345678901", "x" * 20, "x" * 21)
    path = tmp_path / "ocr.txt"
    path.write_text("".join(f'a sign "{text}"\n' for text in texts))
    tags = [row.metadata["tag"] for row in benchmark_rows(BENCHMARKS["ocr"], path)]
    assert tags == ["up to 5", "6 to 10", "6 to 10", "11 to 20", "11 to 20", "over 20"]


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("hps", {"anime.json": "<html>"}, "is no JSON list of prompts"),
        ("hps", {"anime.json": '["a", ""]'}, "must be a JSON list of prompts"),
        ("hps", {"cats.json": "[]", "dogs.json": "[]"}, "none is named like a category of 'hps'"),
        ("geneval", {"p.txt": "a cow\n"}, "prompt 'a cow' has tag None, which is no category of 'geneval'"),
        ("drawbench", {"p.csv": "Prompts,Category\na,Coulours\n"}, "has tag 'Coulours', which is no category"),
        ("ocr", {"readme.md": "x"}, "holds no prompt file"),
    ],
)
def test_wrong_prompts(name: str, files: dict[str, str], message: str, tmp_path: Path) -> None:
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        benchmark_rows(BENCHMARKS[name], tmp_path)


def test_prompts_that_were_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGE_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="get it by: stage data fetch geneval"):
        benchmark_rows(BENCHMARKS["geneval"])
    with pytest.raises(ValueError, match="'shapes' has no official prompts; give a prompt file"):
        benchmark_rows(BENCHMARKS["shapes"])


# --- the table -------------------------------------------------------------------------------------------


def test_the_table_agrees_with_the_rest_of_the_project() -> None:
    assert BENCHMARKS["shapes"].columns == shapes_prompts.CATEGORIES
    assert BENCHMARKS["shapes"].shared_columns == shapes_prompts.SHARED_CATEGORIES
    for benchmark in BENCHMARKS.values():
        assert benchmark.prompt_set is None or benchmark.prompt_set in PROMPT_SETS
        assert {scorer.reward for scorer in benchmark.scorers} - {None} <= set(REWARDS)
    assert [b.measures[0] for b in BENCHMARKS.values()] == [
        STRICT, STRICT, "value", "hps_v2.1", "image_reward", "ocr"
    ]  # fmt: skip


def test_every_column_of_t2i_compbench_has_one_scorer() -> None:
    benchmark = BENCHMARKS["t2i_compbench"]
    assert sorted(c for scorer in benchmark.scorers for c in scorer.columns or ()) == sorted(benchmark.columns)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": ("a", "a")}, "give each one once"),
        ({"columns": ()}, "give each one once"),
        ({"shared_columns": ("c",)}, r"names columns \['c'\]; choose from"),
        ({"scorers": (Scorer("x", "shapes", columns=("c",)),)}, r"names columns \['c'\]; choose from"),
        ({"scorers": ()}, "has no scorer"),
        ({"layout": "tree"}, "has layout 'tree'; choose from geneval, t2i_compbench, hps, flat"),
        ({"images_per_prompt": 0}, "draws 0 images a prompt"),
    ],
)
def test_wrong_lines_of_the_table(change: dict, message: str) -> None:
    line = Benchmark("x", "X", ("a", "b"), (Scorer("strict", "shapes"),), 1, "geneval", "")
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(line, **change)
    with pytest.raises(ValueError, match="unknown benchmark 'x'; known are shapes"):
        get_benchmark("x")
