"""Mask2Former as mmdet runs it: the same resizing, padding, scores and boxes, on transformers' network.

Source: mmdet 2.28, configuration ``mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco``, the detector of arXiv:2310.11513.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional

from stage_grpo.detectors.resizing import resize_bilinear

OFFICIAL_SCALE = (1333, 800)
"""Most pixels along the longer and the shorter side after resizing."""
CHANNEL_ORDERS = ("bgr", "rgb")
PAD_VALUE = 128
"""Grey level of the padding, which mmdet 2.x adds before it normalises (mmdet 3.x adds zeros after)."""
MAX_INSTANCES = 100
BYTES_PER_PIXEL = 1400
"""Peak memory for one pixel of a resized picture, measured on the official architecture in float32 (823 MiB)."""
_DIVISOR = 32
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Instances:
    """The K objects found in one picture of H x W pixels, sorted by falling score.

    Attributes:
        labels: index of each one's class.
        boxes: tight box of each mask, ``x1, y1, x2, y2`` in pixels, the last two exclusive.
        scores: probability of the class times the mean probability within the mask, in [0, 1].
        masks: the pixels of each.
    """

    labels: Int[Tensor, " K"]
    boxes: Float[Tensor, "K 4"]
    scores: Float[Tensor, " K"]
    masks: Bool[Tensor, "K H W"]


class Mask2FormerDetector:
    """Finds objects of the classes that the model was trained on.

    Args:
        model: ``Mask2FormerForUniversalSegmentation``, ready on its device; its ``id2label`` names the classes.
        channel_order: Order of the channels in which mmdet would have been handed the picture. It expects "bgr", which
            is right; "rgb" exchanges red and blue, as several training codes do that pass it a PIL picture.
        scale: Most pixels along the longer and the shorter side after resizing.

    Raises:
        ValueError: An unknown channel order.
    """

    def __init__(self, model: Any, channel_order: str = "bgr", scale: tuple[int, int] = OFFICIAL_SCALE):
        if channel_order not in CHANNEL_ORDERS:
            raise ValueError(f"channel_order={channel_order!r} is unknown; use bgr (right) or rgb (as published)")
        self.model = model
        self.channel_order = channel_order
        self.scale = scale
        self.class_names: list[str] = [model.config.id2label[index] for index in range(model.config.num_labels)]

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.device

    def bytes_per_image(self, images: Sequence[Image.Image]) -> int:
        """Peak memory of the largest of these pictures, roughly; 0 for none."""
        sizes = [scaled_size(image.size, self.scale) for image in images]
        return BYTES_PER_PIXEL * max((width * height for width, height in sizes), default=0)

    @torch.inference_mode()
    def detect(
        self, images: Sequence[Image.Image], min_scores: Sequence[float], batch_size: int = 1
    ) -> list[Instances | None]:
        """Finds the objects of each picture, in batches of pictures that have the same size after resizing.

        A picture's result does not depend on the others: none is padded to the size of another.

        Args:
            images: B pictures of any mode and size.
            min_scores: For each picture, the score that an object must exceed to be returned. A high one saves time:
                masks are made only of what may reach it.
            batch_size: Pictures at a time.

        Returns:
            B sets of instances, on the CPU; None where the network's output is not finite.
        """
        found: dict[int, Instances | None] = {}
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(scaled_size(image.size, self.scale), []).append(index)
        for indices in by_size.values():
            for start in range(0, len(indices), batch_size):
                chosen = indices[start : start + batch_size]
                batch = self._detect_batch([images[i] for i in chosen], [min_scores[i] for i in chosen])
                found.update(zip(chosen, batch))
        return [found[index] for index in range(len(images))]

    def _detect_batch(self, images: list[Image.Image], min_scores: list[float]) -> list[Instances | None]:
        width, height = scaled_size(images[0].size, self.scale)
        pixels = torch.stack([self._prepare(image, width, height) for image in images])
        outputs = self.model(pixel_values=pixels.to(self.model.dtype), output_auxiliary_logits=False)
        padded = (pixels.shape[2], pixels.shape[3])
        found: list[Instances | None] = []
        for index, (image, min_score) in enumerate(zip(images, min_scores)):
            logits = outputs.class_queries_logits[index].float()
            masks = outputs.masks_queries_logits[index].float()
            sizes = (padded, (height, width), (image.height, image.width))
            found.append(find_instances(logits, masks, sizes, min_score))
        return found

    def _prepare(self, image: Image.Image, width: int, height: int) -> Float[Tensor, "3 padded_height padded_width"]:
        """Resized, padded and normalised channels in the order in which the network was trained, or its reverse."""
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).to(self.device)
        if self.channel_order == "rgb":
            pixels = pixels.flip(-1)
        resized = resize_bilinear(pixels, height, width).permute(2, 0, 1).float()
        missing = (0, -width % _DIVISOR, 0, -height % _DIVISOR)
        mean, std = (torch.tensor(values, device=self.device)[:, None, None] for values in (_MEAN, _STD))
        return (functional.pad(resized, missing, value=PAD_VALUE) - mean) / std


def scaled_size(size: tuple[int, int], scale: tuple[int, int]) -> tuple[int, int]:
    """Width and height after resizing as large as ``scale`` allows with the same proportions.

    Args:
        size: Width and height of the picture.
        scale: Most pixels along its longer and its shorter side, in any order.
    """
    factor = min(max(scale) / max(size), min(scale) / min(size))
    return int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)


def find_instances(
    logits: Float[Tensor, "queries labels"],
    masks: Float[Tensor, "queries mask_height mask_width"],
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    min_score: float,
) -> Instances | None:
    """Turns what the network says about one picture into objects.

    Of all pairs of query and class the 100 most probable ones are taken; so a query may be several objects.

    Args:
        logits: Of the labels: the classes, and last "no object".
        masks: Logits of each query's mask, at a quarter of the padded size.
        sizes: Heights and widths of the padded picture, of the same without its padding, and of the original.
        min_score: Score that an object must exceed.

    Returns:
        The objects, on the CPU; None where a logit is not finite, which is no picture without objects.

    Source: mmdet 2.28, ``MaskFormerFusionHead.instance_postprocess``.
    """
    if not (logits.isfinite().all() and masks.isfinite().all()):
        return None
    padded, scaled, original = sizes
    probabilities = logits.softmax(-1)[:, :-1]
    num_classes = probabilities.shape[1]
    top, places = probabilities.flatten().topk(min(MAX_INSTANCES, probabilities.numel()))
    # The score is the probability times at most 1, so less probable pairs need no mask.
    possible = top > min_score
    top, places = top[possible], places[possible]
    used, positions = (places // num_classes).unique(return_inverse=True)
    if len(used) == 0:
        return _as_instances(places, torch.zeros(0, *original, device=masks.device, dtype=torch.bool), top)
    enlarged = _interpolate(masks[used], padded)[:, : scaled[0], : scaled[1]]
    enlarged = _interpolate(enlarged, original)
    inside = enlarged > 0
    certainty = (enlarged.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    scores = top * certainty[positions]
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > min_score]
    return _as_instances(places[order] % num_classes, inside[positions[order]], scores[order])


def _interpolate(
    masks: Float[Tensor, "queries height width"], size: tuple[int, int]
) -> Float[Tensor, "queries new_height new_width"]:
    return functional.interpolate(masks[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _as_instances(labels: Int[Tensor, " K"], masks: Bool[Tensor, "K H W"], scores: Float[Tensor, " K"]) -> Instances:
    boxes = torch.zeros(len(labels), 4)
    for index, (columns, rows) in enumerate(zip(masks.any(1).cpu(), masks.any(2).cpu())):
        x, y = columns.nonzero().flatten(), rows.nonzero().flatten()
        boxes[index] = torch.stack([x[0], y[0], x[-1] + 1, y[-1] + 1])
    return Instances(labels.cpu(), boxes, scores.cpu(), masks.cpu())


def intersection_over_union(box: Sequence[float], other: Sequence[float]) -> float:
    """Overlap of two boxes whose last corner is counted as part of them, in [0, 1].

    Args:
        box: ``x1, y1, x2, y2`` in pixels; more values are not looked at.
        other: The same.

    Source: the evaluation of arXiv:2310.11513.
    """
    shared = _area(max(box[0], other[0]), max(box[1], other[1]), min(box[2], other[2]), min(box[3], other[3]))
    joined = _area(*box[:4]) + _area(*other[:4]) - shared
    return shared / joined if joined else 0.0


def _area(x1: float, y1: float, x2: float, y2: float) -> float:
    return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)
