"""The OCR reward on real pictures of known texts, and by hand."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from rapidfuzz.distance import Levenshtein

from stage_grpo.rewards.base import as_trl_reward
from stage_grpo.rewards.ocr import OcrOptions, OcrReward, edit_distance, plain, quoted_text, reading_score
from stage_grpo.rewards.registry import lacking

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "ocr_reading.py"
SPECIFICATION = importlib.util.spec_from_file_location("ocr_reading", SCRIPT)
drawing = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(drawing)
WHITE = Image.new("RGB", (96, 96), "white")


@pytest.fixture(scope="module")
def reward():
    return OcrReward(OcrOptions(detection_side=384, num_threads=1))


def reading(texts, **options):
    """A reward whose engine reads the given lines, one picture after the other."""
    reward, lines = OcrReward(OcrOptions(**options)), iter(texts)
    reward._reader = lambda image: next(lines)
    return reward


def test_real_pictures_score_exactly_what_is_read(reward):
    pictures = list(drawing.pictures(12))
    assert {picture.kind for picture in pictures} == set(drawing.KINDS)
    result = reward.score([p.image for p in pictures], [p.prompt for p in pictures])
    for picture, score, read, distance in zip(
        pictures, result.scores, result.details["read"], result.details["distance"]
    ):
        assert score == drawing.formula(read, picture.wanted)
        # The engine reads all twelve without an error, so typos cost exactly their number.
        assert plain(read) == plain(picture.drawn)
        assert distance == picture.num_typos
        assert score == pytest.approx(1 - picture.num_typos / len(plain(picture.wanted)), abs=1e-6)
    assert sum(picture.num_typos for picture in pictures) >= 3
    assert result.details["reason"] == [None] * 12


def test_a_picture_without_text_scores_zero(reward):
    result = reward.score([WHITE], ['a "cat"'])
    assert result.scores.tolist() == [0.0]
    assert (result.details["read"], result.details["distance"]) == ([""], [3])


def test_distances_equal_levenshteins_recurrence():
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = ("".join(rng.choice(list("abc "), rng.integers(0, 9))) for _ in range(2))
        assert edit_distance(a, b) == drawing.edit_distance(a, b) == Levenshtein.distance(a, b)


@pytest.mark.parametrize(
    ("read", "prompt", "score", "with_substring"),
    [
        (["Hello World"], 'a sign "Hello World"', 1.0, 1.0),
        (["HELLO", "wor ld"], 'a sign "hello World"', 1.0, 1.0),
        # kitten, sitting: 3 of 7 characters.
        (["kitten"], '"sitting"', 4 / 7, 4 / 7),
        # 5 characters too many of 5: nothing is left; the released code gives it all.
        (["spam CAT S"], '"cat s"', 0.0, 1.0),
        (["acat"], 'a "cat"', 2 / 3, 1.0),
        # Far too much text never scores below 0.
        (["q" * 50], '"ab"', 0.0, 0.0),
        ([], '"ab"', 0.0, 0.0),
        # Several quoted texts, in their order.
        (["Open", "Closed"], 'left "Open", right "Closed"', 1.0, 1.0),
        (["Closed", "Open"], '"Open" and "Closed"', 1 - 8 / 10, 1 - 8 / 10),
        # Straight and curly quotes, an empty one beside a full one, one without a partner.
        (["Hi"], "says “Hi”", 1.0, 1.0),
        (["Hi"], '"" and "Hi"', 1.0, 1.0),
        (["Hi"], 'a "Hi" of 5" size', 1.0, 1.0),
        # Characters beyond ASCII count as one each.
        (["E=mc2"], '"E=mc²"', 4 / 5, 4 / 5),
    ],
)
def test_reward_by_hand(read, prompt, score, with_substring):
    assert reading([read]).score([WHITE], [prompt]).scores == pytest.approx([score], abs=1e-6)
    released = reading([read], substring_match=True)
    assert released.score([WHITE], [prompt]).scores == pytest.approx([with_substring], abs=1e-6)


def test_what_cannot_be_scored_says_why():
    prompts = ["a sign", 'says ""', 'says "  "', 'only one " quote', '"ok"', '"ok"']
    images = [WHITE] * 5 + [Image.new("RGB", (17, 1))]
    result = reading([["ok"]]).score(images, prompts)
    np.testing.assert_equal(result.scores, [np.nan, np.nan, np.nan, np.nan, 1.0, np.nan])
    none = "not applicable: the prompt has no text in double quotes"
    empty = "not applicable: the double quotes of the prompt are empty"
    assert result.details["reason"] == [
        none,
        empty,
        empty,
        none,
        None,
        "a picture of 17 x 1 pixels is too narrow to be read",
    ]
    assert result.details["read"] == [None, None, None, None, "ok", None]


def test_a_truncated_file_is_not_scored(tmp_path):
    WHITE.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-40])
    result = reading([["ok"]]).score([Image.open(tmp_path / "cut.png"), WHITE], ['"ok"', '"ok"'])
    np.testing.assert_equal(result.scores, [np.nan, 1.0])
    assert result.details["reason"][0].startswith("the image cannot be read: ")


def test_trl_sees_none_and_the_mean_distance():
    metrics = {}
    scores = as_trl_reward(reading([["cat"], ["cot"]]))(
        prompts=['"cat"', '"cat"', "cat"], generated_images=[WHITE] * 3, log_metric=metrics.__setitem__
    )
    assert scores == [1.0, pytest.approx(2 / 3, abs=1e-6), None]
    assert metrics == {"rewards/ocr/distance": pytest.approx(0.5, abs=1e-6)}


def test_quoted_text():
    assert quoted_text('a "b c" d') == "b c"
    assert quoted_text("nothing") is None
    assert quoted_text('""') == ""
    assert quoted_text('"a" “b” "c"') == "a b c"
    assert plain(" A\tb\nC ") == "abc"
    assert reading_score(3, 4) == pytest.approx(0.25, abs=1e-6)


def test_paddleocr_is_asked_as_its_third_version_wants(monkeypatch):
    calls = {}

    class PaddleOCR:
        def __init__(self, **arguments):
            calls.update(arguments)

        def predict(self, pixels):
            calls["pixel"] = pixels[0, 0].tolist()
            return [{"rec_texts": ["Hello", "World"], "rec_scores": [0.9, 0.8]}]

    package = ModuleType("paddleocr")
    package.PaddleOCR = PaddleOCR
    package.__spec__ = importlib.util.spec_from_loader("paddleocr", None)
    monkeypatch.setitem(sys.modules, "paddleocr", package)
    reward = OcrReward(OcrOptions(engine="paddleocr", num_threads=3))
    red = Image.new("RGB", (8, 8), (255, 1, 2))
    assert reward.score([red], ['"hello world"']).scores.tolist() == [1.0]
    assert calls["pixel"] == [2, 1, 255]  # blue first
    assert (calls["lang"], calls["device"], calls["cpu_threads"]) == ("en", "cpu", 3)
    assert calls["text_rec_score_thresh"] == 0.5
    assert not {"use_gpu", "show_log", "use_angle_cls"} & calls.keys()


def test_a_missing_engine_is_explained(monkeypatch):
    monkeypatch.setattr("stage_grpo.rewards.ocr.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"paddleocr is not installed; pip install 'paddleocr>=3\.7"):
        OcrReward(OcrOptions(engine="paddleocr")).score([WHITE], ['"a"'])


def test_each_engine_asks_for_its_own_package(monkeypatch):
    monkeypatch.setattr("stage_grpo.rewards.ocr.find_spec", lambda name: None)
    monkeypatch.setattr(OcrReward, "packages", ("rapidfuzz", "no_such_engine"))
    ((what, remedy),) = lacking("ocr", {"engine": "paddleocr"})
    assert what == "the OCR engine paddleocr is not installed" and remedy.startswith("pip install 'paddleocr>=3.7,<4'")
    ((what, remedy),) = lacking("ocr")
    assert "needs no_such_engine" in what and remedy == "pip install 'stage-grpo[ocr]'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tesseract"}, "engine='tesseract' is unknown; use one of rapidocr, paddleocr"),
        ({"detection_side": 31}, "detection_side=31 must be a whole number of at least 32"),
        ({"num_threads": 0}, "num_threads=0 must be a whole number of at least 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        OcrOptions(**options)


def test_building_loads_no_engine():
    code = (
        "import sys; from stage_grpo.rewards.ocr import OcrReward; OcrReward();"
        "sys.exit(','.join({'torch', 'rapidocr', 'onnxruntime', 'cv2', 'rapidfuzz'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
