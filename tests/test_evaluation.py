"""Evaluation of an image folder: scores by hand, intervals, pairing, what is missing, and what a kill leaves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from prompt_folders import write_prompt_folder
from stage_grpo.benchmarks import BENCHMARKS, Benchmark, Scorer, get_benchmark
from stage_grpo.cli import main
from stage_grpo.evaluation import evaluate as evaluation
from stage_grpo.evaluation import scores, t2i_compbench
from stage_grpo.evaluation.measuring import plain
from stage_grpo.evaluation.score_table import format_table
from stage_grpo.images.files import save_image
from stage_grpo.images.layouts import LAYOUTS, plan_images
from stage_grpo.rewards.base import Reward, RewardResult
from stage_grpo.shapes import prompts, scenes
from stage_grpo.types import PromptRow


class RedReward(Reward):
    """Scores an image by its red channel, right at one half and more, unscorable where blue is full."""

    name = "red"
    asked: ClassVar[list[int]] = []
    """Images of every call."""
    fails_at: int | None = None

    def compute(self, images, prompts, metadata):
        if len(self.asked) == self.fails_at:
            raise RuntimeError("killed")
        self.asked.append(len(images))
        red = np.array([image.getpixel((0, 0))[0] / 255 for image in images])
        blue = np.array([image.getpixel((0, 0))[2] for image in images])
        reasons = [[] if r >= 0.5 else ["too dark"] for r in red]
        return RewardResult(
            np.where(blue == 255, np.nan, red),
            {
                "correct": [None if b == 255 else int(r >= 0.5) for r, b in zip(red, blue)],
                "reasons": reasons,
                "reason": ["all blue" if b == 255 else None for b in blue],
                "objects": [{"red": [[0.0, 0.0, 4.0, 4.0, r]]} for r in red],
            },
        )


@dataclasses.dataclass(frozen=True)
class SideOptions:
    power: float = 1.0


class SideReward(Reward):
    """The green channel to some power."""

    name = "side"
    Options = SideOptions

    def compute(self, images, prompts, metadata):
        metadata[0]["tag"] = "changed by a careless reward"
        return [(image.getpixel((0, 0))[1] / 255) ** self.options.power for image in images]


class AbsentReward(Reward):
    """One whose server is not there."""

    name = "absent"

    def check_health(self):
        raise ValueError("no server answers at http://nowhere; start it by stage serve-reward")

    def compute(self, images, prompts, metadata):
        raise AssertionError("must not be asked")


RED, SIDE, ABSENT = (f"{__name__}:{cls.__name__}" for cls in (RedReward, SideReward, AbsentReward))
TOY = Benchmark(
    name="toy",
    title="Toy",
    columns=("a", "b"),
    scorers=(Scorer("strict", RED, detail="correct"), Scorer("graded", RED)),
    images_per_prompt=2,
    layout="geneval",
    source="these tests",
    shared_columns=("a",),
)
WIDE = dataclasses.replace(
    TOY,
    name="wide",
    overall="images",
    shared_columns=(),
    scorers=(
        Scorer("graded", RED),
        Scorer("green", SIDE, columns=("a",), scale=100.0),
        Scorer("green", ABSENT, columns=("b",)),
        Scorer("quality", ABSENT),
    ),
)


@pytest.fixture(autouse=True)
def toy_benchmarks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for benchmark in (TOY, WIDE):
        monkeypatch.setitem(BENCHMARKS, benchmark.name, benchmark)
    monkeypatch.setattr(RedReward, "asked", [])
    for name in ("STAGE_WEIGHTS", "STAGE_DATA"):
        monkeypatch.setenv(name, str(tmp_path / name))


def write(folder: Path, index: int, tag: str, colors: list[tuple[int, int, int]], prompt: str = "") -> None:
    images = [Image.new("RGB", (4, 4), color) for color in colors]
    for image in images:
        image.putpixel((3, 3), (index, 7, 0))  # no two prompts share a picture
    write_prompt_folder(folder, index, {"tag": tag, "prompt": prompt or f"p{index}"}, images)


@pytest.fixture
def images_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    write(folder, 0, "a", [(255, 0, 0), (0, 0, 0)])
    write(folder, 1, "a", [(255, 51, 0), (255, 51, 0)])
    write(folder, 2, "b", [(51, 0, 0), (102, 0, 0)])
    return folder


# --- scores ----------------------------------------------------------------------------------------------


def test_scores_by_hand(images_dir: Path) -> None:
    result = evaluation.evaluate("toy", images_dir)
    # a: right 3 of 4; b: 0 of 2; graded b: (0.2 + 0.4) / 2; overall: means of the two; held out: b alone.
    assert result.scores["strict"] == {"a": 0.75, "b": 0.0, "overall": 0.375, "heldout": 0.0}
    assert result.scores["graded"] == pytest.approx({"a": 0.75, "b": 0.3, "overall": 0.525, "heldout": 0.3})
    assert (result.headline, result.overall, result.reward) == ("strict", 0.375, pytest.approx(0.525))
    assert (result.num_images, result.num_prompts) == (6, 3) and result.num_unscored == {"strict": 0, "graded": 0}
    # Folders 0 and 2 hold two different images, folder 1 the same twice: (1 + 1/2 + 1) / 3.
    assert result.diversity == {"unique_share": pytest.approx(5 / 6), "pairwise_distance": None, "space": None}
    # Category a has two folders with means 1/2 and 1: resamples give 1/2, 3/4, 1; b has one folder, so its images
    # are resampled: 0.2, 0.3, 0.4.
    assert result.ci95["strict"]["a"] == [0.5, 1.0]
    assert result.ci95["graded"]["b"] == pytest.approx([0.2, 0.4])
    assert result.ci95["strict"]["b"] == [0.0, 0.0]
    assert result.per_image[1] == {
        "path": "00000/samples/00001.png",
        "index": 0,
        "sample": 1,
        "prompt": "p0",
        "tag": "a",
        "scores": {"strict": 0.0, "graded": 0.0},
        "reasons": ["too dark"],
        "objects": {"red": [[0.0, 0.0, 4.0, 4.0, 0.0]]},
    }
    assert not result.partial and result.problems == [] and result.missing == {}
    # Both measures come from one run of one reward.
    assert RedReward.asked == [6]


def test_means_over_images_count_every_image_alike(images_dir: Path) -> None:
    # 255, 0, 255, 255, 51, 102 of 255: mean 918 / 255 / 6 = 0.6, where the mean of the category means is 0.525.
    result = evaluation.evaluate("wide", images_dir)
    assert result.scores["graded"]["overall"] == pytest.approx(0.6)
    # Of a category that nothing could be said of, no mean over images either: it would be that of the others.
    write(images_dir, 2, "b", [(51, 0, 255), (102, 0, 255)])
    unscored = evaluation.evaluate("wide", images_dir)
    assert unscored.scores["graded"].keys() == {"a"} and unscored.num_unscored["graded"] == 2
    shutil.rmtree(images_dir / "00002")
    assert evaluation.evaluate("wide", images_dir).scores["graded"].keys() == {"a"}


@pytest.mark.parametrize("name", [name for name, line in BENCHMARKS.items() if line.overall != "none"])
def test_an_overall_score_is_that_of_all_categories(name: str) -> None:
    """The mean of some would pass for the benchmark's own, be it over categories or over images."""
    benchmark = BENCHMARKS[name]
    records = [{"tag": column} for column in benchmark.columns for _ in range(3)]
    lines = scores.table_lines(benchmark, records)
    assert lines.keys() == scores.selections(benchmark).keys() and len(lines["overall"]) == len(records)
    assert scores.table_lines(benchmark, records[:3]) == {benchmark.columns[0]: [0, 1, 2]}
    assert "overall" not in scores.table_lines(benchmark, records[:-3])


def test_overall_as_genevals_own_summary(images_dir: Path, tmp_path: Path) -> None:
    """The official summary: mean of `correct` by tag, then the mean of these, whatever the sizes."""
    rng, by_tag = np.random.default_rng(0), defaultdict(list)
    for index in range(30):
        tag = "ab"[index < 7]
        reds = [int(red) for red in rng.choice([0, 255], 2)]
        write(tmp_path / "random", index, tag, [(red, 0, 0) for red in reds])
        by_tag[tag] += [float(red == 255) for red in reds]
    result = evaluation.evaluate("toy", tmp_path / "random", num_resamples=10)
    assert result.overall == pytest.approx(np.mean([np.mean(values) for values in by_tag.values()]), abs=1e-12)


def test_unscored_images_are_left_out_and_counted(images_dir: Path) -> None:
    write(images_dir, 3, "b", [(255, 0, 255), (255, 0, 0)])
    result = evaluation.evaluate("toy", images_dir)
    assert result.scores["graded"]["b"] == pytest.approx((0.2 + 0.4 + 1.0) / 3)
    assert result.num_unscored == {"strict": 1, "graded": 1}
    assert result.per_image[6]["scores"] == {"strict": None, "graded": None}
    assert result.per_image[6]["reasons"] == [f"{RED}: all blue"]
    assert "graded not scored: 1" in format_table(result)


def test_batch_size_changes_nothing(images_dir: Path) -> None:
    assert evaluation.evaluate("toy", images_dir, batch_size=1) == evaluation.evaluate("toy", images_dir)


def test_a_missing_category_is_a_dash(images_dir: Path) -> None:
    shutil.rmtree(images_dir / "00002")
    result = evaluation.evaluate("toy", images_dir)
    assert "b" not in result.scores["strict"]
    row = next(line for line in format_table(result).splitlines() if line.startswith("b "))
    assert row.split() == ["b", "-", "-", "0"]
    # The mean of what is there would pass for the benchmark's overall score.
    assert result.overall is None and result.reward is None and "overall" not in scores.compare(result, result)


def test_clean_renders_of_the_shapes_world_are_right(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index, row in enumerate(prompts.mixed_rows("heldout", [1] * 6, 24)):
        image = scenes.render(prompts.sample_scene(row, rng))
        write_prompt_folder(tmp_path / "images", index, row.metadata, [image])
    result = evaluation.evaluate("shapes", tmp_path / "images")
    assert set(result.scores["strict"].values()) == {1.0}
    assert result.num_images == 24 and set(result.scores["strict"]) >= {*prompts.CATEGORIES, "overall", "heldout"}
    # One grey picture everywhere: the rules see nothing, and the evaluation sees that it is one picture.
    for path in (tmp_path / "images").glob("*/samples/*.png"):
        Image.new("RGB", (48, 48), (128, 128, 128)).save(path)
    with pytest.raises(ValueError, match=r"the same picture as 00000/samples/00000\.png, which has another prompt"):
        evaluation.evaluate("shapes", tmp_path / "images")
    assert evaluation.evaluate("shapes", tmp_path / "images", allow_partial=True).overall == 0.0


# --- what cannot be measured -----------------------------------------------------------------------------


def test_what_is_missing_is_named_and_the_rest_is_scored(images_dir: Path) -> None:
    result = evaluation.evaluate("wide", images_dir)
    remedy = "no server answers at http://nowhere; start it by stage serve-reward"
    assert result.missing == {"green/b": remedy, "quality": remedy}
    # Green of the images of a: 0, 0, 51, 51 of 255, times 100; its overall would lack b.
    assert result.scores["green"] == {"a": pytest.approx(10.0)} and "quality" not in result.scores
    assert all("green" not in record["scores"] for record in result.per_image if record["tag"] == "b")
    assert [record["tag"] for record in result.per_image] == list("aaaabb")  # whatever a reward did to its copy
    table = format_table(result)
    assert f"quality is missing: {remedy}" in table and "green/b is missing" in table


def test_a_reward_that_scores_nothing_is_missing_too(images_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "blue"
    write(folder, 0, "a", [(0, 0, 255)])
    write(folder, 1, "b", [(9, 51, 255)])
    result = evaluation.evaluate("wide", folder)
    assert result.missing["graded"] == f"no image could be scored ({RED}: all blue)"
    assert list(result.scores) == ["green"]


def test_a_detail_that_a_reward_does_not_give_is_missing(images_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is the measure's own, whatever another scorer said of the same image."""
    scorers = (Scorer("strict", SIDE, detail="correct"), Scorer("graded", RED))
    plain_toy = dataclasses.replace(TOY, scorers=scorers)
    monkeypatch.setitem(BENCHMARKS, "toy", plain_toy)
    write(images_dir, 0, "a", [(0, 0, 0), (0, 0, 0)])
    result = evaluation.evaluate("toy", images_dir)
    expected = f"{SIDE}: the reward gave no detail 'correct'"
    assert result.missing == {"strict": f"no image could be scored ({expected})"} and list(result.scores) == ["graded"]
    assert result.per_image[1]["reasons"] == [expected, "too dark"]


@pytest.mark.parametrize("with_file", [True, False])
def test_a_set_of_some_categories(images_dir: Path, tmp_path: Path, capsys, with_file: bool) -> None:
    """Prompts are numbered among those that were generated."""
    folder, file = tmp_path / "some", tmp_path / "prompts.jsonl"
    rows = [("a", "p0"), ("b", "p1"), ("a", "p2"), ("b", "p3")]
    file.write_text("".join(json.dumps({"tag": tag, "prompt": prompt}) + "\n" for tag, prompt in rows))
    write(folder, 0, "b", [(255, 0, 0)], "p1")
    write(folder, 1, "b", [(0, 0, 0)], "p3")
    given = {"prompts": file} if with_file else {}
    result = evaluation.evaluate("toy", folder, **given, categories=["b"])
    assert result.scores["strict"] == {"b": 0.5, "heldout": 0.5} and not result.partial
    assert result.settings["categories"] == ["b"]
    assert "categories" not in evaluation.evaluate("toy", folder).settings
    with pytest.raises(ValueError, match="--categories c: toy has only a, b"):
        evaluation.evaluate("toy", folder, **given, categories=["b", "c"])
    if with_file:
        with pytest.raises(ValueError, match="2 prompt folders for 4 prompts; generate all, or say by --categories"):
            evaluation.evaluate("toy", folder, **given)
        main(["evaluate", "--benchmark", "toy", "--images", str(folder), "--prompts", str(file), "--categories", "b"])
        assert "PARTIAL" not in capsys.readouterr().out
    else:
        with pytest.raises(ValueError, match="also holds images of b, which --categories a leaves out"):
            evaluation.evaluate("toy", folder, categories=["a"])


def test_nothing_to_measure_is_an_error(images_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing of 'wide' can be measured: quality: no server answers at http"):
        evaluation.evaluate("wide", images_dir, measures=["quality"])
    flat = images_dir.with_name("flat")
    flat.mkdir()
    Image.new("RGB", (8, 8)).save(flat / "00000.png")
    prompts_file = flat.with_suffix(".csv")
    prompts_file.write_text("Prompts,Category\na red car,Colors\n")
    with pytest.raises(
        ValueError, match=r"deqa: .*; give the option url; hps_v2.1: .*; get it by: stage weights get hps"
    ):
        evaluation.evaluate("drawbench", flat, prompts=prompts_file, measures=["hps_v2.1", "deqa"])


def test_measures_and_options(images_dir: Path) -> None:
    chosen = evaluation.evaluate("wide", images_dir, measures=["green"], reward_options={SIDE: {"power": 2.0}})
    # 0, 0, 0.2^2, 0.2^2 times 100.
    assert chosen.scores == {"green": {"a": pytest.approx(2.0)}} and RedReward.asked == []
    assert chosen.settings["scorers"][0]["options"] == {"power": 2.0}
    with pytest.raises(ValueError, match=r"'wide' has no measure \['gren'\]; choose from graded, green, quality"):
        evaluation.evaluate("wide", images_dir, measures=["gren"])
    with pytest.raises(ValueError, match=r"options are given for \['hps'\], which 'toy' does not use"):
        evaluation.evaluate("toy", images_dir, reward_options={"hps": {}})
    with pytest.raises(ValueError, match="has no option 'powr'; known are power"):
        evaluation.evaluate("wide", images_dir, reward_options={SIDE: {"powr": 2.0}})


def test_a_token_is_not_written_down(images_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = Scorer("green", SIDE, MappingProxyType({"token": "s3cret"}))
    monkeypatch.setattr("stage_grpo.evaluation.evaluate.build_reward", lambda *_: SideReward())
    monkeypatch.setattr("stage_grpo.evaluation.jobs.lacking", lambda *_: [])
    result = evaluation.evaluate(dataclasses.replace(WIDE, scorers=(secret,)), images_dir)
    assert "s3cret" not in json.dumps(vars(result))


def test_official_code_serves_what_it_alone_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = get_benchmark("t2i_compbench")
    rows = [PromptRow(f"two {tag} cats", {"tag": tag}) for tag in ("spatial", "numeracy")]
    folder = tmp_path / "set"
    for place, image in enumerate(plan_images(LAYOUTS["t2i_compbench"], rows, 2)):
        save_image(folder / image.path, Image.new("RGB", (4, 4), (place, 0, 0)), {})
    (tmp_path / "prompts").mkdir()
    for row in rows:
        (tmp_path / "prompts" / f"{row.metadata['tag']}_val.txt").write_text(row.prompt + "\n")
    run = {"prompts": tmp_path / "prompts", "measures": ["value"]}
    monkeypatch.delenv("T2I_COMPBENCH_ROOT", raising=False)
    with pytest.raises(ValueError, match=r"value/spatial: only the official code scores it; get github.com/Karine"):
        evaluation.evaluate(benchmark, folder, **run)

    def fake(images_dir: Path, category: str, root: Path, python: str) -> dict[Path, float | None]:
        if category == "numeracy":
            raise ValueError("numeracy_eval.py ended with 1; see its log")
        assert (root, python) == (tmp_path, "python3.9")
        paths = sorted((images_dir / f"{category}_val" / "samples").iterdir())
        return {path: 0.25 + place / 2 for place, path in enumerate(paths)}

    monkeypatch.setattr(t2i_compbench, "category_scores", fake)
    monkeypatch.setattr("stage_grpo.evaluation.official_t2i_compbench.check_checkout", lambda *_: None)
    monkeypatch.setattr("stage_grpo.evaluation.official_t2i_compbench.find_python", lambda *_: None)
    options = {"official": {"root": str(tmp_path), "python": "python3.9"}}
    result = evaluation.evaluate(benchmark, folder, **run, reward_options=options)
    assert result.scores == {"value": {"spatial": 0.5}} and result.overall is None
    assert result.missing["value/numeracy"] == "numeracy_eval.py ended with 1; see its log"
    assert "value/color" in result.missing and "value/spatial" not in result.missing


# --- on disk ---------------------------------------------------------------------------------------------


def test_scores_survive_the_disk(images_dir: Path, tmp_path: Path) -> None:
    write(images_dir, 3, "b", [(255, 0, 255), (255, 0, 255)])
    result = evaluation.evaluate("toy", images_dir)
    path = tmp_path / "deep" / "scores.json"
    result.save(path)
    assert scores.Scores.load(path) == result
    content = json.loads(path.read_text())
    assert {"benchmark", "columns", "scores", "ci95", "num_images", "settings", "versions"} <= set(content)
    assert content["per_image_file"] == "scores.per_image.jsonl" and content["versions"]["numpy"] == np.__version__
    records = [json.loads(line) for line in (path.parent / "scores.per_image.jsonl").read_text().splitlines()]
    assert records == result.per_image and len(list(path.parent.iterdir())) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        lambda path: path.write_text(path.read_text().replace("p0", "q0")),
    ],
)
def test_records_of_another_evaluation_are_refused(
    images_dir: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    evaluation.evaluate("toy", images_dir).save(tmp_path / "scores.json")
    change(tmp_path / "scores.per_image.jsonl")
    with pytest.raises(ValueError, match=r"scores.json holds no scores \(.*per_image.jsonl"):
        scores.Scores.load(tmp_path / "scores.json")


def test_table_shows_every_number(images_dir: Path) -> None:
    table = format_table(evaluation.evaluate("toy", images_dir))
    rows = {line.split("  ")[0]: line for line in table.splitlines()}
    assert "0.750  [0.500, 1.000]" in rows["a"] and rows["a"].endswith("4")
    assert "0.300  [0.200, 0.400]" in rows["b"]
    assert "0.375" in rows["overall"] and "0.525" in rows["overall"]
    assert "0.300" in rows["held-out only"]
    assert table.splitlines()[-1] == "6 images of 3 prompts; different images of one prompt: 83.3%"


def test_a_partial_table_says_so_above_and_below(images_dir: Path) -> None:
    (images_dir / "00001/samples/00001.png").unlink()
    table = format_table(evaluation.evaluate("toy", images_dir, allow_partial=True)).splitlines()
    assert table[0].startswith("PARTIAL") and table[-2].startswith("PARTIAL: the image set is not whole")
    assert "prompt 1 ('p1') has 1 images; most have 2" in table[-1]
    settings = evaluation.evaluate("toy", images_dir, allow_partial=True).settings
    assert settings["num_problems"] == 1


# --- killed and continued --------------------------------------------------------------------------------


def outcomes(result: scores.Scores) -> tuple:
    return result.scores, result.per_image


def test_a_killed_evaluation_goes_on(images_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"batch_size": 2, "cache_dir": tmp_path / "cache"}
    straight = evaluation.evaluate("toy", images_dir)
    RedReward.asked.clear()
    monkeypatch.setattr(RedReward, "fails_at", 2)
    with pytest.raises(RuntimeError, match="killed"):
        evaluation.evaluate("toy", images_dir, **run)
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:-9])  # torn by the kill: the last of four images is measured again
    monkeypatch.setattr(RedReward, "fails_at", None)
    RedReward.asked.clear()
    assert outcomes(evaluation.evaluate("toy", images_dir, **run)) == outcomes(straight)
    assert RedReward.asked == [2, 1]
    assert outcomes(evaluation.evaluate("toy", images_dir, **run)) == outcomes(straight) and RedReward.asked == [2, 1]


def test_a_killed_evaluation_goes_on_with_other_measures(
    images_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second measure is a detail of the same reward, which the first call had no need to keep."""
    run = {"batch_size": 2, "cache_dir": tmp_path / "cache"}
    monkeypatch.setattr(RedReward, "fails_at", 2)
    with pytest.raises(RuntimeError, match="killed"):
        evaluation.evaluate("toy", images_dir, measures=["graded"], **run)
    monkeypatch.setattr(RedReward, "fails_at", None)
    result = evaluation.evaluate("toy", images_dir, **run)
    assert outcomes(result) == outcomes(evaluation.evaluate("toy", images_dir))
    assert result.num_unscored == {"strict": 0, "graded": 0} and result.missing == {}


def test_a_cached_part_is_never_taken_for_another(images_dir: Path, tmp_path: Path) -> None:
    run = {"cache_dir": tmp_path / "cache", "measures": ["green"]}
    first = evaluation.evaluate("wide", images_dir, **run)
    squared = evaluation.evaluate("wide", images_dir, **run, reward_options={SIDE: {"power": 2.0}})
    assert first.scores["green"]["a"] == pytest.approx(10) and squared.scores["green"]["a"] == pytest.approx(2)
    write(images_dir, 1, "a", [(255, 102, 0), (255, 51, 0)])
    other = evaluation.evaluate("wide", images_dir, **run)
    assert other.scores["green"]["a"] == pytest.approx(100 * (0.4 + 0.2) / 4)
    # The key stands in the file as well as, shortened, in its name.
    for path in (tmp_path / "cache").iterdir():
        head, *rest = path.read_text().splitlines()
        path.write_text(
            "\n".join([head.replace('"key": "', '"key": "0'), *rest]).replace('"score": ', '"score": 7') + "\n"
        )
    assert outcomes(evaluation.evaluate("wide", images_dir, **run)) == outcomes(other)


def test_what_failed_is_tried_again(images_dir: Path, tmp_path: Path) -> None:
    write(images_dir, 3, "b", [(255, 0, 255), (255, 0, 0)])
    for expected in ([8], [8, 1]):
        evaluation.evaluate("toy", images_dir, cache_dir=tmp_path / "cache")
        assert RedReward.asked == expected


def test_the_command_cleans_up_after_itself(images_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out" / "scores.json"
    main(["evaluate", "--benchmark", "toy", "--images", str(images_dir), "--out", str(out)])
    assert capsys.readouterr().out.endswith(f"wrote {out}\n")
    assert sorted(path.name for path in out.parent.iterdir()) == ["scores.json", "scores.per_image.jsonl"]
    assert scores.Scores.load(out).scores["strict"]["a"] == 0.75


def test_the_command_keeps_what_was_measured_where_something_failed(
    images_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write(images_dir, 3, "b", [(255, 0, 255), (255, 0, 0)])
    out = tmp_path / "scores.json"
    words = ["evaluate", "--benchmark", "toy", "--images", str(images_dir), "--out", str(out)]
    for asked in ([8], [8, 1]):
        main(words)
        kept = tmp_path / "scores.json.partial"
        said = f"the same command measures what has no score yet, and takes the rest from {kept}\n"
        assert capsys.readouterr().out.endswith(said) and RedReward.asked == asked
    write(images_dir, 3, "b", [(255, 0, 0), (255, 0, 0)])
    main(words)
    assert not kept.exists() and capsys.readouterr().out.endswith(f"wrote {out}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "scores.txt"], "--out scores.txt must be a file ending in .json"),
        (["--reward-options", "{"], "--reward-options '{' is no JSON"),
        (["--reward-options", "[1]"], "must be {NAME: {OPTION: VALUE}}"),
        (["--measures", "nice"], "'toy' has no measure ['nice']; choose from strict, graded"),
        (["--batch-size", "0"], "batch_size is 0; it must be at least 1"),
        (["--num-images", "-3"], "num_images is -3; it must be at least 1"),
        (["--num-resamples", "0"], "num_resamples is 0; it must be at least 1"),
        (["--num-resamples", "-1"], "num_resamples is -1; it must be at least 1"),
        (["--out", "."], "--out . must be a file ending in .json"),
        (["--prompts", "absent.txt"], "absent.txt: cannot be read"),
    ],
)
def test_wrong_words(words: list[str], message: str, images_dir: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--benchmark", "toy", "--images", str(images_dir), *words])
    assert ended.value.code == 2 and message in capsys.readouterr().err and RedReward.asked == []


def test_scores_are_saved_before_they_are_shown(images_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(found: scores.Scores) -> str:
        raise RuntimeError("no table")

    monkeypatch.setattr("stage_grpo.evaluation.command.format_table", broken)
    out = images_dir.parent / "scores.json"
    with pytest.raises(RuntimeError, match="no table"):
        main(["evaluate", "--benchmark", "toy", "--images", str(images_dir), "--out", str(out)])
    assert scores.Scores.load(out).num_images == 6


def test_an_interval_that_there_is_not_is_a_dash(images_dir: Path) -> None:
    result = evaluation.evaluate("toy", images_dir)
    result.ci95["strict"]["a"] = [None, None]
    assert "0.750  [-, -]" in format_table(result)


def test_details_become_json() -> None:
    value = {1: (np.float32(0.5), np.int64(3), np.bool_(True), float("nan")), "path": Path("a")}
    assert plain(value) == {"1": [0.5, 3, True, None], "path": "a"}
    assert [type(item) for item in plain(value)["1"]] == [float, int, bool, type(None)]


# --- comparison ------------------------------------------------------------------------------------------


def test_paired_comparison_by_hand(images_dir: Path, tmp_path: Path) -> None:
    before = evaluation.evaluate("toy", images_dir)
    write(images_dir, 2, "b", [(255, 0, 0), (255, 0, 0)])
    after = evaluation.evaluate("toy", images_dir)
    differences = scores.compare(before, after)
    assert {name: d.value for name, d in differences.items()} == {"a": 0, "b": 1, "overall": 0.5, "heldout": 1}
    assert differences["overall"].low == 0.5 and differences["overall"].p_value < 0.001
    assert differences["a"].p_value == 1.0
    graded = scores.compare(before, after, "graded")
    assert graded["b"].value == pytest.approx(0.7)
    line = scores.format_comparison(before, after).splitlines()[3]
    # Category a stays at 3 of 4 and b goes from 0 to 1: means 0.375 and 0.875.
    assert line.split()[:6] == ["overall", "0.375", "0.875", "+0.500", "[+0.500,", "+0.500]"]


def test_comparison_over_images_weighs_images_alike(images_dir: Path) -> None:
    before = evaluation.evaluate("wide", images_dir)
    write(images_dir, 2, "b", [(255, 0, 0), (255, 0, 0)])
    after = evaluation.evaluate("wide", images_dir)
    # 0.8 and 0.6 more on two of six images.
    assert scores.compare(before, after, "graded")["overall"].value == pytest.approx(1.4 / 6)


def test_comparison_refuses_other_prompts(images_dir: Path) -> None:
    before = evaluation.evaluate("toy", images_dir)
    write(images_dir, 1, "a", [(255, 0, 0), (0, 0, 0)], prompt="another")
    with pytest.raises(
        ValueError, match=r"before 00001/.* of 'p1' and after .* of 'another' do not pair; generate both"
    ):
        scores.compare(before, evaluation.evaluate("toy", images_dir))
    write(images_dir, 1, "a", [(255, 0, 0), (0, 0, 0)])
    write(images_dir, 3, "a", [(255, 0, 0), (0, 0, 0)])
    with pytest.raises(ValueError, match="before has 6 images and after 8, so they do not pair"):
        scores.compare(before, evaluation.evaluate("toy", images_dir))
    with pytest.raises(ValueError, match="before has no measure 'loose'; it has strict, graded"):
        scores.compare(before, before, "loose")
    with pytest.raises(ValueError, match="before is of 'toy' and after of 'wide'"):
        scores.compare(before, evaluation.evaluate("wide", images_dir), "graded")


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown benchmark 'shape'; known are shapes, geneval"):
        get_benchmark("shape")
    with pytest.raises(ValueError, match="holds no scores"):
        scores.Scores.load(tmp_path / "missing.json")
