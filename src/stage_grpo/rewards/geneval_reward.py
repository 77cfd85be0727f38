"""GenEval's rules on photographs: objects by Mask2Former, colours by CLIP.

Source: arXiv:2310.11513 and its evaluation; the graded score as in the training reward of arXiv:2509.25027.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from stage_grpo.detectors.mask2former import (
    CHANNEL_ORDERS,
    Instances,
    Mask2FormerDetector,
    intersection_over_union,
)
from stage_grpo.option_checks import check_count, is_number
from stage_grpo.rewards.base import Reward, RewardResult
from stage_grpo.rewards.batching import ModelOptions, choose_batch_size, pick_device, weights_folder
from stage_grpo.rewards.clip_encoder import ClipEncoder
from stage_grpo.rewards.colors import ColorClassifier, crop_object
from stage_grpo.rewards.failures import NOT_APPLICABLE
from stage_grpo.rewards.geneval import Requirements, judge, parse_metadata
from stage_grpo.rewards.loading import load_model
from stage_grpo.rewards.readable import unreadable
from stage_grpo.types import Box, Metadata

DETECTOR_WEIGHTS = "mask2former-swin-s-coco"
COLOR_WEIGHTS = "clip-vit-large-patch14"
COUNTING_TAG = "counting"
_BROKEN = "a model's output is not finite; use dtype float32"


@dataclass(frozen=True)
class GenevalOptions(ModelOptions):
    """Options of :class:`GenevalReward`; the defaults are the benchmark's.

    Attributes:
        strict: score 1 where GenEval's own rule holds and 0 elsewhere, instead of the graded score.
        channel_order: "bgr" hands the detector the colours that it was trained on; "rgb" exchanges red and blue, as
            the published training codes do.
        threshold: confidence that an object must exceed.
        counting_threshold: the same for prompts tagged "counting".
        max_objects: most objects of one class; the most confident ones are kept.
        max_overlap: intersection over union with a more confident object of the class from which on an object is
            dropped; 1 keeps all.
        color_weights: a ready folder of CLIP instead of the one in the cache; ``weights`` is the detector's.

    Raises:
        ValueError: a value out of range, or what :class:`ModelOptions` refuses.
    """

    strict: bool = False
    channel_order: str = "bgr"
    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    color_weights: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.strict, bool):
            raise ValueError(f"strict={self.strict!r} is no truth value; give true or false")
        if self.channel_order not in CHANNEL_ORDERS:
            raise ValueError(f"channel_order={self.channel_order!r} is unknown; use bgr (right) or rgb (as published)")
        for name in ("threshold", "counting_threshold", "max_overlap"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} is outside [0, 1]; give a number within")
        check_count("max_objects", self.max_objects, 1)
        if self.color_weights is not None and not (isinstance(self.color_weights, str) and self.color_weights):
            raise ValueError(f"color_weights={self.color_weights!r} is no text; name a folder, or leave it out")


@dataclass(frozen=True)
class Detected:
    """What was found in one picture: boxes of each class, sorted by falling confidence, and a mask for each box."""

    boxes: dict[str, list[Box]]
    masks: dict[str, list[Bool[Tensor, "H W"]]]


class GenevalReward(Reward):
    """How well a picture shows what GenEval's metadata ask for, in [0, 1].

    Details: ``correct`` (0 or 1, GenEval's rule whatever ``strict`` says), ``reasons`` (lines that say why it is not
    correct), ``objects`` (class to a list of [x1, y1, x2, y2, confidence] in pixels, the most confident first),
    ``colors`` (class to the colours of its first boxes, as many as the metadata ask about) and ``reason`` (why there
    is no score, else None). Metadata without ``include`` are none of this reward's: NaN.
    """

    name = "geneval"
    Options = GenevalOptions
    requirements = (DETECTOR_WEIGHTS, COLOR_WEIGHTS)
    weight_options = ("weights", "color_weights")

    def __init__(self, options: GenevalOptions | None = None):
        super().__init__(options)
        colors = replace(self.options, weights=self.options.color_weights)
        self.classifier = ColorClassifier(ClipEncoder(colors, COLOR_WEIGHTS))

    @cached_property
    def class_names(self) -> list[str]:
        """Classes that the detector knows, read from its configuration alone."""
        from transformers import Mask2FormerConfig

        folder = weights_folder(self.options.weights, DETECTOR_WEIGHTS)
        config: Any = Mask2FormerConfig.from_pretrained(folder, local_files_only=True)
        return list(config.id2label.values())

    def check_row(self, prompt: str, metadata: Metadata) -> None:
        """Reads the clauses and their classes. See :meth:`Reward.check_row`."""
        if metadata.get("include") is not None:
            _check_classes([parse_metadata(metadata)], self.class_names)

    @cached_property
    def detector(self) -> Mask2FormerDetector:
        """The detector, loaded when first asked for, and the colours' encoder with it: not later beside other work."""
        from transformers import Mask2FormerForUniversalSegmentation

        folder = weights_folder(self.options.weights, DETECTOR_WEIGHTS)
        device = pick_device(self.options.device)
        model = load_model(Mask2FormerForUniversalSegmentation, folder, device, self.options.dtype)
        _ = self.classifier.encoder.model
        return Mask2FormerDetector(model, self.options.channel_order)

    def compute(self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]) -> RewardResult:
        """Detects, names colours, judges, each for the whole batch at once. See :meth:`Reward.compute`.

        Raises:
            ValueError: malformed metadata, a class that the detector does not know, or missing weights.
        """
        details: dict[str, list[Any]] = {
            "correct": [None] * len(images),
            "reasons": [[] for _ in images],
            "objects": [None] * len(images),
            "colors": [None] * len(images),
            "reason": [_obstacle(image, wanted) for image, wanted in zip(images, metadata)],
        }
        scores = np.full(len(images), np.nan)
        asked = [index for index, reason in enumerate(details["reason"]) if reason is None]
        wanted = [parse_metadata(metadata[index]) for index in asked]  # all of them before any work is done
        if not asked:
            return RewardResult(scores, details)
        _check_classes(wanted, self.detector.class_names)
        pictures = [images[index].convert("RGB") for index in asked]
        detected = self.detect(pictures, [metadata[index] for index in asked])
        colors = self._name_colors(pictures, wanted, detected)
        for index, found, named in zip(asked, detected, colors):
            if found is None or named is None:
                details["reason"][index] = _BROKEN
                continue
            verdict = judge(found.boxes, metadata[index], lambda name, boxes, named=named: named[name][: len(boxes)])
            details["correct"][index] = int(verdict.correct)
            details["reasons"][index] = verdict.reasons
            details["objects"][index] = {name: [list(box) for box in boxes] for name, boxes in found.boxes.items()}
            details["colors"][index] = named
            scores[index] = verdict.correct if self.options.strict else verdict.score
        return RewardResult(scores, details)

    def detect(self, images: Sequence[Image.Image], metadata: Sequence[Metadata]) -> list[Detected | None]:
        """Finds the objects in each picture, as many and as sure as the benchmark counts them.

        Args:
            images: B RGB pictures.
            metadata: B descriptions, of which only ``tag`` is looked at: it chooses the threshold.

        Returns:
            What was found in each; None where the model's output is not finite.
        """
        options, detector = self.options, self.detector
        thresholds = [
            options.counting_threshold if wanted.get("tag") == COUNTING_TAG else options.threshold
            for wanted in metadata
        ]
        size = choose_batch_size(options.batch_size, detector.bytes_per_image(images), str(detector.device))
        instances = detector.detect(images, thresholds, size)
        return [found and self._limited(found) for found in instances]

    def _limited(self, instances: Instances) -> Detected:
        """The most confident objects of each class, without those that overlap too much with a more confident one."""
        detected = Detected({}, {})
        order = range(len(instances.labels))
        boxes = [
            Box._make([*corners, score]) for corners, score in zip(instances.boxes.tolist(), instances.scores.tolist())
        ]
        for label in instances.labels.unique().tolist():
            left = [i for i in order if instances.labels[i] == label][: self.options.max_objects]
            kept: list[int] = []
            for i in left:
                if self.options.max_overlap == 1 or all(
                    intersection_over_union(boxes[k], boxes[i]) < self.options.max_overlap for k in kept
                ):
                    kept.append(i)
            name = self.detector.class_names[label]
            detected.boxes[name] = [boxes[i] for i in kept]
            detected.masks[name] = [instances.masks[i] for i in kept]
        return detected

    def _name_colors(
        self, images: list[Image.Image], wanted: list[Requirements], detected: list[Detected | None]
    ) -> list[dict[str, list[str]] | None]:
        """Colours of the boxes that :func:`judge` will ask about, by class; None for a picture that has no colours."""
        keys = [
            (index, name, place)
            for index, (requirements, found) in enumerate(zip(wanted, detected))
            if found is not None
            for name, count in _colored(requirements).items()
            for place in range(min(count, len(found.boxes.get(name, ()))))
        ]
        crops = [_crop(images[index], detected[index], name, place) for index, name, place in keys]
        colors = self.classifier.classify(crops, [name for _, name, _ in keys])
        broken = {index for (index, _, _), color in zip(keys, colors) if color is None}
        named: list[dict[str, list[str]]] = [{} for _ in images]
        for (index, name, _), color in zip(keys, colors):
            named[index].setdefault(name, []).append(color or "")
        return [None if index in broken else names for index, names in enumerate(named)]


def _check_classes(wanted: Sequence[Requirements], known: Sequence[str]) -> None:
    names = {clause.name for requirements in wanted for clause in (*requirements.include, *requirements.exclude)}
    if unknown := sorted(names.difference(known)):
        raise ValueError(
            f"metadata ask for {unknown}, which the detector does not know; it knows {', '.join(sorted(known))}"
        )


def _obstacle(image: Image.Image, metadata: Metadata) -> str | None:
    """Why a picture cannot be scored, or None."""
    if metadata.get("include") is None:
        return f"{NOT_APPLICABLE}: the metadata have no 'include' clause"
    return unreadable(image)


def _colored(requirements: Requirements) -> dict[str, int]:
    """How many of a class's most confident boxes need a colour."""
    counts: dict[str, int] = {}
    for clause in requirements.include:
        if clause.color is not None:
            counts[clause.name] = max(clause.count, counts.get(clause.name, 0))
    return counts


def _crop(image: Image.Image, found: Detected | None, name: str, place: int) -> Image.Image:
    assert found is not None  # keys are made of pictures that were judged
    return crop_object(image, found.boxes[name][place], found.masks[name][place])
