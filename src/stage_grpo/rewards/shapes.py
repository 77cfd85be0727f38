"""The shapes world's reward: GenEval's rules fed by the shapes detector."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from stage_grpo.rewards.base import Reward, RewardResult
from stage_grpo.rewards.geneval import judge, parse_metadata
from stage_grpo.shapes.detector import Detections, ShapesDetector
from stage_grpo.shapes.scenes import IMAGE_SIZE
from stage_grpo.types import Metadata


@dataclass(frozen=True)
class ShapesOptions:
    """Options of :class:`ShapesReward`.

    Attributes:
        strict: score 1 where GenEval's own rule holds and 0 elsewhere, instead of the graded score.

    Raises:
        ValueError: ``strict`` is no bool.
    """

    strict: bool = False

    def __post_init__(self):
        if not isinstance(self.strict, bool):
            raise ValueError(f"strict={self.strict!r} is no truth value; give true or false")


class ShapesReward(Reward):
    """How well a picture shows the shapes its metadata ask for, in [0, 1].

    Details: ``correct`` (0 or 1, GenEval's rule whatever ``strict`` says), ``reasons`` (a list of lines that say why
    it is not correct), ``objects`` (class to a list of [x1, y1, x2, y2, confidence] in pixels of the image, the most
    confident first) and ``colors`` (class to the colours of its boxes).
    """

    name = "shapes"
    Options = ShapesOptions

    def __init__(self, options: ShapesOptions | None = None):
        super().__init__(options)
        self._detector = ShapesDetector()

    def check_row(self, prompt: str, metadata: Metadata) -> None:
        """Reads the clauses. See :meth:`Reward.check_row`."""
        parse_metadata(metadata)

    def compute(self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]) -> RewardResult:
        """Detects and judges. See :meth:`Reward.compute`.

        Raises:
            ValueError: metadata that are not GenEval's.
        """
        detected = self._detector.detect(images)
        verdicts = [judge(found.objects, wanted, found.colors) for found, wanted in zip(detected, metadata)]
        correct = [int(verdict.correct) for verdict in verdicts]
        scores = correct if self.options.strict else [verdict.score for verdict in verdicts]
        details = {
            "correct": correct,
            "reasons": [verdict.reasons for verdict in verdicts],
            "objects": [_in_pixels_of(image, found) for image, found in zip(images, detected)],
            "colors": [
                {name: found.colors(name, boxes) for name, boxes in found.objects.items()} for found in detected
            ],
        }
        return RewardResult(np.array(scores, dtype=np.float64), details)


def _in_pixels_of(image: Image.Image, found: Detections) -> dict[str, list[list[float]]]:
    """Boxes of each class; the detector's are those of the picture scaled to the size of the world's pictures."""
    x, y = image.width / IMAGE_SIZE, image.height / IMAGE_SIZE
    return {
        name: [[box.x1 * x, box.y1 * y, box.x2 * x, box.y2 * y, box.confidence] for box in boxes]
        for name, boxes in found.objects.items()
    }
