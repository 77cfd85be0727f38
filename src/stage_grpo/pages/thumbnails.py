"""Small copies of images as data URIs, for pages that show thousands of them and stand by themselves."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from stage_grpo.devices import num_cores
from stage_grpo.images.folders import load_image

THUMBNAIL_SIZE = 128
"""Pixels of a thumbnail's longer side, unless told otherwise."""
_QUALITY = 60


@dataclass(frozen=True)
class Thumbnail:
    """A small copy of one image.

    Attributes:
        uri: Data URI.
        width: Pixels of the image itself.
        height: Pixels of the image itself.
    """

    uri: str
    width: int
    height: int


def thumbnail(image: Image.Image, size: int = THUMBNAIL_SIZE) -> Thumbnail:
    """Make one thumbnail.

    An image that is no larger than a thumbnail is kept as it is, bit for bit: pages enlarge it without smoothing.

    Args:
        image: RGB.
        size: Longest side in pixels.
    """
    is_small = max(image.size) <= size
    if is_small:
        return Thumbnail(_uri(image, lossless=True), *image.size)
    small = image.copy()
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    return Thumbnail(_uri(small, lossless=False), *image.size)


def make_thumbnails(paths: Sequence[Path], size: int = THUMBNAIL_SIZE) -> list[Thumbnail | None]:
    """Make the thumbnails of image files, in threads and with a progress bar.

    Args:
        paths: The files.
        size: Longest side in pixels.

    Returns:
        One a file; None for a file that is missing or cannot be read.

    Raises:
        ValueError: ``size`` is out of range.
    """
    if not 16 <= size <= 1024:
        raise ValueError(f"a thumbnail of {size} pixels is out of range; use 16 to 1024")

    def make(path: Path) -> Thumbnail | None:
        try:
            return thumbnail(load_image(path), size)
        except ValueError:
            return None

    with ThreadPoolExecutor(num_cores()) as pool, tqdm(total=len(paths), unit="img", desc="thumbnails") as bar:
        made = []
        for one in pool.map(make, paths):
            made.append(one)
            bar.update()
    return made


def _uri(image: Image.Image, lossless: bool) -> str:
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, "WEBP", lossless=True, exact=True, method=4)
    else:
        image.save(buffer, "WEBP", quality=_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
