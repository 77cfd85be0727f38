"""What a grid tells of finished runs: damaged files, missing numbers, equal seeds, and pictures over several axes."""

import dataclasses
import json
import math
import shutil
import sys

import pytest
from PIL import Image

from stage_grpo.ablation import worker
from stage_grpo.ablation.collapse import end_mean
from stage_grpo.ablation.command import main_ablate
from stage_grpo.ablation.grid import Grid, HeldoutTest
from stage_grpo.ablation.job import Job
from stage_grpo.ablation.page import to_html
from stage_grpo.ablation.picture import draw, to_png
from stage_grpo.ablation.plan import PlannedRun
from stage_grpo.ablation.results import BELOW_BEST, collect, guarded
from stage_grpo.ablation.seeds import mean_over_seeds, paired_over_seeds
from stage_grpo.ablation.table import difference_table, main_table, notes, to_markdown
from stage_grpo.benchmarks import get_benchmark
from stage_grpo.config import StageConfig
from stage_grpo.evaluation.scores import Scores
from stage_grpo.run_record import RunRecord

TEST = HeldoutTest("shapes")
COLUMNS = list(get_benchmark("shapes").columns)
STEPS = 20


def write_scores(folder, value):
    """A test of two images a category, all of which score the value."""
    records = []
    for i, tag in enumerate([column for column in COLUMNS for _ in range(2)]):
        path = f"{i:05d}/samples/00000.png"
        about = {"path": path, "index": i, "sample": 0, "prompt": f"prompt {i}", "tag": tag}
        records.append({**about, "scores": {"strict": value, "graded": value}})
        (folder / "images" / path).parent.mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(folder / "images" / path)
    lines = dict.fromkeys((*COLUMNS, "overall", "heldout"), value)
    sides = dict.fromkeys(("strict", "graded"), lines)
    none = {"num_unscored": {}, "diversity": {}, "missing": {}, "problems": [], "settings": {}, "versions": {}}
    fields = {"ci95": {}, "num_images": len(records), "num_prompts": len(records), "partial": False, **none}
    Scores("shapes", COLUMNS, sides, per_image=records, **fields).save(folder / "scores.json")
    (folder / "result.json").write_text('{"steps": 20}')


def write_run(folder, value, kl):
    """A finished run whose KL is the value given, or the last values of a list."""
    write_scores(folder, value)
    kls = [0.1] * STEPS
    kls[-2:] = kl if isinstance(kl, list) else [kl, kl]
    rows = [{"step": i, "loss": 0.0, "kl": kl, "entropy/reference": 5.0} for i, kl in enumerate(kls, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def planned(tmp_path):
    """Writes the finished runs of a grid and gives both; a run's score and KL are those of its variant and seed."""

    def write(scores, kls=None, axes=None, name="toy"):
        count = len(next(iter(scores.values())))
        axes = {axis: {value: {} for value in values} for axis, values in (axes or {}).items()}
        variants = {variant: {} for variant in scores}
        grid = Grid(name, "T", "C", "S", "base.yaml", variants, "grpo", TEST, axes=axes)
        if not (tmp_path / "before").exists():
            write_scores(tmp_path / "before", 0.5)
        config, before = StageConfig(output_dir=str(tmp_path)), Job(tmp_path / "before", {}, TEST, 0)
        runs = []
        for i, cell in enumerate(grid.cells):
            for seed in range(count):
                folder = tmp_path / "runs" / f"{name}_{i}_seed{seed}"
                write_run(folder, scores[cell.variant][seed], (kls or {}).get(cell.variant, [0.2] * count)[seed])
                runs.append(PlannedRun(cell, seed, config, Job(folder, {}, TEST, STEPS), before))
        return grid, runs

    return write


def tear(path):
    path.write_bytes(path.read_bytes()[:-8])


def test_a_run_that_cannot_be_read_is_left_out_and_its_remedy_told(planned):
    grid, runs = planned({"grpo": [0.5, 0.6, 0.7, 0.8], "stage": [0.6, 0.7, 0.8, 0.9]})
    folders = [run.job.folder for run in runs]
    tear(folders[0] / "result.json")  # not finished: it is done again
    tear(folders[1] / "scores.json")
    tear(folders[2] / "scores.per_image.jsonl")
    (folders[4] / "metrics.jsonl").unlink()
    results = collect(grid, runs)
    assert [run.plan.job.folder for run in results.runs] == [folders[i] for i in (3, 5, 6, 7)]
    assert results.missing[0] == folders[0].name and len(results.missing) == 4
    for i, said in zip((1, 2, 4), results.missing[1:]):
        assert said.startswith(f"{folders[i]} (") and said.endswith(f"; delete {folders[i]} to run it again)")
    assert f"{folders[1] / 'scores.json'} cannot be read: " in results.missing[1]
    assert "is of another evaluation" in results.missing[2] and "metrics.jsonl holds no step" in results.missing[3]
    assert results.missing[1] in to_markdown(results) and results.to_json()["missing"] == results.missing
    assert to_html(results) and to_png(results)
    # What is told heals it: without its folder the run is not finished, and so is made again.
    shutil.rmtree(folders[1])
    assert not runs[1].job.is_finished and collect(grid, runs).missing[1] == folders[1].name


def test_the_test_before_training_is_named_where_that_is_torn(planned, tmp_path):
    grid, runs = planned({"grpo": [0.5]})
    tear(tmp_path / "before" / "scores.json")
    with pytest.raises(ValueError, match=f"'toy' has no finished run .*; delete {tmp_path / 'before'} to run it"):
        collect(grid, runs)


@pytest.mark.parametrize("content", ["", '{"steps": ', "[]", "\udcff"])
def test_a_torn_result_is_no_result(tmp_path, monkeypatch, content):
    job, done = Job(tmp_path, {}, TEST, 1), []
    monkeypatch.setattr(worker, "run_job", done.append)
    monkeypatch.setattr(worker, "_end_with_parent", lambda: None)
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path)])
    (tmp_path / "result.json").write_bytes(content.encode(errors="surrogateescape"))
    worker.main()
    assert not job.is_finished and done == [tmp_path]
    (tmp_path / "result.json").write_text("{}")
    worker.main()
    assert job.is_finished and done == [tmp_path]


def test_a_damaged_grid_takes_no_other_along(planned, tmp_path, monkeypatch):
    grids, plans = {}, {}
    for name in ("first", "second"):
        grids[name], plans[name] = planned({"grpo": [0.5], "stage": [0.6]}, name=name)
    for run in plans["first"]:
        tear(run.job.folder / "scores.json")
    monkeypatch.setattr("stage_grpo.ablation.grid.load_grid", grids.get)
    monkeypatch.setattr("stage_grpo.ablation.plan.plan_runs", lambda grid, *_: plans[grid.name])
    monkeypatch.setattr("stage_grpo.ablation.runs.run_jobs", lambda *_: [])
    words = ["first", "second", "--out", str(tmp_path / "out")]
    text, code = main_ablate("stage ablate", words)
    assert code == 1 and "grid 'first' has no finished run that can be read" in text
    assert (tmp_path / "out" / "second" / "picture.png").is_file() and "| stage | 1 | 0.600 |" in text
    assert main_ablate("stage ablate", words[1:])[1] == 0


def test_a_deleted_image_leaves_an_empty_place(planned):
    grid, runs = planned({"grpo": [0.5], "stage": [0.6]})
    whole = to_html(collect(grid, runs))
    shutil.rmtree(runs[0].job.folder / "images")
    thinned = to_html(collect(grid, runs))
    assert whole.count('class="pixels"') == thinned.count('class="pixels"') == 3 * len(COLUMNS)
    assert (whole.count(", no image"), thinned.count(", no image")) == (0, len(COLUMNS))


def test_a_mean_of_fewer_seeds_than_runs_says_so(planned):
    kls = {"stage": [[None, None], 0.2], "grpo": [0.3, 0.5]}
    results = collect(*planned({"grpo": [0.5, 0.6], "stage": [0.6, 0.8]}, kls))
    head, _, grpo, stage = main_table(results)
    place = head.index("KL")
    assert (grpo[place], stage[place], stage[1]) == ("0.400", "0.200 (1 of 2)", "2")
    head, difference = difference_table(results)
    assert difference[head.index("KL")] == "-0.300 (1 of 2)" and "(" not in difference[1]
    assert "0.200 (1 of 2)" in to_html(results) and to_png(results)


def test_a_map_and_a_picture_of_means_tell_of_fewer_seeds_too(planned):
    scores, kls = {"grpo": [0.5, 0.6], "stage": [0.6, 0.7]}, {"stage": [[None, None], 0.2]}
    page = to_html(collect(*planned(scores, kls, {"a": "12", "b": "3"})))
    assert page.count("1 of 2 at") == 2 and "stage: KL at the end (1 of 2 at a = 1, b = 3; 1 of 2 at a = 2, b" in page
    results = collect(*planned(scores, kls, {"a": "1234"}, name="row"))
    assert [[text.get_text() for text in panel.texts] for panel in draw(results).axes] == [[], [], ["1 of 2"] * 4]


def test_a_minority_of_steps_gives_no_end_mean():
    def end(*last):
        rows = [{"step": i, "loss": 0.0, "kl": 0.1} for i in range(36)]
        return end_mean([*rows, *({"step": 36 + i, "loss": 0.0, **row} for i, row in enumerate(last))], "kl")

    none, half = {"kl": None}, {"kl": 0.5}
    assert end(none, none, none, half) is None and end(none, none, {"kl": math.nan}, half) is None
    assert end(none, half, none, half) == 0.5
    assert end({}, {}, {}, half) == 0.5  # of several updates a rollout, some metrics are of one


def heldout(step, score):
    return {"step": step, "heldout/score": score}


def test_the_loss_since_the_best_test_is_that_of_the_last_step(tmp_path):
    def below(rows, abandoned=()):
        return guarded(RunRecord(tmp_path, {}, {}, {}, list(rows), list(abandoned), []))[BELOW_BEST]

    steps = [{"step": step, "loss": 1.0} for step in (10, 20)]
    assert below([heldout(20, 0.4)]) == 0.0  # a single test
    assert below([heldout(0, 0.6), *steps, heldout(20, 0.5)]) == pytest.approx(0.1)
    taken_back = [heldout(20, 0.75), heldout(20, None)]
    assert below([heldout(0, 0.6), *steps, heldout(20, 0.5)], taken_back) == pytest.approx(0.25)
    assert below([heldout(0, 0.6), *steps]) is None
    assert below([heldout(0, 0.6), heldout(10, 0.5), *steps, heldout(20, None)]) is None


def test_equal_seeds_have_no_spread_to_judge_by(planned):
    for mean in (mean_over_seeds([0.25, 0.25]), paired_over_seeds({0: 0.57, 1: 0.56}, {0: 0.32, 1: 0.31})):
        assert mean.value == pytest.approx(0.25)
        assert (mean.low, mean.high, mean.p_value, mean.num_seeds) == (None, None, None, 2)
    results = collect(*planned({"grpo": [0.5, 0.5], "stage": [0.75, 0.75]}))
    head, row = difference_table(results)
    assert row[:3] == ["stage - grpo", "+0.250", "-"] and head[2] == "p"
    assert main_table(results)[3][2] == "0.750"
    assert any("no spread to judge by" in note for note in notes(results))
    page = to_html(results)
    assert 'class="value flat">+0.250' in page and "strict; 2 seeds: the same in all, so no spread" in page
    dots = [line for line in draw(results).axes[2].lines if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots] == [0.5, 0.75] and to_png(results)


AXES = {"a": "21", "b": "43", "c": "65"}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_picture_over_any_number_of_axes(planned, count):
    axes = dict(list(AXES.items())[:count]) if count > 1 else {"a": "2143"}
    grid, runs = planned({"grpo": [0.5], "stage": [0.6]}, axes=axes)
    results = collect(grid, runs)
    assert to_png(results).startswith(b"\x89PNG")
    panels = draw(dataclasses.replace(results, lines=results.lines[::-1])).axes
    if count == 2:
        assert [panel.get_title() for panel in panels[:2]] == ["grpo: strict", "stage: strict"]
        return
    assert [panel.get_title().split(" (")[0] for panel in panels] == ["strict", "strict held-out", "KL"]
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert sorted(names[:2]) == sorted(cell.label for cell in grid.cells[:2])
    blocks = [{name.split(", ", 1)[1] for name in names[i : i + 2]} for i in range(0, len(names), 2)]
    assert all(len(block) == 1 for block in blocks)
    wanted = [cell.label.split(", ", 1)[1] for cell in grid.cells if cell.variant == "grpo"]
    assert [next(iter(block)) for block in blocks] == wanted


def test_a_line_without_runs_moves_no_rule(planned):
    grid, runs = planned({"grpo": [0.5], "stage": [0.6]}, axes=AXES)
    (runs[0].job.folder / "result.json").unlink()
    panel = draw(collect(grid, runs)).axes[0]
    rules = [line.get_ydata()[0] for line in panel.lines if line.get_linewidth() == 0.5]
    assert rules == [0.5, 2.5, 4.5, 6.5, 8.5, 10.5, 12.5]
