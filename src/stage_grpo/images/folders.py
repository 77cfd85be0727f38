"""Generated images on disk, in the layout that GenEval's own tools read and write.

::

    images/
      00000/                 one folder a prompt, numbered without gaps
        metadata.jsonl       one JSON object: {"prompt", "tag", "include", ...}
        samples/00000.png    the images of the prompt
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from stage_grpo.images.problems import Problems
from stage_grpo.images.set_files import read_description
from stage_grpo.types import Metadata

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class PromptFolder:
    """The images of one prompt.

    Attributes:
        name: The folder's name, e.g. "00012".
        metadata: What the prompt asks for; holds "prompt" and whatever the benchmark needs ("tag").
        images: Paths of the images, in the order of their names, numbers in them as numbers.
    """

    name: str
    metadata: Metadata
    images: tuple[Path, ...]


def read_prompt_folders(images_dir: Path) -> list[PromptFolder]:
    """Read a set of generated images, refusing anything incomplete.

    Every image is decoded once, so that a torn file shows here and not after an hour of scoring.

    Args:
        images_dir: The folder of the whole set.

    Returns:
        The prompts in order of their number.

    Raises:
        ValueError: The folder is missing or empty, or holds missing or unreadable metadata, unreadable or torn
            images, prompts with fewer images than the others, or gaps in the numbering. The message lists the first
            few problems of every kind.
    """
    images_dir = Path(images_dir)
    if not images_dir.is_dir():
        raise ValueError(f"{images_dir} is not a folder; generate images first, or correct the path.")
    paths = sorted((p for p in images_dir.iterdir() if p.is_dir() and p.name.isdecimal()), key=natural_order)
    if not paths:
        raise ValueError(
            f"{images_dir} holds no prompt folders; expected {images_dir / '00000'} with metadata.jsonl and"
            " samples/00000.png, and so on."
        )
    problems = Problems()
    _check_gaps(paths, problems)
    folders = []
    for path in paths:
        metadata = read_description(path, None, problems)
        images = _readable_images(path / "samples", problems)
        if metadata is not None and images:
            folders.append(PromptFolder(path.name, metadata, images))
    _check_evenness(folders, problems)
    if len(problems):
        listed = "\n".join(f"  {problem}" for problem in problems.lines())
        raise ValueError(f"{images_dir} cannot be evaluated, {len(problems)} problem(s):\n{listed}")
    return folders


def load_image(path: Path) -> Image.Image:
    """Read one image as RGB, upright as its EXIF orientation says; GenEval's own script reads it so too.

    Args:
        path: An image file.

    Returns:
        The decoded image, RGB, uint8.

    Raises:
        ValueError: The file cannot be read or decoded in full.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(f"{path}: {reason}; generate this image again.") from error


def natural_order(path: Path) -> tuple[str, str]:
    """A key to sort names by, with numbers of equal width: no name has more than 255 letters."""
    return re.sub("[0-9]+", lambda digits: digits[0].zfill(255), path.name), path.name


def _check_gaps(paths: list[Path], problems: Problems) -> None:
    numbers = {int(path.name) for path in paths}
    for number in sorted(set(range(max(numbers) + 1)) - numbers):
        problems.add("gap", f"{paths[0].parent / f'{number:05d}'}: missing; generate the prompts again")


def _readable_images(samples: Path, problems: Problems) -> tuple[Path, ...]:
    """Paths of the images that decode; notes those that do not."""
    paths = sorted((p for p in samples.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES), key=natural_order)
    if not paths:
        problems.add("no image", f"{samples}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
    readable = []
    for path in paths:
        try:
            load_image(path)
            readable.append(path)
        except ValueError as error:
            problems.add("unreadable", str(error))
    return tuple(readable)


def _check_evenness(folders: list[PromptFolder], problems: Problems) -> None:
    """Note prompts with another number of images than most: the sign of an interrupted generation."""
    usual = Counter(len(folder.images) for folder in folders).most_common(1)
    for folder in folders:
        count = len(folder.images)
        if count != usual[0][0]:
            place = folder.images[0].parent
            problems.add("uneven", f"{place}: {count} images where most prompts have {usual[0][0]}")
