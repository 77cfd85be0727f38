"""How different the images of one prompt are. Training for a reward lowers it, and few report it.

Two numbers: the share of different images, and the mean distance of two images of one prompt, in the space of CLIP's
image features or, without CLIP's weights, in that of the image codes that the model drew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from stage_grpo.images.files import decode_codes, read_about
from stage_grpo.images.folders import load_image
from stage_grpo.images.set_files import CODEBOOK
from stage_grpo.images.sets import ImageSet, SetImage

SPACES = ("auto", "clip", "codes", "none")
_CLIP = "clip-vit-large-patch14"

Features = Callable[[Sequence[SetImage]], Float[np.ndarray, "N T D"]]
"""T vectors of length 1, or 0, for each of N images."""


def measure_diversity(image_set: ImageSet, space: str = "auto") -> dict[str, Any]:
    """Diversity of a set, averaged over the prompts that have at least two images.

    Equal prompts in several places count as one prompt.

    Args:
        image_set: The set.
        space: Where to measure distances: "clip", "codes" (needs images that ``stage generate`` wrote), "none", or
            "auto" for the first of CLIP, whose weights must be in the cache, and the codes that there is.

    Returns:
        "unique_share" in (0, 1], "pairwise_distance" in [0, 2], each None where no prompt has two images or there
        is no space to measure in, and "space": "clip", "codes" or None.

    Raises:
        ValueError: An unknown space, or one that is asked for and is not there.
    """
    if space not in SPACES:
        raise ValueError(f"diversity space {space!r} is unknown; use one of {', '.join(SPACES)}")
    groups: dict[str, list[SetImage]] = defaultdict(list)
    for image in image_set.images:
        groups[image.prompt].append(image)
    repeated = [group for group in groups.values() if len(group) > 1]
    if not repeated:
        return {"unique_share": None, "pairwise_distance": None, "space": None}
    shares = [len({image.digest for image in group}) / len(group) for group in repeated]
    chosen, features = _features(image_set, [image for group in repeated for image in group], space)
    distance = None
    if features is not None:
        distance = float(np.mean([mean_pairwise_distance(features(group)) for group in repeated]))
    return {"unique_share": float(np.mean(shares)), "pairwise_distance": distance, "space": chosen}


def mean_pairwise_distance(vectors: Float[np.ndarray, "N T D"]) -> float:
    """Mean over pairs of images of 1 - mean over tokens of the cosine of their vectors.

    Args:
        vectors: T vectors of length 1 for each of N >= 2 images; a vector of length 0 has cosine 0 with all others.

    Returns:
        In [0, 2]; 0 if all images are the same.
    """
    num_images, num_tokens, _ = vectors.shape
    # Sum over pairs from the length of the sum, so that no (N, N, T) array is made.
    total = np.square(vectors.sum(axis=0)).sum() - np.square(vectors).sum()
    return float(1.0 - total / (num_images * (num_images - 1) * num_tokens))


def _features(image_set: ImageSet, images: Sequence[SetImage], space: str) -> tuple[str | None, Features | None]:
    if space == "none":
        return None, None
    if space in ("auto", "clip"):
        from stage_grpo.weights import is_present

        if is_present(_CLIP):
            return "clip", _clip_features(image_set.folder)
        if space == "clip":
            raise ValueError(f"the weights {_CLIP} are not in the cache; get them by: stage weights get {_CLIP}")
    try:
        return "codes", _code_features(image_set, images)
    except ValueError:
        if space == "codes":
            raise
        return None, None  # images of another origin have no codes


def _clip_features(folder: Path) -> Features:
    from stage_grpo.rewards.batching import ModelOptions
    from stage_grpo.rewards.clip_encoder import ClipEncoder

    encoder = ClipEncoder(ModelOptions(), _CLIP)

    def features(images: Sequence[SetImage]) -> Float[np.ndarray, "N T D"]:
        found = encoder.image_features([load_image(folder / image.path) for image in images])
        return found.double().cpu().numpy()[:, None]

    return features


def _code_features(image_set: ImageSet, images: Sequence[SetImage]) -> Features:
    """Vectors of the codes that every image says it was drawn as.

    Raises:
        ValueError: There is no codebook, or an image says no codes, or such as are not in it.
    """
    codebook = _codebook(image_set.side / CODEBOOK)
    codes = {image.path: _codes(image_set.folder / image.path, len(codebook)) for image in images}
    if len({len(found) for found in codes.values()}) > 1:
        raise ValueError(
            f"{image_set.folder} holds images of different numbers of codes; generate it again, or use clip"
        )

    def features(images: Sequence[SetImage]) -> Float[np.ndarray, "N T D"]:
        return codebook[np.stack([codes[image.path] for image in images])]

    return features


def _codebook(path: Path) -> Float[np.ndarray, "V D"]:
    """Code vectors of length 1, float64."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        vectors = load_file(path)["codebook"].astype(np.float64)
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{path} is no codebook ({error}); generate the set again, or use clip") from error
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1.0)


def _codes(path: Path, num_codes: int) -> Int[np.ndarray, " T"]:
    try:
        codes = decode_codes(read_about(path)["codes"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} names no image codes; generate it again, or use clip") from error
    if not len(codes) or codes.max() >= num_codes:
        raise ValueError(f"{path}: its image codes are not in {CODEBOOK}; generate it again, or use clip")
    return codes
