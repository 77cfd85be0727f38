"""A reward in a process of its own on this machine: ``reward_options: {ocr: {worker: true}}``.

It runs beside other such rewards and remote ones, and a library that crashes takes its own process down, not the run.
"""

from __future__ import annotations

import copy
import math
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from stage_grpo.rewards.base import Reward, RewardResult
from stage_grpo.rewards.failures import REASON
from stage_grpo.types import Metadata

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What a run answers by ending after its step."""
_here: Reward | None = None
"""In the worker: the reward that it computes."""


class WorkerReward(Reward):
    """Scores that another process of this machine computes; it is started by the first images.

    If that process dies, the images of the step have no score, and the next step starts it again. Signals that end a
    run do not end it; it ends with the run.

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

    def check_row(self, prompt: str, metadata: Metadata) -> None:
        """As the reward itself. See :meth:`Reward.check_row`."""
        self._outline.check_row(prompt, metadata)

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

    # What a terminal or a cluster sends to the whole group is for the run to obey, which finishes its step first.
    for number in SIGNALS:
        signal.signal(number, _ignore)
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    global _here
    _here = build_reward(name, options)


def _ignore(number: int, frame: Any) -> None:
    """Not SIG_IGN, which programs that the reward starts would inherit."""


def _end_with_the_run() -> None:
    run = parent_process()
    assert run is not None, "a worker is started by a run"
    run.join()
    os._exit(1)


def _score(images: list[Image.Image], prompts: list[str], metadata: list[Metadata]) -> RewardResult:
    assert _here is not None, "the pool builds the reward before it scores"
    try:
        return _here.score(images, prompts, metadata)
    except BaseException as error:
        if _is_portable(error):
            raise
        raise RuntimeError(repr(error)) from error


def _is_portable(error: BaseException) -> bool:
    """Whether the run can receive an error, and goes on by its own rules then."""
    try:
        copy.copy(error)  # by the calls that also make it anew in the run
    except Exception:  # whatever its class raises then
        return False
    return isinstance(error, Exception)
