"""Does a picture show what its prompt says? A large judge answers yes or no: the ``orm`` reward of T2I-R1.

Source: arXiv:2505.00703; LLaVA-OneVision, arXiv:2408.03326.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from scipy.special import expit

from stage_grpo.option_checks import is_number
from stage_grpo.rewards.base import Reward, RewardResult
from stage_grpo.rewards.batching import ModelOptions, batches, choose_batch_size, pick_device, weights_folder
from stage_grpo.rewards.readable import drop_infinite, unreadable
from stage_grpo.types import Metadata

WEIGHTS = "orm-t2i-r1"
BYTES_PER_IMAGE = 600_000_000
"""Activations of one picture and its question in bfloat16, roughly."""


@dataclass(frozen=True)
class OrmOptions(ModelOptions):
    """Options of :class:`OrmReward`, besides those of every model.

    Attributes:
        temperature: What the two logits are divided by before they become a probability; the published code samples
            its answer at 0.3, which drives probabilities towards 0 and 1.
        dtype: bfloat16 as published, for seven billion parameters.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    temperature: float = 1.0
    dtype: str = "bfloat16"

    def __post_init__(self):
        super().__post_init__()
        if not is_number(self.temperature) or not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature={self.temperature!r} must be a number above 0; 1 leaves the logits as they are"
            )


class OrmReward(Reward):
    """Probability of "yes" against "no" to "Does this image accurately represent the prompt?", in [0, 1].

    Nothing is sampled: it is read from the logits of the answer's first token. Details: ``p_either`` (probability that
    the answer begins with one of the two at all; the score means little where it is low) and ``reason`` (why there is
    no score, else None).
    """

    name = "orm"
    Options = OrmOptions
    requirements: ClassVar[tuple[str, ...]] = (WEIGHTS,)

    def __init__(self, options: OrmOptions | None = None):
        super().__init__(options)
        self._model: Any = None

    def compute(self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]) -> RewardResult:
        """Asks about each picture once. See :meth:`stage_grpo.rewards.base.Reward.compute`.

        Raises:
            ValueError: Weights that are missing.
        """
        options = self.options
        if self._model is None:
            from stage_grpo.rewards.orm_model import JudgeModel  # brings transformers along

            folder = weights_folder(options.weights, WEIGHTS)
            self._model = JudgeModel(folder, pick_device(options.device), options.dtype)
        scores = np.full(len(images), np.nan)
        details: dict[str, list[Any]] = {
            "p_either": [None] * len(images),
            "reason": [unreadable(image) for image in images],
        }
        asked = [index for index, reason in enumerate(details["reason"]) if reason is None]
        size = choose_batch_size(options.batch_size, BYTES_PER_IMAGE, self._model.device)
        for part in batches(len(asked), size):
            chosen = asked[part]
            answer = self._model.yes_or_no([images[i] for i in chosen], [prompts[i] for i in chosen])
            scores[chosen] = expit(answer.gap.astype(np.float64) / options.temperature)
            for index, p_either in zip(chosen, answer.p_either.tolist()):
                details["p_either"][index] = p_either
        drop_infinite(scores, details["reason"])
        return RewardResult(scores, details)
