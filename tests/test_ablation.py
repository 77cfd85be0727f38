"""Grids of runs: what a YAML file expands to, what is shared, what seeds say, and that a kill costs nothing."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jaxtyping
import numpy as np
import pytest
import yaml
from filelock import FileLock
from PIL import Image

from stage_grpo import training
from stage_grpo.ablation import worker
from stage_grpo.ablation.collapse import collapse_reasons, end_mean
from stage_grpo.ablation.command import main_ablate
from stage_grpo.ablation.grid import Cell, HeldoutTest, load_grid
from stage_grpo.ablation.job import Job, write_job
from stage_grpo.ablation.picture import draw
from stage_grpo.ablation.plan import PlannedRun, distinct_jobs, plan_runs
from stage_grpo.ablation.results import (
    ALARMS,
    BELOW_BEST,
    DISTANCE,
    ROLLBACKS,
    FinishedRun,
    Line,
    Results,
    _line,
    collect,
    guarded,
)
from stage_grpo.ablation.seeds import mean_over_seeds, paired_over_seeds
from stage_grpo.ablation.table import difference_table
from stage_grpo.ablation.worker import run_job
from stage_grpo.evaluation.scores import Scores
from stage_grpo.evaluation.statistics import Difference
from stage_grpo.guard_record import GuardRecord, append_guard
from stage_grpo.pages import charts
from stage_grpo.run_record import read_run

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "assets" / "shapes"
GRIDS = {
    # Variants x points of the axes, counted by hand.
    "table4": 8,
    "diversity": 5,
    "entropy_loss": 8,
    "entropy_reward": 6,
    "entropy_scope": 7,
    "equal_strength": 7,
    "generalization": 4,
    "group_size": 4 * 4,
    "guidance_in_scoring": 4 * 2,
    "kl_weights": 7,
    "loss_types": 4 * 6,
    "min_reward_std": 4 * 4,
    "readings": 6,
    "guard": 2 * 2,
    "guard_drift": 2 * 2,
    "guard_stable": 2 * 2,
    "stability": 3 * 3 * 2,
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Training prompts that fill one small rollout, and one test prompt of each category."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "train.jsonl").write_text("\n".join((SHAPES / "train.jsonl").read_text().splitlines()[::150]))
    (folder / "heldout.jsonl").write_text("\n".join((SHAPES / "heldout.jsonl").read_text().splitlines()[::100]))
    return folder


@pytest.fixture
def base(prompts, tmp_path):
    return write_base(prompts, tmp_path)


def write_base(prompts, folder):
    """A training configuration of four images a step."""
    values = {
        "output_dir": "unused",
        "model": str(ROOT / "assets" / "tiny-janus-shapes"),
        "train_prompts": str(prompts / "train.jsonl"),
        "rewards": ["shapes"],
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "guidance_scale": 1.0,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "sample_steps": 0,
        "use_cpu": True,
    }
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_grid(start, prompts, name="toy", drop=(), **changes):
    content = {
        "title": "A toy <grid>",
        "claim": "Nothing.",
        "source": "nowhere",
        "base": str(start),
        "variants": {"grpo": {"preset": "grpo"}, "stage": {}},
        "baseline": "grpo",
        "test": {"benchmark": "shapes", "prompts": str(prompts / "heldout.jsonl")},
        **changes,
    }
    path = start.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if key not in drop}, sort_keys=False))
    return path


def test_cells_are_variants_times_axes(base, prompts):
    path = write_grid(
        base,
        prompts,
        settings={"beta": 0.5, "max_steps": 7},
        variants={"grpo": {"preset": "grpo", "epsilon": 0.1}, "stage": {}},
        axes={"beta": [0.1, 0.2], "loss": {"plain": {}, "clipped": {"epsilon": 0.3}}},
    )
    cells = load_grid(path).cells
    assert [cell.label for cell in cells] == [
        f"{variant}, beta={beta}, loss={loss}"
        for beta in (0.1, 0.2)
        for loss in ("plain", "clipped")
        for variant in ("grpo", "stage")
    ]
    assert cells[2].overrides == {"beta": 0.1, "max_steps": 7, "preset": "grpo", "epsilon": 0.3}
    assert cells[5].overrides == {"beta": 0.2, "max_steps": 7}


def test_runs_of_equal_settings_are_one_folder(base, prompts, tmp_path):
    first = load_grid(write_grid(base, prompts, "first"))
    # Another name and another way to say the same: stage without its parts is grpo; logging moves no number.
    parts = {"entropy_reward_weight": 0.0, "reweight_advantages": False, "reweight_kl": False, "logging_steps": 2}
    variants = {"plain": parts, "stage_all": {"entropy_reward_scope": "all"}}
    second = load_grid(write_grid(base, prompts, "second", variants=variants, baseline="plain"))
    planned = {}
    runs = [run for grid in (first, second) for run in plan_runs(grid, tmp_path, [0, 1], planned=planned)]
    names = [run.job.folder.name.rsplit("_", 1)[0] for run in runs]
    assert names[:4] == ["grpo_seed0", "stage_seed0", "grpo_seed1", "stage_seed1"]
    assert names[4:] == ["grpo_seed0", "stage_all_seed0", "grpo_seed1", "stage_all_seed1"]
    jobs = distinct_jobs(runs)
    assert [job.num_steps for job in jobs] == [0] + 6 * [2] and len({run.before.folder for run in runs}) == 1
    # A later call finds the folder under the name that it has.
    renamed = tmp_path / "runs" / f"other_name_{runs[0].job.folder.name[-8:]}"
    renamed.mkdir(parents=True)
    assert plan_runs(second, tmp_path, [0])[0].job.folder == renamed


def test_what_moves_a_number_makes_another_folder(base, prompts, tmp_path):
    def folder(out=tmp_path, max_steps=None, seed=0, **changes):
        return plan_runs(load_grid(write_grid(base, prompts, **changes)), out, [seed], max_steps)[0].job.folder.name

    same = folder()
    assert folder(out=tmp_path / "elsewhere") == same
    guided = {"benchmark": "shapes", "prompts": str(prompts / "heldout.jsonl"), "guidance_scale": 2.0}
    others = [folder(max_steps=3), folder(seed=1), folder(settings={"beta": 0.2}), folder(test=guided)]
    assert len({same, *others}) == 5
    (prompts / "train.jsonl").write_text((prompts / "train.jsonl").read_text() + "\n")
    assert folder() not in {same, *others}


def one_run(base, prompts, out, **settings):
    """The plan of a grid's only run."""
    path = write_grid(base, prompts, settings=settings, variants={"grpo": {"preset": "grpo"}})
    (run,) = plan_runs(load_grid(path), out, [0])
    return run


def test_a_model_is_known_by_its_files(base, prompts, tmp_path):
    def run(model):
        return one_run(base, prompts, tmp_path, model=str(model))

    shipped, copied = ROOT / "assets" / "tiny-janus-shapes", tmp_path / "model"
    shutil.copytree(shipped, copied, copy_function=shutil.copyfile)  # with times of its own
    before, same = run(copied), run(shipped)
    assert (before.job.folder, before.before.folder) == (same.job.folder, same.before.folder)
    with (copied / "model.safetensors").open("ab") as file:
        file.write(b"other weights")
    after = run(copied)
    assert after.job.folder != before.job.folder and after.before.folder != before.before.folder


def test_held_out_tests_make_another_folder(base, prompts, tmp_path):
    def folder(**changes):
        held = {"heldout_benchmark": "shapes", "heldout_prompts": str(prompts / "heldout.jsonl"), **changes}
        return one_run(base, prompts, tmp_path, **held).job.folder

    copy, other = tmp_path / "copy.jsonl", tmp_path / "other.jsonl"
    shutil.copyfile(prompts / "heldout.jsonl", copy)
    other.write_text((SHAPES / "heldout.jsonl").read_text())
    assert folder() == folder(heldout_prompts=str(copy), heldout_keep_images=True, keep_best=False)
    changes = [{"heldout_steps": 1}, {"heldout_measure": "graded"}, {"heldout_num_images": 2}]
    changes += [{"heldout_guidance_scale": 2.0}, {"heldout_prompts": str(other)}]
    assert len({folder(), *(folder(**change) for change in changes)}) == 1 + len(changes)


@pytest.mark.parametrize("guard", ["warn", "stop", "rollback"])
def test_limits_of_the_guard_make_another_folder_where_it_acts(base, prompts, tmp_path, guard):
    acting = {"guard": guard, "save_strategy": "steps", "save_steps": 2}
    changes = [{}, {"guard_max_kl": 3.0}, {"guard_lr_factor": 0.25}, {"save_steps": 4}, {"save_total_limit": 9}]
    folders = {
        plan_runs(load_grid(write_grid(base, prompts, settings={**acting, **change})), tmp_path, [0])[0].job.folder
        for change in changes
    }
    assert len(folders) == (1 if guard == "warn" else len(changes))


def test_training_prompts_can_be_restricted(base, prompts, tmp_path):
    changes = {"settings": {"train_prompts": str(SHAPES / "train.jsonl")}, "train_categories": ["colors", "counting"]}
    (run, _) = plan_runs(load_grid(write_grid(base, prompts, **changes)), tmp_path, [0])
    assert not run.job.folder.exists()
    write_job(run.job, keep_weights=False)
    config = yaml.safe_load((run.job.folder / "config.yaml").read_text())
    lines = Path(config["train_prompts"]).read_text().splitlines()
    kept = [line for line in (SHAPES / "train.jsonl").read_text().splitlines() if '"tag": "co' in line]
    wanted = [row for row in map(json.loads, kept) if row["tag"] in ("colors", "counting")]
    assert [json.loads(line) for line in lines] == wanted and 100 < len(wanted) < 600
    given = write_grid(base, prompts, settings={"train_prompts": config["train_prompts"]})
    assert plan_runs(load_grid(given), tmp_path, [0])[0].job.folder == run.job.folder  # the same prompts
    path = write_grid(base, prompts, **{**changes, "train_categories": ["colours"]})
    with pytest.raises(ValueError, match=r"train_categories colours: .* holds no prompt of them"):
        plan_runs(load_grid(path), tmp_path)


WRONG = [
    ({"varaints": {}}, "grid has an unknown key 'varaints'; did you mean variants\\?"),
    (
        {"test": {"benchmark": "shapes", "num_image": 1}},
        "test has an unknown key 'num_image'; did you mean num_images",
    ),
    ({"test": {"benchmark": "shape"}}, "shape"),
    ({"test": {"benchmark": "shapes", "num_images": 0}}, "test.num_images=0 must be a whole number"),
    ({"test": {"benchmark": ["shapes"]}}, r"test.benchmark=\['shapes'\] must be a text"),
    ({"test": {"benchmark": "shapes", "prompts": ["a"]}}, r"test.prompts=\['a'\] must be a text"),
    ({"test": {"benchmark": "shapes", "guidance_scale": "one"}}, "test.guidance_scale='one' must be a number"),
    ({"title": 4}, "title=4 must be a text; quote it"),
    ({"base": ["x"]}, r"base=\['x'\] must be a text"),
    ({"variants": ["grpo", "stage"]}, r"variants=\['grpo', 'stage'\] must map at least one name to its overrides"),
    ({"variants": {False: {}, True: {"preset": "grpo"}}}, "a name in variants=False must be a text; quote it"),
    ({"variants": {1: {}}, "baseline": 1}, "a name in variants=1 must be a text; quote it"),
    ({"baseline": ["grpo"]}, r"baseline: \['grpo'\] is no variant"),
    ({"controls": [["grpo"]]}, r"controls: \['grpo'\] is no variant"),
    ({"train_categories": [1]}, "a tag in train_categories=1 must be a text"),
    ({"seeds": [[0]]}, r"seeds=\[\[0\]\] must be different whole numbers"),
    ({"seeds": [True]}, r"seeds=\[True\] must be different whole numbers"),
    ({"axes": None}, "axes=None must map keys to their values"),
    ({"axes": ["beta"]}, r"axes=\['beta'\] must map keys to their values"),
    (
        {"settings": {"heldout_benchmark": "shapes", "heldout_prompts": "none.jsonl"}},
        "grpo: none.jsonl: cannot be read",
    ),
    ({"test": {"benchmark": "shapes", "prompts": "none.jsonl"}}, "prompts='none.jsonl' of the test is no file"),
    ({"drop": ["claim"]}, "grid lacks 'claim'; add it"),
    ({"baseline": "grop"}, "'grop' is no variant; did you mean grpo\\?"),
    ({"controls": ["equal"]}, "'equal' is no variant"),
    ({"pictured": ["stagee"]}, "'stagee' is no variant"),
    ({"seeds": [0, 0]}, r"seeds=\[0, 0\] must be different whole numbers"),
    ({"seeds": 3}, "seeds=3 must be a list"),
    ({"axes": {"beta": 0.1}}, "axis 'beta' is 0.1; give a list"),
    ({"axes": {"betta": [0.1]}}, "grpo, betta=0.1: it has an unknown key 'betta'; did you mean beta\\?"),
    ({"axes": {"beta": [0.1, -1]}}, "grpo, beta=-1: beta=-1 must be a number that is not negative"),
    ({"variants": {"grpo": {}, "stage": {}}}, "'grpo' and 'stage' are the same run; leave one out"),
    ({"variants": {"grpo": {}, "all": {"train_prompts": "none.jsonl"}}}, "all: .*none.jsonl"),
    ({"settings": {"max_steps": -1}}, "max_steps=-1 must be at least 1, so that runs are equally long"),
    ({"base": "none.yaml"}, "configuration 'none.yaml' cannot be read"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_wrong_is_said_before_any_run(base, prompts, tmp_path, monkeypatch, changes, message):
    path = write_grid(base, prompts, **changes)
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # or the tests' type check speaks before ours does
    with pytest.raises(ValueError, match=message) as raised:
        main_ablate("stage ablate", [str(path), "--out", str(tmp_path / "out")])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--seeds", "1", "1"], ["--jobs", "0"], ["--max-steps", "0"]])
def test_wrong_flags(base, prompts, words):
    with pytest.raises(ValueError, match="must be"):
        main_ablate("stage ablate", [str(write_grid(base, prompts)), *words])


def test_every_shipped_grid_is_listed():
    assert sorted(path.stem for path in (ROOT / "configs" / "ablation").glob("*.yaml")) == sorted(GRIDS)


@pytest.mark.parametrize(("name", "num_cells"), GRIDS.items())
def test_shipped_grids_resolve(name, num_cells, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    grid = load_grid(f"configs/ablation/{name}.yaml")
    runs = plan_runs(grid, tmp_path, [0])
    assert len(runs) == num_cells == len({run.job.folder for run in runs})
    for run in runs:
        images = run.config.per_device_train_batch_size * run.config.gradient_accumulation_steps
        assert images == 64 and run.config.max_steps == 100 and run.config.beta > 0
    assert {"grpo", "grpo_equal_strength", "stage_normalized"} & {grid.baseline, *grid.controls}


def test_shipped_grids_share_their_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    planned, folders = {}, {}
    for name in ("table4", "entropy_reward", "equal_strength"):
        runs = plan_runs(load_grid(f"configs/ablation/{name}.yaml"), tmp_path, [0], planned=planned)
        folders[name] = {run.job.folder for run in runs}
    assert folders["entropy_reward"] < folders["table4"]
    assert len(folders["equal_strength"] - folders["table4"]) == 2


def test_mean_over_seeds_by_hand():
    # 1, 2, 3: mean 2, error 1 / sqrt(3); Student's t with 2 degrees of freedom is 4.302653 at 97.5 %, and its
    # distribution is 1/2 + t / (2 sqrt(2 + t^2)): at t = 2 sqrt(3) that is 1/2 + sqrt(12 / 14) / 2.
    mean = mean_over_seeds([1.0, 2.0, None, 3.0, math.nan])
    half = 4.30265273 / math.sqrt(3)
    assert (mean.value, mean.num_seeds) == (2.0, 3)
    np.testing.assert_allclose([mean.low, mean.high], [2 - half, 2 + half], atol=1e-6)
    np.testing.assert_allclose(mean.p_value, 1 - math.sqrt(12 / 14), atol=1e-9)


def test_one_seed_has_no_interval_and_none_has_no_mean():
    one, none = mean_over_seeds([0.5]), mean_over_seeds([None])
    assert (one.value, one.low, one.high, one.p_value, one.num_seeds) == (0.5, None, None, None, 1)
    assert (none.value, none.num_seeds) == (None, 0)
    equal = mean_over_seeds([0.25, 0.25])
    assert (equal.value, equal.low, equal.high, equal.p_value) == (0.25, None, None, None)
    # 0.02 each, up to rounding.
    assert paired_over_seeds({0: 0.57, 1: 0.56, 2: 0.61}, {0: 0.55, 1: 0.54, 2: 0.59}).p_value is None


def test_pairs_are_of_one_seed():
    difference = paired_over_seeds({0: 0.5, 1: 0.75, 2: 9.0, 3: None}, {1: 0.5, 0: 0.5, 3: 1.0, 4: 0.0})
    assert (difference.value, difference.num_seeds) == (0.125, 2)  # of 0 and 0.25


def rows(kls, entropy=0.5):
    return [{"step": i, "loss": 0.0, "kl": kl, "entropy/reference": entropy} for i, kl in enumerate(kls, 1)]


def gain(low, high):
    return Difference((low + high) / 2, low, high, 0.5, (high - low) / 4, 100)


def test_two_variants_are_compared_once(base, prompts):
    variants = {"grpo": {"preset": "grpo"}, "stage": {}, "other": {"beta": 0.2}, "third": {"beta": 0.3}}
    grid = load_grid(write_grid(base, prompts, variants=variants, controls=["stage", "other"]))
    run = mock.Mock(FinishedRun, plan=mock.Mock(PlannedRun, seed=0), quantities={"strict": 0.5})
    by_cell = {cell.label: [run] for cell in grid.cells}
    compared = {cell.variant: [*_line(grid, cell, by_cell).differences] for cell in grid.cells}
    assert compared == {"grpo": [], "stage": ["grpo"], "other": ["grpo", "stage"], "third": ["grpo", "stage", "other"]}


def test_collapse_is_what_its_definition_says():
    steady = rows([0.1] * 20)
    assert collapse_reasons(steady, gain(-0.2, 0.0)) == [] == collapse_reasons(steady, None)
    assert collapse_reasons(steady, gain(-0.2, -0.01)) == ["score"]
    # The last tenth of 20 steps is two: their mean decides, against the entropy of the first two.
    assert end_mean(rows([0.1] * 18 + [0.4, 0.8]), "kl") == pytest.approx(0.6)
    assert collapse_reasons(rows([0.1] * 18 + [0.4, 0.8]), None) == ["KL"]
    assert collapse_reasons(rows([9.0] * 18 + [0.4, 0.6]), None) == []
    assert collapse_reasons(rows([0.1] * 19 + [None]), None) == ["not a number"]


def test_a_band_holds_the_mean_of_the_steps_that_all_runs_have(monkeypatch):
    drawn = {}
    monkeypatch.setattr(charts, "_svg", lambda figure: drawn.update(axes=figure.axes[0]) or "<svg/>")
    charts.band_chart({"a": [([1, 2, 3], [0.0, 1.0, 5.0]), ([1, 2], [1.0, 3.0])], "none": []}, salt="x")
    (line,) = drawn["axes"].get_lines()
    np.testing.assert_array_equal(line.get_xydata(), [[1, 0.5], [2, 2.0]])
    low, high = drawn["axes"].collections[0].get_paths()[0].vertices[:, 1].min(), 3.0
    assert (low, high) == (0.0, drawn["axes"].collections[0].get_paths()[0].vertices[:, 1].max())


@pytest.fixture(scope="module")
def toy(prompts, tmp_path_factory):
    """A grid of which one variant cannot be trained: its rollout takes more prompts than there are."""
    folder = tmp_path_factory.mktemp("toy")
    path = write_grid(
        write_base(prompts, folder),
        prompts,
        variants={"grpo": {"preset": "grpo"}, "hungry": {"per_device_train_batch_size": 64}},
    )
    words = [str(path), "--seeds", "0", "--out", str(folder / "out")]
    text, code = main_ablate("stage ablate", [*words, "--jobs", "3"])
    return SimpleNamespace(out=folder / "out", words=words, text=text, code=code)


def test_a_failing_run_is_told_and_the_others_go_on(toy):
    assert toy.code == 1
    first = toy.text.splitlines()[0]
    assert re.search(r"failed: .*/hungry_seed0_\w{8}: ValueError: train_prompts=.* holds 4 prompts, but one", first)
    results = json.loads((toy.out / "toy" / "results.json").read_text())
    assert [run["variant"] for run in results["runs"]] == ["grpo"] and len(results["missing"]) == 1
    assert "One seed: there is no interval over seeds" in toy.text


def test_results_are_those_of_the_run(toy):
    (folder,) = (toy.out / "runs").glob("grpo_seed0_*")
    (before,) = (toy.out / "before").iterdir()
    results = json.loads((toy.out / "toy" / "results.json").read_text())
    (run,), (line,) = results["runs"], results["table"]
    after, start = Scores.load(folder / "scores.json"), Scores.load(before / "scores.json")
    assert run["scores"] == after.scores and results["before"] == {before.name: start.scores}
    assert run["gain"]["graded"]["value"] == pytest.approx(after.reward - start.reward)
    kls = [json.loads(row).get("kl") for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert run["quantities"]["kl"] == line["means"]["kl"]["value"] == kls[1]  # the last of two steps
    assert not list(folder.glob("*.safetensors")) and (folder / "config.json").is_file()
    page = (toy.out / "toy" / "report.html").read_text()
    assert "A toy &lt;grid&gt;" in page and f"{after.overall:.3f}" in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and "<script" not in page


def test_the_picture_shows_the_run(toy):
    with Image.open(toy.out / "toy" / "picture.png") as opened:
        assert opened.format == "PNG" and opened.width > 1000
    grid = load_grid(toy.words[0])
    results = collect(grid, plan_runs(grid, toy.out, [0]))
    (run,) = results.runs
    rewards, drift, scores = draw(results).axes
    assert rewards.lines[0].get_ydata().tolist() == run.record.series("rewards/shapes/mean")[1]
    assert drift.lines[0].get_ydata().tolist() == run.record.series("kl")[1]
    assert scores.lines[0].get_xdata() == [run.quantities["strict held-out"]]
    assert [label.get_text() for label in scores.get_yticklabels()] == ["grpo"]
    before = run.before.scores["strict"]["heldout"]
    assert scores.lines[1].get_xdata() == [before, before]


def test_a_picture_over_two_axes_is_maps(toy):
    grid = load_grid(toy.words[0])
    (run,) = collect(grid, plan_runs(grid, toy.out, [0])).runs
    points = [{"a": a, "b": b} for a in ("1", "2") for b in ("3", "4")]
    score = iter((0.1, 0.2, 0.3))
    lines = [
        Line(Cell("grpo", point, {}), [run], {"strict": mean_over_seeds([next(score)])}, {}) for point in points[:3]
    ]
    grid = dataclasses.replace(
        grid, axes={name: {value: {} for value in values} for name, values in (("a", "12"), ("b", "34"))}
    )
    above, _, below, _ = draw(Results(grid, [run], [], lines)).axes
    assert above.images[0].get_array().tolist()[0] == [0.1, 0.2]
    assert [text.get_text() for text in above.texts] == ["0.100", "0.200", "0.300"]  # the fourth did not finish
    assert [text.get_text() for text in below.texts] == [f"{bool(run.collapse):.0%}"] * 3


def test_a_picture_of_many_lines_along_an_axis_is_of_their_means(toy):
    grid = load_grid(toy.words[0])
    (run,) = collect(grid, plan_runs(grid, toy.out, [0])).runs
    names = ("strict", "strict held-out", "kl")
    lines = [
        Line(Cell("grpo", {"a": a}, {}), [run], {name: mean_over_seeds([float(a)]) for name in names}, {})
        for a in "6543210"  # the picture has the order of the axis
    ]
    grid = dataclasses.replace(grid, axes={"a": {value: {} for value in "0123456"}}, pictured=("grpo",))
    panels = draw(Results(grid, [run], [], lines)).axes
    assert [panel.get_title().split(" (")[0] for panel in panels] == ["strict", "strict held-out", "KL"]
    for panel in panels:
        assert [dot.get_xdata()[0] for dot in panel.lines if dot.get_marker() == "o"] == [0, 1, 2, 3, 4, 5, 6]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [f"grpo, a={a}" for a in "0123456"]


def test_several_images_of_a_prompt_are_compared_by_their_distance(toy):
    grid = load_grid(toy.words[0])
    (run,) = collect(grid, plan_runs(grid, toy.out, [0])).runs
    grid = dataclasses.replace(grid, test=dataclasses.replace(grid.test, num_images=2))
    run = dataclasses.replace(run, quantities={**run.quantities, DISTANCE: 0.4})
    fewer = {"grpo": {DISTANCE: mean_over_seeds([-0.1])}}
    results = Results(grid, [run], [], [Line(grid.cells[1], [run], {DISTANCE: mean_over_seeds([0.4])}, fewer)])
    head, row = difference_table(results)
    assert row[head.index("distance of images")] == "-0.100"
    shown = draw(results).axes[2]
    assert shown.lines[0].get_xdata() == [0.4] and shown.get_title().startswith("distance of images")


def test_what_the_guard_told_is_counted(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"config": {"guard": "rollback"}}))
    scores = [(0, 0.4, False), (20, 0.7, True), (20, 0.5, False), (40, 0.45, False)]
    rows = [{"step": s, "heldout/score": x, **({"abandoned": 1} if gone else {})} for s, x, gone in scores]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for rule, action in (("kl", "rollback"), ("zero_variance", "warn"), ("kl_slope", "warn")):
        append_guard(tmp_path, GuardRecord(20, rule, action, 2.0, 1.0, ""))
    found = guarded(read_run(tmp_path))
    assert found == {ALARMS: 2, ROLLBACKS: 1, BELOW_BEST: pytest.approx(0.25)}


def test_what_is_finished_is_not_run_again(toy):
    text, code = main_ablate("stage ablate", [*toy.words, "--dry"])
    assert code == 0 and "2 different trainings, 1 to run, 2 steps in all" in text


def test_a_dry_call_writes_nothing(base, prompts, tmp_path):
    changes = {"settings": {"train_prompts": str(SHAPES / "train.jsonl")}, "train_categories": ["colors"]}
    path = write_grid(base, prompts, **changes)
    text, code = main_ablate("stage ablate", [str(path), "--out", str(tmp_path / "out"), "--seeds", "0", "--dry"])
    assert code == 0 and "2 different trainings, 2 to run" in text and not (tmp_path / "out").exists()


@pytest.fixture
def worked(base, prompts, tmp_path, monkeypatch):
    """Writes a job of six steps, does it with a training and a test of these outcomes, and notes what they saw."""
    test, seen = HeldoutTest("shapes", str(prompts / "heldout.jsonl")), SimpleNamespace(trained=[], tested=[])
    monkeypatch.setattr(worker, "_score", lambda config, test, model, folder: seen.tested.append(Path(model)))

    def run(folder, train, **changes):
        values = {**yaml.safe_load(base.read_text()), "output_dir": str(folder), "max_steps": 6, **changes}
        monkeypatch.setattr(training, "train", lambda config: seen.trained.append(config) or train(folder))
        write_job(Job(folder, values, test, 6), keep_weights=False)
        run_job(folder)
        return seen

    return run


def test_a_run_that_its_guard_stopped_fails_alike_at_every_call(worked, tmp_path):
    def stopped(folder):
        append_guard(folder, GuardRecord(3, "kl", "stop", 2.0, 1.0, "kl 2 is above guard_max_kl=1"))
        return SimpleNamespace(stopped_by="guard: kl", step=3)

    for _ in range(2):
        with pytest.raises(ValueError, match=r"^the guard stopped it at step 3 of 6: kl 2 is above guard_max_kl=1; "):
            worked(tmp_path / "job", stopped)
    assert (tmp_path / "job" / "guard.jsonl").read_text().count("\n") == 1, "trained past the stop"
    with pytest.raises(SystemExit, match=str(worker.STOPPED)):
        worked(tmp_path / "other", lambda folder: SimpleNamespace(stopped_by="SIGTERM", step=3))


def test_averaged_weights_are_tested_and_no_weights_are_left(worked, tmp_path):
    def trained(folder):
        for place in ("checkpoint-6", "rolled_back/1/checkpoint-4", "ema"):
            (folder / place).mkdir(parents=True)
        return SimpleNamespace(stopped_by=None, step=6)

    worked(tmp_path / "plain", trained)
    seen = worked(tmp_path / "averaged", trained, ema_decay=0.9)
    assert seen.tested == [tmp_path / "plain", tmp_path / "averaged" / "ema"] and len(seen.trained) == 2
    for folder in (tmp_path / "plain", tmp_path / "averaged"):
        assert (folder / "result.json").is_file() and not any(path.is_dir() for path in folder.iterdir())


def wait_for_step(folder, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.is_file() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached:\n" + (folder / "run.log").read_text())


RUN_JOBS = """
import json, sys, yaml
from pathlib import Path
from stage_grpo.ablation.grid import HeldoutTest
from stage_grpo.ablation.job import Job
from stage_grpo.ablation.runs import run_jobs
folder = Path(sys.argv[1])
test = HeldoutTest(**json.loads((folder / "test.json").read_text())["test"])
run_jobs([Job(folder, yaml.safe_load((folder / "config.yaml").read_text()), test, 6)], 1)
"""


def test_a_killed_job_goes_on_and_ends_like_the_straight_one(base, prompts, tmp_path):
    values, test = yaml.safe_load(base.read_text()), HeldoutTest("shapes", str(prompts / "heldout.jsonl"))
    jobs = {}
    for name in ("straight", "killed"):
        changes = {"output_dir": str(tmp_path / name), "max_steps": 6, "disable_tqdm": True}
        jobs[name] = Job(tmp_path / name, {**values, **changes}, test, 6)
        write_job(jobs[name], keep_weights=False)
    folder = tmp_path / "killed"
    (folder / "images").mkdir()  # of an attempt that was killed before it left a checkpoint: swept away
    (folder / "images" / "foreign.png").write_text("torn")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    caller = subprocess.Popen(
        [sys.executable, "-c", RUN_JOBS, str(folder)], env=environment, stderr=subprocess.DEVNULL
    )
    wait_for_step(folder, 2, caller)
    caller.send_signal(signal.SIGKILL)  # its worker sees that it is alone, saves and ends
    caller.wait()
    with FileLock(folder / ".lock", timeout=60):
        pass
    assert list(folder.glob("checkpoint-*")) and not jobs["killed"].is_finished
    run_job(folder)
    run_job(tmp_path / "straight")
    logged = [
        [(row["step"], row["kl"], row["reward"]) for row in map(json.loads, text.splitlines()) if "loss" in row]
        for text in ((tmp_path / name / "metrics.jsonl").read_text() for name in ("killed", "straight"))
    ]
    assert logged[0] == logged[1] and len(logged[0]) == 6
    killed, straight = (Scores.load(tmp_path / name / "scores.json") for name in ("killed", "straight"))
    assert killed.per_image == straight.per_image
    assert not list(folder.glob("checkpoint-*")) and jobs["killed"].is_finished
