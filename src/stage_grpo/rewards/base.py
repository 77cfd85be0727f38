"""The contract of a reward, and the seam that hands one to TRL.

A reward looks at a batch of finished images and says how good each is. It is a subclass of
:class:`Reward`, or any plain function ``f(images, prompts, metadata)`` that returns one number an image.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from stage_grpo.plug_ins import check_call
from stage_grpo.rewards.cells import as_cell, as_metadata
from stage_grpo.rewards.failures import FailureWatch, failures, most_common
from stage_grpo.rewards.result import RewardResult, check_result
from stage_grpo.rewards.whole_models import whole_models
from stage_grpo.types import Metadata
from stage_grpo.weights import WEIGHTS

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Any]
"""``f(images, prompts, metadata) -> one number per image``."""
TrlReward = Callable[..., Any]
"""What TRL calls: returns one number or None a sample, or a coroutine that does."""
Score = Callable[[list[Image.Image], list[str], list[Metadata]], "RewardResult"]
"""As :meth:`Reward.score`."""


@dataclass(frozen=True)
class NoOptions:
    """The options of a reward that has none."""


class Reward(ABC):
    """Scores images. A subclass writes ``name`` and ``compute``, and ``Options`` if it has any.

    Attributes:
        name: how the reward is called in logs and error messages; the class's name where none is given.
        Options: a frozen dataclass whose ``__post_init__`` checks its values; ``self.options`` is one.
        requirements: names of the weights it loads, see ``stage_grpo.weights``.
        weight_options: for each of them, in their order, the option that names other weights or a folder instead.
        extra: the pip extra that brings ``packages``, if it needs any.
        packages: import names of packages that the core does not bring.
        asynchronous: whether it mostly waits for something outside this process, so that TRL may let several such
            rewards wait together. ``compute`` then runs in a thread.
        shares: names what it has in common with other rewards, such as a model that one alone can use; None: nothing.

    Building a reward is cheap: models are loaded by the first call of ``compute``.
    """

    name: str
    Options: ClassVar[type[Any]] = NoOptions
    requirements: ClassVar[tuple[str, ...]] = ()
    weight_options: ClassVar[tuple[str, ...]] = ("weights",)
    extra: ClassVar[str | None] = None
    packages: ClassVar[tuple[str, ...]] = ()
    asynchronous: ClassVar[bool] = False
    shares: str | None = None

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def __init__(self, options: Any = None):
        self.options = self.Options() if options is None else options

    def needed_weights(self) -> tuple[str, ...]:
        """Names of the weights that this reward will load from the cache, its options considered.

        Raises:
            ValueError: an option names neither weights of the cache nor a folder.
        """
        option_of = dict(zip(self.requirements, self.weight_options))
        needed = []
        for name in self.requirements:
            chosen = getattr(self.options, option_of[name], None) if name in option_of else None
            if chosen is None or chosen in WEIGHTS:
                needed.append(chosen or name)
            elif not Path(chosen).expanduser().is_dir():
                raise ValueError(
                    f"reward {self.name!r}: {option_of[name]}={chosen!r} is neither a folder nor the name of weights; "
                    "give a folder in transformers' layout, or a name of `stage weights list`, or leave it out"
                )
        return tuple(needed)

    @classmethod
    def needed_packages(cls, options: Any) -> tuple[str, ...]:
        """Those of ``packages`` that a reward of these options imports."""
        return cls.packages

    def check_health(self) -> str:
        """Asks whatever this reward needs beside its weights, such as a server, whether it is there.

        Returns:
            Name of what will compute the reward.

        Raises:
            ValueError: it is not there; the message says how to get it.
        """
        return self.name

    def check_row(self, prompt: str, metadata: Metadata) -> None:
        """Refuses what :meth:`compute` would refuse of a prompt whatever the image; asked of every row before a run.

        Nothing is computed and no model loaded.

        Raises:
            ValueError: metadata that this reward cannot read.
        """
        return

    @abstractmethod
    def compute(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]
    ) -> RewardResult | Sequence[float | None] | np.ndarray:
        """Returns one number per image, or a :class:`RewardResult`; None or NaN where it could not be scored.

        Args:
            images: B RGB images of any size.
            prompts: B prompts.
            metadata: B descriptions of what each prompt asks for; empty where only the prompt is known.
        """

    def score(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata] | None = None, warn: bool = True
    ) -> RewardResult:
        """Scores B images and checks what :meth:`compute` returned.

        Args:
            images: B RGB images of any size.
            prompts: B prompts.
            metadata: B descriptions of what each prompt asks for; None stands for B empty ones.
            warn: whether to call :meth:`warn_of_failures`.

        Raises:
            ValueError: inputs of different length, or a result that is not B finite-or-NaN numbers.
        """
        metadata = [{} for _ in prompts] if metadata is None else metadata
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(
                f"reward {self.name!r} was given {len(images)} images, {len(prompts)} prompts and "
                f"{len(metadata)} metadata; give one of each per sample"
            )
        try:
            with whole_models():  # they are loaded by the first call
                returned = self.compute(images, prompts, metadata)
        except Exception as error:
            error.add_note(f"raised by reward {self.name!r}")
            raise
        result = check_result(self.name, returned, len(images))
        if warn:
            self.warn_of_failures(result)
        return result

    def warn_of_failures(self, result: RewardResult) -> None:
        """Logs how many images could not be scored, and why."""
        if reasons := failures(result.scores, result.details):
            message = "reward %r could not score %d of %d images: %s"
            logger.warning(message, self.name, len(reasons), len(result.scores), most_common(reasons))


class FunctionReward(Reward):
    """A plain function ``f(images, prompts, metadata, **options)`` as a reward, named after the function.

    Args:
        function: returns one number per image; None or NaN where it could not score.
        options: keyword arguments given to every call.

    Raises:
        ValueError: the function cannot be called so.
    """

    def __init__(self, function: RewardFunction, options: dict[str, Any] | None = None):
        super().__init__()
        self.name = getattr(function, "__name__", type(function).__name__)
        self.shares = function.__module__  # such as a model in a global variable
        self._function = function
        self._arguments = dict(options or {})
        try:
            check_call(function, [[], [], []], self._arguments)
        except TypeError as error:
            raise ValueError(
                f"reward {self.name!r} cannot be called as f(images, prompts, metadata): {error}; let it take these "
                "three, and give what else it needs a default, or an option"
            ) from error

    def compute(self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]) -> Any:
        """Calls the function. See :meth:`Reward.compute`."""
        return self._function(images, prompts, metadata, **self._arguments)


def as_reward(reward: Reward | RewardFunction) -> Reward:
    """Returns a :class:`Reward` as it is and wraps a plain function.

    Raises:
        TypeError: neither a reward nor callable.
        ValueError: a function that does not take images, prompts and metadata.
    """
    if isinstance(reward, Reward):
        return reward
    if not callable(reward) or isinstance(reward, type):
        raise TypeError(f"{reward!r} is no reward; give a Reward object or f(images, prompts, metadata)")
    return FunctionReward(reward)


def check_names(rewards: Sequence[Reward]) -> None:
    """Refuses different rewards of one name, whose scores and details would become one curve.

    Raises:
        ValueError: two rewards have the same name.
    """
    counted = Counter({id(reward): reward.name for reward in rewards}.values())
    if repeated := [name for name, count in counted.items() if count > 1]:
        raise ValueError(
            f"several rewards are called {', '.join(map(repr, repeated))}, and would be logged as one; give each a "
            "name of its own: that of the function, or the attribute `name` of a Reward"
        )


def as_trl_reward(reward: Reward | RewardFunction, score: Score | None = None) -> TrlReward:
    """Adapts a reward to TRL's ``reward_funcs``: a function that returns None for "could not be scored".

    The returned function reads ``prompts``, ``generated_images`` (RGB) and ``metadata`` (JSON strings or
    dicts) from what TRL passes, and ignores the rest. Through TRL's hooks it logs every detail as a column
    of the completions table, ``<name>/<detail>``, and the mean of a numeric one as a metric,
    ``rewards/<name>/<detail>``. It stops the run when the reward fails on every sample of several steps in a row, see
    :class:`~stage_grpo.rewards.failures.FailureWatch`. For an asynchronous reward it is a coroutine function.

    Args:
        reward: The reward.
        score: What gives its results; by default its own :meth:`Reward.score`.

    Raises:
        TypeError: neither a reward nor callable.
    """
    checked = as_reward(reward)
    score = score or checked.score
    watch = FailureWatch(checked.name)

    def prepare(
        prompts: list[str], generated_images: list[Image.Image] | None, metadata: list[Any] | None
    ) -> tuple[list[Image.Image], list[str], list[Metadata]]:
        if generated_images is None:
            raise ValueError(
                f"reward {checked.name!r} got no images; let the rollout return them as 'generated_images'"
            )
        described = [as_metadata(value, checked.name) for value in metadata or [None] * len(prompts)]
        return list(generated_images), list(prompts), described

    def hand_over(result: RewardResult, hooks: dict[str, Any]) -> list[float | None]:
        watch.see(result.scores, result.details)
        _log_details(checked.name, result.details, hooks.get("log_extra"), hooks.get("log_metric"))
        return [None if np.isnan(score) else float(score) for score in result.scores]

    def trl_reward(
        *, prompts: list[str], generated_images: Any = None, metadata: Any = None, **hooks: Any
    ) -> list[float | None]:
        return hand_over(score(*prepare(prompts, generated_images, metadata)), hooks)

    async def waiting_trl_reward(
        *, prompts: list[str], generated_images: Any = None, metadata: Any = None, **hooks: Any
    ) -> list[float | None]:
        inputs = prepare(prompts, generated_images, metadata)
        return hand_over(await asyncio.to_thread(score, *inputs), hooks)

    chosen = waiting_trl_reward if checked.asynchronous else trl_reward
    chosen.__name__ = checked.name
    return chosen


def _log_details(
    name: str,
    details: dict[str, list[Any]],
    log_extra: Callable[[str, list[Any]], None] | None,
    log_metric: Callable[[str, float], None] | None,
) -> None:
    for detail, values in details.items():
        if log_extra is not None:
            log_extra(f"{name}/{detail}", [as_cell(value) for value in values])
        numbers = [float(value) for value in values if isinstance(value, Real | np.bool_)]
        if log_metric is not None and numbers and len(numbers) + values.count(None) == len(values):
            log_metric(f"rewards/{name}/{detail}", float(np.mean(numbers)))
