"""The door that scores rendered text: what users of the released code call, on real readings and by hand."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from stage_grpo.evaluation.ocr_summary import main_ocr_score

DOOR = Path(__file__).parents[1] / "eval" / "cal_ocr_score.py"
TEXTS = ("STOP", "Open now", "Grand opening")


@pytest.fixture(autouse=True)
def readings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An engine that reads the number of an image off its colour."""
    lines = ("STOP", "Open cow", "see the GRAND opening")
    monkeypatch.setattr(
        "stage_grpo.rewards.ocr._rapidocr", lambda options: lambda image: [lines[image.getpixel((0, 0))[0]]]
    )
    monkeypatch.setenv("STAGE_DATA", str(tmp_path / "data"))


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for index in range(3):
        suffix = "jpg" if index == 2 else "png"
        Image.new("RGB", (32, 32), (index, index, index)).save(tmp_path / "images" / f"{index:05d}.{suffix}")
    (tmp_path / "prompts.txt").write_text("".join(f'A sign that says "{text}".\n' for text in TEXTS))
    return tmp_path


def score(folder: Path, *words: str) -> list[str]:
    given = ["--image_root", str(folder / "images"), "--txt_path", str(folder / "prompts.txt")]
    return main_ocr_score("cal_ocr_score.py", [*given, "--output_csv", str(folder / "out.csv"), *words]).splitlines()


def sheet(folder: Path) -> list[list[str]]:
    with (folder / "out.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_scores_by_hand(workplace: Path) -> None:
    lines = score(workplace)
    # STOP: right. "opennow" read as "opencow": 1 of 7 wrong. "grandopening" behind "seethe": 6 of 12 too many.
    expected = [1.0, 1 - 1 / 7, 0.5]
    assert lines[0] == f"[OCR] Samples=3, Missing=0, AvgScore={sum(expected) / 3:.4f}"
    head, *rows = sheet(workplace)
    assert head == ["index", "filename", "prompt", "ocr_score"]
    assert [row[:2] for row in rows] == [["0", "00000.png"], ["1", "00001.png"], ["2", "00002.jpg"]]
    assert [float(row[3]) for row in rows] == pytest.approx(expected)
    by_length = {line.split("  ")[0]: line.split()[-1] for line in lines}
    assert [by_length[name] for name in ("up to 5", "6 to 10", "11 to 20", "over 20")] == ["1", "1", "1", "0"]


def test_the_released_rule_forgives_what_is_around_the_text(workplace: Path) -> None:
    score(workplace, "--substring_match", "--batch_size", "1")
    assert [float(row[3]) for row in sheet(workplace)[1:]] == pytest.approx([1.0, 1 - 1 / 7, 1.0])


def test_missing_and_torn_images_are_counted_and_left_out(workplace: Path) -> None:
    (workplace / "images/00000.png").unlink()
    (workplace / "images/00001.png").write_bytes(b"torn")
    lines = score(workplace)
    assert lines[:2] == ["[OCR] Samples=1, Missing=2, AvgScore=0.5000", "[OCR] Missing indices (first 20): [0, 1]"]
    assert any(line.startswith("PARTIAL") for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ocr_base_root", "whl"], "--ocr_base_root whl: the engine brings its own networks"),
        (["--engine", "tesseract"], "invalid choice: 'tesseract'"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--txt_path", "absent.txt"], "absent.txt: cannot be read"),
    ],
)
def test_wrong_words(words: list[str], message: str, workplace: Path) -> None:
    with pytest.raises(ValueError, match=message):
        score(workplace, *words)


def test_prompts_must_be_known(workplace: Path) -> None:
    with pytest.raises(ValueError, match="get it by: stage data fetch ocr"):
        main_ocr_score("cal_ocr_score.py", ["--image_root", str(workplace / "images")])


def run_door(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(DOOR), *words])
    runpy.run_path(str(DOOR), run_name="__main__")


def test_the_door_reads_real_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.undo()  # the real engine
    (tmp_path / "images").mkdir()
    image = Image.new("RGB", (320, 96), "white")
    ImageDraw.Draw(image).text((20, 30), "STOP", fill="black", font=ImageFont.load_default(size=36))
    image.save(tmp_path / "images" / "00000.png")
    (tmp_path / "prompts.txt").write_text('"STOP" on a wall\n')
    run_door(monkeypatch, tmp_path, "--image_root", "images", "--txt_path", "prompts.txt")
    assert capsys.readouterr().out.splitlines()[0] == "[OCR] Samples=1, Missing=0, AvgScore=1.0000"
    assert (tmp_path / "ocr_scores.csv").read_text().splitlines()[1:] == ['0,00000.png,"""STOP"" on a wall",1.0']
    with pytest.raises(SystemExit, match=r"^cal_ocr_score\.py: error: absent is not a folder") as refused:
        run_door(monkeypatch, tmp_path, "--image_root", "absent", "--txt_path", "prompts.txt")
    assert "\n" not in str(refused.value)
