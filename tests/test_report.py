"""Reports: reading run folders of every age, figures, and a page that stands by itself."""

from __future__ import annotations

import base64
import dataclasses
import importlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prompt_folders import write_prompt_folder
from stage_grpo.config import StageConfig
from stage_grpo.evaluation.scores import Scores
from stage_grpo.pages import before_after, charts, report
from stage_grpo.run_record import read_run

PROMPT = 'a <b>"red"</b> & blue circle'
VOID = {"meta", "img", "br", "link", "input", "hr"}


def tile(value: int, size: int = 4) -> Image.Image:
    return Image.new("RGB", (size, size), (value, 0, 255 - value))


def write_run(folder: Path, weights: bool = True) -> Path:
    """A run of six steps with two groups of two images saved at steps 2 and 6."""
    (folder / "samples").mkdir(parents=True)
    config = {"learning_rate": 2e-4, "clip": [0.0, 1.0], "nothing": None, "note": "<script>x</script>"}
    run = {"config": config, "versions": {"torch": "2.13.0"}, "seed": 7, "commit": None}
    (folder / "run.json").write_text(json.dumps(run))
    rows = [{"step": t, "reward": t / 10, "kl": None if t == 3 else 0.01 * t, "step_time": 10.5} for t in range(1, 7)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (2, 6):
        sheet = Image.new("RGB", (8, 8))
        for i in range(4):
            sheet.paste(tile(50 * i), (i % 2 * 4, i // 2 * 4))
        sheet.save(folder / "samples" / f"step_{step:06d}.png")
        record = {
            "columns": 2,
            "tile": 4,
            "grid": [2, 2],
            "prompts": [PROMPT, PROMPT, "another", "another"],
            "rewards": [0.5, 0.5, 0.25, None],
            "advantages": [0.0, 0.0, 1.0, -1.0],
            "weights": [[0.1, 0.2, 0.3, 0.4]] * 4 if weights else None,
        }
        (folder / "samples" / f"step_{step:06d}.json").write_text(json.dumps(record))
    return folder


def write_side(folder: Path, correct: list[float]) -> Scores:
    """Images of six prompts, one a category, and their scores as `evaluate` would have written them."""
    tags = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    per_image = []
    for index, (tag, right) in enumerate(zip(tags, correct)):
        metadata = {"prompt": PROMPT, "tag": tag}
        write_prompt_folder(folder, index, metadata, [tile(int(200 * right))])
        record = {"path": f"{index:05d}/samples/00000.png", "index": index, "sample": 0, "prompt": PROMPT, "tag": tag}
        record |= {"scores": {"strict": right, "graded": right / 2}, "objects": None}
        per_image.append(record | {"reasons": [] if right else ["found <nothing>"]})
    column_scores = dict(zip(tags, correct)) | {"overall": float(np.mean(correct)), "heldout": 0.5}
    return Scores(
        benchmark="shapes",
        columns=list(tags),
        scores={"strict": column_scores, "graded": {name: value / 2 for name, value in column_scores.items()}},
        ci95={m: {name: [0.0, 1.0] for name in column_scores} for m in ("strict", "graded")},
        num_images=6,
        num_unscored={"strict": 0, "graded": 0},
        num_prompts=6,
        diversity={"unique_share": 0.9, "pairwise_distance": None, "space": None},
        missing={},
        partial=False,
        problems=[],
        settings={"prompts": "folders", "seed": 0},
        versions={},
        per_image=per_image,
    )


class Page(HTMLParser):
    """Collects what a page holds and refuses tags that do not close."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        assert "href" not in values and tag not in ("script", "link", "b"), (tag, attrs)
        if tag == "img":
            self.images.append(values["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def demo_report(tmp_path: Path) -> Path:
    before = write_side(tmp_path / "before", [1.0, 0, 0, 0, 0, 0])
    after = write_side(tmp_path / "after", [1.0, 1, 1, 1, 0, 0])
    run = write_run(tmp_path / "run")
    return report.write_demo_report(
        tmp_path / "out" / "report.html",
        before,
        after,
        run,
        tmp_path / "before",
        tmp_path / "after",
        {"train": 65.0, "evaluate": 30.4},
    )


# --- reading a run ---------------------------------------------------------------------------------------


def test_a_run_reads_back_what_was_written(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert run.config["learning_rate"] == 2e-4 and run.versions == {"torch": "2.13.0"} and run.about["seed"] == 7
    assert run.num_steps == 6 and run.sample_steps == [2, 6]
    assert run.series("reward") == ([1, 2, 3, 4, 5, 6], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert run.series("kl")[0] == [1, 2, 4, 5, 6]  # null is no value
    assert run.series("never logged") == ([], [])
    samples = run.samples(6)
    assert samples is not None and samples.prompts[2] == "another" and samples.grid == (2, 2)
    assert [image.tobytes() for image in samples.images] == [tile(50 * i).tobytes() for i in range(4)]


def test_crashed_and_older_runs_read_as_far_as_they_go(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train_runtime": 9.0}\n[1]\n{"reward": 1}\n{"step": 7, "rew')  # torn by a crash
    (run / "samples" / "step_000006.json").write_text('{"prompts": ["x", "y"], "tile": 4}')
    (run / "samples" / "step_000002.png").write_bytes(b"torn")
    (run / "run.json").unlink()
    record = read_run(run)
    assert record.series("reward")[0] == [1, 2, 3, 4, 5, 6] and record.config == {} and record.samples(2) is None
    older = record.samples(6)
    assert older is not None and older.weights is None and older.rewards == [None, None] and older.columns == 2
    page = Page(report.write_run_report(run).read_text())
    assert "Token weights" not in page.text and "Step 6: x" in page.text


def test_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder; give the output folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no run\.json, metrics\.jsonl or samples"):
        report.write_run_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- figures ---------------------------------------------------------------------------------------------


def test_moving_average_by_hand() -> None:
    # Window 3: (1+2)/2, (1+2+6)/3, (2+6+3)/3, (6+3)/2.
    np.testing.assert_allclose(charts.moving_average([1, 2, 6, 3], 3), [1.5, 3.0, 11 / 3, 4.5], atol=1e-12)
    np.testing.assert_allclose(charts.moving_average([4.0], 5), [4.0], atol=1e-12)


def test_charts_are_deterministic_and_their_ids_do_not_clash() -> None:
    series = {"policy": ([1, 2, 3], [0.0, 1.0, 0.5]), "reference": ([1, 3], [1.0, 1.0]), "empty": ([], [])}
    one, again = (charts.line_chart(series, salt="one", dashed=["reference"]) for _ in range(2))
    assert one == again
    two = charts.line_chart(series, salt="two")
    clips = [set(re.findall(r'clipPath id="([^"]+)"', svg)) for svg in (one, two)]
    assert clips[0] and not clips[0] & clips[1]
    assert one.startswith("<svg") and ">policy<" in one and ">empty<" not in one
    assert "stroke-dasharray" in one


def test_interval_chart_names_rows_and_sides() -> None:
    svg = charts.interval_chart(
        ["counting", "overall"], {"before": [(0.2, 0.1, 0.3)] * 2, "after": [(0.4, 0.3, 0.5)] * 2}, salt="x"
    )
    assert all(f">{word}<" in svg for word in ("counting", "overall", "before", "after"))


def test_images_survive_as_data_uris() -> None:
    uri = charts.data_uri(tile(80))
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    assert image.convert("RGB").tobytes() == tile(80).tobytes()


def test_weight_overlay_tints_each_token_by_its_weight() -> None:
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    overlay = charts.weight_overlay(grey, [0.0, 1.0, 0.5, 2.0], (2, 2), (0.0, 1.0))
    assert overlay.size == (192, 192)
    # 0.4 * 100 + 0.6 * viridis: its ends are (68, 1, 84) and (253, 231, 36); beyond the scale is clipped.
    low, high, beyond = (overlay.getpixel(at) for at in ((10, 10), (180, 10), (180, 180)))
    np.testing.assert_allclose(low, [0.4 * 100 + 0.6 * c for c in (68, 1, 84)], atol=1)
    np.testing.assert_allclose(high, [0.4 * 100 + 0.6 * c for c in (253, 231, 36)], atol=1)
    assert beyond == high != overlay.getpixel((10, 180))
    with pytest.raises(ValueError, match="3 weights do not fill a grid of 2 x 2 tokens"):
        charts.weight_overlay(grey, [0.0, 1.0, 0.5], (2, 2), (0.0, 1.0))


# --- reports ---------------------------------------------------------------------------------------------


def test_demo_report_shows_everything_and_stands_by_itself(tmp_path: Path) -> None:
    html = demo_report(tmp_path).read_text()
    page = Page(html)
    assert not re.search(r'(src|href)=(?!"data:|"#)|url\((?!#)|@import', html)
    # Six pairs; one group of two images twice (plain and weights); two groups of two at the first and last step.
    assert len(page.images) == 12 + 4 + 8
    assert all(uri.startswith("data:image/png;base64,") for uri in page.images)
    assert "0.167 → 0.667" in page.text and "+0.500" in page.text and "1 min 35 s" in page.text
    assert page.text.count(PROMPT) >= 7 and "found <nothing>" in page.text
    assert page.text.count("✓ correct") == 5 and page.text.count("✗ 0.00") == 7
    for words in ("held-out only", "KL from the reference", "learning_rate", "2.13.0", "65.0 s", "seed", "90% → 90%"):
        assert words in page.text
    assert "[0.0, 1.0]" in page.text and "<script>x" in page.text and "nothing" not in re.findall(r"<th>(\w+)", html)


def test_equal_input_gives_an_equal_report(tmp_path: Path) -> None:
    first = demo_report(tmp_path / "a").read_bytes()
    assert demo_report(tmp_path / "b").read_bytes() == first


def test_the_weights_shown_are_those_of_the_group_that_differs_most(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    record = json.loads((run / "samples" / "step_000006.json").read_text())
    record["rewards"] = [0.5, 0.5, 0.0, 1.0]
    (run / "samples" / "step_000006.json").write_text(json.dumps(record))
    page = Page(report.write_run_report(run).read_text())
    assert "One group at step 6: “another”" in page.text
    assert "M = 0.10" in page.text and "+1.00" in page.text and "-1.00" in page.text


def test_a_run_without_weights_falls_back_to_no_section(tmp_path: Path) -> None:
    page = Page(report.write_run_report(write_run(tmp_path / "run", weights=False)).read_text())
    assert "Token weights" not in page.text
    assert "0.100 → 0.600" in page.text  # first and last tenth of six steps: one each
    assert "1 min 03 s" in page.text  # six steps of 10.5 seconds


def test_a_report_needs_its_images(tmp_path: Path) -> None:
    demo_report(tmp_path)
    (tmp_path / "after" / "00003" / "samples" / "00000.png").unlink()
    sides = [write_side(tmp_path / name, [1.0] * 6) for name in ("x", "y")]
    with pytest.raises(ValueError, match=r"00003.*generate this image again"):
        report.write_demo_report(
            tmp_path / "r.html", *sides, tmp_path / "run", tmp_path / "before", tmp_path / "after", 1.0
        )
    assert not (tmp_path / "r.html").exists()


def test_picture_puts_before_above_after_and_frames_what_is_correct(tmp_path: Path) -> None:
    before = write_side(tmp_path / "before", [0.0] * 6)
    after = write_side(tmp_path / "after", [1.0, 0, 0, 0, 0, 0])
    picture = before_after.picture(before, after, tmp_path / "before", tmp_path / "after", tile=40)
    assert picture.size == (52 + 6 * 48, 40 + 2 * 48)
    frame, inside = (52, 40), (52 + 20, 40 + 20)
    assert picture.getpixel(inside) == (0, 0, 255) and picture.getpixel((inside[0], inside[1] + 48)) == (200, 0, 55)
    assert picture.getpixel(frame) == (201, 206, 216) and picture.getpixel((frame[0], frame[1] + 48)) == (42, 157, 111)


# --- documentation ---------------------------------------------------------------------------------------


def test_every_metric_shown_or_logged_is_defined() -> None:
    root = Path(report.__file__).parents[1]
    defined = (root.parents[1] / "docs" / "metrics.md").read_text()
    shown = {name for line in report.CHARTS for name in line.metrics}
    logged = set(re.findall(r'_log\("([^"]+)"', (root / "trainer.py").read_text()))
    assert len(logged) > 8
    for name in sorted(shown | logged):
        base, _, last = name.rpartition("/")
        assert f"`{name}`" in defined or (f"`{base}/" in defined and f"`/{last}`" in defined), name


def test_the_paper_map_names_functions_that_exist() -> None:
    text = (Path(report.__file__).parents[3] / "docs" / "paper_map.md").read_text()
    names = set(re.findall(r"`((?:objective|similarity|entropy)\.\w+)`", text))
    assert len(names) == 10
    for name in names:
        module, function = name.split(".")
        assert callable(getattr(importlib.import_module(f"stage_grpo.{module}"), function)), name
    options = set(re.findall(r"`(\w+): [^`]+`", text)) | set(re.findall(r"`((?:kl|entropy|reweight)_\w+)`", text))
    fields = {field.name for field in dataclasses.fields(StageConfig)}
    assert {"reweight_kl", "preset"} <= options <= fields
