"""Published results: figures as the papers print them, and tables that are refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest

from stage_grpo.benchmarks import BENCHMARKS, GENEVAL_CATEGORIES
from stage_grpo.comparison.published import parse_published, published_rows

ROOT = Path(__file__).parents[1]
TABLE = {
    "benchmark": "hps",
    "measure": "hps_v2.1",
    "unit": "HPS v2.1 x 100",
    "decimals": 2,
    "source": "somewhere",
    "columns": ["overall", "photo"],
    "rows": {"A": [28.5, None], "B": [29, 30.0]},
}


def by_name(benchmark, measure):
    return {row.name: row for row in published_rows(benchmark, measure)}


def test_figures_of_the_paper():
    # Typed in from arXiv:2509.25027, not copied from the file under test.
    geneval = by_name("geneval", "strict")
    assert dict(geneval["Janus-Pro-7B"].scores) == {
        "overall": 0.78,
        "single_object": 0.98,
        "two_object": 0.86,
        "counting": 0.56,
        "colors": 0.89,
        "position": 0.76,
        "color_attr": 0.63,
    }
    overall = {name: row.scores["overall"] for name, row in geneval.items()}
    assert overall["GRPO baseline"] == 0.86
    assert (overall["STAGE (last)"], overall["STAGE (best)"]) == (0.88, 0.89)
    assert (overall["Janus-Pro-1B, GRPO baseline"], overall["Janus-Pro-1B, STAGE"]) == (0.57, 0.80)
    assert by_name("t2i_compbench", "value")["STAGE (HPS+GDino+Git)"].scores["numeracy"] == 0.5993
    assert by_name("hps", "hps_v2.1")["STAGE"].scores["overall"] == 29.87
    assert by_name("ocr", "ocr")["STAGE"].scores["overall"] == 0.49
    assert by_name("drawbench", "pickscore")["T2I-R1"].scores["overall"] == 22.03
    assert all("2509.25027" in row.source for name in BENCHMARKS for row in published_rows(name))


def test_overall_is_the_mean_of_the_categories_but_for_rounding():
    # Six figures rounded to 0.01 have a mean that is off by at most 0.005, and so is the rounded overall figure.
    checked = 0
    for row in published_rows("geneval"):
        columns = [row.scores[column] for column in GENEVAL_CATEGORIES]
        if None not in columns:
            assert abs(sum(columns) / 6 - row.scores["overall"]) <= 0.01 + 1e-12, row.name
            checked += 1
    assert checked == 19


def test_figures_lie_in_the_range_of_their_measure():
    ranges = {"strict": (0, 1), "value": (0, 1), "ocr": (0, 1), "hps_v2.1": (20, 40), "image_reward": (-3, 3)}
    ranges |= {"pickscore": (15, 30), "deqa": (1, 5), "aesthetic": (1, 10)}
    for benchmark in BENCHMARKS:
        for row in published_rows(benchmark):
            low, high = ranges[row.measure]
            assert all(low <= figure <= high for figure in row.scores.values() if figure is not None), row


def test_what_is_not_published_and_what_is_unknown():
    assert published_rows("shapes") == []
    assert published_rows("hps", "deqa") == []
    assert {row.measure for row in published_rows("hps")} == {"hps_v2.1", "image_reward"}
    with pytest.raises(ValueError, match="unknown benchmark 'dpg'"):
        published_rows("dpg")


def test_parse():
    first, second = parse_published({"tables": [TABLE]})
    assert (first.name, dict(first.scores), first.note) == ("A", {"overall": 28.5, "photo": None}, "")
    assert dict(second.scores) == {"overall": 29.0, "photo": 30.0}
    with pytest.raises(TypeError):
        first.scores["overall"] = 99.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"benchmark": None}, "lacks 'benchmark'"),
        ({"benchmark": "dpg"}, "unknown benchmark 'dpg'"),
        ({"measure": "strict"}, "hps has no measure 'strict'; it has hps_v2.1"),
        ({"decimals": "2"}, "lacks 'decimals'; give it as int"),
        ({"source": None}, "lacks 'source'"),
        ({"columns": ["overall", "overall"]}, "give each once"),
        ({"columns": ["overall", "cartoon"]}, "give each once, of anime"),
        ({"columns": []}, "give each once"),
        ({"rows": {"A": [28.5]}}, "'A'.*does not give one figure for each of 2 columns"),
        ({"rows": {"A": [28.5, "29"]}}, "'29' is no figure"),
        ({"rows": {"A": [28.5, True]}}, "True is no figure"),
        ({"rows": {"A": [28.5, float("nan")]}}, "nan is no figure"),
        ({"rows": {"A": [None, None]}}, "'A' has no figure"),
        ({"rows": {"A": {"overall": 1}}}, "does not give one figure"),
    ],
)
def test_wrong_tables_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_published({"tables": [copy.deepcopy(TABLE) | change]})
    assert "\n" not in str(error.value)


def test_a_note_on_a_row_goes_with_it_in_every_table():
    a, b = parse_published({"tables": [TABLE], "row_notes": {"A": "drawn otherwise"}})
    assert (a.row_note, b.row_note) == ("drawn otherwise", "")
    for notes in ({"C": "drawn otherwise"}, {"A": 1}, ["A"], "A", None):
        with pytest.raises(ValueError, match=r"published_results\.json: the note .* on row .*; write"):
            parse_published({"tables": [TABLE], "row_notes": notes})
    noted = {row.name for name in BENCHMARKS for row in published_rows(name) if row.row_note}
    assert noted == {"T2I-R1"} and "a plan in words" in by_name("ocr", "ocr")["T2I-R1"].row_note


@pytest.mark.parametrize("content", [[], {}, {"tables": {}}, {"tables": ["row"]}, None])
def test_other_files_are_refused(content):
    with pytest.raises(ValueError, match=r"published_results\.json"):
        parse_published(content)


def test_a_measure_has_one_table():
    with pytest.raises(ValueError, match=r"second of hps hps_v2\.1"):
        parse_published({"tables": [TABLE, TABLE]})


def test_an_installed_package_has_the_figures_and_templates(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    built = tmp_path / "stage_grpo"
    source = ROOT / "src" / "stage_grpo"
    for name in ("comparison/published_results.json", "templates/comparison.html.j2"):
        assert (built / name).read_bytes() == (source / name).read_bytes()
