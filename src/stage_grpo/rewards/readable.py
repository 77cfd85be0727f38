"""What keeps a picture from being scored, whatever looks at it."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image


def unreadable(image: Image.Image) -> str | None:
    """Why a picture cannot be read, in words for a log, or None if it can.

    Args:
        image: Of any mode and size; a file that was opened lazily is read here.
    """
    if min(image.size) == 0:
        return f"the image is empty, {image.width} x {image.height} pixels"
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for truncated and broken files
        return f"the image cannot be read: {error}"
    return None


def drop_infinite(scores: Float[np.ndarray, " B"], reasons: list[Any]) -> None:
    """Makes scores that are no finite numbers NaN, in place, and says so where there is no reason yet.

    Args:
        scores: As they came out of a model.
        reasons: Why a picture has no score, None where it has one.
    """
    for place in np.flatnonzero(~np.isfinite(scores)):
        reasons[place] = reasons[place] or f"the model gives {scores[place]}; use dtype float32"
        scores[place] = np.nan
