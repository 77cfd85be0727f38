"""Evaluation of an image folder: scores by hand, intervals, pairing, and every way a folder can be broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage_grpo import evaluation, image_folders, scores
from stage_grpo.benchmarks import BENCHMARKS, Benchmark, get_benchmark
from stage_grpo.rewards.base import Reward, RewardResult
from stage_grpo.shapes import prompts, scenes


class RedReward(Reward):
    """Scores an image by its red channel, right at one half and more, unscorable where blue is full."""

    name = "red"

    def compute(self, images, prompts, metadata):
        red = np.array([image.getpixel((0, 0))[0] / 255 for image in images])
        blue = np.array([image.getpixel((0, 0))[2] for image in images])
        reasons = [[] if r >= 0.5 else ["too dark"] for r in red]
        return RewardResult(
            np.where(blue == 255, np.nan, red), {"correct": [int(r >= 0.5) for r in red], "reasons": reasons}
        )


TOY = Benchmark(
    name="toy",
    title="Toy",
    columns=("a", "b"),
    reward=f"{__name__}:RedReward",
    images_per_prompt=2,
    source="these tests",
    shared_columns=("a",),
)


@pytest.fixture(autouse=True)
def toy_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BENCHMARKS, "toy", TOY)


def write(folder: Path, index: int, tag: str, colors: list[tuple[int, int, int]], prompt: str = "") -> None:
    images = [Image.new("RGB", (4, 4), color) for color in colors]
    image_folders.write_prompt_folder(folder, index, {"tag": tag, "prompt": prompt or f"p{index}"}, images)


@pytest.fixture
def images_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    write(folder, 0, "a", [(255, 0, 0), (0, 0, 0)])
    write(folder, 1, "a", [(255, 0, 0), (255, 0, 0)])
    write(folder, 2, "b", [(51, 0, 0), (102, 0, 0)])
    return folder


# --- scores ----------------------------------------------------------------------------------------------


def test_scores_by_hand(images_dir: Path) -> None:
    result = evaluation.evaluate("toy", images_dir)
    # a: right 3 of 4; b: 0 of 2; graded b: (0.2 + 0.4) / 2; overall: means of the two; held out: b alone.
    assert result.scores["strict"] == {"a": 0.75, "b": 0.0, "overall": 0.375, "heldout": 0.0}
    assert result.scores["graded"] == pytest.approx({"a": 0.75, "b": 0.3, "overall": 0.525, "heldout": 0.3})
    assert (result.overall, result.reward) == (0.375, pytest.approx(0.525))
    assert (result.num_images, result.num_prompts, result.num_unscored) == (6, 3, 0)
    # Folders 0 and 2 hold two different images, folder 1 the same twice: (1 + 1/2 + 1) / 3.
    assert result.diversity == pytest.approx(5 / 6)
    # Category a has two folders with means 1/2 and 1: resamples give 1/2, 3/4, 1; b has one folder, so its images
    # are resampled: 0.2, 0.3, 0.4.
    assert result.ci95["strict"]["a"] == [0.5, 1.0]
    assert result.ci95["graded"]["b"] == pytest.approx([0.2, 0.4])
    assert result.ci95["strict"]["b"] == [0.0, 0.0]
    second = result.per_image[1]
    assert second["folder"] == "00000" and second["file"] == "00001.png" and second["tag"] == "a"
    assert (second["strict"], second["graded"], second["reasons"]) == (0.0, 0.0, ["too dark"])


def test_unscored_images_are_left_out_and_counted(images_dir: Path) -> None:
    write(images_dir, 3, "b", [(255, 0, 255), (255, 0, 0)])
    result = evaluation.evaluate("toy", images_dir)
    assert result.scores["graded"]["b"] == pytest.approx((0.2 + 0.4 + 1.0) / 3)
    assert result.num_unscored == 1
    assert "not scored: 1" in scores.format_table(result)


def test_batch_size_changes_nothing(images_dir: Path) -> None:
    assert evaluation.evaluate("toy", images_dir, batch_size=1) == evaluation.evaluate("toy", images_dir)


def test_scores_survive_json(images_dir: Path, tmp_path: Path) -> None:
    write(images_dir, 3, "b", [(255, 0, 255), (255, 0, 255)])
    result = evaluation.evaluate("toy", images_dir)
    result.save(tmp_path / "deep" / "scores.json")
    assert scores.Scores.load(tmp_path / "deep" / "scores.json") == result
    content = json.loads((tmp_path / "deep" / "scores.json").read_text())
    assert {"benchmark", "columns", "scores", "ci95", "num_images", "per_image", "settings", "versions"} <= set(
        content
    )
    assert content["settings"]["reward"] == TOY.reward and content["versions"]["numpy"] == np.__version__


def test_table_shows_every_number(images_dir: Path) -> None:
    table = scores.format_table(evaluation.evaluate("toy", images_dir))
    rows = {line.split("  ")[0]: line for line in table.splitlines()}
    assert "0.750  [0.500, 1.000]" in rows["a"] and rows["a"].endswith("4")
    assert "0.300  [0.200, 0.400]" in rows["b"]
    assert "0.375" in rows["overall"] and "0.525" in rows["overall"]
    assert "0.300" in rows["held-out only"]
    assert table.splitlines()[-1] == "6 images of 3 prompt folders; different images of one prompt: 83.3%"


def test_a_missing_category_is_a_dash(images_dir: Path) -> None:
    shutil.rmtree(images_dir / "00002")
    result = evaluation.evaluate("toy", images_dir)
    assert "b" not in result.scores["strict"]
    row = next(line for line in scores.format_table(result).splitlines() if line.startswith("b "))
    assert row.split() == ["b", "-", "-", "0"]
    # The mean of what is there would pass for the benchmark's overall score.
    assert result.overall is None and result.reward is None and "overall" not in scores.compare(result, result)


def test_clean_renders_of_the_shapes_world_are_right(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index, row in enumerate(prompts.evaluation_rows(4)):
        image = scenes.render(prompts.sample_scene(row, rng))
        image_folders.write_prompt_folder(tmp_path / "images", index, row.metadata, [image])
    result = evaluation.evaluate("shapes", tmp_path / "images")
    assert set(result.scores["strict"].values()) == {1.0}
    assert result.num_images == 24 and set(result.scores["strict"]) >= {*prompts.CATEGORIES, "overall", "heldout"}
    # One pixel in the wrong colour everywhere is no shape any more: the rules see nothing.
    for path in (tmp_path / "images").glob("*/samples/*.png"):
        Image.new("RGB", (48, 48), (128, 128, 128)).save(path)
    assert evaluation.evaluate("shapes", tmp_path / "images").overall == 0.0


def test_the_table_of_benchmarks_agrees_with_the_world() -> None:
    assert BENCHMARKS["shapes"].columns == prompts.CATEGORIES
    assert BENCHMARKS["shapes"].shared_columns == prompts.SHARED_CATEGORIES


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


def test_comparison_refuses_other_prompts(images_dir: Path) -> None:
    before = evaluation.evaluate("toy", images_dir)
    write(images_dir, 1, "a", [(255, 0, 0), (0, 0, 0)], prompt="another")
    with pytest.raises(ValueError, match="generate both sides from the same prompt file"):
        scores.compare(before, evaluation.evaluate("toy", images_dir))
    write(images_dir, 1, "a", [(255, 0, 0), (0, 0, 0)])
    write(images_dir, 3, "a", [(255, 0, 0), (0, 0, 0)])
    with pytest.raises(ValueError, match="6 images before and 8 after"):
        scores.compare(before, evaluation.evaluate("toy", images_dir))
    with pytest.raises(ValueError, match="before has no measure 'loose'; it has strict, graded"):
        scores.compare(before, before, "loose")


# --- broken folders --------------------------------------------------------------------------------------


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


BREAKAGES = {
    "missing folder": (lambda d: shutil.rmtree(d), "is not a folder; generate images first"),
    "empty folder": (lambda d: [shutil.rmtree(p) for p in d.iterdir()], "holds no prompt folders; expected"),
    "torn image": (lambda d: tear(d / "00001/samples/00000.png"), r"00001/samples/00000.png: .*generate this image"),
    "no image": (lambda d: (d / "00001/samples/00001.png").write_bytes(b"hello"), "00001.png: not an image"),
    "empty image": (lambda d: (d / "00001/samples/00001.png").write_bytes(b""), "00001.png: not an image"),
    "no samples": (lambda d: shutil.rmtree(d / "00000/samples"), r"00000/samples: holds no image \(.png"),
    "no metadata": (lambda d: (d / "00000/metadata.jsonl").unlink(), "metadata.jsonl: No such file"),
    "metadata no JSON": (lambda d: (d / "00000/metadata.jsonl").write_text("{"), "metadata.jsonl: Expecting"),
    "two objects": (
        lambda d: (d / "00000/metadata.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y"}\n'),
        "expected one JSON object",
    ),
    "no prompt": (lambda d: (d / "00000/metadata.jsonl").write_text('{"tag": "a"}'), 'object with "prompt"'),
    "unknown tag": (
        lambda d: (d / "00000/metadata.jsonl").write_text('{"tag": "c", "prompt": "x"}'),
        "tag 'c' is none of a, b",
    ),
    "binary metadata": (lambda d: (d / "00000/metadata.jsonl").write_bytes(b"\xff\xfe"), "can't decode byte 0xff"),
    "gap": (lambda d: shutil.rmtree(d / "00001"), "00001: missing; generate the prompts again"),
    "interrupted": (lambda d: (d / "00001/samples/00001.png").unlink(), "1 images where most prompts have 2"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_folder_is_refused_with_the_reason(images_dir: Path, name: str) -> None:
    breakage, message = BREAKAGES[name]
    breakage(images_dir)
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate("toy", images_dir)


def test_only_the_first_ten_problems_are_listed(tmp_path: Path) -> None:
    for index in range(13):
        write(tmp_path / "images", index, "unknown", [(0, 0, 0)])
    with pytest.raises(ValueError, match=r"13 problem\(s\)") as error:
        evaluation.evaluate("toy", tmp_path / "images")
    assert str(error.value).count("is none of") == 10 and str(error.value).endswith("and 3 more")


def test_wrong_arguments(images_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown benchmark 'shape'; known are shapes, geneval"):
        get_benchmark("shape")
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluation.evaluate("toy", images_dir, batch_size=0)
    with pytest.raises(ValueError, match="holds no scores"):
        scores.Scores.load(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="hold no 'prompt'"):
        image_folders.write_prompt_folder(tmp_path, 0, {"tag": "a"}, [Image.new("RGB", (2, 2))])
    with pytest.raises(ValueError, match="has no images to write"):
        image_folders.write_prompt_folder(tmp_path, 0, {"prompt": "x"}, [])
    with pytest.raises(ValueError, match="give each one once"):
        Benchmark("x", "X", ("a", "a"), "shapes", 1, "")
