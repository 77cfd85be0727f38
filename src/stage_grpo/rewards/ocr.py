"""How well a picture spells the quoted text of its prompt, read by an OCR engine.

The engine's networks come with its package, so nothing is downloaded. Source: arXiv:2509.25027, section 4.1.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from stage_grpo.devices import num_cores
from stage_grpo.option_checks import check_count
from stage_grpo.rewards.base import Reward, RewardResult
from stage_grpo.rewards.readable import unreadable
from stage_grpo.types import Metadata

# PaddleOCR is no extra of this package: it wants an older NumPy than everything else here.
ENGINES = {"rapidocr": "'stage-grpo[ocr]'", "paddleocr": "'paddleocr>=3.7,<4' 'paddlepaddle>=3.3,<4'"}
"""Engines, and what pip installs for each."""
MAX_ASPECT_RATIO = 16
"""The engine enlarges the short side to ``detection_side``, so a narrow strip would become a gigantic picture."""

_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')

Reader = Callable[[Image.Image], list[str]]
"""Reads the lines of text in an RGB picture, top to bottom."""


@dataclass(frozen=True)
class OcrOptions:
    """Options of :class:`OcrReward`.

    Attributes:
        engine: ``rapidocr`` (PP-OCRv6 on onnxruntime, CPU) or ``paddleocr`` (3.x, in an environment of its own).
        substring_match: a text that is anywhere within what was read counts as read without an error, as in the
            released code; a picture full of text then gets the full reward.
        detection_side: pixels to which the short side of a smaller picture is enlarged before text is looked for;
            less is faster.
        num_threads: threads of the engine; None: this process's share of the cores, at most 8.

    Raises:
        ValueError: a value of the wrong kind.
    """

    engine: str = "rapidocr"
    substring_match: bool = False
    detection_side: int = 736
    num_threads: int | None = None

    def __post_init__(self):
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r} is unknown; use one of {', '.join(ENGINES)}")
        if not isinstance(self.substring_match, bool):
            raise ValueError(f"substring_match={self.substring_match!r} is no truth value; give true or false")
        for name, value, least in (
            ("detection_side", self.detection_side, 32),
            ("num_threads", 1 if self.num_threads is None else self.num_threads, 1),
        ):
            check_count(name, value, least)


def quoted_text(prompt: str) -> str | None:
    """The text that a prompt asks for: everything in double quotes, straight or curly, joined in its order.

    A last quote without a partner is left out. Returns None if nothing is quoted, and ``""`` for empty quotes.
    """
    parts = [straight or curly for straight, curly in _QUOTED.findall(prompt)]
    return " ".join(part for part in parts if part.strip()) if parts else None


def plain(text: str) -> str:
    """Lower-cased text without white space: what is compared."""
    return "".join(text.lower().split())


def edit_distance(read: str, wanted: str, substring_match: bool = False) -> int:
    """Characters to insert, delete or replace (Levenshtein) until ``read`` is ``wanted``; both in plain form.

    Args:
        read: Recognised text.
        wanted: Text of the prompt.
        substring_match: 0 if ``wanted`` stands anywhere in ``read``.
    """
    from rapidfuzz.distance import Levenshtein

    return 0 if substring_match and wanted in read else Levenshtein.distance(read, wanted)


def reading_score(distance: int, num_wanted: int) -> float:
    """``max(1 - distance / num_wanted, 0)`` in [0, 1], with ``num_wanted`` the characters of the wanted text, over 0.

    Source: arXiv:2509.25027, section 4.1.
    """
    return max(1.0 - distance / num_wanted, 0.0)


class OcrReward(Reward):
    """Share of the quoted text that a picture shows, in [0, 1]; white space and case do not count.

    NaN for a prompt without quoted text, and for a picture that is broken or too narrow to be read. Details: ``read``
    (recognised text), ``wanted``, ``distance`` (characters) and ``reason`` (why there is no score, else None).
    """

    name = "ocr"
    Options = OcrOptions
    extra: ClassVar[str | None] = "ocr"
    packages: ClassVar[tuple[str, ...]] = ("rapidfuzz", "rapidocr", "onnxruntime", "cv2")

    def __init__(self, options: OcrOptions | None = None):
        super().__init__(options)
        self._reader: Reader | None = None

    @classmethod
    def needed_packages(cls, options: OcrOptions) -> tuple[str, ...]:
        """PaddleOCR, which is no part of the extra, is looked for by :meth:`check_health`."""
        return ("rapidfuzz",) if options.engine == "paddleocr" else cls.packages

    def check_health(self) -> str:
        """Sees that the engine is installed. See :meth:`stage_grpo.rewards.base.Reward.check_health`."""
        _check_installed(self.options.engine)
        return self.name

    def compute(self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]) -> RewardResult:
        """Reads every picture whose prompt quotes a text. See :meth:`stage_grpo.rewards.base.Reward.compute`.

        Raises:
            ValueError: the engine is not installed.
        """
        scores = np.full(len(images), np.nan)
        details: dict[str, list[Any]] = {key: [None] * len(images) for key in ("read", "wanted", "distance", "reason")}
        for index, (image, prompt) in enumerate(zip(images, prompts)):
            wanted = quoted_text(prompt)
            details["wanted"][index] = wanted
            details["reason"][index] = reason = _obstacle(image, wanted)
            if reason is not None or wanted is None:
                continue
            read = " ".join(self._read(image))
            distance = edit_distance(plain(read), plain(wanted), self.options.substring_match)
            scores[index] = reading_score(distance, len(plain(wanted)))
            details["read"][index], details["distance"][index] = read, distance
        return RewardResult(scores, details)

    def _read(self, image: Image.Image) -> list[str]:
        if self._reader is None:
            make = {"rapidocr": _rapidocr, "paddleocr": _paddleocr}[self.options.engine]
            self._reader = make(self.options)
        return self._reader(image.convert("RGB"))


def _obstacle(image: Image.Image, wanted: str | None) -> str | None:
    """Why a picture cannot be scored, if so."""
    if wanted is None:
        return "not applicable: the prompt has no text in double quotes"
    if not plain(wanted):
        return "not applicable: the double quotes of the prompt are empty"
    if (broken := unreadable(image)) is not None:
        return broken
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        return f"a picture of {image.width} x {image.height} pixels is too narrow to be read"
    return None


def _rapidocr(options: OcrOptions) -> Reader:
    _check_installed("rapidocr")
    from rapidocr import RapidOCR

    # Neither turned by 180 degrees nor filtered further: as the published rewards call their engine.
    engine = RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.use_cls": False,
            "Det.limit_side_len": options.detection_side,
            "EngineConfig.onnxruntime.intra_op_num_threads": _num_threads(options),
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )

    def read(image: Image.Image) -> list[str]:
        found: Any = engine(_bgr(image))
        return list(found.txts or ())

    return read


def _paddleocr(options: OcrOptions) -> Reader:
    _check_installed("paddleocr")
    from paddleocr import PaddleOCR  # pyright: ignore[reportMissingImports]

    engine = PaddleOCR(
        lang="en",
        use_doc_orientation_classify=False,
        use_doc_unwarping=False,
        use_textline_orientation=False,
        text_det_limit_side_len=options.detection_side,
        text_det_limit_type="min",
        text_rec_score_thresh=0.5,  # the second version's drop_score, which the published rewards leave as it is
        device="cpu",
        cpu_threads=_num_threads(options),
    )

    def read(image: Image.Image) -> list[str]:
        return [text for page in engine.predict(_bgr(image)) for text in page["rec_texts"]]

    return read


def _bgr(image: Image.Image) -> np.ndarray:
    """Pixels (height, width, 3) uint8 in the channel order of OpenCV, which both engines expect."""
    return np.ascontiguousarray(np.asarray(image)[..., ::-1])


def _num_threads(options: OcrOptions) -> int:
    if options.num_threads is not None:
        return options.num_threads
    return max(1, min(8, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _check_installed(engine: str) -> None:
    if find_spec(engine) is None:
        raise ValueError(f"the OCR engine {engine} is not installed; pip install {ENGINES[engine]}")
