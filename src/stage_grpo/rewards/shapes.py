"""The shapes world's reward: GenEval's rules fed by the shapes detector."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from stage_grpo.rewards.base import Reward, RewardResult
from stage_grpo.rewards.geneval import judge
from stage_grpo.shapes.detector import ShapesDetector
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

    Details: ``correct`` (0 or 1, GenEval's rule whatever ``strict`` says) and ``reasons`` (a list of lines that
    say why it is not correct).
    """

    name = "shapes"
    Options = ShapesOptions

    def __init__(self, options: ShapesOptions | None = None):
        super().__init__(options)
        self._detector = ShapesDetector()

    def compute(self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]) -> RewardResult:
        """Detects and judges. See :meth:`Reward.compute`.

        Raises:
            ValueError: metadata that are not GenEval's.
        """
        verdicts = [
            judge(found.objects, wanted, found.colors)
            for found, wanted in zip(self._detector.detect(images), metadata)
        ]
        correct = [int(verdict.correct) for verdict in verdicts]
        scores = correct if self.options.strict else [verdict.score for verdict in verdicts]
        details = {"correct": correct, "reasons": [verdict.reasons for verdict in verdicts]}
        return RewardResult(np.array(scores, dtype=np.float64), details)
