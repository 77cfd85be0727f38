"""Does a picture show every thing a prompt names? The disentangled BLIP-VQA of T2I-CompBench, ``blip_vqa``.

Source: arXiv:2307.06350, section 4.1; arXiv:2201.12086 (model).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from stage_grpo.rewards.base import Reward, RewardResult
from stage_grpo.rewards.batching import ModelOptions, batches, choose_batch_size, pick_device, weights_folder
from stage_grpo.rewards.noun_phrases import KEY, check_spacy, phrases_of
from stage_grpo.rewards.readable import drop_infinite, unreadable
from stage_grpo.types import Metadata

WEIGHTS = "blip-vqa"
BYTES_PER_IMAGE = 60_000_000
BYTES_PER_QUESTION = 15_000_000
"""Activations of one picture, and of one question about it, in float32, roughly."""
MOST_WORDS = 50
_LEFT_OUT = re.compile(r"[.!\"()*#:;~]")
"""What BLIP's own cleaning drops from a question, and how many words it keeps."""


@dataclass(frozen=True)
class BlipVqaOptions(ModelOptions):
    """Options of :class:`BlipVqaReward`, besides those of every model.

    Attributes:
        spacy_model: The spaCy pipeline that finds noun phrases; None: only those in the metadata are used.
        legacy: Score as the benchmark's code writes it: each probability and the product rounded to 4 decimals, and 1
            for a prompt without noun phrases.

    Raises:
        ValueError: ``spacy_model`` is no text, ``legacy`` is no bool, or what :class:`ModelOptions` refuses.
    """

    spacy_model: str | None = "en_core_web_sm"
    legacy: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.spacy_model is not None and not (isinstance(self.spacy_model, str) and self.spacy_model):
            raise ValueError(f"spacy_model={self.spacy_model!r} is no text; name a spaCy pipeline, or give null")
        if not isinstance(self.legacy, bool):
            raise ValueError(f"legacy={self.legacy!r} is no truth value; give true or false")


def question(phrase: str) -> str:
    """What is asked about a noun phrase, cleaned as BLIP cleans questions: ``"A red apple"`` -> ``"a red apple?"``."""
    return " ".join(_LEFT_OUT.sub("", f"{phrase}?".lower()).rstrip(" ").split(" ")[:MOST_WORDS])


class BlipVqaReward(Reward):
    """Product over a prompt's noun phrases of BLIP's probability of "yes" against "no", in [0, 1].

    The phrases come from ``metadata["noun_phrases"]`` where it is given, else from spaCy; NaN without any.
    Details: ``noun_phrases``, ``p_yes`` (of each phrase), and ``reason`` (why there is no score, else None).
    """

    name = "blip_vqa"
    Options = BlipVqaOptions
    requirements: ClassVar[tuple[str, ...]] = (WEIGHTS,)
    extra = "t2i_compbench"

    def __init__(self, options: BlipVqaOptions | None = None):
        super().__init__(options)
        self._model: Any = None

    def check_health(self) -> str:
        """Sees that spaCy and its model are there, if they are to be used. See :meth:`Reward.check_health`.

        Raises:
            ValueError: One is missing.
        """
        if self.options.spacy_model is not None:
            check_spacy(self.options.spacy_model)
        return self.name

    def check_row(self, prompt: str, metadata: Metadata) -> None:
        """Reads the row's noun phrases, and leaves it to later to find them. See :meth:`Reward.check_row`."""
        if metadata.get(KEY) is not None or self.options.spacy_model is None:
            phrases_of(prompt, metadata, None)

    def compute(self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]) -> RewardResult:
        """Asks about every noun phrase of each prompt. See :meth:`Reward.compute`.

        Raises:
            ValueError: Noun phrases that are no list of texts, or neither given nor found because spaCy is missing;
                weights that are missing.
        """
        phrases = [phrases_of(prompt, row, self.options.spacy_model) for prompt, row in zip(prompts, metadata)]
        scores = np.full(len(images), np.nan)
        details: dict[str, list[Any]] = {
            "noun_phrases": list(phrases),
            "p_yes": [None] * len(images),
            "reason": [unreadable(image) or _obstacle(found) for image, found in zip(images, phrases)],
        }
        asked = [index for index, reason in enumerate(details["reason"]) if reason is None]
        answers = self._answers([images[i] for i in asked], [phrases[i] for i in asked]) if asked else []
        for index, p_yes in zip(asked, answers):
            scores[index] = self._product(p_yes)
            details["p_yes"][index] = [round(p, 4) for p in p_yes]
        drop_infinite(scores, details["reason"])
        for index, found in enumerate(phrases):
            if self.options.legacy and not found and details["reason"][index] == _obstacle(found):
                scores[index], details["reason"][index] = 1.0, None
        return RewardResult(scores, details)

    def _product(self, p_yes: list[float]) -> float:
        if not self.options.legacy:
            return math.prod(p_yes)
        return round(math.prod(round(p, 4) for p in p_yes), 4)

    def _answers(self, images: list[Image.Image], phrases: list[list[str]]) -> list[list[float]]:
        options = self.options
        if self._model is None:
            from stage_grpo.rewards.blip_vqa_model import BlipVqa  # brings transformers along

            folder = weights_folder(options.weights, WEIGHTS)
            self._model = BlipVqa(folder, pick_device(options.device), options.dtype)
        asked = [[question(phrase) for phrase in found] for found in phrases]
        needed = BYTES_PER_IMAGE + max(map(len, asked)) * BYTES_PER_QUESTION
        size = choose_batch_size(options.batch_size, needed, self._model.device)
        return [p_yes for part in batches(len(images), size) for p_yes in self._model.p_yes(images[part], asked[part])]


def _obstacle(phrases: list[str]) -> str | None:
    return None if phrases else "not applicable: the prompt has no noun phrase"
