"""Images as the pixels that CLIP and its relatives take, equal to the originals' transforms to the bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the images that CLIP was trained on, in [0, 1]; every model here was trained with them."""

Pixels = Callable[[Image.Image, int], Float[Tensor, "3 S S"]]
"""Makes an RGB image the normalised square of S x S that a model takes."""


def crop_pixels(image: Image.Image, size: int) -> Float[Tensor, "3 S S"]:
    """The original CLIP's pixels: shorter side to ``size``, bicubic on 8-bit values, the middle square, normalised.

    Equals the ``torchvision`` transforms of OpenAI, open_clip and ImageReward to the bit.

    Args:
        image: RGB.
        size: Side S in pixels.

    Returns:
        Normalised by CLIP's mean and spread.
    """
    return _middle(image, size, lambda spare: round(spare / 2.0))


def crop_pixels_rounding_down(image: Image.Image, size: int) -> Float[Tensor, "3 S S"]:
    """As :func:`crop_pixels`, but cut out as ``transformers`` does: one pixel off for some sizes of oblong images.

    Args:
        image: RGB.
        size: Side S in pixels.

    Returns:
        Normalised by CLIP's mean and spread.
    """
    return _middle(image, size, lambda spare: spare // 2)


def pad_pixels(image: Image.Image, size: int) -> Float[Tensor, "3 S S"]:
    """HPSv2's pixels: longer side to ``size``, antialiased bicubic on floats, black around it, normalised.

    The original leaves an oblong image whose longer side is ``size`` already without its padding, and then fails;
    here it is padded too. Source: hpsv2 1.2.0, ``ResizeMaxSize``.

    Args:
        image: RGB.
        size: Side S in pixels.

    Returns:
        Normalised by CLIP's mean and spread.
    """
    pixels = _as_tensor(image).div_(255)
    scale = size / max(image.width, image.height)
    height, width = max(1, round(image.height * scale)), max(1, round(image.width * scale))
    if scale != 1.0:
        pixels = torch.nn.functional.interpolate(
            pixels[None], (height, width), mode="bicubic", align_corners=False, antialias=True
        )[0]
    spare_x, spare_y = size - width, size - height
    around = (spare_x // 2, spare_x - spare_x // 2, spare_y // 2, spare_y - spare_y // 2)
    return _normalised(torch.nn.functional.pad(pixels, around))


def _middle(image: Image.Image, size: int, start: Callable[[int], int]) -> Float[Tensor, "3 S S"]:
    shorter = min(image.width, image.height)
    width, height = (int(size * side / shorter) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = start(width - size), start(height - size)
    return _normalised(_as_tensor(image.crop((left, top, left + size, top + size))).div_(255))


def _as_tensor(image: Image.Image) -> Float[Tensor, "3 H W"]:
    values: UInt8[np.ndarray, "H W 3"] = np.array(image)
    return torch.from_numpy(values).permute(2, 0, 1).contiguous().float()


def _normalised(pixels: Float[Tensor, "3 S S"]) -> Float[Tensor, "3 S S"]:
    """The same tensor, changed in place: no copy of a picture that nobody else holds."""
    return pixels.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])
