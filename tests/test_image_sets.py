"""Image sets: every way one can be broken is refused with the reason, and what is left can be scored, marked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from prompt_folders import write_prompt_folder
from stage_grpo.benchmarks import BENCHMARKS, Benchmark, Scorer
from stage_grpo.evaluation import evaluate as evaluation
from stage_grpo.images.files import save_image
from stage_grpo.images.layouts import LAYOUTS, plan_images, side_folder
from stage_grpo.images.sets import read_image_set
from stage_grpo.types import PromptRow


def redness(images, prompts, metadata):
    """A reward."""
    return [image.getpixel((0, 0))[0] / 255 for image in images]


def toy(layout: str) -> Benchmark:
    return Benchmark("toy", "Toy", ("a", "b"), (Scorer("red", f"{__name__}:redness"),), 2, layout, "these tests")


ROWS = [PromptRow(f"prompt {index}", {"tag": "ab"[index // 2], "prompt": f"prompt {index}"}) for index in range(4)]
NUM_IMAGES = 2


def write_set(folder: Path, layout_name: str, rows: list[PromptRow] = ROWS) -> Path:
    """A whole set as ``stage generate`` leaves it; every picture is another one."""
    layout = LAYOUTS[layout_name]
    side = side_folder(layout, folder)
    lines = []
    for image in plan_images(layout, rows, NUM_IMAGES):
        path = folder / image.path
        about = {"prompt": image.row.prompt, "index": image.index, "sample": image.sample, "seed": 0}
        color = (40 * image.index + 10 * image.sample, 0, 0)
        save_image(path, Image.new("RGB", (8, 8), color), about)
        if layout.describes_prompts:
            (path.parents[1] / "metadata.jsonl").write_text(json.dumps(image.row.metadata) + "\n")
            Image.new("RGB", (16, 8)).save(path.parents[1] / "grid.png")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append({**about, "path": image.path.as_posix(), "tag": image.row.metadata["tag"], "sha256": sha256})
    side.mkdir(exist_ok=True)
    (side / "generation.json").write_text(json.dumps({"num_images": NUM_IMAGES, "image_size": 8}))
    write_manifest(side, lines)
    return folder


def write_manifest(side: Path, lines: list[dict]) -> None:
    (side / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def manifest(side: Path) -> list[dict]:
    return [json.loads(line) for line in (side / "manifest.jsonl").read_text().splitlines()]


def rows_file(folder: Path, rows: list[PromptRow] = ROWS) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row.metadata) + "\n" for row in rows))
    return path


def test_jpegs_are_saved_as_the_protocol_of_hps_saves_them(tmp_path: Path) -> None:
    """HPSv2's README: ``image.save("00000.jpg")``, and nothing more."""
    noise = Image.effect_noise((48, 48), 90)
    picture = Image.merge("RGB", (noise, noise.rotate(90), noise.rotate(180)))
    save_image(tmp_path / "ours.jpg", picture, {"prompt": "a dog"})
    picture.save(tmp_path / "theirs.jpg")
    with Image.open(tmp_path / "ours.jpg") as ours, Image.open(tmp_path / "theirs.jpg") as theirs:
        assert ours.tobytes() == theirs.tobytes() != picture.tobytes()
    save_image(tmp_path / "ours.png", picture, {})
    with Image.open(tmp_path / "ours.png") as ours:
        assert ours.tobytes() == picture.tobytes()


# --- whole sets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_rows", [True, False])
def test_a_whole_set_reads_in_the_order_of_its_prompts(layout: str, with_rows: bool, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", layout)
    found = read_image_set(toy(layout), folder, ROWS if with_rows else None)
    assert found.problems == [] and found.source == ("prompts" if with_rows else "manifest")
    plan = plan_images(LAYOUTS[layout], ROWS, NUM_IMAGES)
    assert [(i.path, i.index, i.sample, i.prompt) for i in found.images] == [
        (p.path.as_posix(), p.index, p.sample, p.row.prompt) for p in plan
    ]
    assert len({image.digest for image in found.images}) == len(plan)
    assert [image.metadata["tag"] for image in found.images] == list("aaaabbbb")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_set_of_another_program_needs_no_records(layout: str, tmp_path: Path) -> None:
    """Images alone, in the official layout, with the official prompts."""
    folder = write_set(tmp_path / "set", layout)
    for path in (folder, folder.with_name("set.about")):
        for name in ("manifest.jsonl", "generation.json"):
            (path / name).unlink(missing_ok=True)
    for path in [path for path in folder.rglob("*") if path.suffix in (".png", ".jpg")]:
        with Image.open(path) as image:
            pixels = image.convert("RGB")
        pixels.save(path)  # without what stage generate writes into a file
    found = read_image_set(toy(layout), folder, ROWS)
    assert found.problems == [] and len(found.images) == 8


def renumbered(folder: Path) -> Path:
    """The same images under numbers of other widths, which GenEval's own scorer reads as well."""
    for path in sorted(folder.glob("*/samples/*.png")):
        path.rename(path.with_name(f"{int(path.stem)}.png"))
    for path in sorted(folder.glob("0*")):
        path.rename(folder / f"{int(path.name):03d}")
    return folder


@pytest.mark.parametrize("num_images", [None, NUM_IMAGES])
def test_folders_and_images_of_another_program_go_by_their_numbers(tmp_path: Path, num_images: int | None) -> None:
    folder = renumbered(undescribed(write_set(tmp_path / "set", "geneval")))
    found = read_image_set(toy("geneval"), folder, ROWS, num_images)
    assert found.problems == []
    assert [(i.path, i.index, i.sample) for i in found.images] == [
        (f"{index:03d}/samples/{sample}.png", index, sample) for index in range(4) for sample in range(2)
    ]
    (folder / "001/samples/1.png").rename(folder / "001/samples/1.jpg")
    (folder / "002/samples/0.png").unlink()
    shutil.copy(folder / "003/samples/1.png", folder / "003/samples/01.png")
    shutil.copy(folder / "003/samples/1.png", folder / "003/samples/7.png")
    told = "\n".join(read_image_set(toy("geneval"), folder, ROWS, num_images).problems)
    assert "001/samples/1.jpg: the benchmark's own scorer reads .png only" in told
    assert "00002/samples/00000.png: missing" in told
    assert all(f"003/samples/{name}.png: belongs to no prompt" in told for name in ("1", "7"))
    assert told.count("\n") == 3


def test_our_own_sets_keep_their_names(tmp_path: Path) -> None:
    folder = renumbered(write_set(tmp_path / "set", "geneval"))
    assert read_image_set(toy("geneval"), folder, ROWS).images == []
    (folder / "manifest.jsonl").unlink()
    assert read_image_set(toy("geneval"), folder, ROWS).images == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_current_folder_is_read_like_any_other(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_set(tmp_path / "set", layout)
    whole = read_image_set(toy(layout), folder)
    monkeypatch.chdir(folder)
    for place in (".", f"{folder}/../set/."):
        found = read_image_set(toy(layout), place)
        assert found.fingerprint == whole.fingerprint and found.generation == whole.generation


def test_other_suffixes_will_do_where_no_official_scorer_minds(tmp_path: Path) -> None:
    for index in range(4):
        path = tmp_path / "set" / f"{index:05d}.jpg"
        save_image(path, Image.new("RGB", (8, 8), (60 * index, 0, 0)), {})
    found = read_image_set(toy("flat"), tmp_path / "set", ROWS)
    assert found.problems == [] and [image.path for image in found.images] == [f"0000{i}.jpg" for i in range(4)]


def test_the_fingerprint_knows_pixels_prompts_and_places(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", "flat")
    first = read_image_set(toy("flat"), folder)
    assert read_image_set(toy("flat"), folder).fingerprint == first.fingerprint
    images = list(first.images)
    for change in ({"digest": "0"}, {"prompt": "x"}, {"path": "x.png"}, {"metadata": {"tag": "b"}}):
        other = dataclasses.replace(first, images=[dataclasses.replace(images[0], **change), *images[1:]])
        assert other.fingerprint != first.fingerprint, change


# --- broken sets -----------------------------------------------------------------------------------------


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-25])


def repaint(path: Path, color: tuple[int, int, int] = (1, 2, 3), size: int = 8, about: dict | None = None) -> None:
    save_image(path, Image.new("RGB", (size, size), color), about or {})


def plain_copy(source: Path, target: Path) -> None:
    with Image.open(source) as image:
        pixels = image.convert("RGB")
    pixels.save(target)


def change_line(folder: Path, **values: object) -> None:
    lines = manifest(folder)
    write_manifest(folder, [{**lines[0], **values}, *lines[1:]])


def describe(folder: Path, text: str) -> None:
    (folder / "00001" / "metadata.jsonl").write_text(text)


def link_out(folder: Path) -> None:
    outside = folder.parent / "outside.png"
    repaint(outside)
    (folder / "00001/samples/00000.png").unlink()
    (folder / "00001/samples/00000.png").symlink_to(outside)


FIRST, SECOND = "00000/samples/00000.png", "00001/samples/00001.png"

Breakage = tuple[Callable[[Path], object], str, int | None]
"""What is done to a whole set of eight images, what the refusal says, and how many images can be scored still."""

GENEVAL: dict[str, Breakage] = {
    "missing image": (lambda d: (d / SECOND).unlink(), r"00001/samples/00001\.png: missing; generate it again", 7),
    "missing prompt folder": (lambda d: shutil.rmtree(d / "00002"), r"00002: missing; generate the prompts again", 6),
    "torn image": (lambda d: tear(d / FIRST), r"00000/samples/00000\.png: .*; generate this image again", 7),
    "no image": (lambda d: (d / FIRST).write_bytes(b"hello"), r"00000\.png: not an image; generate", 7),
    "zero bytes": (lambda d: (d / FIRST).write_bytes(b""), r"00000\.png: not an image, 0 bytes", 7),
    "a folder as image": (lambda d: ((d / FIRST).unlink(), (d / FIRST).mkdir()), r"00000\.png: missing", 7),
    "wrong size": (lambda d: repaint(d / FIRST, size=9), r"00000\.png: 9 x 9 pixels, expected 8 x 8", 8),
    "extra image": (lambda d: repaint(d / "00000/samples/00002.png"), r"00002\.png: belongs to no prompt", 8),
    "extra prompt folder": (
        lambda d: shutil.copytree(d / "00000", d / "00004"),
        r"00004/samples/00000\.png: belongs to no prompt; remove it",
        8,
    ),
    "image of another type": (
        lambda d: (plain_copy(d / FIRST, d / "00000/samples/00000.jpg"), (d / FIRST).unlink()),
        r"00000\.jpg: the benchmark's own scorer reads \.png only",
        8,
    ),
    "image of another prompt": (
        lambda d: shutil.copyfile(d / "00003/samples/00000.png", d / FIRST),
        "the file says prompt 'prompt 3' for 'prompt 0', index 3 for 0",
        7,
    ),
    "image of another place": (
        lambda d: shutil.copyfile(d / "00000/samples/00001.png", d / FIRST),
        "the file says sample 1 for 0",
        8,
    ),
    "duplicate": (
        lambda d: plain_copy(d / "00003/samples/00000.png", d / FIRST),
        r"00003/samples/00000\.png: the same picture as 00000/samples/00000\.png, which has another prompt",
        8,
    ),
    "altered file": (lambda d: repaint(d / FIRST), r"00000\.png: not the file of the manifest", 8),
    "no metadata": (lambda d: (d / "00001/metadata.jsonl").unlink(), r"metadata\.jsonl: No such file", 6),
    "torn metadata": (lambda d: describe(d, '{"prompt": "pro'), r"metadata\.jsonl: .*; generate this prompt again", 6),
    "metadata no object": (lambda d: describe(d, "[1]"), 'expected one JSON object with "prompt"', 6),
    "two objects": (lambda d: describe(d, '{"prompt": "x"}\n{"prompt": "y"}\n'), "expected one JSON object", 6),
    "no prompt": (lambda d: describe(d, '{"tag": "a"}'), 'one JSON object with "prompt"', 6),
    "unknown tag": (lambda d: describe(d, '{"tag": "c", "prompt": "prompt 1"}'), "tag 'c' is none of a, b", 6),
    "binary metadata": (
        lambda d: (d / "00001/metadata.jsonl").write_bytes(b"\xff\xfe"),
        "can't decode byte 0xff",
        6,
    ),
    "other prompt in metadata": (
        lambda d: describe(d, '{"tag": "a", "prompt": "another"}'),
        "made from 'prompt 1', described as 'another'",
        6,
    ),
    "unfinished": (lambda d: (d / "manifest.jsonl").unlink(), r"generation\.json without manifest\.jsonl", 8),
    "torn manifest": (
        lambda d: (d / "manifest.jsonl").write_text((d / "manifest.jsonl").read_text()[:-40]),
        r"manifest\.jsonl, line 8: torn",
        7,
    ),
    "empty manifest": (lambda d: (d / "manifest.jsonl").write_text(""), r"manifest\.jsonl: names no image", 8),
    "manifest outside": (
        lambda d: change_line(d, path="../../outside.png"),
        r"line 1: path '\.\./\.\./outside\.png' leads out of the folder",
        7,
    ),
    "absolute manifest": (lambda d: change_line(d, path="/etc/x.png"), "leads out of the folder", 7),
    "manifest lacks a field": (
        lambda d: change_line(d, prompt=None),
        "line 1: expected an object with path, index",
        7,
    ),
    "manifest says twice": (
        lambda d: write_manifest(d, [*manifest(d), manifest(d)[0]]),
        r"line 9: 00000/samples/00000\.png is named twice",
        8,
    ),
    "binary generation": (
        lambda d: (d / "generation.json").write_bytes(b"\xff"),
        r"generation\.json: cannot be read",
        8,
    ),
    "link out of the folder": (link_out, r"00001/samples/00000\.png: a link to .*outside\.png, outside the folder", 7),
    "folder link out": (
        lambda d: (shutil.move(d / "00003", d.parent / "moved"), (d / "00003").symlink_to(d.parent / "moved")),
        "00003: a link to .*moved, outside the folder",
        6,
    ),
    "link to nothing": (
        lambda d: ((d / FIRST).unlink(), (d / FIRST).symlink_to(d / "nothing.png")),
        r"00000\.png: a link to nothing",
        7,
    ),
}


def refused_and_partly_scored(
    benchmark: Benchmark, folder: Path, message: str, num_left: int | None, prompts: Path | None = None
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        evaluation.evaluate(benchmark, folder, prompts=prompts)
    if num_left is None:
        assert "--allow-partial" not in str(refusal.value)
        with pytest.raises(ValueError, match=message):
            evaluation.evaluate(benchmark, folder, prompts=prompts, allow_partial=True)
        return
    assert str(refusal.value).endswith("repair them, or score what there is by --allow-partial")
    scores = evaluation.evaluate(benchmark, folder, prompts=prompts, allow_partial=True)
    assert scores.partial and scores.num_images == num_left
    assert scores.problems and all(problem in str(refusal.value) for problem in scores.problems)


@pytest.fixture(autouse=True)
def toy_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BENCHMARKS, "toy", toy("geneval"))


@pytest.mark.parametrize("name", GENEVAL)
def test_a_broken_set_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    breakage, message, num_left = GENEVAL[name]
    folder = write_set(tmp_path / "set", "geneval")
    breakage(folder)
    refused_and_partly_scored(toy("geneval"), folder, message, num_left)


AGAINST_PROMPTS: dict[str, Breakage] = {
    "other prompt in metadata": (
        lambda d: describe(d, '{"tag": "a", "prompt": "another"}'),
        "00001: made from 'another', expected 'prompt 1'; give --prompts FILE",
        6,
    ),
    "other metadata": (
        lambda d: describe(d, '{"tag": "b", "prompt": "prompt 1"}'),
        "00001: metadata differ in tag from the prompts'",
        8,
    ),
    "other prompt in the manifest": (
        lambda d: change_line(d, prompt="another"),
        r"00000/samples/00000\.png: made from 'another', expected 'prompt 0'",
        7,
    ),
    "no metadata": (lambda d: (d / "00001/metadata.jsonl").unlink(), r"metadata\.jsonl: No such file", 8),
    "not in the manifest": (
        lambda d: write_manifest(d, manifest(d)[1:]),
        r"00000/samples/00000\.png: not in manifest\.jsonl",
        8,
    ),
    "too few prompts": (lambda d: shutil.rmtree(d / "00003"), "3 prompt folders for 4 prompts", 6),
    "too many prompts": (
        lambda d: shutil.copytree(d / "00000", d / "00004"),
        "00004: there are 4 prompts; remove it",
        8,
    ),
}


@pytest.mark.parametrize("name", AGAINST_PROMPTS)
def test_a_set_that_contradicts_its_prompts_is_refused(name: str, tmp_path: Path) -> None:
    breakage, message, num_left = AGAINST_PROMPTS[name]
    folder = write_set(tmp_path / "set", "geneval")
    breakage(folder)
    refused_and_partly_scored(toy("geneval"), folder, message, num_left, rows_file(tmp_path))


def undescribed(folder: Path) -> Path:
    """The same set without records: folders that speak for themselves."""
    (folder / "manifest.jsonl").unlink()
    (folder / "generation.json").unlink()
    return folder


FOLDERS: dict[str, Breakage] = {
    "gap": (lambda d: shutil.rmtree(d / "00001"), "00001: missing; generate the prompts again", 6),
    "no samples": (lambda d: shutil.rmtree(d / "00000/samples"), r"00000/samples: holds no image \(.png", 6),
    "uneven": (lambda d: (d / SECOND).unlink(), r"prompt 1 \('prompt 1'\) has 1 images; most have 2", 7),
    "wrong size": (lambda d: repaint(d / FIRST, size=9), r"00000\.png: 9 x 9 pixels, expected 8 x 8", 8),
    "no number": (lambda d: repaint(d / "00000/samples/best.png"), r"best\.png: belongs to no prompt", 8),
    "no prompt folders": (
        lambda d: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in d.iterdir()] and repaint(d / "x.png"),
        "holds no prompt folders; expected .*00000 with metadata",
        None,
    ),
    "empty folder": (lambda d: [shutil.rmtree(p) for p in d.iterdir()], "is empty; generate images first", None),
    "missing folder": (lambda d: shutil.rmtree(d), "is not a folder; generate images first", None),
    "a file": (lambda d: (shutil.rmtree(d), d.write_text("x")), "is a file; generate images first", None),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_broken_folders_without_records_are_refused(name: str, tmp_path: Path) -> None:
    breakage, message, num_left = FOLDERS[name]
    folder = undescribed(write_set(tmp_path / "set", "geneval"))
    breakage(folder)
    refused_and_partly_scored(toy("geneval"), folder, message, num_left)


OTHERS: dict[str, tuple[str, Callable[[Path], object], str, int | None]] = {
    "hps, of another type": (
        "hps",
        lambda d: (plain_copy(d / "a/00001.jpg", d / "a/00001.png"), (d / "a/00001.jpg").unlink()),
        r"a/00001\.png: the benchmark's own scorer reads \.jpg only",
        8,
    ),
    "hps, stray entry": (
        "hps",
        lambda d: (d / "notes.txt").write_text("x"),
        "notes.txt: the official scorer takes",
        8,
    ),
    "hps, unfinished": (
        "hps",
        lambda d: (d.with_name("set.about") / "manifest.jsonl").unlink(),
        r"set\.about: generation\.json without manifest\.jsonl",
        8,
    ),
    "flat, two types": ("flat", lambda d: repaint(d / "00000.webp"), r"00000\.webp: belongs to no prompt", 8),
    "flat, too many prompts": (
        "flat",
        lambda d: write_manifest(d, [*manifest(d), {**manifest(d)[0], "index": 4, "path": "00004.png"}]),
        "5 prompts for 4 prompts",
        8,
    ),
    "t2i, foreign name": (
        "t2i_compbench",
        lambda d: (d / "a_val/samples/prompt 0_000000.png").rename(d / "a_val/samples/prompt 9_000000.png"),
        r"prompt 9_000000\.png: belongs to no prompt",
        7,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_broken_sets_of_other_layouts(name: str, tmp_path: Path) -> None:
    layout, breakage, message, num_left = OTHERS[name]
    folder = write_set(tmp_path / "set", layout)
    breakage(folder)
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    refused_and_partly_scored(toy(layout), folder, message, num_left, rows_file(prompts))


def test_a_manifest_with_an_unknown_category(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", "flat")
    change_line(folder, tag="c")
    refused_and_partly_scored(toy("flat"), folder, r"tag 'c' in manifest\.jsonl is none of a, b", 7)


def test_images_that_say_nothing_of_themselves_need_prompts(tmp_path: Path) -> None:
    repaint(tmp_path / "set" / "00000.png")
    with pytest.raises(
        ValueError, match=r"does not say what its images were made from .* give their prompts by --pro"
    ):
        evaluation.evaluate(toy("flat"), tmp_path / "set")
    drawbench = BENCHMARKS["drawbench"]
    with pytest.raises(ValueError, match="get the official ones by: stage data fetch drawbench"):
        read_image_set(drawbench, tmp_path / "set")


def test_equal_pictures_of_one_prompt_or_of_a_collapsed_model_are_no_error(tmp_path: Path) -> None:
    """They lower diversity; only a copy of a file under another prompt is wrong, and such a file says so itself."""
    folder = tmp_path / "set"
    for index in range(4):
        metadata = ROWS[index].metadata
        write_prompt_folder(folder, index, metadata, [Image.new("RGB", (4, 4), (index, 0, 0))] * 2)
    assert read_image_set(toy("geneval"), folder).problems == []
    for index in range(4):
        about = {"prompt": ROWS[index].prompt, "index": index, "sample": 0}
        save_image(folder / f"{index:05d}/samples/00000.png", Image.new("RGB", (4, 4)), about)
    assert read_image_set(toy("geneval"), folder).problems == []


def test_the_first_few_of_every_kind_are_listed(tmp_path: Path) -> None:
    for index in range(13):
        metadata = {"tag": "unknown" if index < 9 else "a", "prompt": f"p{index}"}
        write_prompt_folder(tmp_path / "set", index, metadata, [Image.new("RGB", (4, 4), (index, 0, 0))])
    (tmp_path / "set/00012/samples/00000.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"10 problem\(s\)") as error:
        evaluation.evaluate(toy("geneval"), tmp_path / "set")
    lines = str(error.value).splitlines()
    assert str(error.value).count("is none of") == 5 and "  and 4 more of the kind: unknown tag" in lines
    assert "0 bytes" in lines[-2]


@pytest.mark.parametrize("layout", ["geneval", "flat"])
def test_a_number_of_images_that_is_asked_for_is_checked_without_prompts(layout: str, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", layout)
    assert read_image_set(toy(layout), folder, num_images=2).problems == []
    read = read_image_set(toy(layout), folder, num_images=3)
    assert len(read.images) == 8 and read.num_problems == 4
    assert read.problems[0].endswith("prompt 0 ('prompt 0') has 2 images; --num-images says 3")
    if layout == "geneval":
        assert read_image_set(toy(layout), undescribed(folder), num_images=3).problems == read.problems


def test_how_many_images_a_prompt_has_is_seen_in_a_set_that_lacks_some(tmp_path: Path) -> None:
    folder = undescribed(write_set(tmp_path / "set", "geneval"))
    shutil.rmtree(folder / "00003")
    (folder / SECOND).unlink()
    repaint(folder / "00000/samples/00002.png")
    found = read_image_set(toy("geneval"), folder, ROWS)
    assert len(found.images) == 5 and found.num_problems == 1 + 2 + 1 + 1
    assert any("00001/samples/00001.png: missing" in problem for problem in found.problems)
    assert any("00002.png: belongs to no prompt" in problem for problem in found.problems)
    # Asked for three images of each, four prompts lack 4 + 2 + 1 + ... of them.
    more = read_image_set(toy("geneval"), folder, ROWS, num_images=3)
    assert len(more.images) == 6 and more.num_problems == 1 + (12 - 6)
