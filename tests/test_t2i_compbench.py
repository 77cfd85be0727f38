"""The bridge to T2I-CompBench's official code, against small scripts that behave, and misbehave, like its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from stage_grpo.evaluation.official_t2i_compbench import STEPS
from stage_grpo.evaluation.t2i_compbench import (
    CATEGORIES,
    REWARDS,
    category_scores,
    images_of,
    in_prompt_order,
    main_official,
    official_order,
    run_official,
)
from stage_grpo.rewards.base import Reward

SCRIPT = """
import argparse, json, os, sys
sys.path.insert(0, {root!r})
parser = argparse.ArgumentParser()
parser.add_argument({flag!r}, dest="images", required=True)
parser.add_argument("--complex", type=bool, default=False)
options = parser.parse_args()
assert os.getcwd() == {cwd!r}, os.getcwd()
names = os.listdir(options.images + "/samples")
names.sort(key=lambda x: int(x.split("_")[-1].split(".")[0]))
scores = [float(open(options.images + "/samples/" + name).read()) for name in names]
with open({calls!r}, "a") as calls:
    calls.write({script!r} + (" --complex" if options.complex else "") + "\\n")
{body}
file = options.images + "/" + {result!r}
os.makedirs(os.path.dirname(file), exist_ok=True)
json.dump(rows, open(file, "w"))
"""
BY_PLACE = 'rows = [{"question_id": i, "answer": "{:.4f}".format(s)} for i, s in enumerate(scores)]'
BY_NUMBER = 'rows = [{"question_id": int(n.split("_")[1].split(".")[0]), "answer": s} for n, s in zip(names, scores)]'
THREE_IN_ONE = """
read = lambda file: [float(row["answer"]) for row in json.load(open(options.images + "/" + file))]
blip = read("annotation_blip/vqa_result.json")
spatial = read("labels/annotation_obj_detection_2d/vqa_result.json")
clip = read("annotation_clip/vqa_result.json")
prompts = open("../examples/dataset/complex_val.txt").read().split("\\n")
places = [prompts.index(name.split("_")[0]) for name in names]
assert places == [i // 10 for i in range(10 * len(prompts))], places
rows = [{"question_id": i, "answer": (a + b + c) / 3} for i, (a, b, c) in enumerate(zip(blip, spatial, clip))]
"""
COMPLEX_PROMPTS = ["The red hat was on top of the rack.", "A dog runs."]


class Checkout:
    """A folder with the official scripts' names, that scores an image by the number its file holds."""

    def __init__(self, root):
        self.root, self.calls_file = root, root / "calls.txt"
        (root / "examples" / "dataset").mkdir(parents=True)
        for kind in ("", "_spatial", "_action"):
            (root / "examples" / "dataset" / f"complex_val{kind}.txt").write_text("\n".join(COMPLEX_PROMPTS))
        for step in (step for steps in STEPS.values() for step in steps):
            body = BY_NUMBER if step.folder == "UniDet_eval" else BY_PLACE
            self.write(step, THREE_IN_ONE if step.folder == "3_in_1_eval" else body)

    def write(self, step, body):
        cwd = (self.root / step.folder).resolve()
        path = cwd / step.script
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"root": str(self.root), "cwd": str(cwd), "flag": step.flag, "result": step.result, "body": body}
        text = SCRIPT
        for key, value in (content | {"calls": str(self.calls_file), "script": step.script}).items():
            text = text.replace("{" + key + "!r}", repr(value)).replace("{" + key + "}", value)
        path.write_text(text)

    @property
    def calls(self):
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "official")


def fill(root, category, scores):
    """Images whose names are keys and whose content is a score."""
    samples = root / f"{category}_val" / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    for name, score in scores.items():
        (samples / name).write_text(str(score))
    return root


@pytest.fixture
def images(tmp_path):
    scores = {f"a cat_{n:06d}.png": n / 20 for n in (10, 2, 1, 11)} | {"a dog. and a cat_000003.png": 0.9}
    return fill(tmp_path / "images", "color", scores)


def run(images, checkout, tmp_path, categories=("color",)):
    return run_official(images, checkout.root, sys.executable, tmp_path / "out", categories)


def test_order_is_the_official_sorting_line():
    """The two lines by which the official scripts sort ``os.listdir``."""
    random = np.random.RandomState(0)
    names = [f"{prompt}_{number:06d}.png" for number, prompt in enumerate(["a cat.", "two 2 dogs", "it's 3.5 m"] * 40)]
    for _ in range(5):
        shuffled = [names[i] for i in random.permutation(len(names))]
        found = [path.name for path in official_order([Path("x") / name for name in shuffled])]
        assert found == sorted(shuffled, key=lambda x: int(x.split("_")[-1].split(".")[0]))
        assert found == sorted(shuffled, key=lambda x: int(x.split("_")[1].split(".")[0]))


def test_scores_come_in_official_order_and_into_a_file(images, checkout, tmp_path):
    expected = [0.05, 0.1, 0.9, 0.5, 0.55]
    assert run(images, checkout, tmp_path) == {"color": expected}
    written = json.loads((tmp_path / "out" / "color.json").read_text())
    assert [image["image"] for image in written["images"]] == [path.name for path in images_of(images, "color")]
    assert [image["score"] for image in written["images"]] == expected
    assert written["num_images"] == 5 and written["mean"] == pytest.approx(sum(expected) / 5)
    assert sorted(path.name for path in (images / "color_val").iterdir()) == ["samples"]  # the images stay alone


@pytest.mark.parametrize("category", [name for name in CATEGORIES if name != "complex"])
def test_every_category_maps_its_results_back(category, checkout, tmp_path):
    """Numbered within each prompt, where the official order would be the file system's."""
    scores = {f"{prompt}_{n:06d}.png": value for prompt, value in (("b", 0.2), ("a", 0.7)) for n in (0, 1)}
    images = fill(tmp_path / "images", category, scores)
    assert run(images, checkout, tmp_path, [category])[category] == [0.7, 0.2, 0.7, 0.2]
    assert checkout.calls == [STEPS[category][0].script]


def test_complex_runs_its_four_scripts_on_images_in_prompt_order(checkout, tmp_path):
    names = [f"{prompt}_{n:06d}.png" for prompt in COMPLEX_PROMPTS for n in range(10)]
    images = fill(tmp_path / "images", "complex", {name: place / 100 for place, name in enumerate(names)})
    found = run(images, checkout, tmp_path, ["complex"])["complex"]
    expected = [float(path.read_text()) for path in images_of(images, "complex")]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert expected != sorted(expected)  # the names' numbers mix the prompts, as the official code would
    complex_calls = ["2D_spatial_eval.py --complex", "CLIPScore_eval/CLIP_similarity.py --complex", "3_in_1.py"]
    assert checkout.calls == ["BLIP_vqa.py", *complex_calls]


def test_a_second_run_takes_what_is_whole_and_other_images_are_scored_again(images, checkout, tmp_path):
    first = run(images, checkout, tmp_path)
    assert run(images, checkout, tmp_path) == first and len(checkout.calls) == 1
    changed = images / "color_val" / "samples" / "a cat_000001.png"
    changed.write_text("0.25")
    assert run(images, checkout, tmp_path)["color"][0] == 0.25 and len(checkout.calls) == 2
    (tmp_path / "out" / "color.json").write_text('{"category": "color", "ima')  # torn: read again, not run again
    assert run(images, checkout, tmp_path)["color"][0] == 0.25 and len(checkout.calls) == 2
    checkout.write(STEPS["color"][0], BY_PLACE.replace("enumerate(scores)", "enumerate([0.0] * len(scores))"))
    assert run(images, checkout, tmp_path) == {"color": [0.0] * 5}  # another version of the official code


def test_complex_goes_on_at_the_script_that_failed(checkout, tmp_path):
    names = [f"{prompt}_{n:06d}.png" for prompt in COMPLEX_PROMPTS for n in range(10)]
    images = fill(tmp_path / "images", "complex", dict.fromkeys(names, 0.5))
    clip = STEPS["complex"][2]
    checkout.write(clip, BY_PLACE.replace("(scores)", "(scores if os.path.exists('repaired') else scores[:7])"))
    with pytest.raises(ValueError, match=r"CLIP_similarity\.py ended well, but .* 7 results, of 7 .* 20 images"):
        run(images, checkout, tmp_path, ["complex"])
    before = len(checkout.calls)
    (checkout.root / "repaired").touch()
    np.testing.assert_allclose(run(images, checkout, tmp_path, ["complex"])["complex"], [0.5] * 20)
    assert checkout.calls[before:] == ["CLIPScore_eval/CLIP_similarity.py --complex", "3_in_1.py"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("rows = [{'question_id': 0, 'answer': 1}] * 5", "5 results, of 1 images, where there are 5 images"),
        ("rows = [{'question_id': i + 1, 'answer': 1} for i in range(5)]", "5 results, of 5 images, where there are"),
        ("rows = [{'question_id': i} for i in range(5)]", "KeyError: 'answer'"),
        ("rows = [{'question_id': i, 'answer': 'high'} for i in range(5)]", "could not convert"),
        ("rows = {'question_id': 0}", "is no list of results"),
        ("sys.exit(0)", "FileNotFoundError"),
        ("os.makedirs(options.images + '/annotation_blip'); open(options.images + '/annotation_blip/vqa_result.json',"
         " 'w').write('[{\"question_id\": 0, \"an'); sys.exit(0)", "JSONDecodeError"),
    ],
)  # fmt: skip
def test_a_result_that_is_not_whole_is_never_believed(rows, message, images, checkout, tmp_path):
    checkout.write(STEPS["color"][0], rows)
    with pytest.raises(ValueError, match=f"BLIP_vqa.py ended well, but .*{message}.*; its output is in .*stderr.txt"):
        run(images, checkout, tmp_path)
    assert not (tmp_path / "out" / "color.json").exists()


def test_a_script_that_fails_is_quoted_and_its_log_named(images, checkout, tmp_path):
    checkout.write(STEPS["color"][0], "print('loading'); raise RuntimeError('no CUDA GPUs are available')")
    with pytest.raises(ValueError, match=r"exit code 1: .*RuntimeError: no CUDA GPUs are available; all") as caught:
        run(images, checkout, tmp_path)
    assert "\n" not in str(caught.value)
    log = Path(str(caught.value).rpartition(" is in ")[2])
    assert "Traceback" in log.read_text()
    assert (log.parent / "BLIP_vqa.stdout.txt").read_text() == "loading\n"


def test_old_results_never_stand_in_for_a_failed_run(images, checkout, tmp_path):
    run(images, checkout, tmp_path)
    (images / "color_val" / "samples" / "a cat_000001.png").write_text("0.25")
    checkout.write(STEPS["color"][0], "sys.exit(0)")
    with pytest.raises(ValueError, match="ended well, but"):
        run(images, checkout, tmp_path)


def test_depth_maps_of_an_interrupted_run_are_made_again(checkout, tmp_path):
    """The official script takes ``labels/depth`` for complete as soon as it exists."""
    images = fill(tmp_path / "images", "3d_spatial", {"a_000000.png": 0.5})
    step = STEPS["3d_spatial"][0]
    depth = "depth = options.images + '/labels/depth'\nassert not os.path.exists(depth)\nos.makedirs(depth)\n"
    checkout.write(step, f"{depth}sys.exit(3)")
    with pytest.raises(ValueError, match="exit code 3: nothing on stderr"):
        run(images, checkout, tmp_path, ["3d_spatial"])
    checkout.write(step, depth + BY_NUMBER)
    assert run(images, checkout, tmp_path, ["3d_spatial"]) == {"3d_spatial": [0.5]}


def test_answers_that_are_no_numbers_are_no_scores(images, checkout, tmp_path):
    checkout.write(STEPS["color"][0], BY_PLACE.replace("format(s)", "format(s if i else float('nan'))"))
    assert run(images, checkout, tmp_path)["color"] == [None, 0.1, 0.9, 0.5, 0.55]
    told = main_official("x", [str(images), "--official-root", str(checkout.root), "--python", sys.executable,
                               "--categories", "color"]).splitlines()  # fmt: skip
    assert told == ["color         0.5125  5 images, 1 without a score", f"written {images / 't2i_compbench'}"]


def test_what_is_missing_is_named(images, checkout, tmp_path):
    (checkout.root / "BLIPvqa_eval" / "BLIP_vqa.py").unlink()
    with pytest.raises(ValueError, match=r"lacks BLIPvqa_eval/BLIP_vqa\.py, .* set T2I_COMPBENCH_ROOT to one"):
        run(images, checkout, tmp_path)
    with pytest.raises(ValueError, match="no interpreter 'no-such-python'; set T2I_COMPBENCH_PYTHON"):
        fill(images, "spatial", {"a_000000.png": 1})
        run_official(images, checkout.root, "no-such-python", tmp_path / "out", ["spatial"])
    with pytest.raises(ValueError, match="shape_val/samples holds no images; generate the category 'shape'"):
        run(images, checkout, tmp_path, ["shape"])
    with pytest.raises(ValueError, match="no category 'colour'; choose from color, shape"):
        run(images, checkout, tmp_path, ["colour"])


@pytest.mark.parametrize("name", ["a cat.png", "a_b_000001.png", "a cat_1.jpg", "_000001.png"])
def test_names_that_the_official_code_would_misread_are_refused(name, images, checkout, tmp_path):
    fill(images, "color", {name: 1, ".DS_Store": 1})
    with pytest.raises(ValueError, match=f"{name} is not named <prompt>_<number>.png"):
        run(images, checkout, tmp_path)


def test_complex_wants_ten_images_of_every_prompt():
    paths = [Path(f"{prompt}_{n:06d}.png") for prompt in COMPLEX_PROMPTS for n in range(10)]
    assert in_prompt_order(official_order(paths), COMPLEX_PROMPTS) == paths
    without_stop = [Path(path.name.replace("._", "_")) for path in paths]  # the official code ignores what follows it
    assert in_prompt_order(without_stop, COMPLEX_PROMPTS) == without_stop
    with pytest.raises(ValueError, match=r"'A dog runs\.' has 9 images, but .* 10 of each prompt"):
        in_prompt_order(paths[:-1], COMPLEX_PROMPTS)
    with pytest.raises(ValueError, match=r"A dog runs\._000011\.png is one too many"):
        in_prompt_order([*paths, Path("A dog runs._000011.png")], COMPLEX_PROMPTS)


def test_a_folder_of_somebody_elses_and_a_running_twin_are_left_alone(images, checkout, tmp_path):
    foreign = tmp_path / "out" / "official" / "color_val" / "thesis.tex"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("hours of work")
    with pytest.raises(ValueError, match="color_val was not made by this command; move it away"):
        run(images, checkout, tmp_path)
    assert foreign.read_text() == "hours of work"
    with FileLock(tmp_path / "out" / ".color.lock"), pytest.raises(ValueError, match="another process scores 'color'"):
        run(images, checkout, tmp_path)


def test_the_shell_script_is_the_same_door(images, checkout, tmp_path):
    script = Path(__file__).parents[1] / "eval" / "cal_t2i_compbench_value.sh"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def call(*words, **env):
        done = subprocess.run(
            [script, images, *words],
            env={**os.environ, "PATH": path, **env},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    code, out, err = call("--categories", "color", T2I_COMPBENCH_ROOT="")
    assert (code, out) == (2, "")
    assert err.startswith("cal_t2i_compbench_value.sh: error: T2I_COMPBENCH_ROOT is not set") and err.count("\n") == 1
    words = ("--out", tmp_path / "out", "--categories", "color")
    code, out, err = call(*words, T2I_COMPBENCH_ROOT=str(checkout.root), T2I_COMPBENCH_PYTHON=sys.executable)
    assert (code, out, err) == (0, f"color         0.4200  5 images\nwritten {tmp_path / 'out'}\n", "")


class Redness(Reward):
    """Red of the first pixel, and NaN for blue ones; remembers the prompts."""

    def compute(self, images, prompts, metadata):
        assert prompts == ["a red wall", "a blue wall"]
        return [None if image.getpixel((0, 0))[2] else image.getpixel((0, 0))[0] / 255 for image in images]


def test_a_category_is_scored_by_a_reward_of_ours(monkeypatch, checkout, tmp_path):
    samples = tmp_path / "color_val" / "samples"
    samples.mkdir(parents=True)
    Image.new("RGB", (8, 8), (51, 0, 0)).save(samples / "a red wall_000000.png")
    Image.new("RGB", (8, 8), (0, 0, 255)).save(samples / "a blue wall_000001.png")
    asked = []
    monkeypatch.setattr(
        "stage_grpo.rewards.registry.build_reward", lambda name, options: asked.append((name, options)) or Redness()
    )
    found = category_scores(tmp_path, "color", options={"device": "cpu"})
    assert found == {samples / "a red wall_000000.png": 0.2, samples / "a blue wall_000001.png": None}
    assert asked == [("blip_vqa", {"legacy": True, "device": "cpu"})]
    assert REWARDS["non_spatial"] == ("clip", {"weights": "clip-vit-base-patch32"})
    fill(tmp_path, "spatial", {"a_000000.png": 0.5})
    with pytest.raises(ValueError, match=r"'spatial' is scored by the official code alone; .* set T2I_COMPBENCH_ROOT"):
        category_scores(tmp_path, "spatial")
    by_official = category_scores(tmp_path, "spatial", checkout.root, sys.executable)
    assert by_official == {tmp_path / "spatial_val" / "samples" / "a_000000.png": 0.5}
    assert (tmp_path / "t2i_compbench" / "spatial.json").is_file()
