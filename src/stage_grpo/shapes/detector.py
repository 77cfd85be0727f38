"""Finds the shapes of the embedded world in pictures, drawn or generated, with no learned weights.

Foreground is what differs from the quiet background; each connected piece of it is compared, as soft coverage,
with templates of every shape at every plausible size and place. A piece becomes an object only if one template
overlaps it well *and* better than those of the other shapes, and if it has one colour. So blurred or slightly
ragged shapes pass, smudges, half-drawn and two-coloured ones do not: a policy trained on this detector cannot
earn more by drawing less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float, Int
from PIL import Image
from scipy import ndimage

from stage_grpo.shapes.scenes import BACKGROUNDS, COLORS, IMAGE_SIZE, SHAPES, SIZES
from stage_grpo.types import Box

UNKNOWN_COLOR = "unknown"
"""Colour name of an object that is near none of the world's colours."""
MIN_OVERLAP = 0.85
"""Least soft intersection over union with the best template: the confidence of an object."""
MIN_MARGIN = 0.04
"""Least lead of the best template over the best one of any other shape."""
MIN_QUARTER_OVERLAP = 0.7
"""Least overlap in the worst quarter: a shape that lacks a corner overlaps well on the whole."""
MIN_PURITY = 0.85
"""Least share of a piece's pixels that mix the background with the piece's own colour alone."""
MAX_COLOR_DISTANCE = 75.0
"""Farthest an object's RGB colour may lie from the world's colour that it is named after."""

_FOREGROUND = 85.0
"""A pixel is foreground if a channel differs this much from the background: half of the palest colour's way."""
_MAX_RESIDUAL = 60.0
"""A pixel this far in RGB from every mix of background and piece colour is of another colour."""
_BACKGROUND_DRIFT = 25
_WINDOW = 22
_CENTER_STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)
_SIZE_RANGE = range(min(SIZES.values()) - 1, max(SIZES.values()) + 2)
_MIN_EXTENT, _MAX_EXTENT = _SIZE_RANGE.start - 1, _SIZE_RANGE.stop
_SUPERSAMPLING = 8
_STEEPNESS = 3.0
"""Slope of the contrast curve on coverage, for pictures and templates alike."""


@dataclass(frozen=True)
class Detections:
    """What one picture shows.

    Attributes:
        objects: boxes of each shape in pixels of the 48 x 48 picture, sorted by falling confidence; a shape that
            is not there has no key.
        box_colors: a colour of the world, or `UNKNOWN_COLOR`, for each (shape, box).
    """

    objects: dict[str, list[Box]]
    box_colors: dict[tuple[str, Box], str]

    def colors(self, name: str, boxes: list[Box]) -> list[str]:
        """Names the colour of each given box of a shape: the ``colors`` argument of ``rewards.geneval.judge``.

        Raises:
            KeyError: a box that is not among the shape's own.
        """
        return [self.box_colors[name, box] for box in boxes]


class ShapesDetector:
    """Detects circles, squares, triangles, rings and crosses."""

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        """Finds the objects of each picture.

        Args:
            images: B pictures of any mode and size; other sizes than 48 x 48 are scaled to it first.

        Returns:
            B detections. Never raises on a picture, whatever it shows.
        """
        return [_detect_one(_as_pixels(image)) for image in images]


def _as_pixels(image: Image.Image) -> Float[np.ndarray, "48 48 3"]:
    """RGB values in [0, 255] at the world's size."""
    image = image.convert("RGB")
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32)


def _detect_one(pixels: Float[np.ndarray, "H W 3"]) -> Detections:
    # Clipped, so that a picture that is mostly one flat colour is one big piece of it and no background.
    low, high = BACKGROUNDS[0] - _BACKGROUND_DRIFT, min(BACKGROUNDS[1] + _BACKGROUND_DRIFT, 255)
    background = np.clip(np.median(pixels.reshape(-1, 3), axis=0), low, high)
    foreground = np.abs(pixels - background).max(axis=-1) > _FOREGROUND
    pieces, _ = ndimage.label(foreground)  # pyright: ignore[reportGeneralTypeIssues]
    found: list[tuple[str, Box, str]] = []
    for index, (rows, columns) in enumerate(ndimage.find_objects(pieces), start=1):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if min(height, width) >= _MIN_EXTENT and max(height, width) <= _MAX_EXTENT:
            found += _identify(pixels - background, pieces, index, (rows, columns), background)
    found.sort(key=lambda item: -item[1].confidence)
    objects: dict[str, list[Box]] = {}
    for shape, box, _ in found:
        objects.setdefault(shape, []).append(box)
    return Detections(objects, {(shape, box): color for shape, box, color in found})


def _identify(
    offset: Float[np.ndarray, "H W 3"],
    pieces: Int[np.ndarray, "H W"],
    index: int,
    place: tuple[slice, slice],
    background: Float[np.ndarray, " 3"],
) -> list[tuple[str, Box, str]]:
    """Shape, box and colour of one piece of foreground; nothing where it is not clearly one of the shapes."""
    rows, columns = place
    inside = pieces[place] == index
    values = offset[place][inside]
    color = _core_color(values)
    if np.abs(color).max() < _FOREGROUND:  # a medley, whose median is no colour at all
        return []
    coverage = values @ color / (color @ color)
    residual = np.linalg.norm(values - coverage[:, None] * color, axis=1)
    if (residual < _MAX_RESIDUAL).mean() < MIN_PURITY:
        return []
    top = (rows.start + rows.stop - _WINDOW) // 2
    left = (columns.start + columns.stop - _WINDOW) // 2
    patch = _own_coverage(offset, pieces, index, color, top, left)
    shape, overlap = _match(patch)
    if shape is None:
        return []
    box = Box(float(columns.start), float(rows.start), float(columns.stop), float(rows.stop), overlap)
    return [(shape, box, _color_name(color + background))]


def _core_color(values: Float[np.ndarray, "K 3"]) -> Float[np.ndarray, " 3"]:
    """The piece's colour as an offset from the background: median of its more strongly coloured half."""
    strength = np.abs(values).max(axis=1)
    return np.median(values[strength >= np.median(strength)], axis=0)


def _color_name(rgb: Float[np.ndarray, " 3"]) -> str:
    distances = np.linalg.norm(rgb - np.array(list(COLORS.values())), axis=1)
    nearest = int(distances.argmin())
    return list(COLORS)[nearest] if distances[nearest] <= MAX_COLOR_DISTANCE else UNKNOWN_COLOR


def _own_coverage(
    offset: Float[np.ndarray, "H W 3"],
    pieces: Int[np.ndarray, "H W"],
    index: int,
    color: Float[np.ndarray, " 3"],
    top: int,
    left: int,
) -> Float[np.ndarray, "22 22"]:
    """How much of each pixel of a window the piece covers, in [0, 1]; other pieces count as background."""
    rows = slice(max(top, 0), min(top + _WINDOW, IMAGE_SIZE))
    columns = slice(max(left, 0), min(left + _WINDOW, IMAGE_SIZE))
    coverage = np.clip(offset[rows, columns] @ color / (color @ color), 0.0, 1.0)
    labels = pieces[rows, columns]
    # Half-covered pixels at the rim are no foreground; they belong to the piece that they touch.
    near = ndimage.maximum_filter((labels == index).astype(np.uint8), size=3) > 0
    coverage[np.logical_not(near) | ((labels != index) & (labels != 0))] = 0.0
    patch = np.zeros((_WINDOW, _WINDOW), dtype=np.float32)
    patch[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = coverage
    return patch


def _match(patch: Float[np.ndarray, "22 22"]) -> tuple[str | None, float]:
    """The shape a window clearly shows, or None, and its overlap with that shape's best template."""
    templates, areas = _templates()
    flat = _sharpen(patch.reshape(-1))
    area = flat.sum()
    # No overlap exceeds the ratio of the areas, and those below this can be neither the best nor its rival.
    near = np.minimum(areas, area) >= (MIN_OVERLAP - MIN_MARGIN) * np.maximum(areas, area)
    overlaps = np.zeros(len(templates), dtype=np.float32)
    shared = np.minimum(templates[near], flat).sum(axis=1)
    overlaps[near] = shared / (areas[near] + area - shared)
    by_shape = overlaps.reshape(len(SHAPES), -1).max(axis=1)
    runner_up, best = np.sort(by_shape)[-2:]
    template = templates[int(overlaps.argmax())]
    clear = best >= MIN_OVERLAP and best - runner_up >= MIN_MARGIN
    if not clear or _quarter_overlaps(flat, template).min() < MIN_QUARTER_OVERLAP:
        return None, float(best)
    return SHAPES[int(by_shape.argmax())], float(best)


def _quarter_overlaps(
    coverage: Float[np.ndarray, " 484"], template: Float[np.ndarray, " 484"]
) -> Float[np.ndarray, "2 2"]:
    """Soft intersection over union in each quarter of the window, whose middle is the piece's."""
    half = _WINDOW // 2
    shared = np.minimum(coverage, template).reshape(2, half, 2, half).sum(axis=(1, 3))
    joined = np.maximum(coverage, template).reshape(2, half, 2, half).sum(axis=(1, 3))
    return shared / np.maximum(joined, 1.0)


def _sharpen(coverage: np.ndarray) -> np.ndarray:
    """Steepens coverage around one half, so that blur costs little overlap; the outline stays where it was."""
    return np.clip((coverage - 0.5) * _STEEPNESS + 0.5, 0.0, 1.0)


@cache
def _templates() -> tuple[Float[np.ndarray, "K 484"], Float[np.ndarray, " K"]]:
    """Coverage of a window by every shape at every size and place, shape by shape, and their areas."""
    middle = _WINDOW / 2
    drawn = [
        _draw(shape, middle + dx, middle + dy, size)
        for shape in SHAPES
        for size in _SIZE_RANGE
        for dy in _CENTER_STEPS
        for dx in _CENTER_STEPS
    ]
    templates = _sharpen(np.stack(drawn).astype(np.float32))
    return templates, templates.sum(axis=1)


def _draw(shape: str, x: float, y: float, size: int) -> Float[np.ndarray, " 484"]:
    """Coverage of each pixel of a window by a shape of a given centre and size, by supersampling."""
    steps = (np.arange(_WINDOW * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING
    u, v = (steps[None, :] - x) / size, (steps[:, None] - y) / size
    inside = (np.abs(u) <= 0.5) & (np.abs(v) <= 0.5) & _shape_test(shape, u, v)
    cells = inside.reshape(_WINDOW, _SUPERSAMPLING, _WINDOW, _SUPERSAMPLING)
    return cells.mean(axis=(1, 3)).reshape(-1)


def _shape_test(shape: str, u: Float[np.ndarray, "1 S"], v: Float[np.ndarray, "S 1"]) -> np.ndarray:
    """Whether points lie in a shape; u and v run from -0.5 to 0.5 over its bounding box."""
    radius = np.hypot(u, v)
    tests = {
        "circle": radius <= 0.5,
        "square": radius >= 0.0,
        "triangle": np.abs(u) <= (v + 0.5) / 2,
        "ring": (radius <= 0.5) & (radius >= 0.24),
        "cross": (np.abs(u) <= 0.16) | (np.abs(v) <= 0.16),
    }
    return tests[shape]
