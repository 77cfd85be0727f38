"""Objects, their relations and their number, seen by GroundingDINO: the ``gdino`` reward of T2I-R1.

Source: arXiv:2303.05499 (detector), arXiv:2505.00703 (reward).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from stage_grpo.option_checks import is_number
from stage_grpo.rewards.base import Reward, RewardResult
from stage_grpo.rewards.batching import ModelOptions, choose_batch_size, pick_device, weights_folder
from stage_grpo.rewards.grounding_rules import NEAR_DISTANCE, Caption, build_caption, judge, obstacle
from stage_grpo.rewards.readable import unreadable
from stage_grpo.rewards.t2i_r1_rows import parse_row
from stage_grpo.types import Box, Metadata

WEIGHTS = "grounding-dino-tiny"
BYTES_PER_IMAGE = 1_200_000_000
"""Activations of one picture at 800 x 800 pixels in float32, roughly."""


@dataclass(frozen=True)
class GdinoOptions(ModelOptions):
    """Options of :class:`GdinoReward`, besides those of every model.

    Attributes:
        box_threshold: Confidence, in [0, 1], above which a box counts.
        near_distance: How far the centres of neighbours may be apart, in shares of the picture's side.
        legacy: Compute what the published code computes, see :mod:`stage_grpo.rewards.grounding_rules`.

    Raises:
        ValueError: A value out of its range, or a dtype other than float32: the detector loses boxes in lower ones.
    """

    box_threshold: float = 0.3
    near_distance: float = NEAR_DISTANCE
    legacy: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name, most in (("box_threshold", 1.0), ("near_distance", 2.0)):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < most:
                raise ValueError(f"{name}={value!r} must be a number between 0 and {most:g}")
        if not isinstance(self.legacy, bool):
            raise ValueError(f"legacy={self.legacy!r} is no truth value; give true or false")
        if self.dtype != "float32":
            raise ValueError(f"dtype={self.dtype!r} does not work for this detector; leave it at float32")


class GdinoReward(Reward):
    """How well the objects of a T2I-R1 row are there, in [0, 1]; NaN for a row that names none.

    ``spatial`` rows score presence and relation, ``numeracy`` rows number, all others presence.
    Details: ``found`` (how many boxes of each phrase), ``task_type``, and ``reason`` (why no score, else None).
    """

    name = "gdino"
    Options = GdinoOptions
    requirements: ClassVar[tuple[str, ...]] = (WEIGHTS,)

    def __init__(self, options: GdinoOptions | None = None):
        super().__init__(options)
        self._detector: Any = None

    def check_row(self, prompt: str, metadata: Metadata) -> None:
        """Reads the row. See :meth:`stage_grpo.rewards.base.Reward.check_row`."""
        parse_row(metadata)

    def compute(self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]) -> RewardResult:
        """Detects and judges. See :meth:`stage_grpo.rewards.base.Reward.compute`.

        Raises:
            ValueError: Metadata that are no T2I-R1 row, or weights that are missing.
        """
        options = self.options
        rows = [parse_row(row) for row in metadata]
        broken = [unreadable(image) for image in images]
        reasons = broken if options.legacy else [why or obstacle(row) for why, row in zip(broken, rows)]
        scores = np.full(len(images), np.nan)
        details: dict[str, list[Any]] = {
            "found": [None] * len(rows),
            "task_type": [row.task_type for row in rows],
            "reason": reasons,
        }
        asked = [index for index, row in enumerate(rows) if reasons[index] is None and row.nouns]
        for index, row in enumerate(rows):
            if options.legacy and reasons[index] is None and not row.nouns:
                scores[index] = 1.0
        captions = [build_caption(rows[index].nouns, options.legacy) for index in asked]
        detections = self._detect([images[index] for index in asked], captions) if asked else []
        for index, found in zip(asked, detections):
            scores[index] = judge(rows[index], found, options.near_distance, options.legacy)
            details["found"][index] = ", ".join(f"{len(boxes)} {phrase}" for phrase, boxes in found.items())
        return RewardResult(scores, details)

    def _detect(self, images: list[Image.Image], captions: list[Caption]) -> list[dict[str, list[Box]]]:
        options = self.options
        if self._detector is None:
            from stage_grpo.rewards.gdino_model import PhraseDetector  # brings transformers along

            self._detector = PhraseDetector(weights_folder(options.weights, WEIGHTS), pick_device(options.device))
        batch_size = choose_batch_size(options.batch_size, BYTES_PER_IMAGE, self._detector.device)
        return self._detector.detect(images, captions, options.box_threshold, batch_size)
