"""Rewards of a step begun as soon as its images are there: beside one another, and beside the reference's forward.

TRL asks for the rewards last, one after the other. Here each begins in a thread of its own and TRL, when it asks, gets
the result or waits for the rest of it. Whatever follows a score (failures, logs, gathering) stays where TRL asks, so
that results, their order and their errors are those of rewards in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from stage_grpo.rewards.base import Reward, RewardFunction, RewardResult, as_reward, as_trl_reward, check_names
from stage_grpo.rewards.cells import as_metadata
from stage_grpo.types import Metadata


class RewardThreads:
    """The rewards of a run, for TRL to call; those that can begin ahead of that do.

    A reward begins ahead as soon as it has scored something where TRL called it. By then its models are loaded, which
    must not happen beside other work: transformers changes torch's default dtype meanwhile, for all threads. Rewards
    that are one object, or of equal :attr:`Reward.shares`, take turns in one thread.

    Args:
        rewards: The rewards.
        ahead: Whether to use threads; if not, each reward is computed where TRL calls it.

    Attributes:
        ahead: As given.
        functions: One for each reward, see :func:`~stage_grpo.rewards.base.as_trl_reward`.

    Raises:
        TypeError: A reward is neither a :class:`Reward` nor callable.
        ValueError: A function is called otherwise, or two rewards have the same name.
    """

    def __init__(self, rewards: Sequence[Reward | RewardFunction], ahead: bool):
        self.ahead = ahead
        self._rewards = [as_reward(reward) for reward in rewards]
        check_names(self._rewards)
        self.functions = [
            as_trl_reward(reward, partial(self._result, place) if ahead else None)
            for place, reward in enumerate(self._rewards)
        ]
        keys = [reward.shares or id(reward) for reward in self._rewards]
        pools = {key: ThreadPoolExecutor(1, "reward") for key in keys}
        self._pools = [pools[key] for key in keys]
        self._loaded: set[int] = set()
        self._rows: list[dict[str, Any]] | None = None
        self._images: list[Image.Image] = []
        self._started: dict[int, Future[RewardResult]] = {}
        self._seconds: list[float] = []
        self._torch_modes = _torch_modes()

    @property
    def work_seconds(self) -> float:
        """Seconds that the rewards of the last batch took, added up, however many of them passed at once."""
        return sum(self._seconds)

    @contextmanager
    def batch(self, rows: list[dict[str, Any]]) -> Iterator[None]:
        """Frame all that is done with one batch. After it, also after an error, no reward is at work any more.

        Args:
            rows: The batch's samples; the cell ``metadata`` of each is read, if there is one.
        """
        self._rows, self._seconds, self._torch_modes = rows, [], _torch_modes()
        try:
            yield
        finally:
            for future in self._started.values():
                future.cancel()
            wait(self._started.values())
            self._rows, self._images, self._started = None, [], {}

    def start(self, images: list[Image.Image], prompts: list[str]) -> None:
        """Begin what can begin ahead; outside :meth:`batch`, nothing.

        Args:
            images: RGB images of the batch's rows.
            prompts: Their prompts.
        """
        if not self.ahead or self._rows is None:
            return
        self._images = images
        cells = [row.get("metadata") for row in self._rows]
        for place, reward in enumerate(self._rewards):
            if place in self._loaded:
                work = partial(self._in_thread, reward, list(images), list(prompts), cells)
                self._started[place] = self._pools[place].submit(copy_context().run, work)

    def _in_thread(
        self, reward: Reward, images: list[Image.Image], prompts: list[str], cells: list[Any]
    ) -> RewardResult:
        with self._torch_modes():
            return self._timed(reward, images, prompts, [as_metadata(cell, reward.name) for cell in cells])

    def _timed(
        self, reward: Reward, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]
    ) -> RewardResult:
        start = time.perf_counter()
        result = reward.score(images, prompts, metadata, warn=False)
        self._seconds.append(time.perf_counter() - start)
        return result

    def _result(
        self, place: int, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]
    ) -> RewardResult:
        """What a reward gives for the batch, where TRL calls it."""
        reward = self._rewards[place]
        if place in self._started:
            same = len(images) == len(self._images) and all(map(lambda a, b: a is b, images, self._images))
            assert same, "TRL no longer hands rewards the images of the rollout: see tests/test_trl_seams.py"
            result = self._started[place].result()
        else:
            wait(self._started.values())  # this one may load its models now
            result = self._timed(reward, images, prompts, metadata)
        reward.warn_of_failures(result)
        if not np.isnan(result.scores).all():
            self._loaded.add(place)
        return result


def _torch_modes() -> Callable[[], AbstractContextManager[None]]:
    """What torch keeps apart for each thread, as it is in this one; the returned function sets it in another."""
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    @contextmanager
    def set_here() -> Iterator[None]:
        with ExitStack() as stack:
            if gpu is not None:
                stack.enter_context(torch.cuda.device(gpu))
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype in casts:
                stack.enter_context(torch.autocast(kind, dtype))
            yield

    return set_here
