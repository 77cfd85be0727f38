"""A reward in a process of its own on this machine: ``reward_options: {ocr: {worker: true}}``.

It runs beside other such rewards and remote ones, and a library that crashes takes its own process down, not the run.
"""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from stage_grpo.rewards.base import Reward, RewardResult
from stage_grpo.rewards.failures import REASON
from stage_grpo.types import Metadata

_here: Reward | None = None
"""In the worker: the reward that it computes."""


class WorkerReward(Reward):
    """Scores that another process of this machine computes; it is started by the first images.

    If that process dies, the images of the step have no score, and the next step starts it again.

    Args:
        name: As in :func:`~stage_grpo.rewards.registry.build_reward`.
        options: Likewise.
        outline: The same reward built in this process, which checked the options; it never scores.
    """

    asynchronous: ClassVar[bool] = True

    def __init__(self, name: str, options: dict[str, Any], outline: Reward):
        super().__init__()
        self.name = outline.name
        self._recipe = (name, options)
        self._outline = outline
        self._pool: ProcessPoolExecutor | None = None

    def needed_weights(self) -> tuple[str, ...]:
        """Those of the reward itself. See :meth:`Reward.needed_weights`."""
        return self._outline.needed_weights()

    def check_health(self) -> str:
        """As the reward itself. See :meth:`Reward.check_health`."""
        return self._outline.check_health()

    def compute(self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]) -> RewardResult:
        """Has the worker score. See :meth:`Reward.compute`."""
        if self._pool is None:
            # A forked process would inherit locks and GPUs in whatever state they are.
            self._pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_build, initargs=self._recipe)
        try:
            return self._pool.submit(_score, images, prompts, metadata).result()
        except BrokenProcessPool as error:
            self._pool = None
            reason = f"the worker process died ({error})"
            return RewardResult(np.full(len(images), math.nan), {REASON: [reason] * len(images)})


def _build(name: str, options: dict[str, Any]) -> None:
    from stage_grpo.rewards.registry import build_reward

    global _here
    _here = build_reward(name, options)


def _score(images: list[Image.Image], prompts: list[str], metadata: list[Metadata]) -> RewardResult:
    assert _here is not None, "the pool builds the reward before it scores"
    return _here.score(images, prompts, metadata)
