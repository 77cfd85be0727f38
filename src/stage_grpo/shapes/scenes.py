"""The pictures of the shapes world: a few flat shapes on a quiet grey background, 48 x 48 pixels.

Geometry is chosen for the image tokenizer. Tokens cover 8 x 8 pixels; a shape is centred near a *corner* of
four tokens and reaches at most 8 pixels from it, so it fills exactly a 2 x 2 block of tokens that it shares
with no other shape. One code then says "this quarter of this shape in this colour": 512 codes can tell.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 48
"""Width and height of a picture, in pixels."""
PATCH_SIZE = 8
"""Width and height of what one image token covers, in pixels."""
SHAPES = ("circle", "square", "triangle", "ring", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (40, 75, 225),
    "yellow": (240, 205, 30),
    "purple": (190, 50, 200),
    "cyan": (40, 195, 215),
}
SIZES: dict[str, int] = {"small": 10, "large": 14}
"""Width and height of a shape's bounding box, in pixels."""
BACKGROUNDS = (224, 232)
"""Lowest and highest grey level of a background, both included."""
GRID = tuple(range(PATCH_SIZE, IMAGE_SIZE, PATCH_SIZE))
"""Coordinates (x or y, pixels) near which shapes are centred."""
JITTER = 1
"""Largest distance of a centre from its grid point along either axis, in pixels."""
MIN_GAP = 2
"""Least number of background pixels between the bounding boxes of two shapes."""
MAX_OBJECTS = 4
_SUPERSAMPLING = 4
_MAX_PLACEMENTS = 1000


@dataclass(frozen=True)
class SceneObject:
    """One flat shape.

    Attributes:
        shape: a name of `SHAPES`.
        color: a key of `COLORS`.
        size: a key of `SIZES`.
        x: centre of the bounding box, pixels from the left edge.
        y: centre of the bounding box, pixels from the top edge (y grows downwards).

    Raises:
        ValueError: unknown shape, colour or size, or a bounding box that leaves the picture.
    """

    shape: str
    color: str
    size: str
    x: float
    y: float

    def __post_init__(self) -> None:
        for field, value, known in (
            ("shape", self.shape, SHAPES),
            ("color", self.color, tuple(COLORS)),
            ("size", self.size, tuple(SIZES)),
        ):
            if value not in known:
                raise ValueError(f"SceneObject.{field}={value!r} is unknown: use one of {', '.join(known)}")
        if not all(0 <= edge <= IMAGE_SIZE for edge in bounding_box(self)):
            raise ValueError(
                f"SceneObject at ({self.x}, {self.y}) of size {self.size!r} leaves the {IMAGE_SIZE} x "
                f"{IMAGE_SIZE} picture: move its centre inwards"
            )


@dataclass(frozen=True)
class Scene:
    """What a picture shows: its objects, drawn in order, and the grey level of its background in [0, 255]."""

    objects: tuple[SceneObject, ...]
    background: int = 228

    def __post_init__(self) -> None:
        if not 0 <= self.background <= 255:
            raise ValueError(f"Scene.background={self.background} is no grey level: use 0 to 255")


def bounding_box(obj: SceneObject) -> tuple[float, float, float, float]:
    """Corners ``(x1, y1, x2, y2)`` of the box that the shape fills, in pixels."""
    half = SIZES[obj.size] / 2
    return obj.x - half, obj.y - half, obj.x + half, obj.y + half


def gap(a: SceneObject, b: SceneObject) -> float:
    """Pixels between the bounding boxes of two objects along their best axis; negative where they overlap."""
    ax1, ay1, ax2, ay2 = bounding_box(a)
    bx1, by1, bx2, by2 = bounding_box(b)
    return max(bx1 - ax2, ax1 - bx2, by1 - ay2, ay1 - by2)


def sample_centers(rng: np.random.Generator, sizes: list[str]) -> list[tuple[float, float]]:
    """Random centres for shapes of the given sizes: on the grid, jittered, never sharing a token or touching.

    Args:
        rng: the only source of randomness.
        sizes: one key of `SIZES` per shape, at most `MAX_OBJECTS` of them.

    Returns:
        One ``(x, y)`` per shape, in pixels.

    Raises:
        ValueError: more than `MAX_OBJECTS` shapes.
    """
    if len(sizes) > MAX_OBJECTS:
        raise ValueError(f"{len(sizes)} objects do not fit into a picture: ask for at most {MAX_OBJECTS}")
    for _ in range(_MAX_PLACEMENTS):
        cells = rng.integers(0, len(GRID), (len(sizes), 2))
        jitter = rng.integers(-JITTER, JITTER + 1, (len(sizes), 2))
        centers = [(float(GRID[i] + dx), float(GRID[j] + dy)) for (i, j), (dx, dy) in zip(cells, jitter)]
        if _apart(cells, centers, sizes):
            return centers
    raise RuntimeError("no free placement found: the grid is too small for these sizes")  # pragma: no cover


def _apart(cells: np.ndarray, centers: list[tuple[float, float]], sizes: list[str]) -> bool:
    """Whether no two shapes share a token (grid points at least 2 apart) and all keep `MIN_GAP`."""
    for i in range(len(sizes)):
        for j in range(i):
            reach = (SIZES[sizes[i]] + SIZES[sizes[j]]) / 2 + MIN_GAP
            offset = max(abs(centers[i][0] - centers[j][0]), abs(centers[i][1] - centers[j][1]))
            if np.abs(cells[i] - cells[j]).max() < 2 or offset < reach:
                return False
    return True


def render(scene: Scene) -> Image.Image:
    """Draw a scene.

    Returns:
        An RGB picture of 48 x 48 pixels, values in [0, 255], antialiased; equal scenes give equal pixels.
    """
    scale = _SUPERSAMPLING
    background = (scene.background, scene.background, scene.background)
    canvas = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), background)
    draw = ImageDraw.Draw(canvas)
    for obj in scene.objects:
        _draw(draw, obj, background)
    return canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def _draw(draw: ImageDraw.ImageDraw, obj: SceneObject, background: tuple[int, int, int]) -> None:
    """Draw one shape on the supersampled canvas. PIL's corners are inclusive, hence the -1."""
    x1, y1, x2, y2 = (edge * _SUPERSAMPLING for edge in bounding_box(obj))
    x2, y2, color = x2 - 1, y2 - 1, COLORS[obj.color]
    width = x2 - x1
    if obj.shape == "circle":
        draw.ellipse((x1, y1, x2, y2), fill=color)
    elif obj.shape == "square":
        draw.rectangle((x1, y1, x2, y2), fill=color)
    elif obj.shape == "triangle":
        draw.polygon([((x1 + x2) / 2, y1), (x2, y2), (x1, y2)], fill=color)
    elif obj.shape == "ring":
        rim = round(0.26 * width)
        draw.ellipse((x1, y1, x2, y2), fill=color)
        draw.ellipse((x1 + rim, y1 + rim, x2 - rim, y2 - rim), fill=background)
    else:
        arm = round(0.34 * width)
        draw.rectangle((x1 + arm, y1, x2 - arm, y2), fill=color)
        draw.rectangle((x1, y1 + arm, x2, y2 - arm), fill=color)
