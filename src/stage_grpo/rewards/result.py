"""What a reward returns for a batch of images, and what of it is accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class RewardResult:
    """Scores of a batch of B images, and named details for logs.

    ``scores`` are float64; NaN marks a sample that could not be scored, never 0. Every list of ``details``
    has B values.
    """

    scores: Float[np.ndarray, " B"]
    details: dict[str, list[Any]] = field(default_factory=dict)


def check_result(name: str, raw: Any, num_images: int) -> RewardResult:
    """What a reward returned as scores in float64, with None as NaN.

    Args:
        name: Name of the reward.
        raw: One number per image, or a :class:`RewardResult`.
        num_images: Images that it was given.

    Raises:
        ValueError: it is not one finite number, NaN or None per image.
    """
    details = raw.details if isinstance(raw, RewardResult) else {}
    values = raw.scores if isinstance(raw, RewardResult) else raw
    if hasattr(values, "tolist"):  # numpy arrays and torch tensors alike, without importing torch
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"reward {name!r} returned {values!r}; return a list of one number per image")
    if len(values) != num_images:
        raise ValueError(f"reward {name!r} returned {len(values)} scores for {num_images} images; return as many")
    scores = np.array([_as_score(name, value, index) for index, value in enumerate(values)], dtype=np.float64)
    for detail, column in details.items():
        if len(column) != num_images:
            raise ValueError(
                f"reward {name!r} returned {len(column)} values of detail {detail!r} "
                f"for {num_images} images; return as many"
            )
    return RewardResult(scores, details)


def _as_score(name: str, value: Any, index: int) -> float:
    if value is None:
        return float("nan")
    if isinstance(value, str | bytes) or np.ndim(value) != 0:
        raise ValueError(f"reward {name!r} returned {value!r} for image {index}; return a number")
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"reward {name!r} returned {value!r} for image {index}; return a number") from None
    if np.isinf(score):
        raise ValueError(
            f"reward {name!r} returned {score} for image {index}; return a finite number, or NaN for no score"
        )
    return score
