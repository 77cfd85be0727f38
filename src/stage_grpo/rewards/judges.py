"""Rewards that ask a vision-language model: a judge of your own wording, and UnifiedReward.

The model runs in this process (Qwen2.5-VL) or behind any OpenAI-compatible server. An answer without a score in its
range is no score: NaN with the answer as the reason, never 0.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from stage_grpo.option_checks import check_count, is_number
from stage_grpo.rewards.base import Reward, RewardResult
from stage_grpo.rewards.batching import ModelOptions, pick_device, weights_folder
from stage_grpo.rewards.failures import REASON
from stage_grpo.types import Metadata

REALISM = (
    "How much does this picture look like a real photograph? Look at light, texture, anatomy and perspective. Answer "
    'with JSON alone, {"score": N}, where N is a number from 0 (nothing about it is real) to 5 (it could be a photo).'
)
ALIGNMENT = (
    "A model drew this picture for the caption below. Judge two things: whether it shows what the caption says (its "
    "objects, their attributes and their relations), and how good the picture is (clarity, details, colours, overall "
    "appeal). Give one score from 1 to 5 after 'Final Score:'.\nCaption: [{prompt}]"
)


@dataclass(frozen=True)
class JudgeOptions(ModelOptions):
    """Options of a judge.

    Attributes:
        question: what the model is asked; ``{prompt}`` stands for the image's prompt. It must ask for a score in the
            form that the reward reads.
        server: base address of an OpenAI-compatible server, e.g. ``http://127.0.0.1:8000/v1``; None: the model runs in
            this process.
        model: name under which the server has the model.
        key_file: file with the server's key, if it asks for one.
        timeout: seconds after which a server's answer is given up.
        retries: further tries after one that failed.
        concurrency: questions under way at a time.
        max_tokens: longest answer.

    Raises:
        ValueError: a value that cannot be.
    """

    dtype: str = "bfloat16"
    question: str = REALISM
    server: str | None = None
    model: str | None = None
    key_file: str | None = None
    timeout: float = 120.0
    retries: int = 2
    concurrency: int = 8
    max_tokens: int = 64

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.question, str) or not self.question.strip():
            raise ValueError(f"question={self.question!r} is empty; write what the model is to judge")
        if self.server is not None and not re.match(r"https?://[^/]", str(self.server)):
            raise ValueError(f"server={self.server!r} is no address; write http://HOST:PORT/v1")
        if self.server is not None and not self.model:
            raise ValueError("server is given without model; name the model as the server does")
        for name in ("model", "key_file"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name}={getattr(self, name)!r} is no text; put it into quotes")
        if not is_number(self.timeout) or not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout={self.timeout!r} must be a number of seconds above 0")
        for name, least in (("retries", 0), ("concurrency", 1), ("max_tokens", 1)):
            check_count(name, getattr(self, name), least)


@dataclass(frozen=True)
class UnifiedRewardOptions(JudgeOptions):
    """As :class:`JudgeOptions`, with the question and the longer answers of UnifiedReward."""

    question: str = ALIGNMENT
    max_tokens: int = 512


class VlmJudge(Reward):
    """What a vision-language model answers to a question about the image, as a share of the highest score.

    By default it judges realism, as AR-GRPO's training does. Details: ``answer``, and ``reason`` where the answer held
    no score.
    """

    name = "vlm_judge"
    Options = JudgeOptions
    requirements = ("qwen2.5-vl-7b",)
    asynchronous: ClassVar[bool] = True
    pattern: ClassVar[str] = r'"score"\s*:\s*"?(-?\d+(?:\.\d+)?)'
    score_range: ClassVar[tuple[float, float]] = (0.0, 5.0)
    image_size: ClassVar[int | None] = None

    def __init__(self, options: Any = None):
        super().__init__(options)
        self._chat: Any = None

    def needed_weights(self) -> tuple[str, ...]:
        """None with a server, which brings its own. See :meth:`Reward.needed_weights`."""
        return () if self.options.server else super().needed_weights()

    def check_health(self) -> str:
        """Asks the server, if there is one, for its models. See :meth:`Reward.check_health`."""
        if self.options.server:
            self._chat = self._chat or self._load()
            self._chat.check()
        return self.name

    def compute(self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]) -> RewardResult:
        """Asks and reads the answers. See :meth:`Reward.compute`."""
        if self._chat is None:
            self._chat = self._load()
        if self.image_size is not None:
            images = [image.resize((self.image_size, self.image_size)) for image in images]
        questions = [self.options.question.replace("{prompt}", prompt) for prompt in prompts]
        answers = self._chat.answer(images, questions, self.options.max_tokens)
        pairs = [self._read(answer) for answer in answers]
        details = {REASON: [reason for _, reason in pairs], "answer": [str(answer) for answer in answers]}
        return RewardResult(np.array([score for score, _ in pairs], dtype=np.float64), details)

    def _read(self, answer: str | Exception) -> tuple[float, str | None]:
        """The score of an answer in [0, 1], or NaN and the reason."""
        if isinstance(answer, Exception):
            return math.nan, f"the model did not answer ({type(answer).__name__}: {str(answer)[:200]})"
        found = re.findall(self.pattern, answer)
        low, high = self.score_range
        if not found:
            return math.nan, f"no score in the answer {answer[:200]!r}"
        score = float(found[-1])  # a model that thinks aloud comes to its score last
        if not low <= score <= high:
            return math.nan, f"the score {found[-1]} is outside {low:g} to {high:g}"
        return score / high, None

    def _load(self) -> Any:
        o = self.options
        if o.server:
            from stage_grpo.rewards.chat_server import ChatServer

            return ChatServer(o.server, o.model, o.key_file, o.timeout, o.retries, o.concurrency)
        from stage_grpo.rewards.qwen_vl import QwenVl

        folder = weights_folder(o.weights, self.requirements[0])
        return QwenVl(folder, pick_device(o.device), o.dtype, o.batch_size)


class UnifiedReward(VlmJudge):
    """UnifiedReward's score of alignment and quality, 1 to 5, divided by 5.

    The default question says in our words what the model was trained to answer; for published numbers give the
    official wording as ``question``. Source: arXiv:2503.05236.
    """

    name = "unified_reward"
    Options = UnifiedRewardOptions
    requirements = ("unified-reward",)
    pattern = r"Final Score:\s*\**\s*(-?\d+(?:\.\d+)?)"
    score_range = (1.0, 5.0)
    image_size = 512
