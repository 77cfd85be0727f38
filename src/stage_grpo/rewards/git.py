"""Does a visual question answering model see what a prompt names? The ``git`` reward of T2I-R1.

Source: arXiv:2205.14100 (model), arXiv:2505.00703 (reward).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from stage_grpo.rewards.base import Reward, RewardResult
from stage_grpo.rewards.batching import ModelOptions, batches, choose_batch_size, pick_device, weights_folder
from stage_grpo.rewards.readable import drop_infinite, unreadable
from stage_grpo.rewards.t2i_r1_rows import T2IR1Row, parse_row
from stage_grpo.types import Metadata

WEIGHTS = "git-large-vqav2"
NOT_ASKED = ("spatial", "numeracy")
"""Task types whose rows this reward has nothing to say about."""
BYTES_PER_QUESTION = 120_000_000
"""Activations of one question about one picture in float32, roughly."""


@dataclass(frozen=True)
class GitOptions(ModelOptions):
    """Options of :class:`GitReward`, besides those of every model.

    Attributes:
        legacy: Score rows that this reward cannot score as the published code does: 0 for relations and numbers, 1 for
            rows that name nothing.

    Raises:
        ValueError: ``legacy`` is no bool.
    """

    legacy: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.legacy, bool):
            raise ValueError(f"legacy={self.legacy!r} is no truth value; give true or false")


def questions(row: T2IR1Row) -> list[str]:
    """One question for each object with its attributes, or for each object where none has any: ``"red apple?"``."""
    return [f"{name}?" for name in (row.nouns if row.attr_nouns is None else row.attr_nouns)]


class GitReward(Reward):
    """Mean probability of "yes" against "no" over the questions of a T2I-R1 row, in [0, 1].

    NaN for rows about relations and numbers, and for rows that name nothing. Details: ``p_yes`` (of each question),
    ``task_type``, and ``reason`` (why there is no score, else None).
    """

    name = "git"
    Options = GitOptions
    requirements: ClassVar[tuple[str, ...]] = (WEIGHTS,)

    def __init__(self, options: GitOptions | None = None):
        super().__init__(options)
        self._model: Any = None

    def check_row(self, prompt: str, metadata: Metadata) -> None:
        """Reads the row. See :meth:`stage_grpo.rewards.base.Reward.check_row`."""
        parse_row(metadata)

    def compute(self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]) -> RewardResult:
        """Asks all questions of each picture. See :meth:`stage_grpo.rewards.base.Reward.compute`.

        Raises:
            ValueError: Metadata that are no T2I-R1 row, or weights that are missing.
        """
        rows = [parse_row(row) for row in metadata]
        scores = np.full(len(images), np.nan)
        details: dict[str, list[Any]] = {
            "p_yes": [None] * len(rows),
            "task_type": [row.task_type for row in rows],
            "reason": [unreadable(image) or _obstacle(row) for image, row in zip(images, rows)],
        }
        asked = [index for index, reason in enumerate(details["reason"]) if reason is None]
        answers = self._answers([images[i] for i in asked], [questions(rows[i]) for i in asked]) if asked else []
        for index, p_yes in zip(asked, answers):
            scores[index] = np.mean(p_yes)
            details["p_yes"][index] = [round(p, 4) for p in p_yes]
        drop_infinite(scores, details["reason"])
        for index, row in enumerate(rows):
            if self.options.legacy and details["reason"][index] is not None and _obstacle(row):
                scores[index] = 0.0 if row.task_type in NOT_ASKED else 1.0
                details["reason"][index] = None
        return RewardResult(scores, details)

    def _answers(self, images: list[Image.Image], asked: list[list[str]]) -> list[list[float]]:
        options = self.options
        if self._model is None:
            from stage_grpo.rewards.git_model import YesNoModel  # brings transformers along

            folder = weights_folder(options.weights, WEIGHTS)
            self._model = YesNoModel(folder, pick_device(options.device), options.dtype)
        most = max(map(len, asked))
        size = choose_batch_size(options.batch_size, most * BYTES_PER_QUESTION, self._model.device)
        return [p_yes for part in batches(len(images), size) for p_yes in self._model.p_yes(images[part], asked[part])]


def _obstacle(row: T2IR1Row) -> str | None:
    if row.task_type in NOT_ASKED:
        return f"not applicable: it does not score {row.task_type} rows"
    return None if questions(row) else "not applicable: the row names no object"
