"""Bilinear resizing with OpenCV's own rounding, so that a detector sees the pixels that it was trained to see.

Other bilinear code differs by a grey level here and there. Nothing but integers is involved, on any device.
"""

from __future__ import annotations

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

_ONE = 2048
"""Weights are whole multiples of 1 / 2048."""


def resize_bilinear(
    pixels: UInt8[Tensor, "H W 3"], height: int, width: int
) -> UInt8[Tensor, "new_height new_width 3"]:
    """Resizes without a filter, as OpenCV's ``INTER_LINEAR`` does with bytes.

    Args:
        pixels: Values of 0 to 255.
        height: Of the result, at least 1.
        width: Of the result, at least 1.

    Returns:
        The same bytes as ``cv2.resize`` of OpenCV 4 and 5.
    """
    if (height, width) == tuple(pixels.shape[:2]):
        return pixels
    if (2 * height, 2 * width) == tuple(pixels.shape[:2]):  # there OpenCV takes the mean of four
        return ((pixels.int().unflatten(0, (height, 2)).unflatten(2, (width, 2)).sum((1, 3)) + 2) >> 2).byte()
    columns, weights = _neighbours(pixels.shape[1], width, pixels.device)
    values = pixels.int()
    rows = (values[:, columns] * weights[..., None]).sum(2, dtype=torch.int32) >> 4
    lines, weights = _neighbours(pixels.shape[0], height, pixels.device)
    # Each of the two products is cut off before they are added; that is where others differ.
    parts = (rows[lines] * weights[..., None, None]) >> 16
    return ((parts.sum(1, dtype=torch.int32) + 2) >> 2).clamp(0, 255).byte()


def _neighbours(size: int, new_size: int, device: torch.device) -> tuple[Int[Tensor, "new 2"], Int[Tensor, "new 2"]]:
    """Places of the two source pixels of each new one, and their weights, which add up to 2048."""
    centers = (torch.arange(new_size, dtype=torch.float64) + 0.5) * (size / new_size) - 0.5
    centers = centers.float()
    left = centers.floor()
    share = centers - left
    weights = torch.stack([(1 - share) * _ONE, share * _ONE], dim=1).round().int()
    places = torch.stack([left, left + 1], dim=1).long().clamp(0, size - 1)
    return places.to(device), weights.to(device)
